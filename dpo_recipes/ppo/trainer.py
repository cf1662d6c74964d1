"""PPO (Schulman et al. 2017; Ouyang et al. 2022) on today's TRL, which removed its own: a subclass of GRPOTrainer.

TRL samples the answers, keeps the reference model, buffers a rollout for several epochs, computes the clipped
surrogate, logs and saves. These steps make PPO of it, each in the method named:

1. Rollout (`_generate_and_score_completions`): TRL samples answers and scores them (`_calculate_rewards`); the critic
   gives each token the value of the state before it (`_state_values`).
2. Reward of a token (`math.token_rewards`): -beta times its log-ratio to the reference model; the last token of an
   answer gets the answer's score, too.
3. Generalised advantage estimates and returns (`math.gae`), per token, normalised over the rollout (`_moments`). They
   replace GRPO's advantages per answer.
4. Epochs (`training_step`): `num_iterations` passes over the rollout, ended early where the policy has moved too far.
5. Loss (`_compute_loss`): GRPO's clipped surrogate on these advantages (`_clipped_surrogate`), and vf_coef times the
   clipped value loss (`math.clipped_value_loss`).

The critic (`critic.add_critic`), a sequence classifier with one label, is a submodule of the policy, so that DDP, FSDP,
the optimizer and checkpoints see it. docs/ppo.md explains the metrics and what was measured.
"""

import logging
import math
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin, TrainerCallback
from trl import GRPOTrainer
from trl.trainer.callbacks import SyncRefModelCallback
from trl.trainer.utils import get_config_model_id

from dpo_recipes.ppo.checks import RolloutCheck, check_online
from dpo_recipes.ppo.config import PPOConfig
from dpo_recipes.ppo.critic import CRITIC, CRITIC_FILE, add_critic, without_critic
from dpo_recipes.ppo.math import clipped_value_loss, gae, token_rewards, without_padding
from dpo_recipes.ppo.micro_batches import Shares, divided_logps, divided_loss, parts_of, refuse_whole, take_budget

logger = logging.getLogger(__name__)


