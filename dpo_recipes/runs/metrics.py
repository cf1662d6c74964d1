"""Names of metrics with their labels, from metrics.toml."""

import tomllib
from pathlib import Path

_TABLE = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))

PANELS: dict[str, list[str]] = {}
"""Names of the logged metrics by panel of curves.png, in their order."""
for _name, _shown in _TABLE["logged"].items():
    if "panel" in _shown:
        PANELS.setdefault(_shown["panel"], []).append(_name)

LINES: dict[str, str] = {name: shown["line"] for name, shown in _TABLE["logged"].items() if "line" in shown}
"""Words of the logged metrics in a progress line, with a place for the value."""

LABELS: dict[str, str] = _TABLE["measured"]
"""Labels of the metrics that `finish_run` measures."""
