"""Guards on a run: the reference model is the initial model, trained weights are float32, an interrupt saves first."""

import logging
import signal
import time
from itertools import islice
from types import FrameType
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import DPOTrainer, RewardTrainer

from dpo_recipes.errors import RecipeError, UnhealthyRunError
from dpo_recipes.models.likelihood import completion_logps, reference_in_memory, sharded
from dpo_recipes.models.open import evaluating
from dpo_recipes.trl_patches import prepare_inputs

logger = logging.getLogger(__name__)

REFERENCE_TOLERANCE = {"float32": 1e-3, "16 bits": 5e-2}
"""Nats a token (root mean square) that rounding explains between the log-probs of two equal models."""

REFERENCE_PAIRS = 4
"""Training pairs, the first ones, on which policy and reference model are compared."""


STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class WrongReferenceError(RuntimeError):
    """The policy does not start at the reference model; `sign` says by how much their log-probs differ."""

    def __init__(self, nats: float) -> None:
        self.sign = (
            f"on the first pairs their log-probs differ by {nats:.2g} nats a token (root mean square), so the first "
            "loss is not the ln 2 of two equal models"
        )
        super().__init__(
            f"The policy does not start at the reference model: {self.sign}. Let TRL make the reference model "
            "(ref_model=None), or pass the model that the policy starts from."
        )


def add_guards(trainer: Trainer, *, reference_is_start: bool = True) -> None:
    """Makes a built trainer safe to run: call it between building the trainer and `trainer.train`.

    - Trained weights become float32. TRL casts the LoRA adapter of a 4-bit base to bfloat16, where a learning rate of
      5e-6 moves 3 % of its weights; full fine-tuning of 16-bit weights loses small updates in the same way. A separate
      reference model becomes float32 with them, because it would round differently in 16 bits.
    - The score head of a reward model receives the output of 16-bit layers in its own float32.
    - With full fine-tuning DPOTrainer loads the reference model from disk. If the policy was changed in memory since
      (by merging a LoRA adapter, say), the reference model receives the policy's weights.
    - 4-bit layers on a CPU keep their layout. On a CPU with AVX512-BF16, bitsandbytes 0.50.2 repacks them for good in
      the first evaluation, after which no gradient passes through them.
    - On the first pairs policy and reference model must give the same log-probs before the first update, and the
      reference model must not move with the policy: trained weights outside the LoRA adapter are refused.
    - SIGTERM, Ctrl-C and a closed terminal save a checkpoint at the end of the step and end the run.

    Args:
        trainer: Any transformers Trainer; the guards on the reference model are for DPOTrainer.
        reference_is_start: False if DPOTrainer was given another reference model on purpose: it is then not replaced,
            and may differ from the policy, but must not move.

    Raises:
        RecipeError: If a trained weight would stay when the LoRA adapter is switched off, while the model without the
            adapter serves as the reference model.
    """
    if isinstance(trainer, DPOTrainer) and reference_is_start:
        _refuse_prompt_learning(trainer)
        _refuse_weights_outside_the_adapter(trainer)
        start_reference_at_policy(trainer)
    if isinstance(trainer, DPOTrainer):
        trainer.add_callback(ReferenceGuard(trainer, is_start=reference_is_start))
    reference = getattr(trainer, "ref_model", None)
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    for parameter in [*trained, *(reference.parameters() if reference is not None else [])]:
        if parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
    if isinstance(trainer, RewardTrainer):
        for head in trainer.model.modules():
            if isinstance(head, torch.nn.Linear) and head.out_features == 1 and head.weight.requires_grad:
                head.register_forward_pre_hook(lambda head, inputs: (inputs[0].to(head.weight.dtype),))
    for module in trainer.model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    trainer.add_callback(InterruptCallback())


def _refuse_prompt_learning(trainer: DPOTrainer) -> None:
    adapters = trainer.model.peft_config.values() if isinstance(trainer.model, PeftModel) else ()
    if kinds := [config.peft_type.value for config in adapters if config.is_prompt_learning]:
        raise RecipeError(
            f"{kinds[0]} puts trained vectors before the prompt, so the policy does not start at the reference model, "
            "which is the base without them. Give a LoraConfig as peft_config, or none to train all weights."
        )


