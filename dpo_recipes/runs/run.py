"""A run's folder, from its start to the files that say what it did."""

import fcntl
import logging
import os
import platform
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import PartialState
from peft import PeftModel
from transformers import (
    PreTrainedModel,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import RewardTrainer

from dpo_recipes.errors import RecipeError, UnhealthyRunError
from dpo_recipes.files import write_json, write_jsonl, write_text
from dpo_recipes.health.callback import HealthCallback
from dpo_recipes.health.guards import add_guards
from dpo_recipes.health.rules import read_findings
from dpo_recipes.manifest import NEW_FILES, claim, clear, declare, settle
from dpo_recipes.models.checkpoints import MERGING, check_saved, merge_adapter, replace_adapter, trained_weights
from dpo_recipes.models.likelihood import sharded
from dpo_recipes.models.open import open_model
from dpo_recipes.models.rewards import Text, check_reloads
from dpo_recipes.ppo.trainer import PPOTrainer
from dpo_recipes.recipe import DONE_FILE, SETTINGS_FILE, OnlineArguments, RecipeArguments, is_disk_full, settings_hash
from dpo_recipes.runs.before_after import Outcome, Score, measure, not_measured, readable
from dpo_recipes.runs.curves import plot_curves, side_by_side, table
from dpo_recipes.runs.model_card import LIBRARIES, cost, data_hash, hardware, model_card, weights_hash
from dpo_recipes.runs.page import write_run_page
from dpo_recipes.terminal import say
from dpo_recipes.tracking import start_tracking
from dpo_recipes.trl_patches import method_name, skip_epochs

logger = logging.getLogger(__name__)

PROBED = 64  # tokens of a row by which a saved model is compared: little memory beside a large vocabulary


def start_run(trainer: Trainer, script_args: RecipeArguments) -> None:
    """Put the guards on a built trainer and take its output folder: call it before `trainer.train`.

    With `overwrite` the files that an earlier run wrote there are removed. Nothing else is, and nothing without it.

    Raises:
        RecipeError: If another process trains in that folder, or the model to start from has weights that are NaN.
    """
    _refuse_broken_start(trainer)
    add_guards(trainer)
    trainer.add_callback(NoUpdateAfterTheLast(trainer))
    if not trainer.args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(ProgressLines())
    if script_args.health != "off":
        trainer.add_callback(HealthCallback(trainer, script_args.health, partial(_show_stopped, trainer, script_args)))
    trainer.add_callback(DeclareCheckpoints())  # the last one: the others decide whether there is a checkpoint
    folder = Path(trainer.args.output_dir)
    if trainer.is_world_process_zero():
        _lock(folder)
        (folder / DONE_FILE).unlink(missing_ok=True)
        if script_args.overwrite and (removed := clear(folder, but="preflight.json")):  # is new
            say(f"Removed the earlier run in {folder}: {', '.join(removed)}.")
        write_json(folder / SETTINGS_FILE, script_args.settings)
        packages = sorted(f"{item.metadata['Name']}=={item.version}" for item in distributions())
        write_text(folder / "environment.txt", "\n".join(packages) + "\n")
    start_tracking(trainer, script_args.settings)
    trainable = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in trainer.model.parameters())
    unit = "answers" if isinstance(script_args, OnlineArguments) else "pairs"
    say(
        f"Training {trainable:,} of {total:,} weights on {trainer.accelerator.device}. An update: "
        f"{script_args.pairs_per_update} {unit} = {trainer.args.per_device_train_batch_size} a device x "
        f"{trainer.args.world_size} process(es) x {trainer.args.gradient_accumulation_steps} accumulated."
    )


