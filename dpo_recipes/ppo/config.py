"""PPO's settings: GRPOConfig's, and those of the critic, the advantages and the reward."""

from dataclasses import dataclass

from transformers.hf_argparser import HfArg
from trl import GRPOConfig

_FIXED = dict(
    importance_sampling_level="token",
    scale_rewards="none",
    multi_objective_aggregation="sum_then_normalize",
    off_policy_mask_threshold=None,
)
"""GRPO's settings of advantages per answer. PPO has advantages per token and would ignore any other value."""


@dataclass
class PPOConfig(GRPOConfig):
    """GRPOConfig's fields with PPO's defaults, and the fields of the critic, the advantages and the reward.

    A rollout is `generation_batch_size` answers, trained on in `num_iterations` epochs. `epsilon` clips the ratio of
    new to old probabilities. `beta` weighs the KL penalty, which is part of the reward and not of the loss. An
    optimizer step never spans two rollouts.

    Raises:
        ValueError: If a setting of GRPO is given that PPO would ignore, or a number is out of its range.
    """

    num_generations: int | None = HfArg(default=1, help="Answers to a prompt; PPO needs only one.")
    num_iterations: int = HfArg(default=4, help="Epochs over the answers of a rollout.")
    beta: float = HfArg(default=0.05, help="KL coefficient: each token's reward is -beta log-ratio.")
    loss_type: str = HfArg(default="bnpo", help="bnpo is the mean over tokens; grpo over answers.")
    scale_rewards: str = HfArg(default="none", help="Not used: see whiten_advantages.")
    disable_dropout: bool = HfArg(default=True, help="The ratio of old and new must be 1 at first.")
    gamma: float = HfArg(default=1.0, help="Discount of GAE, per token.")
    lam: float = HfArg(default=0.95, help="Lambda of GAE: 1 trusts the rewards, 0 the critic.")
    vf_coef: float = HfArg(default=0.1, help="Weight of the value loss.")
    cliprange_value: float = HfArg(default=0.2, help="How far a value may move from the rollout's.")
    whiten_advantages: bool = HfArg(default=True, help="Mean 0 and deviation 1 over a rollout's tokens.")
    missing_eos_penalty: float | None = HfArg(default=None, help="Taken from the score without an EOS.")
    reward_aggregation: str = HfArg(
        default="sum", metadata={"choices": ["sum", "min"]}, help="sum of the weighted rewards, or min of an ensemble."
    )
    target_kl: float | None = HfArg(
        default=None, help="Nats a token. A rollout's epochs end where the policy has moved 1.5 times as far."
    )
    critic_learning_rate: float | None = HfArg(default=None, help="By default the policy's.")
    critic_warmup_steps: int = HfArg(default=0, help="Optimizer steps at first that train it alone.")

    def __post_init__(self) -> None:
        """Check the settings."""
        self._check_grpo_settings()
        for name, value in _FIXED.items():
            if getattr(self, name) != value:
                raise ValueError(f"PPO has no use for {name}={getattr(self, name)!r}. Leave it at {value!r}.")
        if self.loss_type not in ("bnpo", "grpo", "dr_grpo", "dapo"):
            raise ValueError(f"loss_type={self.loss_type!r} is no clipped surrogate: use 'bnpo', the mean over tokens.")
        if not (0 <= self.gamma <= 1 and 0 <= self.lam <= 1):
            raise ValueError(f"gamma={self.gamma} and lam={self.lam} must lie in [0, 1].")
        if self.reward_aggregation not in ("sum", "min"):
            raise ValueError(f"reward_aggregation={self.reward_aggregation!r} is neither 'sum' nor 'min'.")
        if self.target_kl is not None and (self.fp16 or self.deepspeed_plugin is not None):
            raise ValueError("target_kl skips updates, which neither fp16's loss scale nor DeepSpeed allows.")

    def _check_grpo_settings(self) -> None:
        """Run GRPOConfig's own checks, which refuse one answer to a prompt: with one they are run for two."""
        answers, self.num_generations_eval = self.num_generations or 1, getattr(self, "num_generations_eval", None) or 1
        self.num_generations = max(2, answers)
        try:
            super().__post_init__()
        except ValueError as error:
            if answers == 1 and "by num_generations (2)" in str(error):
                raise ValueError(f"generation_batch_size={self.generation_batch_size} is odd: make it even.") from error
            raise
        self.num_generations = answers
