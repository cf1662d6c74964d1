"""Shows a run on one page, made from the files in its folder, so that it can be made again."""

import base64
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

from PIL import Image

from dpo_recipes.errors import RecipeError
from dpo_recipes.files import read_json, read_jsonl
from dpo_recipes.health.rules import read_findings
from dpo_recipes.models.checkpoints import STATE_FILE, latest_checkpoint
from dpo_recipes.pages import page
from dpo_recipes.runs.curves import plot_curves
from dpo_recipes.runs.metrics import LABELS, NAMES, PANELS
from dpo_recipes.runs.model_card import SHOWN_SETTINGS, write_model_card
from dpo_recipes.terminal import say

LOG_FILE = "log.json"
"""File in which a run in rounds, and each of its rounds, keeps what the trainer logged."""
_SHOWN = 6  # prompts with both answers


def write_run_page(folder: str | Path) -> Path:
    """Writes a page from the files of a run and returns its path; sections without their file are left out."""
    folder = Path(folder)
    names = ("settings", "preflight", "metrics", "health", "done", "eval", "votes")
    held = {name: read_json(folder / f"{name}.json") for name in names}
    curves, samples = folder / "curves.png", read_jsonl(folder / "samples.jsonl")
    drawn = curves.read_bytes() if curves.exists() else b""
    of_health = {str(finding) for finding in read_findings(folder)}
    shown = {
        "name": folder.resolve().name,
        "curves": base64.b64encode(drawn).decode(),
        "curves_panels": int(Image.open(BytesIO(drawn)).info.get("panels", 0)) if drawn else 0,
        "samples": samples[:_SHOWN],
        "answered": len(samples),
        "warnings": [text for text in held["metrics"].get("warnings", []) if text not in of_health],
        "labels": LABELS,
        "panels": PANELS,
        "logged": NAMES,
        "shown_settings": SHOWN_SETTINGS,
    }
    return page.write_page(folder / "report.html", page.TEMPLATES / "run.html.jinja", held | shown)


def draw_curves(folder: Path, log_history: Sequence[Mapping[str, float]]) -> Path:
    """Draws what the trainer logged into curves.png, under the model and dataset of settings.json."""
    settings = read_json(folder / "settings.json")
    title = f"{folder.name}: {settings.get('model_name_or_path')} on {settings.get('dataset_name')}"
    return plot_curves(log_history, folder / "curves.png", title=title)


def remake(run: str) -> Path:
    """Draws a run's curves and writes its model card and its page again, from the files in its folder.

    A model card that exists is left as it is: others may have written into it.

    Raises:
        RecipeError: If the folder holds no run.
    """
    folder = Path(run)
    if not read_json(folder / "settings.json"):
        raise RecipeError(f"{run} holds no settings.json. Name the folder of a run.")
    checkpoint = latest_checkpoint(folder)
    if log := read_json(folder / LOG_FILE) or (checkpoint and read_json(checkpoint / STATE_FILE)):
        say(str(draw_curves(folder, log["log_history"])))
    if (folder / "done.json").exists() and not (folder / "README.md").exists():
        say(str(write_model_card(folder)))
    written = write_run_page(folder)
    say(str(written))
    return written