def _refuse_broken_start(trainer: Trainer) -> None:
    plain = (torch.float32, torch.bfloat16, torch.float16)
    weights = [(name, each) for name, each in trainer.model.named_parameters() if each.dtype in plain]
    if broken := [name for name, each in weights if not (each.is_meta or each.isfinite().all())]:
        raise RecipeError(
            f"{len(broken)} weights of the model to start from are NaN or infinite ({broken[0]}, ...). "
            "Its files are damaged, or it was trained until it broke: name another with --model_name_or_path."
        )


def _show_stopped(trainer: Trainer, script_args: RecipeArguments) -> None:
    """A broken run can be looked at: its curves, and the page without what is measured at the end."""
    folder = Path(trainer.args.output_dir)
    plot_curves(trainer.state.log_history, folder / "curves.png", title=_title(folder, script_args))
    say(f"What happened until then: {write_run_page(folder)}")


def _title(folder: Path, script_args: RecipeArguments) -> str:
    return f"{folder.name}: {script_args.settings.get('model_name_or_path')} on {script_args.dataset_name}"


def _lock(folder: Path) -> None:
    """Hold the folder until this process ends, however it ends."""
    claim(folder, ".lock", "completions")  # TRL writes the latter with --log_completions true
    lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise RecipeError(
            f"Another run is training in {folder}. Wait for it, or choose another --output_dir."
        ) from error


class NoUpdateAfterTheLast(TrainerCallback):
    """Keeps a run that is resumed from its last update from making another: transformers 5.23 does within an epoch."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave out the epochs where no update is left."""
        if state.global_step >= state.max_steps:
            skip_epochs(self.trainer)


class DeclareCheckpoints(TrainerCallback):
    """Lists the files of each checkpoint as the run's, and declares them before they are written."""

    @staticmethod
    def _names(state: TrainerState) -> tuple[str, str]:
        return f"checkpoint-{state.global_step}", "README.md"  # the draft of a model card that TRL writes with it

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Declare the checkpoint of this update."""
        if control.should_save and state.is_world_process_zero:
            declare(args.output_dir, *self._names(state))

    on_epoch_end = on_step_end

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """List what all processes have written."""
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            settle(args.output_dir, *self._names(state))


class ProgressLines(ProgressCallback):
    """The progress bar, and one short line for each log instead of a dict of fifteen metrics."""

    SHOWN: ClassVar[dict[str, str]] = {
        "loss": "loss {:.4f}",
        "eval_loss": "held-out loss {:.4f}",
        "mean_token_accuracy": "token accuracy {:.3f}",
        "rewards/accuracies": "reward accuracy {:.3f}",
        "eval_rewards/accuracies": "reward accuracy {:.3f}",
        "rewards/margins": "margin {:+.3f}",
        "accuracy": "accuracy {:.3f}",
        "eval_accuracy": "accuracy {:.3f}",
        "margin": "margin {:+.3f}",
        "logps/chosen": "chosen {:.1f} nats",
        "reward": "score {:+.3f}",
        "eval_reward": "held-out score {:+.3f}",
        "kl": "KL {:.3f}",
        "entropy": "entropy {:.2f}",
        "completions/mean_length": "{:.0f} tokens",
        "value/explained_variance": "explained variance {:.2f}",
        "grad_norm": "gradient {:.2f}",
    }

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the line above the bar."""
        shown = [text.format(logs[name]) for name, text in self.SHOWN.items() if logs and logs.get(name) is not None]
        if "rewards/margins" in (logs or {}):
            shown = [part for part in shown if not part.startswith("token accuracy")]
        if state.is_world_process_zero and shown and self.training_bar is not None:
            self.training_bar.write(f"  {state.global_step:>5}  " + "  ".join(shown))


