"""Begins a training run, and ends it: settings and guards before, weights, measurements and a page after."""

import fcntl
import logging
import os
import platform
import socket
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence, Sized
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from peft import PeftModel
from transformers import PreTrainedModel, ProgressCallback, Trainer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl import DPOTrainer, RewardTrainer

from dpo_recipes.ending import is_disk_full
from dpo_recipes.errors import RecipeError, UnhealthyRunError
from dpo_recipes.files import write_json, write_jsonl, write_text
from dpo_recipes.flags import grouped
from dpo_recipes.health.callback import HealthCallback
from dpo_recipes.health.guards import add_guards
from dpo_recipes.health.rules import read_findings
from dpo_recipes.machine import hardware
from dpo_recipes.manifest import NEW_FILES, claim, clear, declare, settle
from dpo_recipes.models.checkpoints import check_saved, trained_weights
from dpo_recipes.models.likelihood import sharded
from dpo_recipes.models.merge import merge_adapter, replace_adapter
from dpo_recipes.models.open import open_model
from dpo_recipes.models.rewards import Text, check_reloads
from dpo_recipes.ppo.trainer import PPOTrainer
from dpo_recipes.recipe import DONE_FILE, SETTINGS_FILE, OnlineArguments, RecipeArguments
from dpo_recipes.runs.before_after import Candidates, Outcome, Questions, Score, measure, not_measured
from dpo_recipes.runs.callbacks import DeclareCheckpoints, NoUpdateAfterTheLast, ProgressLines, Stopwatch
from dpo_recipes.runs.curves import side_by_side, table
from dpo_recipes.runs.metrics import rounds_of
from dpo_recipes.runs.model_card import LIBRARIES, cost, data_hash, weights_hash, write_model_card
from dpo_recipes.runs.page import draw_curves, write_run_page
from dpo_recipes.runs.verdict import verdict
from dpo_recipes.settings import settings_hash
from dpo_recipes.terminal import say
from dpo_recipes.tracking import send_results, start_tracking
from dpo_recipes.trl_patches import method_name

logger = logging.getLogger(__name__)

PROBED = 64  # tokens of a row on which a saved model is compared: little memory even with a large vocabulary
COMMANDS = {
    "evaluate": "dpo-recipes evaluate {0} --dataset_name DATA",
    "merge": "dpo-recipes merge {0} --output_dir {0}",
    "page": "dpo-recipes page {0}",
}
"""Commands that repeat a step of `finish_run` in the run's folder."""


def start_run(trainer: Trainer, script_args: RecipeArguments, *, reference_is_start: bool = True) -> None:
    """Adds the guards to a built trainer and takes its output folder: call it before `trainer.train`.

    With `overwrite` the files that an earlier run wrote into the folder are removed. No other file is ever removed.
    In a dry run that times updates the folder is left alone, and `trainer.train` ends the process after them.

    Args:
        trainer: Any transformers Trainer.
        script_args: As `parse_recipe` returned them.
        reference_is_start: As in `add_guards`.

    Raises:
        RecipeError: If another process trains in that folder, another machine does not see it, weights of the initial
            model are NaN or infinite, or the trainer does not know `tokens_per_step`.
    """
    budget = getattr(trainer, "tokens_per_step", None)
    asked = script_args.tokens_per_step and "tokens_per_step" in dict(grouped(sys.argv[1:]))
    if asked and not budget:  # a profile's value is for the trainers that know it
        raise RecipeError(
            f"tokens_per_step has no effect on {type(trainer).__name__}. Train with SharedPrefixDPOTrainer, which "
            "shared_prefix=false makes plain TRL, or leave --tokens_per_step out."
        )
    _refuse_broken_model(trainer)
    add_guards(trainer, reference_is_start=reference_is_start)
    if script_args.is_dry_run:
        trainer.add_callback(Stopwatch(script_args.timed_updates))
        return
    _add_callbacks(trainer, script_args)
    folder = Path(trainer.args.output_dir)
    if trainer.args.should_save:  # the main process, with save_on_each_node one process of each machine
        take_folder(folder, script_args)
    _refuse_hidden_folder(trainer, folder)
    trainer.on_halved = partial(_store_budget, trainer, script_args)
    start_tracking(trainer, script_args.settings)
    trainable = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in trainer.model.parameters())
    unit = "pairs" if isinstance(trainer, DPOTrainer) or not isinstance(script_args, OnlineArguments) else "answers"
    say(
        f"Training {trainable:,} of {total:,} weights on {trainer.accelerator.device}. An update: "
        f"{script_args.pairs_per_update} {unit} = {trainer.args.per_device_train_batch_size} a device x "
        f"{trainer.args.world_size} process(es) x {trainer.args.gradient_accumulation_steps} accumulated."
        + (f" Micro-batches hold up to {budget:,} tokens." if budget else "")
        + _said_of_the_end(trainer)
    )


