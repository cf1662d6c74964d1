"""DPO's loss and gradients at a fraction of the cost: each prompt is encoded once for both completions, unpadded.

TRL calls `model(**batch, labels=..., fused_lm_head=True)` on padded tensors of shape (2 pairs, length) and reads
per-token log-probs from the result. Only the inside of that call changes:

1. The data collator adds a plan to TRL's tensors: where each token of the packed row comes from and goes to
   (`packing.plan_pairs`).
2. A hook before the model turns the padded batch into one row: prompt, chosen and rejected of the first pair, and so
   on. The positions of rejected continue those of the prompt. The plan rides on the attention mask, which every layer
   is given and which activation checkpointing keeps (`packing._pack`).
3. Attention runs over prompt and chosen causally, and from rejected over its prompt and itself (`packing.attend`).
4. A hook after the backbone keeps the hidden states that predict a token of a completion (`packing._keep_predicting`).
5. A head that is not trained takes its gradient in the forward (`head.log_probs`).
6. A hook after the model puts the per-token results where TRL looks for them (`packing._unpack`).

With `tokens_per_step` a batch is divided into micro-batches first (`micro_batches.divide`), and steps 1 to 6 are those
of a micro-batch. Each has a backward pass of its own. TRL's loss and metrics are then computed once more, from the
per-token results of the whole batch.

Losses, metrics, the reference pass and the cache of its log-probs stay TRL's own code. What cannot be shared, or was
not tested, runs as plain TRL, and one line says why (`support.why_not`, docs/shared_prefix.md).
"""

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from trl import DPOTrainer

from dpo_recipes.errors import RecipeError
from dpo_recipes.models.pair_ids import prepare_dataset
from dpo_recipes.models.precision import in_float32
from dpo_recipes.shared_prefix.head import log_probs
from dpo_recipes.shared_prefix.micro_batches import NOT_A_MEAN, Division, RandomState, why_whole
from dpo_recipes.shared_prefix.packing import PLAN, SharedPrefixCollator, install
from dpo_recipes.shared_prefix.reference_cache import precompute_ref_logps
from dpo_recipes.shared_prefix.support import changeable, why_not
from dpo_recipes.trl_patches import head_function, lora_switched_by_flags, prepare_inputs, unlogged

logger = logging.getLogger(__name__)

FIRST_BATCH_TOLERANCE = {"float32": 1e-5, "16 bits": 5e-2}
"""Relative difference of the first batch's per-token log-probs from plain TRL's that rounding explains."""


