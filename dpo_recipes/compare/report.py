"""Writes the report of a comparison: a page, the same in Markdown, and the plots."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo_recipes.compare.plan import NAMES
from dpo_recipes.evaluate.measures import MEASURES, RATES
from dpo_recipes.pages import page

COLOURS = ("#767f8c", "#1f82c0", "#d55e00", "#009e73", "#9d3df2", "#d9003a")  # after Okabe and Ito (2008)
LOOKS = dict(zip(NAMES, zip("◆●■▲▼✚", COLOURS, strict=True), strict=False))
"""Marker and colour of each contender, the same in every plot, bar and table."""
PLOTS = {  # measure on the x-axis: file, title
    "kl": ("reward_kl.svg", "The judge's reward, and the KL to the reference model that it costs"),
    "reward_model": ("two_rewards.svg", "The judge's reward, and the score by the reward model that all but DPO raise"),
}


def write_report(folder: Path, results: Mapping[str, Any]) -> list[Path]:
    """Writes report.html, report.md and the plots from what results.json holds, and returns their paths."""
    looks = {model["label"]: LOOKS[model["algorithm"]] for model in results["models"]}
    plots = {name: plot for name, plot in PLOTS.items() if all(name in model for model in results["models"])}
    data = {**results, "measures": MEASURES, "rates": RATES, "names": NAMES, "looks": looks, "plots": plots}
    templates = {f"report.{kind}": (f"comparison.{kind}.jinja", data) for kind in ("html", "md")}
    for across, (name, title) in plots.items():
        templates[name] = ("frontier.svg.jinja", {**data, "across": across, "title": title, "alone": True})
    return [page.write_page(folder / name, page.TEMPLATES / made_by, on) for name, (made_by, on) in templates.items()]
