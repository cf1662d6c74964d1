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

Losses, metrics, the reference pass and the cache of its log-probs stay TRL's own code. What cannot be shared, or was
not tested, runs as plain TRL, and one line says why (`support.why_not`, docs/shared_prefix.md).
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from trl import DPOTrainer

from dpo_recipes.errors import RecipeError
from dpo_recipes.models.pair_ids import prepare_dataset
from dpo_recipes.models.precision import in_float32
from dpo_recipes.shared_prefix.head import log_probs
from dpo_recipes.shared_prefix.packing import PLAN, SharedPrefixCollator, install
from dpo_recipes.shared_prefix.reference_cache import precompute_ref_logps
from dpo_recipes.shared_prefix.support import changeable, why_not
from dpo_recipes.trl_patches import head_function, lora_switched_by_flags

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
        kwargs: Keyword arguments of DPOTrainer.

    Raises:
        RecipeError: With "true", if prompts cannot be shared, or the first batch differs from plain TRL's.
    """

    share_prompts = True
    """False packs without sharing. This switch and the next two exist to measure how much each ingredient saves."""
    frozen_head = True
    """Take the gradient of a head that is not trained in the forward."""
    lean_reference = True
    """Precompute reference log-probs without metrics, with LoRA switched off by its flags alone."""

    _prepare_dataset = prepare_dataset

    def __init__(self, *args: Any, shared_prefix: str | bool = "auto", **kwargs: Any) -> None:
        self.shared_prefix = str(shared_prefix).lower()  # a YAML file's true is no string
        if self.shared_prefix not in ("auto", "true", "false"):
            raise RecipeError(f"shared_prefix={shared_prefix} is not auto, true or false.")
        self.sharing: bool | None = None  # not known before the model is there
        self.agrees_with_trl = False
        self.changeable: dict[Any, list[Any]] = {}  # by model, the modules that are looked at in every step
        super().__init__(*args, **kwargs)
        self._install()

    def _install(self) -> None:
        """Prepares models and data collator, once: DPOTrainer's `__init__` itself may compute reference log-probs."""
        if self.sharing is not None:
            return
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

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
        """TRL's reference log-probs, by a packed row and without TRL's metrics."""
        with self._shared(inputs, lean=self.lean_reference) as inputs:
            return super().compute_ref_log_probs(model, inputs)

    def _compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """TRL's loss, by a packed row. A subclass's `compute_loss` gets here, too."""
        with self._shared(inputs) as inputs:
            return super()._compute_loss(model, inputs, *args, **kwargs)

    @contextmanager
    def _shared(self, inputs: dict[str, Any], *, lean: bool = False) -> Iterator[dict[str, Any]]:
        """Yields the batch to compute with: with its plan and our head function, or as plain TRL has it."""
        if self.sharing and PLAN in inputs:
            self._check_models()
            self._check_batch(inputs)
        if not self.sharing:
            yield {name: value for name, value in inputs.items() if name != PLAN}
            return
        model = self.accelerator.unwrap_model(self.model)
        function = partial(log_probs, allow_frozen=self.frozen_head, log_probs_alone=lean)
        with head_function(function), lora_switched_by_flags(model) if lean else nullcontext():
            yield inputs

    def _check_models(self) -> None:
        """Falls back if a model cannot share prompts, or no longer can: its settings may be changed at any time."""
        for model in self._models():
            if model not in self.changeable:
                self.changeable[model] = changeable(model)
            asked: dict[str, Any] = dict(modules=self.changeable[model], tested_only=self.shared_prefix == "auto")
            if self.sharing and (reason := why_not(self, model, **asked)):
                self._fall_back(reason)

    def _check_batch(self, inputs: dict[str, Any]) -> None:
        """Falls back if the batch was changed after its plan was made, or the first batch differs from plain TRL's."""
        # On a card every number that is read back makes it wait, so there the first batch speaks for all.
        look = not (self.agrees_with_trl and inputs["input_ids"].is_cuda)
        if self.sharing and look and not inputs[PLAN].belongs_to(inputs):
            self._fall_back("batches that were changed after the data collator")
        if self.sharing and not self.agrees_with_trl:
            self._compare_with_trl(inputs)

    def _compare_with_trl(self, inputs: dict[str, Any]) -> None:
        """Falls back if a batch's log-probs are not plain TRL's: a model may share wrongly without an error.

        The comparison is in float32, where a fault cannot hide behind rounding, and in the run's own dtype, whose
        attention may be another function.
        """
        for model in self._models():
            exact = model.dtype in (torch.float32, torch.float64) and self.accelerator.mixed_precision == "no"
            ways = {"float32": nullcontext() if exact else in_float32(model)}
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