def _refuse_weights_outside_the_adapter(trainer: DPOTrainer) -> None:
    model = trainer.model
    if trainer.ref_model is not None or not isinstance(model, PeftModel) or trainer.precompute_ref_logps:
        return
    adapter_parts = (model.base_model.prefix, "modules_to_save.", "trainable_tokens_")
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    if outside := [name for name in trained if not any(part in name for part in adapter_parts)]:
        raise RecipeError(
            f"{len(outside)} weights are trained outside the LoRA adapter ({outside[0]}, ...). They stay when the "
            "adapter is switched off, so the reference model would move with the policy. Train the adapter alone "
            "(bias='none' in LoraConfig), or pass DPOTrainer a ref_model of its own."
        )


def start_reference_at_policy(trainer: DPOTrainer) -> bool:
    """Copies the policy's weights into the reference model if they differ, and returns True if they did.

    LoRA needs no copy (the reference model is the base in memory); sharded models cannot be compared here.
    """
    reference = trainer.ref_model
    if reference is None or isinstance(trainer.model, PeftModel) or sharded(trainer):
        return False
    reference = trainer.accelerator.unwrap_model(reference)
    start = trainer.model.state_dict()
    if all(torch.equal(start[name].to(value), value) for name, value in reference.state_dict().items()):
        return False
    reference.load_state_dict(start)
    logger.warning(
        "The policy was changed after it was loaded, so DPOTrainer read another model from disk as the reference "
        "model. The reference model now has the policy's weights. Pass ref_model=copy.deepcopy(model) to silence "
        "this, or call add_guards(trainer, reference_is_start=False) if you mean another reference model."
    )
    return True