def _said_of_the_end(trainer: Trainer) -> str:
    """A sentence about the pairs that accelerate repeats so that all processes have as many; empty without any."""
    at_once = trainer.args.per_device_train_batch_size * trainer.args.world_size
    repeated = -len(trainer.train_dataset) % at_once if isinstance(trainer.train_dataset, Sized) else 0
    if trainer.args.world_size == 1 or not repeated or trainer.args.dataloader_drop_last:
        return ""
    return f" The last {at_once} rows of an epoch are filled up with {repeated} of its first ones, which count twice."


def _refuse_broken_model(trainer: Trainer) -> None:
    plain = (torch.float32, torch.bfloat16, torch.float16)
    weights = [(name, each) for name, each in trainer.model.named_parameters() if each.dtype in plain]
    if broken := [name for name, each in weights if not (each.is_meta or each.isfinite().all())]:
        raise RecipeError(
            f"{len(broken)} weights of the initial model are NaN or infinite ({broken[0]}, ...). Its files are "
            "damaged, or it was trained until it broke. Name another model with --model_name_or_path."
        )


def _add_callbacks(trainer: Trainer, script_args: RecipeArguments) -> None:
    trainer.add_callback(NoUpdateAfterTheLast(trainer))
    if not trainer.args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(ProgressLines())
    if script_args.health != "off":
        trainer.add_callback(HealthCallback(trainer, script_args.health, partial(_show_broken, trainer)))
    trainer.add_callback(DeclareCheckpoints())  # the last one: the others decide whether there is a checkpoint


def _show_broken(trainer: Trainer) -> None:
    """Draws the curves of a broken run and writes its page, without the measurements of a finished one."""
    folder = Path(trainer.args.output_dir)
    draw_curves(folder, trainer.state.log_history)
    say(f"What happened until then: {write_run_page(folder)}")


def take_folder(folder: Path, script_args: RecipeArguments) -> None:
    """Locks the folder, removes an earlier run if that is asked for, and writes settings and packages."""
    _lock(folder)
    (folder / DONE_FILE).unlink(missing_ok=True)
    if script_args.overwrite and (removed := clear(folder, but="preflight.json")):  # which this run has just written
        say(f"Removed the earlier run in {folder}: {', '.join(removed)}.")
    write_json(folder / SETTINGS_FILE, script_args.settings)
    packages = sorted(f"{item.metadata['Name']}=={item.version}" for item in distributions())
    write_text(folder / "environment.txt", "\n".join(packages) + "\n")


def _store_budget(trainer: Trainer, script_args: RecipeArguments, budget: int) -> None:
    """Writes a budget that was halved in training into the settings, so that a resumed run takes it."""
    script_args.settings["tokens_per_step"] = budget
    if trainer.is_world_process_zero():
        write_json(Path(trainer.args.output_dir) / SETTINGS_FILE, script_args.settings)


def _refuse_hidden_folder(trainer: Trainer, folder: Path) -> None:
    """Raises RecipeError if a machine cannot see the main one's output folder and is to keep no checkpoints itself."""
    if int(os.environ.get("GROUP_WORLD_SIZE", "1")) < 2 or trainer.args.save_on_each_node:
        return
    lock, token = folder / ".lock", ""
    [expected] = broadcast_object_list([lock.read_text() if trainer.is_world_process_zero() else None])
    for _ in range(20):  # a network disk may show a new file late
        token = lock.read_text() if lock.exists() else ""
        if token == expected:
            break
        time.sleep(0.5)
    if blind := [rank for rank, seen in enumerate(gather_object([token])) if seen != expected]:
        raise RecipeError(
            f"The machine of rank {blind[0]} does not see {folder} of the main machine, so that it could not resume. "
            "Put the folder on a file system that all machines share, or let each keep checkpoints of its own: "
            "--save_on_each_node true."
        )


