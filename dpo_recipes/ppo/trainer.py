"""PPO (Schulman et al. 2017; Ouyang et al. 2022) on today's TRL, which removed its own: a subclass of GRPOTrainer.

TRL samples the answers, scores them, keeps the reference model, buffers a rollout for several epochs, computes the
clipped surrogate, logs and saves. What is PPO's own stands here:

1. A critic, a sequence classifier with one label, is a submodule of the policy, so that DDP, FSDP, the optimizer and
   checkpoints see it. Its value of a token is that of the state before the token.
2. The reward of a token is -beta times its log-ratio to the reference; the last token of an answer gets the score too.
3. Advantages and returns are generalised advantage estimates, per token; GRPO's own, per answer, are discarded.
4. The loss is GRPO's clipped surrogate on them, and vf_coef times the clipped value loss.

docs/ppo.md explains the metrics and what was measured.
"""

import copy
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from peft import PeftConfig, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.callbacks import SyncRefModelCallback
from trl.trainer.utils import disable_dropout_in_model, get_config_model_id

from dpo_recipes.ppo.checks import RolloutCheck, check_online
from dpo_recipes.ppo.critic import CRITIC, CRITIC_FILE, attach_critic, load_critic, without_critic

logger = logging.getLogger(__name__)

_FIXED = dict(
    importance_sampling_level="token",
    scale_rewards="none",
    multi_objective_aggregation="sum_then_normalize",
    off_policy_mask_threshold=None,
)
"""GRPO's settings of advantages that are per answer, which PPO replaces: another value would be ignored."""