class PPOTrainer(GRPOTrainer):
    """TRL's GRPOTrainer with PPO's advantages and a critic. It takes GRPOTrainer's arguments, except tools.

    Args:
        model: The policy: a folder or Hub name, a causal language model, or a PeftModel of one.
        reward_funcs: Functions, reward models, folders or Hub names of reward models; one or a list.
        args: Settings; by default PPOConfig's, in a folder named after the model, as in TRL.
        critic: The critic's initial model: a sequence classifier, or the name of one (for example of a reward model)
            with the policy's vocabulary. By default it is the policy's initial model with the value 0 for every state.
            It is trained as the policy is: with LoRA or in full. A reward model of this trainer is copied first.
        kwargs: GRPOTrainer's datasets, processing classes, callbacks, and two settings that the critic shares:
            `peft_config`, and `quantization_config` where the critic is given by name. An optimizer is refused, as it
            would lack the critic's weights.

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
        **kwargs: Any,
    ) -> None:
        if refused := [key for key in ("tools", "rollout_func", "environment_factory") if kwargs.get(key)]:
            raise ValueError(f"PPO trains on answers to prompts: it has no use for {', '.join(refused)}.")
        if kwargs.get("optimizers", (None, None))[0] is not None:
            raise ValueError("An optimizer made beforehand lacks the critic's weights. Set optim of PPOConfig instead.")
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = PPOConfig(f"{name.split('/')[-1]}-PPO")
        self.tokens_per_step = take_budget(args)
        super().__init__(model, reward_funcs, args=args, **kwargs)
        if isinstance(self.processing_class, ProcessorMixin):
            raise ValueError("The critic reads text alone, and this is a model of images. Use TRL's GRPOTrainer.")
        if self.tokens_per_step:
            refuse_whole(self)
        self.updates_per_rollout = _updates_per_rollout(args)
        check_online(self)
        add_critic(self, critic, **{name: kwargs.get(name) for name in ("quantization_config", "peft_config")})
        self._check_rollout = RolloutCheck(self)
        # What one method leaves for another that TRL calls later:
        self._scores: Tensor  # of this process's answers: from `_calculate_rewards` to the rest of the rollout
        self._moved: list[Tensor] = []  # nats a token, of each batch of an update: from `_compute_loss` to the epochs
        self._stopped = False  # the rest of the rollout is skipped: from one `training_step` to the next
        self.add_callback(RolloutBoundaries(self))
        if args.sync_ref_model:
            self.remove_callback(SyncRefModelCallback)
            self.add_callback(SyncPolicyAlone(self))

    # Rollout: answers, scores, values, rewards, advantages

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        """TRL's rollout with advantages, values and returns of each token; padding is on the right."""
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)  # calls `_calculate_rewards`
        args, mask = self.args, batch["completion_mask"].float()
        if "old_per_token_logps" not in batch:  # GRPO leaves them out where each answer is trained on but once
            whole, at_a_time = _whole(batch), args.per_device_train_batch_size
            with torch.no_grad():
                logps = self._get_per_token_logps_and_entropies(self.model, *whole, at_a_time)[0]
            batch["old_per_token_logps"] = logps
        values = self._state_values(batch) * mask
        scores = self._scores_of(batch).to(values)
        log_ratio = torch.zeros_like(values)
        if self.beta != 0.0:
            log_ratio = (batch["old_per_token_logps"] - batch.pop("ref_per_token_logps")) * mask
            self._log_mean("kl", log_ratio.sum(dim=1))
        rewards = token_rewards(scores, log_ratio, mask, beta=self.beta)
        advantages, returns = gae(rewards, values, mask, gamma=args.gamma, lam=args.lam)
        (mean, variance), (_, spread), (_, unexplained) = self._moments(mask, advantages, returns, returns - values)
        if args.whiten_advantages:
            advantages = (advantages - mean) * torch.rsqrt(variance + 1e-8) * mask
        self._log_mean("score", scores)
        self._log_mean("value/mean", values.sum(dim=1) / mask.sum(dim=1).clamp(min=1))
        self._log_mean("value/explained_variance", 1 - unexplained / spread)
        return batch | {"advantages": advantages, "old_values": values, "returns": returns}

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        """TRL's rewards of all processes' answers, (answers, reward functions); keeps this process's scores."""
        rewards: Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._check_rollout.each_function(rewards)
        weighted = rewards * self.reward_weights.to(rewards.device)
        lowest = self.args.reward_aggregation == "min"
        scores = weighted.masked_fill(weighted.isnan(), torch.inf).amin(dim=1) if lowest else weighted.nansum(dim=1)
        scores[weighted.isnan().all(dim=1)] = torch.nan
        self._scores = scores.split(len(prompts))[self.accelerator.process_index]
        return rewards

    @torch.no_grad()
    def _state_values(self, batch: dict[str, Any]) -> Tensor:
        """Critic's values of the states before the completion tokens. Shape (batch, tokens)."""
        ids, mask, kept = _whole(batch)
        values = torch.zeros(ids.shape, device=ids.device)
        with self.accelerator.autocast():
            for rows, columns in parts_of(self, mask, kept):
                tokens = dict(input_ids=ids[rows, columns], attention_mask=mask[rows, columns])
                part = self.model(**tokens, values_only=True)
                values = values.to(part.dtype)
                values[rows, columns] = part
        return values[:, -kept - 1 : -1]

    def _get_per_token_logps_and_entropies(self, *args: Any, **given: Any) -> Any:
        return divided_logps(self, super()._get_per_token_logps_and_entropies, *args, **given)

    def _scores_of(self, batch: dict[str, Any]) -> Tensor:
        """Checked scores of this process's answers, less the penalty for a missing end token. Shape (batch,)."""
        ids, scores = batch["completion_ids"], self._scores
        ends = torch.isin(ids, torch.tensor(self.eos_token_ids, device=ids.device)) & (batch["completion_mask"] > 0)
        ended = ends.any(dim=1)
        scores = scores.to(ended.device)
        if self.args.missing_eos_penalty is not None:
            scores = torch.where(ended, scores, scores - self.args.missing_eos_penalty)
        self._check_rollout(scores, ended)
        return scores

    def _moments(self, mask: Tensor, *tensors: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Mean and variance of each tensor over the tokens of all processes."""
        sums = [mask.sum(), *(((each**power) * mask).sum() for each in tensors for power in (1, 2))]
        count, *totals = self.accelerator.reduce(torch.stack(sums).double(), reduction="sum")
        means = [(total / count.clamp(min=1)).to(tensors[0]) for total in totals]
        return [(mean, (square - mean**2).clamp(min=0)) for mean, square in zip(means[::2], means[1::2], strict=True)]

    # Epochs over the rollout

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """TRL's step, or no step where the policy has moved too far: without a gradient there is no update."""
        if self._step % self.current_gradient_accumulation_steps == 0:
            self._begin_update()
        if self._stopped:
            self._step += 1
            return torch.zeros((), device=self.accelerator.device)
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if self._trains_critic_alone():
            for name, weight in model.named_parameters():
                weight.grad = weight.grad if CRITIC in name else None  # a zero would be decayed and counted by Adam
        return loss

    def _begin_update(self) -> None:
        """Skips the rest of the rollout if the last update found the policy too far from the rollout's policy."""
        if (target := self.args.target_kl) is not None:
            if self._step % (self.args.steps_per_generation * self.num_iterations) == 0:  # a new rollout
                self._stopped = False
            elif self._moved:
                moved = self.accelerator.reduce(torch.stack(self._moved).mean(), reduction="mean")
                self._stopped |= bool(moved > 1.5 * target)
            self._metrics["train"]["policy/stopped"].append(float(self._stopped))  # the model is not yet in this mode
        self._moved = []

    def _trains_critic_alone(self) -> bool:
        """Says if this optimizer step is one of the critic's warm-up."""
        return bool(self.state.global_step < self.args.critic_warmup_steps)

    # Loss

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """GRPO's clipped surrogate on per-token advantages, and the value loss of the same forward."""
        if self.tokens_per_step:
            return divided_loss(self, model, inputs, self._loss)
        return self._loss(model, without_padding(inputs), Shares())

    def _loss(self, model: Any, inputs: dict[str, Any], shares: Shares) -> Tensor:
        """Part of an update's loss that some of its answers make."""
        loss, output = self._clipped_surrogate(model, inputs)
        mask, clip = inputs["completion_mask"].float(), self.args.cliprange_value
        kept = mask.shape[1]
        values, logps = output.state_values[:, -kept - 1 : -1], output.log_probs[:, -kept:]
        value_loss = clipped_value_loss(values, inputs["old_values"], inputs["returns"], mask, clip)
        moved = self._log_update(inputs, mask, logps, values)
        self._log_mean("value/loss", value_loss)
        accumulated = 1
        if self.model.training:
            self._moved = [*self._moved, moved]  # a new list: `unlogged` puts the old one back
            accumulated = self.current_gradient_accumulation_steps  # GRPO scaled its own part
            if self._trains_critic_alone():
                loss = loss * 0.0  # `training_step` removes the gradient; DDP waits for one of every weight
        # bnpo is a mean over a batch's tokens, dapo over a rollout's; grpo and dr_grpo are means over answers.
        share = {"bnpo": shares.tokens, "dapo": 1.0}.get(self.loss_type, shares.answers)
        total: Tensor = loss * share + value_loss * (shares.tokens * self.args.vf_coef / accumulated)
        return total

    def _clipped_surrogate(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
        """GRPO's loss without its KL term, and the output of the one forward that it makes, values included."""
        outputs = []

        def policy_and_critic(**tokens: Any) -> Any:  # GRPO only ever calls the model like this
            outputs.append(model(**tokens, return_values=True))
            return outputs[-1]

        beta, self.beta = self.beta, 0.0  # the KL penalty is in the reward; GRPO reads this attribute
        try:
            loss: Tensor = super()._compute_loss(policy_and_critic, inputs)
        finally:
            self.beta = beta
        return loss, outputs[0]

    @torch.no_grad()
    def _log_update(self, inputs: dict[str, Any], mask: Tensor, logps: Tensor, values: Tensor) -> Tensor:
        """Logs how far policy and critic are from the rollout's; returns the policy's KL, in nats a token."""
        tokens = mask.sum().clamp(min=1)
        log_ratio = (logps - inputs["old_per_token_logps"]) * mask
        moved: Tensor = (log_ratio.expm1() - log_ratio).sum() / tokens  # KL(old || new) as in Schulman 2020, k3
        beyond = ((values - inputs["old_values"]).abs() > self.args.cliprange_value) * mask
        self._log_mean("policy/ratio", (log_ratio.exp() * mask).sum() / tokens)
        self._log_mean("policy/approx_kl", moved)
        self._log_mean("value/clip_ratio", beyond.sum() / tokens)
        return moved

    def _log_mean(self, name: str, values: Tensor) -> None:
        """Logs the mean over all processes."""
        mode = "train" if self.model.training else "eval"
        self._metrics[mode][name].append(self.accelerator.gather(values.detach().float()).mean().item())

    # Optimizer and checkpoints with the critic

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

    def without_critic(self) -> AbstractContextManager[Any]:
        """Takes the critic out of the policy inside the block, and yields it."""
        return without_critic(self.accelerator.unwrap_model(self.model))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Saves the policy as TRL does, and the critic's trained weights in a file of their own."""
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


def _whole(batch: dict[str, Any]) -> tuple[Tensor, Tensor, int]:
    """Token ids and mask of prompts with answers, and the columns of the answers."""
    ids, mask = (torch.cat([batch[f"prompt_{part}"], batch[f"completion_{part}"]], dim=1) for part in ("ids", "mask"))
    return ids, mask, batch["completion_ids"].shape[1]


def _updates_per_rollout(args: PPOConfig) -> int:
    batches = args.steps_per_generation * args.num_iterations
    if batches % args.gradient_accumulation_steps:
        raise ValueError(
            f"{args.num_iterations} epochs over {args.generation_batch_size} answers are {batches} batches, which "
            f"make no whole number of updates of {args.gradient_accumulation_steps}: change generation_batch_size."
        )
    return int(batches // args.gradient_accumulation_steps)


class SyncPolicyAlone(SyncRefModelCallback):
    """TRL's moving-average reference model without the critic: TRL pairs the weights of both models in order."""

    def __init__(self, trainer: PPOTrainer) -> None:
        super().__init__(ref_model=trainer.ref_model, accelerator=trainer.accelerator)
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the reference model."""
        with self.trainer.without_critic():
            super().on_step_end(args, state, control, **kwargs)


class RolloutBoundaries(TrainerCallback):
    """Rounds `save_steps` up to whole rollouts: a checkpoint holds no rollout, so a run resumes exactly after one."""

    def __init__(self, trainer: PPOTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Round `save_steps`, and count batches from where a resumed run goes on."""
        self.trainer._step = state.global_step * args.gradient_accumulation_steps
        rollout = self.trainer.updates_per_rollout
        if args.save_strategy == "steps" and state.save_steps % rollout:
            state.save_steps = math.ceil(state.save_steps / rollout) * rollout
            logger.warning(f"Saving every {state.save_steps} updates: a rollout is {rollout} of them.")
