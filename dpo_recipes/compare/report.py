"""Writes the report of a comparison: a page, the same in Markdown, and the plots."""

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from dpo_recipes.compare.results import NAMES
from dpo_recipes.evaluate.measures import MEASURES, RATES
from dpo_recipes.files import write_bytes
from dpo_recipes.pages import page

COLOURS = {"sft": "#7d8591", "dpo": "#2b6cb0", "ppo": "#c2571a", "rloo": "#2f8f6b"}
PLOTS = {  # file: measure on the x-axis, its label, title
    "reward_kl.png": (
        *("kl", "KL to the reference model, nats an answer"),
        "Reward against KL: the judge's reward of each model, and its distance from the reference model",
    ),
    "two_rewards.png": (
        *("reward_model", "score by the reward model that PPO optimises"),
        "Two opinions of the same answers: the judge's, and the one that PPO optimised",
    ),
}


def write_report(folder: Path, results: Mapping[str, Any]) -> list[Path]:
    """Writes report.html, report.md and the plots from what results.json holds, and returns their paths."""
    pictures = []
    for name, (across, label, title) in PLOTS.items():
        if results["runs"] and all(run[across] is not None for run in results["runs"].values()):
            drawn = _plot(results, across, label)
            write_bytes(folder / name, drawn)
            pictures.append({"name": name, "title": title, "data": base64.b64encode(drawn).decode()})
    data = {**results, "measures": MEASURES, "rates": RATES, "colours": COLOURS, "pictures": pictures}
    pages = [
        page.write_page(folder / f"report.{kind}", page.TEMPLATES / f"comparison.{kind}.jinja", data, {"cell": _cell})
        for kind in ("html", "md")
    ]
    return [*pages, *(folder / picture["name"] for picture in pictures)]


def _cell(text: str) -> str:
    """The text for one cell or list item of Markdown."""
    return text.replace("|", "\\|").replace("\n", " ")


def _plot(results: Mapping[str, Any], across: str, label: str) -> bytes:
    """A PNG with a point for each run, and a line through the means over seeds, from beta to beta."""
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.add_subplot()
    lines: dict[str, list[tuple[float, float]]] = {}
    for model in results["models"]:
        runs = [results["runs"][name] for name in model["names"].values()]
        points = [[float(np.mean(run[name])) for run in runs] for name in (across, "judge")]
        middle = float(np.mean(points[0])), float(np.mean(points[1]))
        axes.scatter(points[0], points[1], s=28, color=COLOURS[model["algorithm"]], alpha=0.6, linewidths=0)
        axes.annotate(
            model["beta"] or "", middle, xytext=(6, -12), textcoords="offset points", fontsize=9, annotation_clip=False
        )
        lines.setdefault(model["algorithm"], []).append(middle)
    for kind, means in lines.items():
        axes.plot(*zip(*means, strict=True), color=COLOURS[kind], marker="D", markersize=7, label=NAMES[kind])
    axes.set(xlabel=label, ylabel="judge's reward")
    axes.margins(0.08)
    axes.grid(alpha=0.3)
    axes.legend()
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=130)
    return drawn.getvalue()
