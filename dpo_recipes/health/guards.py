"""Guards on a run: the reference is the start, what is trained is float32, an interrupt saves before it ends."""

import logging
import signal
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
from dpo_recipes.trl_patches import prepare_inputs

logger = logging.getLogger(__name__)

REFERENCE_TOLERANCE = {"float32": 1e-3, "16 bits": 5e-2}
"""Nats a token (root mean square) that rounding explains between the log-probs of two equal models."""

REFERENCE_PAIRS = 4
"""Training pairs, the first ones, on which policy and reference model are compared."""


STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class WrongReferenceError(RuntimeError):
    """The policy does not start at the reference model."""


def add_guards(trainer: Trainer, *, reference_is_start: bool = True) -> None:
    """Make a built trainer safe to run: call it between building the trainer and `trainer.train`.

    - Trained weights become float32. TRL casts the LoRA adapter of a 4-bit base to bfloat16, where a learning rate of
      5e-6 moves 3 % of its weights; full fine-tuning of 16-bit weights loses small updates in the same way. A separate
      reference model becomes float32 with them, lest it round otherwise.
    - The score head of a reward model gets what 16-bit layers give it in its own float32.
    - With full fine-tuning DPOTrainer loads the reference model from disk. Where the policy was changed in memory
      since (a merged LoRA adapter, say), the reference gets the policy's weights.
    - 4-bit layers on a CPU keep their layout. On one with AVX512-BF16, bitsandbytes 0.50.2 repacks them for good in the
      first evaluation, after which no gradient passes through them.
    - On the first pairs policy and reference model must give the same log-probs before the first update, and the
      reference model must not move with the policy: weights trained outside of the LoRA adapter are refused.
    - SIGTERM, Ctrl-C and a closed terminal save a checkpoint at the end of the step and end the run.

    Args:
        trainer: Any transformers Trainer; the guards on the reference are for DPOTrainer.
        reference_is_start: False where DPOTrainer was given another reference model on purpose: it is then neither
            replaced nor checked.

    Raises:
        RecipeError: If weights would be trained that switching the LoRA adapter off does not take back, while that
            serves as the reference model.
    """
    if isinstance(trainer, DPOTrainer) and reference_is_start:
        _refuse_prompt_learning(trainer)
        _refuse_weights_beside_the_adapter(trainer)
        start_reference_at_policy(trainer)
        trainer.add_callback(ReferenceGuard(trainer))
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


def _refuse_weights_beside_the_adapter(trainer: DPOTrainer) -> None:
    model = trainer.model
    if trainer.ref_model is not None or not isinstance(model, PeftModel) or trainer.precompute_ref_logps:
        return
    adapter_parts = (model.base_model.prefix, "modules_to_save.", "trainable_tokens_")
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    if beside := [name for name in trained if not any(part in name for part in adapter_parts)]:
        raise RecipeError(
            f"{len(beside)} weights are trained beside the adapter ({beside[0]}, ...). They stay when the adapter is "
            "switched off, so the reference model would move with the policy. Train the adapter alone (bias='none' in "
            "LoraConfig), or pass DPOTrainer a ref_model of its own."
        )


def _refuse_prompt_learning(trainer: DPOTrainer) -> None:
    adapters = trainer.model.peft_config.values() if isinstance(trainer.model, PeftModel) else ()
    if kinds := [config.peft_type.value for config in adapters if config.is_prompt_learning]:
        raise RecipeError(
            f"{kinds[0]} puts trained vectors before the prompt, so that the policy does not start at the reference "
            "model, which is the base without them. Give a LoraConfig as peft_config, or none to train all weights."
        )


