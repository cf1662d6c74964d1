"""Starts experiment trackers without surprises: no tracker unless asked for, no telemetry, no question for a login."""

import os
import sys
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_token, is_offline_mode
from transformers import Trainer, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from dpo_recipes.errors import RecipeError
from dpo_recipes.manifest import claim
from dpo_recipes.terminal import say
from dpo_recipes.trl_patches import method_name

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
    """Raises RecipeError if the run shall be uploaded, but the Hub cannot be reached or there is no login."""
    if not training_args.push_to_hub:
        return
    later = "leave --push_to_hub out and upload the finished run later: hf upload REPOSITORY FOLDER"
    if is_offline_mode():
        raise RecipeError(f"push_to_hub needs the Hub, and HF_HUB_OFFLINE is set. Unset it, or {later}.")
    if get_token() is None:
        raise RecipeError(f"push_to_hub needs a login at the Hub. Call `hf auth login`, or {later}.")


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
