"""Names of metrics, from metrics.toml."""

import tomllib
from pathlib import Path
from typing import Any

from dpo_recipes.files import read_json

_TABLE = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))

NAMES: dict[str, str] = {key: shown["name"] for key, shown in _TABLE["logged"].items()}
"""Names of the metrics that trainers log."""

PANELS: dict[str, list[str]] = {}
"""Keys of the logged metrics by panel of curves.png, in their order."""

LINES: dict[str, str] = {}
"""Words of the logged metrics in a progress line, with a place for the value."""

for _key, _shown in _TABLE["logged"].items():
    _together = PANELS.setdefault(_shown.get("panel", _shown["name"]), [])
    _together += [_key] if "panel" in _shown else [_key, f"eval_{_key}"]
    if "line" in _shown:
        _name, _, _unit = _shown["name"].partition(", ")
        LINES[_key] = f"{_name} {{:{_shown['line']}}} {_unit}".rstrip()

LABELS: dict[str, str] = _TABLE["measured"]
"""Names of the metrics that `finish_run` measures."""

ROUND_FILE = "round.json"
"""File in which each round of a run keeps its numbers."""

REWARD_SCORE = "reward-model score"
"""Name of the score that an online trainer raises; where there are several, their reward models' names follow."""


def rounds_of(folder: Path) -> list[dict[str, Any]]:
    """Numbers of a run's finished rounds, in their order; empty for a run without rounds."""
    accounts = [read_json(file) for file in folder.glob(f"round-*/{ROUND_FILE}")]
    return sorted((each for each in accounts if "updates" in each), key=lambda each: int(each["round"]))
