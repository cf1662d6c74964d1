"""Guards on a run: the reference is the start, what is trained is float32, an interrupt saves before it ends."""

import logging
import math
import signal
from types import FrameType
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from bitsandbytes.nn import Linear4bit
from datasets import Dataset
from peft import PeftModel
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import DPOTrainer, GRPOTrainer, RewardTrainer

from dpo_recipes.errors import RecipeError
from dpo_recipes.rewards import check_reward_model

logger = logging.getLogger(__name__)

FIRST_LOGPS_TOLERANCE = {"float32": 0.01, "16 bits": 0.5}
"""Nats by which policy and reference may differ at the start: what rounding moves a sum of some hundred log-probs."""


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
    - The first batch must show policy and reference to be equal, before the first update.
    - SIGTERM and Ctrl-C save a checkpoint at the end of the step and end the run.

    Args:
        trainer: Any transformers Trainer; the guards on the reference are for DPOTrainer.
        reference_is_start: False where DPOTrainer was given another reference model on purpose: it is then neither
            replaced nor checked.
    """
    if isinstance(trainer, DPOTrainer) and reference_is_start:
        _refuse_prompt_learning(trainer)
        start_reference_at_policy(trainer)
        trainer.add_callback(FirstLossGuard(trainer))
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
            f"{kinds[0]} puts trained vectors before the prompt, so that the policy does not start at the reference "
            "model, which is the base without them. Give a LoraConfig as peft_config, or none to train all weights."
        )


def start_reference_at_policy(trainer: DPOTrainer) -> bool:
    """Copy the policy's weights into the reference model where they differ; whether it was necessary.

    LoRA needs none of it (the reference is the base in memory), sharded models cannot be compared here.
    """
    reference = trainer.ref_model
    sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    if reference is None or isinstance(trainer.model, PeftModel) or sharded:
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


class FirstLossGuard(TrainerCallback):
    """Ends the run before its first update if the policy does not start at the reference model.

    At step 0 the log-ratios of both completions are 0, so the sigmoid loss is ln 2 = 0.6931 (Rafailov et al. 2023,
    eq. 7). A wrong reference shows in the rewards of either completion, so they are checked, not their difference.
    """

    def __init__(self, trainer: DPOTrainer) -> None:
        self.trainer = trainer
        self.checked = False
        self.exact = trainer.model.dtype == torch.float32 and not (trainer.args.bf16 or trainer.args.fp16)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the micro-batches of the first update; a resumed run has no first update."""
        if self.checked or state.global_step > 0 or not (self.trainer.args.disable_dropout and self.trainer.beta):
            return
        if self.trainer.precompute_ref_logps and not isinstance(self.trainer.model, PeftModel) and not self.exact:
            return  # TRL computed the reference with the 16-bit weights that were cast since
        self.checked = True
        metrics = self.trainer._metrics["train"]
        chosen, rejected = (max(map(abs, metrics[f"rewards/{side}"])) for side in ("chosen", "rejected"))
        nats = max(chosen, rejected) / self.trainer.beta
        off = (chosen + rejected) / 2  # a margin of m moves the sigmoid loss from ln 2 by m / 2
        # Cached log-probs were batched otherwise, hence rounded otherwise.
        exact = self.exact and not self.trainer.precompute_ref_logps
        if not nats <= FIRST_LOGPS_TOLERANCE["float32" if exact else "16 bits"]:  # NaN is refused too
            raise WrongReferenceError(
                f"The first loss should be ln 2 = {math.log(2):.4f} but is off by up to {off:.4f}: the policy does "
                f"not start at the reference model (implicit reward of chosen {chosen:.4f}, of rejected "
                f"{rejected:.4f}). Let TRL make the reference (ref_model=None), or pass the model that the policy "
                "starts from."
            )