def _lock(folder: Path) -> None:
    """Holds the folder until this process ends, however it ends. The file's text is this process's own."""
    claim(folder, ".lock", "completions")  # TRL writes the latter with --log_completions true
    lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise RecipeError(
            f"Another run is training in {folder}. Wait for it, or choose another --output_dir."
        ) from error
    os.truncate(lock, 0)
    os.write(lock, f"{socket.gethostname()} {os.getpid()} {time.time()}".encode())


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
    candidates: Candidates | None = None,
) -> None:
    """Saves the trained weights, checks them, measures the model against the reference model, and writes the files.

    The weights are saved first. An error after that loses none of them: it becomes a warning in the terminal, in
    README.md and in done.json, with the command that repeats the failed step.

    Args:
        trainer: After `trainer.train`.
        script_args: As `parse_recipe` returned them.
        merge: Save the base model with the LoRA adapter merged into it, so that a later stage can start from it.
        strata: A column of the held-out pairs; accuracy is also given for each of its values.
        score: Scores an answer to a prompt, each entry in [0, 1], for the table before and after.
        prompts: Prompts that both models answer; by default 16 of the held-out ones, drawn by seed, or 64 after PPO or
            RLOO.
        max_new_tokens: Length in tokens at which an answer is cut.
        temperatures: Temperatures of the answers; 0 is greedy.
        candidates: For a reward model, marked answers to prompts that it has not seen: `prompt`, `completions`, `right`
            and, for a majority vote, `votes`. The best of N answers by its score is measured against chance.

    Raises:
        UnhealthyRunError: If a trained weight is NaN or infinite; curves and page are written, and nothing else.
    """
    folder = Path(trainer.args.output_dir)
    later = _Later(folder)
    _refuse_broken_weights(trainer)
    _save(trainer, folder)
    outcome = not_measured(trainer)
    with later.step("Measuring the model", "evaluate", together=trainer.args.world_size > 1):
        questions = Questions(score, prompts, max_new_tokens, temperatures, candidates)
        outcome = measure(trainer, script_args, strata, questions)
    if trainer.is_world_process_zero():
        model = trainer.accelerator.unwrap_model(trainer.model)
        if merge and isinstance(model, PeftModel):
            with later.step("Merging the LoRA adapter", "merge"):
                model = _merge(trainer, folder)
        if isinstance(trainer, RewardTrainer) and not (isinstance(model, PeftModel) or sharded(trainer)):
            with later.step("Checking the saved reward model", "evaluate"), trainer.accelerator.autocast():
                check_reloads(str(folder), model, _probe(trainer))
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        outcome.metrics["verdict"] = verdict(outcome.metrics)
        files = _write_files(trainer, script_args, outcome, later)
        _show(folder, outcome, later.failures, files)


class _Later:
    """The steps after the weights are saved: an error in one becomes a warning, so that no trained weight is lost."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.failures: list[str] = []

    @contextmanager
    def step(self, name: str, command: str, *, together: bool = False) -> Iterator[None]:
        """Turns an error in the block into a warning that names the command of COMMANDS which repeats the step.

        An error in a step that several processes do together is raised: the other processes may wait for this one.
        """
        try:
            yield
        except Exception as error:
            if together:
                raise
            reason = textwrap.shorten(f"{type(error).__name__}: {error}", 300)
            again = COMMANDS[command].format(self.folder)
            self.failures.append(f"{name} failed ({reason}). Repeat it with: {again}")
            logger.warning(self.failures[-1], exc_info=None if is_disk_full(error) else error)


def _refuse_broken_weights(trainer: Trainer) -> None:
    trained = (weight for weight in trainer.model.parameters() if weight.requires_grad)
    if sharded(trainer) or all(weight.isfinite().all() for weight in trained):
        return
    if trainer.is_world_process_zero():
        _show_broken(trainer)
    trainer.accelerator.wait_for_everyone()
    raise UnhealthyRunError(
        "The trained weights are NaN or infinite: nothing is saved or measured. Train again with a lower learning rate "
        "and --overwrite true; with --health stop the run ends before it saves such weights."
    )


def _save(trainer: Trainer, folder: Path) -> None:
    """Saves the trained weights, and raises RuntimeError unless the folder holds them bit for bit."""
    if trainer.args.should_save:
        declare(folder, NEW_FILES)
    trainer.save_model(str(folder))
    if trainer.args.should_save:
        if not sharded(trainer):
            with trainer.without_critic() if isinstance(trainer, PPOTrainer) else nullcontext():
                check_saved(folder, trained_weights(trainer.accelerator.unwrap_model(trainer.model)))
        settle(folder, NEW_FILES)


def _merge(trainer: Trainer, folder: Path) -> PreTrainedModel:
    """Replaces the saved LoRA adapter by a full model with the adapter merged into it, and returns that model."""
    # Without accelerate's wrapper, under which a float32 model computes in 16 bits too.
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    is_reward_model = isinstance(trainer, RewardTrainer)
    if getattr(model, "is_quantized", False) or sharded(trainer):  # merge into the base's own weights, read whole
        unset_hf_deepspeed_config()  # under which ZeRO-3 would divide this model, too
        how: dict[str, Any] = {"device_map": {"": "cpu"}} if sharded(trainer) else {}  # no card may have room for it
        how |= dict(as_trained=False, reward_model=is_reward_model, trust_remote_code=trainer.args.trust_remote_code)
        model, _ = open_model(str(folder), **how)
    merged = merge_adapter(model, _probe(trainer))
    replace_adapter(folder, merged)
    return merged


def _probe(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Token ids and mask of the first tokens of a few training rows. Each has shape (rows, tokens)."""
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(min(4, len(trainer.train_dataset)))])
    parts = {name: batch[name][:, :PROBED] for name in ("input_ids", "attention_mask")}
    return {name: part.to(trainer.accelerator.device) for name, part in parts.items()}


