"""A run's folder, from its start to the files that say what it did."""

import fcntl
import os
import platform
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any, ClassVar

from peft import PeftModel
from transformers import PreTrainedModel, ProgressCallback, Trainer, TrainerControl, TrainerState, TrainingArguments
from trl import RewardTrainer

from dpo_recipes.checkpoints import check_saved, merge_adapter, trained_weights
from dpo_recipes.errors import RecipeError, UnhealthyRunError
from dpo_recipes.files import write_json, write_jsonl, write_text
from dpo_recipes.guards import add_guards
from dpo_recipes.health import HealthCallback
from dpo_recipes.health.rules import HEALTH_FILE, read_findings
from dpo_recipes.models import open_model
from dpo_recipes.outcome import Score, measure, readable, sharded
from dpo_recipes.ppo import PPOTrainer
from dpo_recipes.recipe import DONE_FILE, SETTINGS_FILE, OnlineArguments, RecipeArguments, settings_hash
from dpo_recipes.record import LIBRARIES, cost, data_hash, hardware, model_card, weights_hash
from dpo_recipes.report import plot_curves, side_by_side, table
from dpo_recipes.rewards import Text, check_reloads
from dpo_recipes.run_page import RUN_PAGE, write_run_page
from dpo_recipes.terminal import say
from dpo_recipes.tracking import start_tracking

RESULTS = (
    *(DONE_FILE, SETTINGS_FILE, "metrics.json", "samples.jsonl", "curves.png", "README.md", "environment.txt"),
    *("eval.json", "eval.jsonl", "eval.html", HEALTH_FILE, RUN_PAGE),
    *("*.safetensors", "*.safetensors.index.json", "adapter_config.json", "config.json", "generation_config.json"),
)


def start_run(trainer: Trainer, script_args: RecipeArguments) -> None:
    """Put the guards on a built trainer and take its output folder: call it before `trainer.train`.

    A run that does not resume begins with an empty folder: what an earlier one left there is removed, `parse_recipe`
    having made sure that it is the same run or that `overwrite` was given.

    Raises:
        RecipeError: If another process trains in that folder.
    """
    add_guards(trainer)
    if not trainer.args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(ProgressLines())
    if script_args.health != "off":
        trainer.add_callback(HealthCallback(trainer, script_args.health, partial(_show_stopped, trainer, script_args)))
    folder = Path(trainer.args.output_dir)
    if trainer.is_world_process_zero():
        _lock(folder)
        (folder / DONE_FILE).unlink(missing_ok=True)
        if trainer.args.resume_from_checkpoint is None:
            for checkpoint in folder.glob("checkpoint-*"):
                shutil.rmtree(checkpoint)
            for file in [file for pattern in RESULTS for file in folder.glob(pattern)]:
                file.unlink()
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


def _show_stopped(trainer: Trainer, script_args: RecipeArguments) -> None:
    """A broken run can be looked at: its curves, and the page without what is measured at the end."""
    folder = Path(trainer.args.output_dir)
    plot_curves(trainer.state.log_history, folder / "curves.png", title=_title(folder, script_args))
    say(f"What happened until then: {write_run_page(folder)}")


def _title(folder: Path, script_args: RecipeArguments) -> str:
    return f"{folder.name}: {script_args.settings.get('model_name_or_path')} on {script_args.dataset_name}"


def _lock(folder: Path) -> None:
    """Hold the folder until this process ends, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise RecipeError(
            f"Another run is training in {folder}. Wait for it, or choose another --output_dir."
        ) from error


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
    _save(trainer, folder, merge=merge)
    outcome = measure(
        trainer,
        script_args,
        strata=strata,
        score=score,
        prompts=prompts,
        max_new_tokens=max_new_tokens,
        temperatures=temperatures,
    )
    trainer.accelerator.wait_for_everyone()
    if not trainer.is_world_process_zero():
        return
    spent, answers = cost(trainer), outcome.answers
    warnings = outcome.warnings + [str(finding) for finding in read_findings(folder)]
    more = {"note": outcome.note, "warnings": warnings, "cost": spent}
    files = [write_json(folder / "metrics.json", outcome.metrics | more)]
    if answers:
        files.append(write_jsonl(folder / "samples.jsonl", answers))
    files.append(plot_curves(trainer.state.log_history, folder / "curves.png", title=_title(folder, script_args)))
    report = table(outcome.header, outcome.rows) if outcome.rows else ""
    write_text(folder / "README.md", model_card(trainer, script_args, spent, report, outcome.note, warnings))
    judges = [part.config for part in getattr(trainer, "reward_funcs", []) if isinstance(part, PreTrainedModel)]
    write_json(
        folder / DONE_FILE,
        {
            "method": trainer._name,
            "settings_hash": settings_hash(script_args.settings),
            "data_hash": data_hash(trainer.train_dataset),
            "start_hash": weights_hash(trainer.accelerator.unwrap_model(trainer.model).config),
            "reward_model_hashes": [weights_hash(config) for config in judges],
            "request": os.environ.get("DPO_RECIPES_REQUEST"),
            "seed": trainer.args.seed,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": {name: version(name) for name in LIBRARIES} | {"python": platform.python_version()},
            "hardware": hardware(trainer.accelerator.device, trainer.args.world_size),
            **spent,
        },
    )
    files.append(write_run_page(folder))
    if report:
        say(f"\n{report}\n{outcome.note}\n")
    for warning in outcome.warnings:
        say(f"WARNING: {warning}\n")
    if answers:
        say(side_by_side(readable(answers[:3])) + "\n")
    kind = "LoRA adapter" if (folder / "adapter_config.json").exists() else "Model"
    say("\n".join([f"{kind:<13}{folder}", *(f"{file.name:<13} {file}" for file in files)]))


def _save(trainer: Trainer, folder: Path, *, merge: bool) -> None:
    model = trainer.accelerator.unwrap_model(trainer.model)
    trainer.save_model(str(folder))
    if not trainer.is_world_process_zero():
        return
    if not sharded(trainer):
        with trainer.without_critic() if isinstance(trainer, PPOTrainer) else nullcontext():
            check_saved(folder, trained_weights(model))
    is_reward_model = isinstance(trainer, RewardTrainer)
    if not (is_reward_model or (merge and isinstance(model, PeftModel))):
        return
    probe = trainer.data_collator([trainer.train_dataset[row] for row in range(min(4, len(trainer.train_dataset)))])
    inputs = {name: probe[name].to(model.device) for name in ("input_ids", "attention_mask")}
    if merge and isinstance(model, PeftModel):
        if getattr(model, "is_quantized", False):  # merge into the base's own weights, not the 4-bit ones
            model, _ = open_model(str(folder), as_trained=False, reward_model=is_reward_model)
        model = merge_adapter(model, inputs)
        if is_reward_model:  # a head that was trained in float32 is read in the dtype of the rest
            model = model.to(model.dtype)
        model.save_pretrained(folder)
        check_saved(folder, model.state_dict())
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            (folder / name).unlink()
    if is_reward_model and not (sharded(trainer) or isinstance(model, PeftModel)):
        with trainer.accelerator.autocast():
            check_reloads(str(folder), model, inputs)