def check_online(trainer: GRPOTrainer) -> None:
    """Nothing, if the prompts make a rollout, each leaves room for an answer and every reward model can score one.

    Args:
        trainer: Built, before `trainer.train`; of a streamed dataset no prompt is looked at.

    Raises:
        RecipeError: If not; nothing has been generated.
    """
    sets = [trainer.train_dataset, trainer.eval_dataset]
    sets = [each for one in sets for each in (one.values() if isinstance(one, dict) else [one])]
    prompts = [prompt for each in sets if isinstance(each, Dataset) for prompt in each["prompt"][:]]
    answer, rollout = trainer.max_completion_length, trainer.args.generation_batch_size
    if isinstance(sets[0], Dataset) and len(sets[0]) * trainer.num_generations < rollout:
        raise RecipeError(
            f"{len(sets[0])} prompts with num_generations={trainer.num_generations} make no rollout of "
            f"generation_batch_size={rollout} answers. Give more prompts, or lower generation_batch_size."
        )
    for scorer, tokenizer in zip(trainer.reward_funcs, trainer.reward_processing_classes, strict=True):
        if tokenizer is not None:
            model = trainer.accelerator.unwrap_model(scorer)
            check_reward_model(model, tokenizer, prompts, max_completion_length=answer)
    context = getattr(trainer.model.config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        return
    parts = (prompts[start : start + 1000] for start in range(0, len(prompts), 1000))
    lengths = [len(ids) for part in parts for ids in trainer._tokenize_prompts(part)[0]]
    if too_long := [length for length in lengths if length + answer > context]:
        raise RecipeError(
            f"{len(too_long):,} of {len(lengths):,} prompts have more than {context - answer} tokens, up to "
            f"{max(too_long):,}: with max_completion_length={answer} that is beyond the model's {context:,} positions. "
            "Shorten or drop them, or lower max_completion_length."
        )


class RolloutCheck:
    """Refuses scores of a rollout that are no numbers; says once where scores or answers cannot teach anything."""

    def __init__(self, trainer: GRPOTrainer) -> None:
        self.trainer = trainer
        self.said: set[str] = set()

    def __call__(self, scores: torch.Tensor, ended: torch.Tensor) -> None:
        """Look at the answers of all processes.

        Args:
            scores: Of this process's answers. Shape (answers,).
            ended: Whether an answer gave its end token. Shape (answers,).

        Raises:
            RecipeError: If a score is None, NaN or infinite.
        """
        scores, ended = map(self.trainer.accelerator.gather, (scores, ended))
        names = ", ".join(self.trainer.reward_func_names)
        if bad := int((~scores.isfinite()).sum()):
            raise RecipeError(
                f"{bad} of {len(scores)} answers got a score that is no number (NaN, None or infinite) from {names}. "
                "Return a number for every answer, or leave their prompts out."
            )
        if len(scores) > 1 and bool((scores == scores[0]).all()):
            self._say(
                f"All {len(scores)} answers of a rollout have the same score, {scores[0].item():g}: nothing to learn "
                f"from. See what {names} makes of them: log_completions=True shows them.",
                about="scores",
            )
        if not ended.any():
            most = self.trainer.max_completion_length
            self._say(
                f"None of a rollout's {len(ended)} answers has ended within {most} tokens. Raise "
                "max_completion_length, or start from a model that was taught to end its answers.",
                about="ends",
            )

    def each_function(self, rewards: torch.Tensor) -> None:
        """Look at the rewards of all processes: a function without a number for any answer is left out of the scores.

        Args:
            rewards: NaN where a function gave None. Shape (answers, reward functions).
        """
        for name, silent in zip(self.trainer.reward_func_names, rewards.isnan().all(dim=0), strict=True):
            if silent:
                self._say(f"{name} gave no number (NaN or None) for any of {len(rewards)} answers.", about=name)

    def _say(self, message: str, *, about: str) -> None:
        if about not in self.said and self.trainer.model.training and self.trainer.accelerator.is_main_process:
            logger.warning(message)
            self.said.add(about)


class InterruptCallback(TrainerCallback):
    """Turns the first SIGTERM or Ctrl-C into a checkpoint at the end of the step, and then exits with 143 or 130.

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
        """Take the two signals over."""
        self.previous = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}

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
            logger.warning(
                f"Saved {args.output_dir}/checkpoint-{state.global_step}. Continue with --resume_from_checkpoint true."
            )
            raise SystemExit(128 + self.signal)