def _write_files(trainer: Trainer, script_args: RecipeArguments, outcome: Outcome, later: _Later) -> list[Path]:
    """Writes the files of a finished run, and returns the paths of those that a user opens first."""
    folder, spent, files = later.folder, cost(trainer), []
    warnings = outcome.warnings + [str(finding) for finding in read_findings(folder)]
    shown = {"table": table(outcome.header, outcome.rows) if outcome.rows else "", "note": outcome.note}
    with later.step("Writing the metrics", "evaluate"):
        rounds = {"rounds": found} if (found := rounds_of(folder)) else {}
        metrics = outcome.metrics | rounds | shown | {"warnings": warnings, "cost": spent}
        files.append(write_json(folder / "metrics.json", metrics))
    if outcome.answers:
        with later.step("Writing the answers", "evaluate"):
            files.append(write_jsonl(folder / "samples.jsonl", outcome.answers))
    with later.step("Drawing the curves", "page"):
        files.append(draw_curves(folder, trainer.state.log_history))
    record = _record(trainer, script_args) | spent
    write_json(folder / DONE_FILE, record | {"warnings": later.failures})
    with later.step("Writing the model card", "page"):
        write_model_card(folder)
    with later.step("Writing the page", "page"):
        files.append(write_run_page(folder))
    later.failures += send_results(trainer, outcome.header, outcome.rows)
    write_json(folder / DONE_FILE, record | {"warnings": later.failures})
    return files


def _record(trainer: Trainer, script_args: RecipeArguments) -> dict[str, Any]:
    """Content of done.json, without the run's cost."""
    judges = [part.config for part in getattr(trainer, "reward_funcs", []) if isinstance(part, PreTrainedModel)]
    return {
        "method": method_name(trainer) + (" in rounds" if rounds_of(Path(trainer.args.output_dir)) else ""),
        "settings_hash": settings_hash(script_args.settings),
        "data_hash": data_hash(trainer.train_dataset),
        "start_hash": weights_hash(trainer.accelerator.unwrap_model(trainer.model).config.name_or_path),
        "reward_model_hashes": [weights_hash(config.name_or_path) for config in judges],
        "request": os.environ.get("DPO_RECIPES_REQUEST"),
        "seed": trainer.args.seed,
        "training_rows": len(trainer.train_dataset),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in LIBRARIES} | {"python": platform.python_version()},
        "hardware": hardware(trainer.accelerator.device, trainer.args.world_size),
    }


def _show(folder: Path, outcome: Outcome, failures: Sequence[str], files: Sequence[Path]) -> None:
    """Shows the table, the warnings, three prompts with both answers, and the paths."""
    if outcome.rows:
        say(f"\n{table(outcome.header, outcome.rows)}\n{outcome.note}\n")
    for warning in [*outcome.warnings, *failures]:
        say(f"WARNING: {warning}\n", always=True)
    if outcome.answers:
        say(side_by_side(outcome.answers[:3]) + "\n")
    kind = "LoRA adapter" if (folder / "adapter_config.json").exists() else "Model"
    say("\n".join([f"{kind:<13}{folder}", *(f"{file.name:<13} {file}" for file in files)]))
    say(f"\n{outcome.metrics['verdict']['sentence']}", always=True)