def start_reference_at_policy(trainer: DPOTrainer) -> bool:
    """Copy the policy's weights into the reference model where they differ; whether it was necessary.

    LoRA needs none of it (the reference is the base in memory), sharded models cannot be compared here.
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
        "The policy was changed after it was loaded, so the reference model that DPOTrainer read from disk was another "
        "model. It now has the policy's weights. Pass ref_model=copy.deepcopy(model) to silence this; if another "
        "reference is meant, add_guards(trainer, reference_is_start=False)."
    )
    return True


class ReferenceGuard(TrainerCallback):
    """Ends a DPO run before its first update unless policy and reference model agree; says if the reference moves.

    At step 0 both models give every token the same log-prob, so the sigmoid loss is ln 2 (Rafailov et al. 2023, eq. 7).
    The loss alone proves little: a wrong reference that moves both completions of a pair alike leaves it at ln 2. So
    the log-probs of the first pairs are compared token by token, and the reference model's once more after training.
    """

    KEPT = "reference/logps_at_start"

    def __init__(self, trainer: DPOTrainer) -> None:
        self.trainer = trainer
        self.checked = False  # a second call of `trainer.train` goes on with what the first one trained
        self.at_start: list[float] | None = None  # the reference's summed log-probs, and of how many pairs
        exact = trainer.model.dtype == torch.float32 and not (trainer.args.bf16 or trainer.args.fp16)
        self.tolerance = REFERENCE_TOLERANCE["float32" if exact else "16 bits"]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compare policy and reference model; a resumed run remembers what the reference was."""
        if state.global_step == 0:
            self.check()
        else:
            self.at_start = next((log[self.KEPT] for log in state.log_history if self.KEPT in log), None)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep the reference model's log-probs at step 0 where a checkpoint takes them along."""
        if self.at_start is not None and not any(self.KEPT in log for log in state.log_history):
            state.log_history.append({self.KEPT: self.at_start, "step": state.global_step})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Warn if the reference model is no longer what it was at step 0."""
        if moved := self.moved():
            logger.warning(moved)

    def check(self) -> None:
        """Compares policy and reference model on the first training pairs, before anything is learned.

        Raises:
            WrongReferenceError: If their log-probs differ by more than rounding.
            UnhealthyRunError: If the policy's log-probs are NaN or infinite.
        """
        if self.checked:
            return
        self.checked = True
        batch = self._batch(min(REFERENCE_PAIRS, self.trainer.args.per_device_train_batch_size))
        policy = self._logps(self.trainer.model_wrapped, batch)
        if not policy.isfinite().all():
            raise UnhealthyRunError(
                "The log-probs of the first pairs are NaN or infinite before the first update: the weights of the "
                "model are broken, or its dtype overflows (float16 ends at 65,504). Look at the model, or train it in "
                "bfloat16 or float32."
            )
        reference, count = self._reference(batch), int(batch["completion_mask"].sum())
        if reference is not None:
            self.at_start = [float(reference.sum()), len(policy) // 2]
        if self.trainer.precompute_ref_logps:
            if "ref_chosen_logps" not in batch or self.trainer.ld_alpha is not None:
                return
            reference, tokens = torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]]), count / len(policy)
            policy, reference, count = policy.sum(dim=1) / tokens, reference / tokens, len(policy)
        if reference is None:
            return
        off = float((policy - reference).square().sum() / count) ** 0.5
        if not off <= self.tolerance:  # NaN is refused too
            raise WrongReferenceError(
                f"The policy does not start at the reference model: on the first pairs their log-probs differ by "
                f"{off:.2g} nats a token (root mean square), so the first loss is not the ln 2 of two equal models. "
                "Let TRL make the reference (ref_model=None), or pass the model that the policy starts from."
            )

    def moved(self) -> str | None:
        """Says by how much the reference model has moved since step 0; None where it has not, or cannot be known."""
        if self.at_start is None or self.trainer.args.sync_ref_model:
            return None
        logps, pairs = self.at_start
        batch = self._batch(int(pairs))
        reference = self._reference(batch)
        if reference is None:
            return None
        off = (float(reference.sum()) - logps) / int(batch["completion_mask"].sum())
        if abs(off) <= self.tolerance:
            return None
        return (
            f"The reference model has moved by {off:+.2g} nats a token since step 0: something was trained that is not "
            "part of the LoRA adapter. Losses, rewards, KL and everything measured of the start belong to a moved "
            "model. Train the adapter alone (bias='none'), or pass a ref_model of its own."
        )

    def _batch(self, count: int) -> dict[str, Any]:
        batch = self.trainer.data_collator(list(islice(self.trainer.train_dataset, count)))
        return prepare_inputs(self.trainer, batch)

    def _reference(self, batch: dict[str, Any]) -> torch.Tensor | None:
        with reference_in_memory(self.trainer) as reference:
            return None if reference is None else self._logps(reference, batch)

    def _logps(self, model: Any, batch: dict[str, Any]) -> torch.Tensor:
        was_training = model.training
        model.eval()  # no dropout, no noise
        with torch.no_grad(), self.trainer.accelerator.autocast():
            logps = completion_logps(model, batch)
        model.train(was_training)
        return logps


class InterruptCallback(TrainerCallback):
    """Turns the first SIGTERM, Ctrl-C or SIGHUP into a checkpoint at the end of the step; exits with 143, 130 or 129.

    transformers' `enable_jit_checkpoint` waits three seconds, ignores Ctrl-C and may save within a step, where the
    random state is no longer that of a step's beginning; saving at a step's end is what makes a resume bit-identical.
    A second signal ends the run at once.
    """

    def __init__(self) -> None:
        self.signal = 0  # none yet
        self.previous: dict[int, Any] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            raise SystemExit(128 + number)
        self.signal = number
        logger.warning("Interrupted: saving a checkpoint at the end of this step (once more: stop at once).")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the signals over, without a SIGHUP that nohup has ignored."""
        ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        heeded = STOPPING[:-1] if ignored else STOPPING
        self.previous = {number: signal.signal(number, self._handle) for number in heeded}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a checkpoint and the end. All processes stop at the same step, whichever got the signal first."""
        if stop := max(gather_object([self.signal])):
            self.signal = stop
            control.should_save = True
            control.should_evaluate = False
            control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the signals back; leave with the shell's status for the signal if there was one.

        The processes leave together: torch's launcher ends the others as soon as one has left, maybe while it saves.
        """
        PartialState().wait_for_everyone()
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        if self.signal:
            way = "It holds weights alone." if args.save_only_model else "Continue with --resume_from_checkpoint true."
            logger.warning(f"Saved {args.output_dir}/checkpoint-{state.global_step}. {way}")
            raise SystemExit(128 + self.signal)