class ReferenceGuard(TrainerCallback):
    """Ends a DPO run before its first update unless policy and reference model agree; warns if the latter moves.

    At step 0 both models give every token the same log-prob, so the sigmoid loss is ln 2 (Rafailov et al. 2023, eq. 7).
    The loss alone proves little: a wrong reference model that moves both completions of a pair alike leaves it at ln 2.
    So the log-probs of the first pairs are compared token by token, and the reference model's once more after training.

    Args:
        trainer: A built DPOTrainer.
        is_start: False if the policy starts from another model on purpose: then only the reference model is watched.
    """

    KEPT = "reference/logps_at_start"

    def __init__(self, trainer: DPOTrainer, *, is_start: bool = True) -> None:
        self.trainer = trainer
        self.is_start = is_start
        self.checked = False  # a second call of `trainer.train` goes on with the weights that the first one trained
        self.at_start: list[float] | None = None  # the reference model's summed log-probs, and the number of pairs
        exact = trainer.model.dtype == torch.float32 and not (trainer.args.bf16 or trainer.args.fp16)
        self.tolerance = REFERENCE_TOLERANCE["float32" if exact else "16 bits"]

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Compares policy and reference model; a resumed run reads the reference model's log-probs of step 0."""
        if state.global_step == 0:
            self.check()
        else:
            self.at_start = next((log[self.KEPT] for log in state.log_history if self.KEPT in log), None)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Keeps the reference model's log-probs of step 0 in the log, which checkpoints save."""
        if self.at_start is not None and not any(self.KEPT in log for log in state.log_history):
            state.log_history.append({self.KEPT: self.at_start, "step": state.global_step})

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Warns if the reference model has changed since step 0."""
        if moved := self.moved():
            logger.warning(moved)

    def check(self) -> None:
        """Compares policy and reference model on the first training pairs, before the first update.

        Raises:
            WrongReferenceError: If their log-probs differ by more than rounding.
            UnhealthyRunError: If the policy's log-probs are NaN or infinite.
        """
        if self.checked:
            return
        self.checked = True
        batch = self._first_pairs(min(REFERENCE_PAIRS, self.trainer.args.per_device_train_batch_size))
        # The policy first: FSDP2 takes the gradients' dtype in its first pass, from weights that are trained then.
        policy = self._logps(self.trainer.model_wrapped, batch)
        reference = self._reference_logps(batch)
        if not policy.isfinite().all():
            raise UnhealthyRunError(
                "The log-probs of the first pairs are NaN or infinite before the first update. The model's weights "
                "are broken, or its dtype overflows (float16 ends at 65,504). Look at the model, or train it in "
                "bfloat16 or float32."
            )
        if reference is not None:
            self.at_start = [float(reference.sum()), len(policy) // 2]
        nats = self._difference(policy, reference, batch) if self.is_start else None
        if nats is not None and not nats <= self.tolerance:  # NaN is refused too
            raise WrongReferenceError(nats)

    def _first_pairs(self, count: int) -> dict[str, Any]:
        """The first training pairs as a batch."""
        rows = list(islice(self.trainer.train_dataset, count))
        return dict(prepare_inputs(self.trainer, self.trainer.data_collator(rows)))

    def _reference_logps(self, batch: dict[str, Any]) -> torch.Tensor | None:
        """Log-probs of the reference model; None if it is not here."""
        with reference_in_memory(self.trainer) as reference:
            return None if reference is None else self._logps(reference, batch)

    def _logps(self, model: Any, batch: dict[str, Any]) -> torch.Tensor:
        with evaluating(model), self.trainer.accelerator.autocast():  # no dropout, no noise
            return completion_logps(model, batch)

    def _difference(self, policy: torch.Tensor, reference: torch.Tensor | None, batch: dict[str, Any]) -> float | None:
        """Root mean square difference in nats a token; None where the reference model's log-probs are not known.

        TRL keeps precomputed log-probs summed over a completion, and with `ld_alpha` in a form that cannot be compared.
        """
        count = int(batch["completion_mask"].sum())
        if self.trainer.precompute_ref_logps:
            if "ref_chosen_logps" not in batch or self.trainer.ld_alpha is not None:
                return None
            tokens, count = count / len(policy), len(policy)  # of a completion, on average
            policy = policy.sum(dim=1) / tokens
            reference = torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]]) / tokens
        return None if reference is None else float((policy - reference).square().sum() / count) ** 0.5

    def moved(self) -> str | None:
        """A warning with the distance that the reference model has moved since step 0; None if it has not moved.

        None is also returned where the log-probs of step 0 are not known, and where the reference model should move.
        """
        if self.at_start is None or self.trainer.args.sync_ref_model:
            return None
        logps, pairs = self.at_start
        batch = self._first_pairs(int(pairs))
        reference = self._reference_logps(batch)
        off = 0.0 if reference is None else (float(reference.sum()) - logps) / int(batch["completion_mask"].sum())
        if abs(off) <= self.tolerance:
            return None
        return (
            f"The reference model has moved by {off:+.2g} nats a token since step 0: weights outside the LoRA adapter "
            "were trained. Losses, rewards, KL and every number before training belong to a moved model. Train the "
            "adapter alone (bias='none'), or pass a ref_model of its own."
        )


class InterruptCallback(TrainerCallback):
    """Turns the first SIGTERM, Ctrl-C or SIGHUP into a checkpoint at the end of the step; exits with 143, 130 or 129.

    transformers' `enable_jit_checkpoint` waits three seconds, ignores Ctrl-C and may save within a step, when random
    numbers of that step have been drawn already. Only a save at a step's end makes a resume bit-identical.
    A second signal ends the run at once, unless it is a SIGTERM that comes with the first: a cluster sends it to every
    process, and the launcher passes on the one that it was sent itself.
    """

    TOGETHER = 5.0  # seconds

    def __init__(self) -> None:
        self.signal = 0  # none yet
        self.since = 0.0
        self.previous: dict[int, Any] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == self.signal == signal.SIGTERM and time.monotonic() - self.since < self.TOGETHER:
            return
        if self.signal:
            raise SystemExit(128 + number)
        self.signal, self.since = number, time.monotonic()
        logger.warning("Interrupted: saving a checkpoint at the end of this step (once more: stop at once).")

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Takes the signals over, except a SIGHUP that nohup ignores."""
        ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        heeded = STOPPING[:-1] if ignored else STOPPING
        self.previous = {number: signal.signal(number, self._handle) for number in heeded}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Asks for a checkpoint and the end of training; all processes stop at the same step after a signal to one."""
        if stop := max(gather_object([self.signal])):
            self.signal = stop
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Gives the signals back, and exits with the shell's status for the signal if one came.

        The processes exit together: torch's launcher ends the others as soon as one has exited, maybe during a save.
        """
        PartialState().wait_for_everyone()
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        if self.signal:
            way = "It holds only weights." if args.save_only_model else "Continue with --resume_from_checkpoint true."
            logger.warning(f"Saved {args.output_dir}/checkpoint-{state.global_step}. {way}")
            raise SystemExit(128 + self.signal)