@dataclass
class PPOConfig(GRPOConfig):
    """GRPOConfig's fields, with PPO's defaults, and those of the critic, of GAE and of the reward.

    A rollout is `generation_batch_size` answers, trained on in `num_iterations` epochs; `epsilon` clips the ratio;
    `beta` weighs the KL penalty, which is part of the reward here and not of the loss. An optimizer step never spans
    two rollouts.

    Raises:
        ValueError: If a setting of GRPO is given that PPO would ignore, or a number is out of its range.
    """

    num_generations: int | None = field(default=1, metadata={"help": "Answers to a prompt; PPO needs only one."})
    num_iterations: int = field(default=4, metadata={"help": "Epochs over the answers of a rollout."})
    beta: float = field(default=0.05, metadata={"help": "KL coefficient: each token's reward is -beta log-ratio."})
    loss_type: str = field(default="bnpo", metadata={"help": "bnpo is the mean over tokens; grpo over answers."})
    scale_rewards: str = field(default="none", metadata={"help": "Not used: see whiten_advantages."})
    disable_dropout: bool = field(default=True, metadata={"help": "The ratio of old and new must be 1 at first."})
    gamma: float = field(default=1.0, metadata={"help": "Discount of GAE, per token."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of GAE: 1 trusts the rewards, 0 the critic."})
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss."})
    cliprange_value: float = field(default=0.2, metadata={"help": "How far a value may move from the rollout's."})
    whiten_advantages: bool = field(default=True, metadata={"help": "Mean 0 and deviation 1 over a rollout's tokens."})
    missing_eos_penalty: float | None = field(default=None, metadata={"help": "Taken from the score without an EOS."})
    reward_aggregation: str = field(
        default="sum",
        metadata={"help": "sum of the weighted rewards, or the min of an ensemble.", "choices": ["sum", "min"]},
    )
    target_kl: float | None = field(
        default=None,
        metadata={"help": "Nats a token. A rollout's epochs end where the policy has moved 1.5 times as far."},
    )
    critic_learning_rate: float | None = field(default=None, metadata={"help": "By default the policy's."})
    critic_warmup_steps: int = field(default=0, metadata={"help": "Optimizer steps at first that train it alone."})

    def __post_init__(self) -> None:
        """Check the settings."""
        answers, self.num_generations_eval = self.num_generations or 1, getattr(self, "num_generations_eval", None) or 1
        self.num_generations = max(2, answers)  # GRPO refuses 1
        try:
            super().__post_init__()
        except ValueError as error:
            if answers == 1 and "by num_generations (2)" in str(error):
                raise ValueError(f"generation_batch_size={self.generation_batch_size} is odd: make it even.") from error
            raise
        self.num_generations = answers
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


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and returns (Schulman et al. 2016, eq. 16), 0 where the mask is.

    Masked tokens are no steps: the state after an answer's last token has the value 0.

    Args:
        rewards: Per-token reward, KL penalty included. Shape (batch, tokens).
        values: Value of the state before each token. Shape (batch, tokens).
        mask: 1 on completion tokens, 0 on padding. Shape (batch, tokens).
        gamma: Discount.
        lam: Decay of the weights of later temporal differences.

    Raises:
        ValueError: If the three shapes differ.
    """
    if not rewards.shape == values.shape == mask.shape:
        raise ValueError(f"Shapes differ: {[*rewards.shape]}, {[*values.shape]}, {[*mask.shape]}.")
    advantages = torch.zeros_like(rewards)
    advantage = next_value = rewards.new_zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        here = mask[:, t] > 0
        difference = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(here, difference + gamma * lam * advantage, advantage)
        next_value = torch.where(here, values[:, t], next_value)
        advantages[:, t] = advantage
    return advantages * mask, (advantages + values) * mask


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float) -> Tensor:
    """0.5 times the mean over tokens of the larger squared error, clipped or not (the value loss of PPO's authors).

    Args:
        values: Those of the critic now. Shape (batch, tokens).
        old_values: Those of the rollout. Shape (batch, tokens).
        returns: What they should be. Shape (batch, tokens).
        mask: 1 on completion tokens. Shape (batch, tokens).
        clip: How far a value counts as moved from the old one.
    """
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    error = torch.maximum((values - returns).square(), (clipped - returns).square())
    return 0.5 * (error * mask).sum() / mask.sum().clamp(min=1)


def without_padding(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch of a rollout without the last columns, where all of its answers have ended.

    The prompts keep their padding on the left, which moves the positions of models that count it (GPT-2).

    Args:
        batch: As GRPOTrainer buffers it: completions and what is theirs padded on the right.
    """
    width = batch["completion_mask"].shape[1]
    used = max(1, int(batch["completion_mask"].sum(dim=1).max()))  # with answers that all count for nothing: one
    theirs = [name for name, part in batch.items() if torch.is_tensor(part) and part.dim() == 2]
    theirs = [name for name in theirs if batch[name].shape[1] == width and not name.startswith("prompt_")]
    return batch | {name: batch[name][:, :used] for name in theirs}


class PPOTrainer(GRPOTrainer):
    """TRL's GRPOTrainer with PPO's advantages and a critic; the arguments are its own, less tools and environments.

    Args:
        model: The policy: a folder or Hub name, a causal language model, or a PeftModel of one.
        reward_funcs: Functions, reward models, folders or Hub names of reward models; one or a list. GRPOTrainer can do
            without where an environment scores, which PPO has no use for.
        args: Settings; by default those of PPOConfig, in a folder named after the model, as TRL has it.
        critic: What the critic starts from: a model or a name, of a reward model say, with the policy's vocabulary. By
            default what the policy started from, with the value 0 for every state. It is trained as the policy is: with
            LoRA where that is, else in full. A reward model of this trainer is copied first.
        quantization_config: Of the policy, and of the critic where it is given by name.
        peft_config: Of the policy, and of the critic.
        kwargs: GRPOTrainer's datasets, processing classes and callbacks. An optimizer is made here: it has the critic's
            weights, too.

    Raises:
        ValueError: If the critic cannot read the policy's tokens or gives no single value, a rollout is no whole number
            of optimizer steps, or an argument is given that PPO has no use for.
        RecipeError: If a prompt leaves no room for an answer, or a reward model cannot score one (`check_online`); in
            training, if a score is no number.
    """

    beta: float
    _tag_names = ["trl", "ppo"]  # noqa: RUF012 (as TRL declares them)
    _name = "PPO"
    _paper = {  # noqa: RUF012
        "title": "Training language models to follow instructions with human feedback",
        "id": "2203.02155",
        "citation": "@inproceedings{ouyang2022training, author = {Long Ouyang and others}, booktitle = {NeurIPS}, "
        "title = {Training language models to follow instructions with human feedback}, year = 2022}",
    }

    def __init__(
        self,
        model: Any,
        reward_funcs: Any,
        args: PPOConfig | None = None,
        *,
        critic: str | PreTrainedModel | None = None,
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ) -> None:
        if refused := [key for key in ("tools", "rollout_func", "environment_factory") if kwargs.get(key)]:
            raise ValueError(f"PPO trains on answers to prompts: it has no use for {', '.join(refused)}.")
        if kwargs.get("optimizers", (None, None))[0] is not None:
            raise ValueError(
                "An optimizer made beforehand lacks the critic's weights. Choose one by PPOConfig's optim."
            )
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = PPOConfig(f"{name.split('/')[-1]}-PPO")
        own = dict(quantization_config=quantization_config, peft_config=peft_config)
        super().__init__(model, reward_funcs, args=args, **own, **kwargs)
        if self._is_vlm:
            raise ValueError("The critic reads text alone, and this is a model of images. Use TRL's GRPOTrainer.")
        batches = args.steps_per_generation * args.num_iterations
        self.updates_per_rollout, rest = divmod(batches, args.gradient_accumulation_steps)
        if rest:
            raise ValueError(
                f"{args.num_iterations} epochs over {args.generation_batch_size} answers are {batches} batches, which "
                f"make no whole number of updates of {args.gradient_accumulation_steps}: change generation_batch_size."
            )
        check_online(self)
        if critic is None or isinstance(critic, str):
            critic = load_critic(self, critic, quantization_config)
        self._add_critic(copy.deepcopy(critic) if critic in self.reward_funcs else critic, peft_config)
        self._moved: list[Tensor] = []  # nats a token from the rollout's policy, of each batch of this update
        self._stopped = False  # for the rest of the rollout
        self._check_rollout = RolloutCheck(self)
        self.add_callback(RolloutBoundaries(self))
        if args.sync_ref_model:
            self.remove_callback(SyncRefModelCallback)
            self.add_callback(SyncPolicyAlone(self))

    # The critic

    def _add_critic(self, critic: Any, peft_config: PeftConfig | None) -> None:
        """Prepare the critic as TRL prepared the policy, and attach it."""
        policy, config = self.model, critic.config
        if not hasattr(critic, "score") or config.num_labels != 1:
            raise ValueError(f"The critic is a {type(critic).__name__}, not a sequence classifier with one label.")
        rows, largest = config.get_text_config().vocab_size, max(self._tokenizer.get_vocab().values())
        if rows <= largest:
            raise ValueError(
                f"The critic has {rows:,} words and reads the policy's tokens, up to {largest:,}. Let it start from a "
                "model with the same tokenizer, or leave critic out."
            )
        critic.config.get_text_config().pad_token_id = self._tokenizer.pad_token_id
        if self.args.disable_dropout:
            disable_dropout_in_model(critic)
        if is_peft_model(policy):
            lora = copy.deepcopy(peft_config or policy.peft_config["default"])
            lora.task_type, lora.modules_to_save, lora.inference_mode = TaskType.SEQ_CLS, ["score"], False
            lora.base_model_name_or_path = None
            critic = get_peft_model(critic, lora)
            if self.args.activation_checkpointing:  # the Trainer enables it in what a PeftModel wraps
                critic.get_base_model().activation_checkpointing_enable(self.args.activation_checkpointing_kwargs)
                critic.get_base_model().enable_input_require_grads()
        attach_critic(policy, critic.to(policy.device))
        if self.use_vllm:  # the engine has no place for the critic's weights
            named = self.vllm_generation._iter_named_params
            self.vllm_generation._iter_named_params = lambda: (each for each in named() if CRITIC not in each[0])

    def create_optimizer(self, model: Any = None) -> Any:
        """TRL's optimizer, the critic's weights in groups of their own."""
        made, rate = self.optimizer is not None, self.args.critic_learning_rate
        optimizer = super().create_optimizer(model)
        if made:
            return optimizer
        critics = {id(weight) for name, weight in (model or self.model).named_parameters() if CRITIC in name}
        for group in [*optimizer.param_groups]:
            if own := [weight for weight in group["params"] if id(weight) in critics]:
                group["params"] = [weight for weight in group["params"] if id(weight) not in critics]
                optimizer.add_param_group({**group, "params": own, "lr": group["lr"] if rate is None else rate})
        return optimizer

    @contextmanager
    def without_critic(self) -> Iterator[Any]:
        """The critic, which the policy is without while the block lasts."""
        with without_critic(self.accelerator.unwrap_model(self.model)) as critic:
            yield critic

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """The policy as TRL saves it, and what of the critic is trained in a file beside it."""
        weights = self.model.state_dict() if state_dict is None else state_dict
        with self.without_critic() as critic:
            super()._save(output_dir, {name: weight for name, weight in weights.items() if CRITIC not in name})
            trained = [name for name, weight in critic.named_parameters() if weight.requires_grad]
        if self.args.should_save:
            own = {name.partition(f"{CRITIC}.")[2]: weight for name, weight in weights.items() if CRITIC in name}
            kept = {name: own[name].detach().contiguous().cpu() for name in trained}
            save_file(kept, Path(output_dir or self.args.output_dir) / CRITIC_FILE, metadata={"format": "pt"})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled:  # whose checkpoints hold the policy's submodules
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        with self.without_critic() as critic:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        if unknown := critic.load_state_dict(load_file(Path(resume_from_checkpoint) / CRITIC_FILE), False)[1]:
            raise ValueError(f"{resume_from_checkpoint} holds another critic, with {unknown[0]}.")

    def _load_best_model(self) -> None:
        with self.without_critic():  # stays as it is: nothing is learned after this
            super()._load_best_model()

    # The rollout

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        rewards: Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._check_rollout.each_function(rewards)
        weighted = rewards * self.reward_weights.to(rewards.device)  # (answers of all processes, reward functions)
        lowest = self.args.reward_aggregation == "min"
        scores = weighted.masked_fill(weighted.isnan(), torch.inf).amin(dim=1) if lowest else weighted.nansum(dim=1)
        scores[weighted.isnan().all(dim=1)] = torch.nan
        self._scores = scores.split(len(prompts))[self.accelerator.process_index]
        return rewards

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
        mode, args = "train" if self.model.training else "eval", self.args
        ids, mask = batch["completion_ids"], batch["completion_mask"].float()
        kept = ids.shape[1]
        if "old_per_token_logps" not in batch:  # GRPO leaves them out where each answer is trained on but once
            batch["old_per_token_logps"] = self._in_batches(
                batch, lambda each: self._get_per_token_logps_and_entropies(self.model, *each.values(), kept)[0]
            )
        values = self._in_batches(batch, lambda each: self.model(**each, values_only=True))
        values = values[:, -kept - 1 : -1] * mask  # of the state before each token of the completion
        ended = (torch.isin(ids, torch.tensor(self.eos_token_ids, device=ids.device)) & (mask > 0)).any(dim=1)
        scores = self._scores.to(values)
        if args.missing_eos_penalty is not None:
            scores = torch.where(ended, scores, scores - args.missing_eos_penalty)
        self._check_rollout(scores, ended)

        rewards = torch.zeros_like(values)
        if self.beta != 0.0:
            log_ratio = (batch.pop("ref_per_token_logps") - batch["old_per_token_logps"]) * mask
            rewards += self.beta * log_ratio
            self._log_mean("kl", -log_ratio.sum(dim=1), mode)
        last = (mask.sum(dim=1).long() - 1).clamp(min=0)
        rewards[torch.arange(len(last), device=last.device), last] += scores
        advantages, returns = gae(rewards, values, mask, gamma=args.gamma, lam=args.lam)
        moments = self._moments(mask, advantages, returns, returns - values)
        if args.whiten_advantages:
            mean, variance = moments[0]
            advantages = (advantages - mean) * torch.rsqrt(variance + 1e-8) * mask
        self._log_mean("score", scores, mode)
        self._log_mean("value/mean", values.sum(dim=1) / mask.sum(dim=1).clamp(min=1), mode)
        self._metrics[mode]["value/explained_variance"].append((1 - moments[2][1] / moments[1][1]).item())
        return batch | {"advantages": advantages, "old_values": values, "returns": returns}

    @torch.no_grad()
    def _in_batches(self, batch: dict[str, Any], compute: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
        """What is computed of prompts with completions, as many at a time as in training."""
        whole = (torch.cat([batch[f"prompt_{part}"], batch[f"completion_{part}"]], dim=1) for part in ("ids", "mask"))
        parts = zip(*(torch.split(tensor, self.args.per_device_train_batch_size) for tensor in whole), strict=True)
        with self.accelerator.autocast():
            return torch.cat([compute({"input_ids": ids, "attention_mask": mask}) for ids, mask in parts])

    def _moments(self, mask: Tensor, *tensors: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Mean and variance of each over the tokens of all processes."""
        sums = [mask.sum(), *(((each**power) * mask).sum() for each in tensors for power in (1, 2))]
        count, *totals = self.accelerator.reduce(torch.stack(sums).double(), reduction="sum")
        means = [(total / count.clamp(min=1)).to(tensors[0]) for total in totals]
        return [(mean, (square - mean**2).clamp(min=0)) for mean, square in zip(means[::2], means[1::2], strict=True)]

    def _log_mean(self, name: str, values: Tensor, mode: str) -> None:
        self._metrics[mode][name].append(self.accelerator.gather(values.detach().float()).mean().item())

    # The update

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """GRPO's clipped surrogate on per-token advantages, and the value loss of the same forward."""
        inputs, outputs = without_padding(inputs), []

        def policy_and_critic(**tokens: Any) -> Any:  # GRPO only ever calls the model like this
            outputs.append(model(**tokens, return_values=True))
            return outputs[-1]

        beta, self.beta = self.beta, 0.0  # the KL penalty is in the reward
        try:
            loss: Tensor = super()._compute_loss(policy_and_critic, inputs)
        finally:
            self.beta = beta
        mode, args, mask = "train" if self.model.training else "eval", self.args, inputs["completion_mask"].float()
        kept, tokens = mask.shape[1], mask.sum().clamp(min=1)
        values, logps = outputs[0].state_values[:, -kept - 1 : -1], outputs[0].log_probs[:, -kept:]
        value_loss = clipped_value_loss(values, inputs["old_values"], inputs["returns"], mask, args.cliprange_value)
        with torch.no_grad():
            log_ratio = (logps - inputs["old_per_token_logps"]) * mask
            moved = (log_ratio.expm1() - log_ratio).sum() / tokens  # KL(old || new) as in Schulman 2020, k3
            beyond = ((values - inputs["old_values"]).abs() > args.cliprange_value) * mask
            self._log_mean("policy/ratio", (log_ratio.exp() * mask).sum() / tokens, mode)
            self._log_mean("policy/approx_kl", moved, mode)
            self._log_mean("value/loss", value_loss, mode)
            self._log_mean("value/clip_ratio", beyond.sum() / tokens, mode)
        accumulated = 1
        if mode == "train":
            self._moved.append(moved)
            accumulated = self.current_gradient_accumulation_steps  # GRPO scaled its own part
            if self.state.global_step < args.critic_warmup_steps:
                loss = loss * 0.0  # and no gradient at all in `training_step`: DDP waits for every weight
        total: Tensor = loss + value_loss * (args.vf_coef / accumulated)
        return total

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """TRL's, or nothing where the policy has moved too far from the rollout's: no gradient, hence no update."""
        if self._step % self.current_gradient_accumulation_steps == 0:  # an update begins
            if (target := self.args.target_kl) is not None:
                rollout = self.args.steps_per_generation * self.num_iterations
                if self._step % rollout == 0:
                    self._stopped = False
                elif self._moved:
                    moved = self.accelerator.reduce(torch.stack(self._moved).mean(), reduction="mean")
                    self._stopped |= bool(moved > 1.5 * target)
                self._metrics["train"]["policy/stopped"].append(float(self._stopped))
            self._moved.clear()
        if self._stopped:
            self._step += 1
            return torch.zeros((), device=self.accelerator.device)
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if self.state.global_step < self.args.critic_warmup_steps:
            for name, weight in model.named_parameters():
                weight.grad = weight.grad if CRITIC in name else None  # a zero would be decayed and counted by Adam
        return loss


class SyncPolicyAlone(SyncRefModelCallback):
    """TRL's moving-average reference, which pairs the weights of both models off: the critic is no part of it."""

    def __init__(self, trainer: PPOTrainer) -> None:
        super().__init__(ref_model=trainer.ref_model, accelerator=trainer.accelerator)
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the reference."""
        with self.trainer.without_critic():
            super().on_step_end(args, state, control, **kwargs)


class RolloutBoundaries(TrainerCallback):
    """Rounds `save_steps` to whole rollouts: no checkpoint holds one, so only from an end a resumed run is the same."""

    def __init__(self, trainer: PPOTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count batches, too, from where a resumed run goes on."""
        self.trainer._step = state.global_step * args.gradient_accumulation_steps
        rollout = self.trainer.updates_per_rollout
        if args.save_strategy == "steps" and state.save_steps % rollout:
            state.save_steps = math.ceil(state.save_steps / rollout) * rollout
            logger.warning(f"Saving every {state.save_steps} updates: a rollout is {rollout} of them.")
