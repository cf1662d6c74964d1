"""The report of a comparison: a page, the same in Markdown, and the plots."""

import base64
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from dpo_recipes import page
from dpo_recipes.compare.results import MEASURES, NAMES, RATES
from dpo_recipes.files import write_bytes

NOTHING = "\N{EN DASH}"
COLOURS = {"sft": "#7d8591", "dpo": "#2b6cb0", "ppo": "#c2571a", "rloo": "#2f8f6b"}
PLOTS = {
    "reward_kl.png": "Reward against KL: what each model earns, and how far it has moved from the start for that",
    "two_rewards.png": "Two opinions of the same answers: the judge's, and the one that PPO optimised",
}


def write_report(folder: Path, results: Mapping[str, Any]) -> list[Path]:
    """The paths of report.html, report.md and the plots, made of what results.json holds."""
    plots = {
        "reward_kl.png": _plot_reward_kl(folder / "reward_kl.png", results),
        "two_rewards.png": _plot_two_rewards(folder / "two_rewards.png", results),
    }
    pictures = [
        {"name": name, "title": PLOTS[name], "data": base64.b64encode(plot.read_bytes()).decode()}
        for name, plot in plots.items()
        if plot
    ]
    shown = {"measures": MEASURES, "rates": RATES, "names": NAMES, "colours": COLOURS}
    given = {**results, **shown, "pictures": pictures}
    filters: dict[str, Callable[..., str]] = {
        "number": _number,
        "time": _time,
        "text_cell": lambda text: text.replace("|", "\\|").replace("\n", " "),
    }
    pages = [
        page.write_page(folder / f"report.{kind}", Path(__file__).with_name(f"report.{kind}.jinja"), given, filters)
        for kind in ("html", "md")
    ]
    return [*pages, *(plot for plot in plots.values() if plot)]


def _number(value: float | None, places: int = 3) -> str:
    return NOTHING if value is None else f"{value:,.{places}f}".replace("-", "\N{MINUS SIGN}")


def _time(seconds: float | None) -> str:
    if seconds is None:
        return NOTHING
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _points(results: Mapping[str, Any], horizontal: str) -> dict[str, list[tuple[str, Any, Any]]]:
    """By algorithm, each model's beta, and its seeds' means: (seeds,) of `horizontal` and of the judge's reward."""
    points: dict[str, list[tuple[str, Any, Any]]] = {}
    for model in results["models"]:
        runs = [results["runs"][name] for name in model["names"].values()]
        if all(run[horizontal] is not None for run in runs):
            means = [np.array([np.mean(run[name]) for run in runs]) for name in (horizontal, "judge")]
            points.setdefault(model["algorithm"], []).append((model["beta"], *means))
    return points


def _plot(path: Path, results: Mapping[str, Any], horizontal: str, label: str) -> Path | None:
    """A point for each run, a line through the means over seeds, from beta to beta."""
    points = _points(results, horizontal)
    if not points:
        return None
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.add_subplot()
    for kind, models in points.items():
        models = sorted(models, key=lambda model: float(model[0] or 0))
        for beta, across, up in models:
            axes.scatter(across, up, s=28, color=COLOURS[kind], alpha=0.6, linewidths=0)
            if beta:
                axes.annotate(
                    f"β {beta}", (across.mean(), up.mean()), xytext=(6, -11), textcoords="offset points", fontsize=8
                )
        means = [(across.mean(), up.mean()) for _, across, up in models]
        axes.plot(*zip(*means, strict=True), color=COLOURS[kind], marker="D", markersize=7, label=NAMES[kind])
    axes.set_xlabel(label)
    axes.set_ylabel("judge's reward")
    axes.grid(alpha=0.3)
    axes.legend()
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=130)
    return write_bytes(path, drawn.getvalue())


def _plot_reward_kl(path: Path, results: Mapping[str, Any]) -> Path | None:
    return _plot(path, results, "kl", "KL to the start, nats an answer")


def _plot_two_rewards(path: Path, results: Mapping[str, Any]) -> Path | None:
    return _plot(path, results, "reward_model", "score by the reward model that PPO optimises")