class SharedPrefixDPOTrainer(DPOTrainer):
    """TRL's DPOTrainer: the same arguments and, to rounding, the same results for a fraction of the cost.

    Args:
        args: Positional arguments of DPOTrainer.
        shared_prefix: "auto" shares prompts where sharing was tested and the first batch agrees with plain TRL;
            otherwise it warns and is plain TRL. "true" needs only the agreement, and raises where "auto" would fall
            back. "false" is plain TRL.
        tokens_per_step: Most tokens that go through the model at a time: p + c + r of each pair where prompts are
            shared, else padded tokens. A batch is divided into micro-batches that fit, with the loss, the gradients and
            the metrics of the whole batch. None or 0: a batch goes through the model whole. By default the value that
            `parse_recipe` left in `args`, and a batch is then the pairs of a whole update. `auto` is for recipes:
            `prepare_pairs` finds the number.
        kwargs: Keyword arguments of DPOTrainer.

    Raises:
        RecipeError: With "true", if prompts cannot be shared, or the first batch differs from plain TRL's. With
            `tokens_per_step`, if batches cannot be divided.
    """

    share_prompts = True
    """False packs without sharing. This switch and the next two exist to measure how much each ingredient saves."""
    frozen_head = True
    """Take the gradient of a head that is not trained in the forward."""
    lean_reference = True
    """Precompute reference log-probs without metrics, with LoRA switched off by its flags alone."""

    _prepare_dataset = prepare_dataset
    _metrics: Any
    _total_train_tokens: Any
    current_gradient_accumulation_steps: float
    loss_weights: list[float]
    precompute_ref_logps: bool

    def __init__(
        self, *args: Any, shared_prefix: str | bool = "auto", tokens_per_step: int | None = None, **kwargs: Any
    ) -> None:
        self.shared_prefix = str(shared_prefix).lower()  # a YAML file's true is no string
        if self.shared_prefix not in ("auto", "true", "false"):
            raise RecipeError(f"shared_prefix={shared_prefix} is not auto, true or false.")
        self.tokens_per_step = tokens_per_step
        self.budget_is_estimated = self.halved = False
        self.on_halved: Callable[[int], None] = lambda budget: None
        for config in (*args, kwargs.get("args")):
            if tokens_per_step is None and (budget := getattr(config, "tokens_per_step", None)):
                self.tokens_per_step = budget
                self.budget_is_estimated = getattr(config, "budget_is_estimated", False)
                config.per_device_train_batch_size *= config.gradient_accumulation_steps
                config.gradient_accumulation_steps = 1
        if str(self.tokens_per_step) == "auto":
            raise RecipeError("tokens_per_step=auto needs prepare_pairs, which finds the number. Give a number.")
        self.running: Division | None = None  # the batch whose micro-batches `training_step` is running
        self.sharing: bool | None = None  # not known before the model is there
        self.agrees_with_trl = False
        self.changeable: dict[Any, list[Any]] = {}  # by model, the modules that are looked at in every step
        super().__init__(*args, **kwargs)
        self._install()

    def _install(self) -> None:
        """Prepares models and data collator, once: DPOTrainer's `__init__` itself may compute reference log-probs."""
        if self.sharing is not None:
            return
        if self.tokens_per_step and (reason := why_whole(self)):
            raise RecipeError(
                f"tokens_per_step does not go with: {reason}. Give --per_device_train_batch_size instead, the pairs "
                "that go through the model at a time."
            )
        self.sharing = self.shared_prefix != "false"
        self._check_models()
        if self.sharing:
            collator: Any = vars(self)["data_collator"]
            self.data_collator = SharedPrefixCollator(**vars(collator) | {"share": self.share_prompts})
            for model in self._models():
                install(model)
            # The default for streams cuts a batch's tensors row by row, and with them the plan.
            self.accelerator.dataloader_config.dispatch_batches = False

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
        self._install()
        return precompute_ref_logps(self, *args, **kwargs)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        """TRL's step. With `tokens_per_step` each micro-batch has a backward pass; gradients are synchronised once.

        Where a budget that was estimated takes too much memory, the step is repeated with half of it.
        """
        if not self.tokens_per_step:
            return super().training_step(model, inputs, num_items_in_batch)
        random, logged = RandomState(), copy.deepcopy((self._metrics, self._total_train_tokens))
        while True:
            try:
                return self._divided_step(model, inputs, num_items_in_batch)
            except torch.OutOfMemoryError as error:
                if not self.budget_is_estimated:
                    raise
                self._halve_budget(error)
            # Not inside of `except`: the error's traceback holds the tensors of the failed attempt.
            model.zero_grad()
            self._metrics, self._total_train_tokens = logged
            random.restore()

    def _halve_budget(self, error: torch.OutOfMemoryError) -> None:
        """Halves the budget that the preflight has estimated, once."""
        budget = self.tokens_per_step or 0
        if self.halved or self.accelerator.num_processes > 1:
            reason = "half of what was estimated" if self.halved else "as was estimated, and several processes"
            raise RecipeError(
                f"Out of memory with {budget:,} tokens at a time, {reason}. Give fewer, --tokens_per_step "
                f"{budget // 2}, set --activation_checkpointing true, or lower --max_length."
            ) from error
        self.tokens_per_step, self.halved = max(1, budget // 2), True
        self.on_halved(self.tokens_per_step)
        logger.warning(
            f"Out of memory with {budget:,} tokens at a time: this update is repeated, and the run goes on, with "
            f"tokens_per_step={self.tokens_per_step}."
        )

    def _divided_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any) -> Any:
        model.train()
        steps, weights = self.current_gradient_accumulation_steps, self.loss_weights
        with self._reference_first(prepare_inputs(self, inputs)) as inputs:
            self.running = division = self._divide(inputs)
            try:
                if NOT_A_MEAN.intersection(self.loss_types):
                    self._find_gradient(model, division)
                loss = torch.zeros((), device=self.accelerator.device)
                for pairs, part in zip(division.parts, division, strict=True):
                    share, by_tokens = division.shares(pairs)
                    self.current_gradient_accumulation_steps = steps / share  # TRL's step divides the loss by it
                    factors = [by_tokens / share if loss == "sft" else 1 for loss in self.loss_types]
                    self.loss_weights = [weight * x for weight, x in zip(weights, factors, strict=True)]
                    with nullcontext() if pairs is division.parts[-1] else self.accelerator.no_sync(model):
                        loss = loss + super().training_step(model, part, num_items_in_batch)
            finally:
                self.running = None
                self.current_gradient_accumulation_steps, self.loss_weights = steps, weights
            with torch.no_grad():
                logged = super()._compute_loss(division.replay, inputs, False)
            return loss if division.gradient is None else logged / steps

    def _find_gradient(self, model: Any, division: Division) -> None:
        """Finds the gradient of a batch's loss by the log-probs, where the loss is no sum over micro-batches."""
        with torch.no_grad():
            for part in division:
                self._run_part(model, part, division)
        merged = division.merged()
        merged.log_probs.requires_grad_()
        with unlogged(self), torch.enable_grad():
            loss = super()._compute_loss(lambda **_: merged, division.batch, False)
        [division.gradient] = torch.autograd.grad(loss, [merged.log_probs])
        division.results.clear()

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
        """TRL's reference log-probs, by a packed row and without TRL's metrics."""
        division, logps = self._divide(inputs), []
        for part in division:
            with self._shared(part, lean=self.lean_reference) as part:
                logps.append(torch.stack(super().compute_ref_log_probs(model, part)))  # (2, pairs)
        return tuple(division.in_order(logps))

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False) -> Any:
        """TRL's loss, by a packed row. A subclass's `compute_loss` gets here, too."""
        if not self.tokens_per_step:
            with self._shared(inputs) as inputs:
                return super()._compute_loss(model, inputs, return_outputs)
        if self.running:
            loss = self._run_part(model, inputs, self.running, detach=True)
            return loss if self.running.gradient is None else self.running.share_of_gradient()
        with self._reference_first(inputs) as inputs:
            division = self._divide(inputs)
            for part in division:
                self._run_part(model, part, division)
            return super()._compute_loss(partial(division.replay, model=model), inputs, return_outputs)

    def _run_part(self, model: Any, part: dict[str, Any], division: Division, *, detach: bool = False) -> Any:
        """TRL's loss of a micro-batch, unlogged. The division keeps the model's results."""
        with self._shared(part) as part, unlogged(self):
            return super()._compute_loss(partial(division.run, model, detach=detach), part, False)

    @contextmanager
    def _reference_first(self, inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yields the batch with the reference model's log-probs, which TRL then takes as precomputed."""
        precomputed = self.precompute_ref_logps
        if not precomputed:
            chosen, rejected = self.compute_ref_log_probs(self.ref_model or self.model, inputs)
            inputs = {**inputs, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        self.precompute_ref_logps = True
        try:
            yield inputs
        finally:
            self.precompute_ref_logps = precomputed

    def _divide(self, inputs: dict[str, Any]) -> Division:
        """The batch, in micro-batches that fit into `tokens_per_step`."""
        return Division(self._checked(inputs), self.tokens_per_step, share=self.share_prompts)

    @contextmanager
    def _shared(self, inputs: dict[str, Any], *, lean: bool = False) -> Iterator[dict[str, Any]]:
        """Yields the batch to compute with: with its plan and our head function, or as plain TRL has it."""
        inputs = self._checked(inputs)
        if PLAN in inputs and not self.agrees_with_trl:
            self._compare_with_trl(Division(inputs, self.tokens_per_step, share=self.share_prompts).sample())
            inputs = self._checked(inputs)
        if not self.sharing:
            yield inputs
            return
        model = self.accelerator.unwrap_model(self.model)
        function = partial(log_probs, allow_frozen=self.frozen_head, log_probs_alone=lean)
        with head_function(function), lora_switched_by_flags(model) if lean else nullcontext():
            yield inputs

    def _checked(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch, without its plan where prompts cannot be shared, or if it was changed after its plan was made."""
        if self.sharing and PLAN in inputs:
            self._check_models()
            # On a card every number that is read back makes it wait, so there the first batch speaks for all.
            look = not (self.agrees_with_trl and inputs["input_ids"].is_cuda)
            if self.sharing and look and not inputs[PLAN].belongs_to(inputs):
                self._fall_back("batches that were changed after the data collator")
        return inputs if self.sharing else {name: value for name, value in inputs.items() if name != PLAN}

    def _check_models(self) -> None:
        """Falls back if a model cannot share prompts, or no longer can: its settings may be changed at any time."""
        for model in self._models():
            if model not in self.changeable:
                self.changeable[model] = changeable(model)
            asked: dict[str, Any] = dict(modules=self.changeable[model], tested_only=self.shared_prefix == "auto")
            if self.sharing and (reason := why_not(self, model, **asked)):
                self._fall_back(reason)

    def _compare_with_trl(self, inputs: dict[str, Any]) -> None:
        """Falls back if a batch's log-probs are not plain TRL's: a model may share wrongly without an error.

        The comparison is in float32, where a fault cannot hide behind rounding, and in the run's own dtype, whose
        attention may be another function. Weights that are divided among processes cannot be made float32.
        """
        divided = self.is_fsdp_enabled or self.is_deepspeed_enabled
        for model in self._models():
            exact = model.dtype in (torch.float32, torch.float64) and self.accelerator.mixed_precision == "no"
            ways = {} if divided and not exact else {"float32": nullcontext() if exact else in_float32(model)}
            ways |= {} if exact else {"16 bits": self.accelerator.autocast()}
            for dtype, way in ways.items():
                with torch.no_grad(), way:
                    off = _distance_from_trl(model, inputs)
                if self.sharing and not off <= FIRST_BATCH_TOLERANCE[dtype]:  # or is NaN
                    self._fall_back(
                        f"log-probs of the first batch that differ from plain TRL's by {off:.0e} in {dtype}"
                    )
        self.agrees_with_trl = True  # not before: an error above may be caught, and the step tried again

    def _fall_back(self, reason: str) -> None:
        if self.shared_prefix == "true":
            raise RecipeError(f"shared_prefix=true does not go with: {reason}. Leave it at auto to train as plain TRL.")
        self.sharing = False
        if self.accelerator.is_main_process:
            logger.warning(f"Prompts are not shared, this is plain TRL: {reason}. shared_prefix=false silences this.")

    def _models(self) -> list[Any]:
        """The policy, and the reference model if it is a model of its own."""
        return [self.accelerator.unwrap_model(each) for each in (self.model, self.ref_model) if each is not None]


def _distance_from_trl(model: Any, inputs: dict[str, Any]) -> float:
    """Relative distance of a packed row's per-token log-probs from the padded batch's."""
    padded = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    padded["labels"] = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    plain, shared = (
        model(**batch, fused_lm_head=True, use_cache=False).log_probs.float()
        for batch in (padded, {**padded, PLAN: inputs[PLAN]})
    )
    return float(torch.linalg.vector_norm(shared - plain) / torch.linalg.vector_norm(plain))
