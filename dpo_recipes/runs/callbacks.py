"""Callbacks that every run has: its progress lines, the list of its checkpoints, and no update after the last."""

import time
from itertools import pairwise
from statistics import fmean
from typing import Any

from accelerate import PartialState
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dpo_recipes.machine import peak_memory
from dpo_recipes.manifest import declare, settle
from dpo_recipes.runs.metrics import LINES
from dpo_recipes.terminal import duration, say
from dpo_recipes.trl_patches import skip_epochs


class ProgressLines(ProgressCallback):
    """Shows the progress bar, and one short line for each log instead of a dict of fifteen metrics."""

    def on_train_begin(self, *given: Any, **more: Any) -> None:
        """Names the bar."""
        super().on_train_begin(*given, **more)
        if self.training_bar is not None:
            self.training_bar.set_description("Training", refresh=False)

    def on_prediction_step(self, *given: Any, **more: Any) -> None:
        """Names the bar of an evaluation."""
        super().on_prediction_step(*given, **more)
        if self.prediction_bar is not None:
            self.prediction_bar.set_description("Evaluating", refresh=False)

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **_: Any) -> None:
        """Writes the line above the bar. Token accuracy is left out where the rewards say more."""
        logs = {name: value for name, value in (logs or {}).items() if value is not None}
        kind = "eval_" if "eval_loss" in logs else ""
        shown = [words.format(logs[kind + key]) for key, words in LINES.items() if kind + key in logs]
        if f"{kind}rewards/margins" in logs:
            shown = [part for part in shown if not part.startswith("token accuracy")]
        if kind and shown:
            shown[0] = f"held out: {shown[0]}"
        if state.is_world_process_zero and shown and self.training_bar is not None:
            self.training_bar.write(f"  {state.global_step:>5}  " + "  ".join(shown))


def _names(state: TrainerState) -> tuple[str, str]:
    return f"checkpoint-{state.global_step}", "README.md"  # the draft of a model card that TRL writes with it


class DeclareCheckpoints(TrainerCallback):
    """Declares the files of each checkpoint as the run's before they are written, and lists them afterwards."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Declares the checkpoint of this update."""
        if control.should_save and args.should_save:
            declare(args.output_dir, *_names(state))

    on_epoch_end = on_step_end

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Lists the files that all processes have written."""
        PartialState().wait_for_everyone()
        if args.should_save:
            settle(args.output_dir, *_names(state))


class NoUpdateAfterTheLast(TrainerCallback):
    """Keeps a run that is resumed at its last update from making another, as transformers 5.23 does within an epoch."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Leaves out the epochs where no update is left."""
        if state.global_step >= state.max_steps:
            skip_epochs(self.trainer)


class Stopwatch(TrainerCallback):
    """Times some updates, says how long all of them would take, and ends the process with status 0."""

    def __init__(self, updates: int) -> None:
        self.updates = updates

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Takes the time."""
        self.marks = [time.monotonic()]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Takes the time, without a log, an evaluation or a checkpoint; the first update is not counted, if it can be.

        Raises:
            SystemExit: With status 0, after the last timed update.
        """
        control.should_log = control.should_evaluate = control.should_save = False
        self.marks.append(time.monotonic())
        if state.global_step <= self.updates and state.global_step < state.max_steps:
            return
        seconds = [after - before for before, after in pairwise(self.marks)]
        timed = seconds[1:] or seconds
        each = fmean(timed)
        say(
            f"About {duration(each * state.max_steps)} for {state.max_steps:,} updates on this machine, "
            f"{each:.2g} s each ({len(timed)} timed), with {peak_memory() / 2**20:,.0f} MiB of memory at most. "
            "Evaluations and the measurements at the end come on top. Nothing was kept.",
            always=True,
        )
        raise SystemExit(0)
