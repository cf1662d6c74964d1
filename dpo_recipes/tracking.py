"""Experiment trackers without surprises: no tracker unless asked for, no telemetry, no question for a login."""

import importlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas
from huggingface_hub import constants
from transformers import Trainer, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from dpo_recipes.errors import RecipeError
from dpo_recipes.files import read_json, read_jsonl
from dpo_recipes.manifest import claim
from dpo_recipes.pages.markdown import inline
from dpo_recipes.terminal import say, shown
from dpo_recipes.trl_patches import method_name

logger = logging.getLogger(__name__)

PROJECT = "dpo-recipes"
EXTRAS = ("wandb", "tensorboard", "trackio")
FOLDERS = {"wandb": "wandb", "tensorboard": "runs"}  # in the output folder; trackio keeps its own elsewhere


def check_trackers(training_args: TrainingArguments) -> None:
    """Refuses a tracker that cannot be used, names the run after its output folder, and switches telemetry off.

    Raises:
        RecipeError: If a tracker of `report_to` is unknown, or its package is not installed.
    """
    if "HF_HUB_DISABLE_TELEMETRY" not in os.environ:
        constants.HF_HUB_DISABLE_TELEMETRY = True  # the Hub's library has read the variable already, at its import
    for tracker in training_args.report_to:
        if tracker not in INTEGRATION_TO_CALLBACK:
            raise RecipeError(f"There is no tracker {tracker}. Set --report_to to none, {', '.join(EXTRAS)}.")
        if tracker not in get_available_reporting_integrations():
            package = f"'dpo-recipes[{tracker}]'" if tracker in EXTRAS else tracker.replace("_", "-")
            raise RecipeError(f"The tracker {tracker} is not installed: pip install {package}.")
    if training_args.run_name is None:
        training_args.run_name = Path(training_args.output_dir).name
    if training_args.project == "huggingface":  # transformers' default, for trackio
        training_args.project = PROJECT


def check_hub(training_args: TrainingArguments) -> None:
    """Raises RecipeError if the run shall be uploaded while it trains, when nothing of it can have been checked."""
    if training_args.push_to_hub:
        raise RecipeError(
            "push_to_hub would upload checkpoints and training_args.bin, with paths of this machine, before anybody "
            "knows what the run is worth. Leave it out, and publish the finished run after its checks: "
            f"dpo-recipes publish {training_args.output_dir} --hub_id {training_args.hub_model_id or 'YOU/NAME'}"
        )


def start_tracking(trainer: Trainer, settings: dict[str, Any]) -> None:
    """Opens a run at Weights & Biases, if asked for, with the recipe's settings and tags; transformers logs into it.

    Without a login the run is logged offline. wandb by itself would ask for a key on a terminal and wait.
    """
    args = trainer.args
    if trainer.is_world_process_zero():
        claim(args.output_dir, *(FOLDERS[tracker] for tracker in args.report_to if tracker in FOLDERS))
    if "wandb" not in args.report_to or not trainer.is_world_process_zero():
        return
    import wandb

    mode = wandb.setup().settings.mode  # WANDB_MODE, or what `wandb offline` left
    settled = mode in ("offline", "dryrun", "disabled") or wandb.login(prompt=False, verify=False)
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=args.run_name,
        tags=[Path(sys.argv[0]).stem, method_name(trainer).lower()],
        config=settings,
        dir=os.environ.get("WANDB_DIR", args.output_dir),
        mode=None if settled else "offline",
    )
    if run.offline:
        say(f"wandb is offline (no login, or WANDB_MODE). Send the run with: wandb sync {Path(run.dir).parent}")


def send_results(trainer: Trainer, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Sends what the page of a finished run shows to each of its trackers; returns a warning for each that failed.

    A tracker gets the numbers of metrics.json, and as tables the results, the answers and the health findings. It gets
    them through its callback of transformers, which names them eval/... like all measurements on held-out data.

    Args:
        trainer: After `trainer.train`, in the main process, and after the run has written its files.
        header: Columns of the results, the name of the metric first.
        rows: The results.
    """
    folder, warnings = Path(trainer.args.output_dir), []
    trackers = {INTEGRATION_TO_CALLBACK[name]: name for name in EXTRAS}
    for callback in (each for each in trainer.callback_handler.callbacks if type(each) in trackers):
        tracker = trackers[type(callback)]
        try:
            options = dict(model=trainer.model, logs=_logs(folder, header, rows, tracker))
            callback.on_log(trainer.args, trainer.state, trainer.control, **options)
            if tracker != "wandb":  # on_log has opened the run again
                callback.on_train_end(trainer.args, trainer.state, trainer.control, **options)
            elif os.environ.get("WANDB_LOG_PAGE") == "true":
                wandb = importlib.import_module("wandb")
                wandb.log_artifact(folder / "report.html", name=f"report-{wandb.run.id}", type="report")
        except Exception as error:
            reason = shown(f"{type(error).__name__}: {error}")[:300]
            warnings.append(f"{tracker} did not take the results ({reason}). The files in {folder} hold all of them.")
            logger.warning(warnings[-1])
    return warnings


def _logs(folder: Path, header: Sequence[str], rows: Sequence[Sequence[Any]], tracker: str) -> dict[str, Any]:
    """Verdict and numbers of metrics.json by their paths there, without intervals, and the tables that have rows."""
    metrics, health = (read_json(folder / f"{name}.json") for name in ("metrics", "health"))
    logged = {"train": None, "held_out": None}  # by the trainer, and sent by transformers
    [flat] = pandas.json_normalize(metrics | logged, sep="/").to_dict("records")
    numbers = {
        f"eval_{name.removesuffix('/mean').replace(' ', '_')}": value
        for name, value in flat.items()
        if (isinstance(value, int | float) and not name.endswith(("/low", "/high", "/n")))
        or name.startswith("verdict/")
    }
    if health:
        numbers["eval_health_findings"] = len(health["findings"])
    tables = {
        "eval_results": pandas.DataFrame([[*map(str, row)] for row in rows], columns=["metric", *header[1:]]),
        "eval_samples": pandas.json_normalize(read_jsonl(folder / "samples.jsonl"), sep=" "),
        "eval_health": pandas.DataFrame(health.get("findings")),
    }
    return numbers | {name: _table(table, tracker) for name, table in tables.items() if len(table)}


def _table(table: pandas.DataFrame, tracker: str) -> Any:
    """The table in the form of the tracker. Its texts are shown as they are; of a dialogue it holds the last turn."""

    def cell(value: Any) -> Any:
        text = value[-1]["content"] if isinstance(value, list) else value
        return (shown if tracker == "wandb" else inline)(text) if isinstance(text, str) else text

    columns, data = [*table], table.map(cell).to_numpy().tolist()
    if tracker != "tensorboard":
        return importlib.import_module(tracker).Table(columns, data)
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in (columns, ["---"] * len(columns), *data))