def finish_run(
    trainer: Trainer,
    script_args: RecipeArguments,
    *,
    merge: bool = False,
    strata: str | None = None,
    score: Score | None = None,
    prompts: Sequence[Text] | None = None,
    max_new_tokens: int = 128,
    temperatures: Sequence[float] = (0.0,),
) -> None:
    """Save what was trained, prove it, measure it against its start, and write the run's files.

    The weights are saved first. What fails after that loses nothing: it becomes a warning, in the terminal, in
    metrics.json and in done.json, with the command that repeats it.

    Args:
        trainer: After `trainer.train`.
        script_args: As `parse_recipe` returned them.
        merge: Save the base model with the LoRA adapter merged into it, which a later stage can start from.
        strata: A column of the held-out pairs; accuracy is given for each of its values too.
        score: Scores an answer to a prompt, each entry in [0, 1], for the table before and after.
        prompts: To answer before and after; by default 16 of the held-out ones, drawn by seed, or 64 after PPO or
            RLOO.
        max_new_tokens: Where an answer is cut.
        temperatures: Of the answers; 0 is greedy.

    Raises:
        UnhealthyRunError: If a trained weight is NaN or infinite; curves and page are written, and nothing else.
    """
    folder = Path(trainer.args.output_dir)
    trained = (weight for weight in trainer.model.parameters() if weight.requires_grad)
    if not sharded(trainer) and not all(weight.isfinite().all() for weight in trained):
        if trainer.is_world_process_zero():
            _show_stopped(trainer, script_args)
        trainer.accelerator.wait_for_everyone()
        raise UnhealthyRunError(
            "The trained weights are NaN or infinite: nothing is saved or measured. Train again with a lower learning "
            "rate and --overwrite true; with --health stop it ends before it saves such weights."
        )
    if trainer.is_world_process_zero():
        declare(folder, NEW_FILES)
    _save(trainer, folder)
    if trainer.is_world_process_zero():
        settle(folder, NEW_FILES)
    later = _Later()
    outcome = not_measured(trainer)
    together = trainer.args.world_size > 1
    with later.part("Measuring the model", f"dpo-recipes evaluate {folder} --dataset_name DATA", together=together):
        outcome = measure(
            trainer,
            script_args,
            strata=strata,
            score=score,
            prompts=prompts,
            max_new_tokens=max_new_tokens,
            temperatures=temperatures,
        )
    if trainer.is_world_process_zero():
        model = trainer.accelerator.unwrap_model(trainer.model)
        if merge and isinstance(model, PeftModel):
            with later.part("Merging the LoRA adapter", f"dpo-recipes merge {folder} --output_dir {folder}"):
                model = _merge(trainer, folder)
        if isinstance(trainer, RewardTrainer) and not (isinstance(model, PeftModel) or sharded(trainer)):
            again = f"dpo-recipes evaluate {folder} --dataset_name DATA"
            with later.part("Checking the saved reward model", again), trainer.accelerator.autocast():
                check_reloads(str(folder), model, _probe(trainer))
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        _write(trainer, script_args, outcome, later)


class _Later:
    """The parts that follow the saved weights: a failure becomes a warning, so that nothing trained is lost."""

    def __init__(self) -> None:
        self.failures: list[str] = []

    @contextmanager
    def part(self, what: str, command: str, *, together: bool = False) -> Iterator[None]:
        """Turns an error in the block into a warning that names the command that repeats it.

        What several processes do together raises the error: the others may wait for this one.
        """
        try:
            yield
        except Exception as error:
            if together:
                raise
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            self.failures.append(f"{what} failed ({textwrap.shorten(reason, 300)}). Repeat it with: {command}")
            logger.warning(self.failures[-1], exc_info=None if is_disk_full(error) else error)


def _write(trainer: Trainer, script_args: RecipeArguments, outcome: Outcome, later: _Later) -> None:
    """The files of a finished run, and what the terminal shows of it."""
    folder = Path(trainer.args.output_dir)
    again = f"dpo-recipes page {folder}"
    spent, answers, files = cost(trainer), outcome.answers, []
    warnings = outcome.warnings + [str(finding) for finding in read_findings(folder)]
    report = table(outcome.header, outcome.rows) if outcome.rows else ""
    if answers:
        with later.part("Writing the answers", f"dpo-recipes evaluate {folder} --dataset_name DATA"):
            files.append(write_jsonl(folder / "samples.jsonl", answers))
    with later.part("Drawing the curves", again):
        files.append(plot_curves(trainer.state.log_history, folder / "curves.png", title=_title(folder, script_args)))
    with later.part("Writing the metrics", f"dpo-recipes evaluate {folder} --dataset_name DATA"):
        more = {"table": report, "note": outcome.note, "warnings": warnings, "cost": spent}
        files.insert(0, write_json(folder / "metrics.json", outcome.metrics | more))
    record = _record(trainer, script_args) | spent
    write_json(folder / DONE_FILE, record | {"warnings": later.failures})
    with later.part("Writing the model card", again):
        write_text(folder / "README.md", model_card(folder))
    with later.part("Writing the page", again):
        files.append(write_run_page(folder))
    write_json(folder / DONE_FILE, record | {"warnings": later.failures})
    if report:
        say(f"\n{report}\n{outcome.note}\n")
    for warning in outcome.warnings + later.failures:
        say(f"WARNING: {warning}\n")
    if answers:
        say(side_by_side(readable(answers[:3])) + "\n")
    kind = "LoRA adapter" if (folder / "adapter_config.json").exists() else "Model"
    say("\n".join([f"{kind:<13}{folder}", *(f"{file.name:<13} {file}" for file in files)]))


def _record(trainer: Trainer, script_args: RecipeArguments) -> dict[str, Any]:
    """Content of done.json, without the run's cost."""
    judges = [part.config for part in getattr(trainer, "reward_funcs", []) if isinstance(part, PreTrainedModel)]
    return {
        "method": method_name(trainer),
        "settings_hash": settings_hash(script_args.settings),
        "data_hash": data_hash(trainer.train_dataset),
        "start_hash": weights_hash(trainer.accelerator.unwrap_model(trainer.model).config),
        "reward_model_hashes": [weights_hash(config) for config in judges],
        "request": os.environ.get("DPO_RECIPES_REQUEST"),
        "seed": trainer.args.seed,
        "training_rows": len(trainer.train_dataset),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in LIBRARIES} | {"python": platform.python_version()},
        "hardware": hardware(trainer.accelerator.device, trainer.args.world_size),
    }


def _save(trainer: Trainer, folder: Path) -> None:
    """Saves the trained weights, and raises RuntimeError unless they lie there bit for bit."""
    trainer.save_model(str(folder))
    if trainer.is_world_process_zero() and not sharded(trainer):
        with trainer.without_critic() if isinstance(trainer, PPOTrainer) else nullcontext():
            check_saved(folder, trained_weights(trainer.accelerator.unwrap_model(trainer.model)))


def _probe(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Token ids and mask of the beginning of a few training rows. Each has shape (rows, tokens)."""
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(min(4, len(trainer.train_dataset)))])
    parts = {name: batch[name][:, :PROBED] for name in ("input_ids", "attention_mask")}
    return {name: part.to(trainer.accelerator.device) for name, part in parts.items()}


def _merge(trainer: Trainer, folder: Path) -> PreTrainedModel:
    """Puts a full model, with the LoRA adapter merged into it, in the place of the adapter, and returns it."""
    # Without accelerate's wrapper, under which a float32 model computes in 16 bits too.
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    is_reward_model = isinstance(trainer, RewardTrainer)
    if getattr(model, "is_quantized", False):  # merge into the base's own weights, not the 4-bit ones
        trusted = trainer.args.trust_remote_code
        model, _ = open_model(str(folder), as_trained=False, reward_model=is_reward_model, trust_remote_code=trusted)
    merged = merge_adapter(model, _probe(trainer))
    declare(folder, NEW_FILES, MERGING)
    replace_adapter(folder, merged)
    settle(folder, NEW_FILES, MERGING)
    return merged
