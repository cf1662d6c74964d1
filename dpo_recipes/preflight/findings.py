"""Findings of the preflight: the checks of checks.toml, their thresholds, and what to do about a finding."""

import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from dpo_recipes.errors import RecipeError
from dpo_recipes.terminal import say

CHECKS = tomllib.loads(Path(__file__).with_name("checks.toml").read_text(encoding="utf-8"))
_SHOWN = 4  # findings on the screen, which is 40 lines
_KEYS: dict[Literal["warning", "failure"], str] = {"failure": "_failure", "warning": ""}
THRESHOLDS: dict[str, float] = {
    f"{name}{ending}": check[level]
    for name, check in CHECKS.items()
    for level, ending in _KEYS.items()
    if level in check
}


@dataclass(frozen=True)
class Finding:
    """A fault of the pairs, or a risk, that a user should know before training on them."""

    name: str  # of the check, and of its threshold
    level: Literal["warning", "failure"]  # a failure stops the run before a model is loaded
    text: str  # what was found, with the number
    remedy: str


def set_thresholds(given: Sequence[str] | None, **defaults: float) -> dict[str, float]:
    """The thresholds of THRESHOLDS, or of `defaults`, or as given in the form `name=value`: the last one counts.

    Raises:
        RecipeError: If there is no such threshold, or the value is no share (70 for 70 %).
    """
    thresholds = THRESHOLDS | defaults
    for word in given or []:
        match = re.fullmatch(r"(\w+)=([01]|[01]?\.\d+)", word)
        if match is None or match[1] not in thresholds:
            raise RecipeError(
                f"--threshold {word} is not of the form NAME=0.1: a name and a share. The names are: "
                f"{', '.join(sorted(thresholds))}."
            )
        thresholds[match[1]] = float(match[2])
    return thresholds


def judge(name: str, count: float, total: float, thresholds: Mapping[str, float], **words: Any) -> list[Finding]:
    """The finding of a check of checks.toml, if the count's share of the total is above its threshold."""
    for level, ending in _KEYS.items():
        if count > thresholds.get(f"{name}{ending}", math.inf) * total:
            text = CHECKS[name]["text"].format(count=count, total=total, **words)
            return [Finding(name, level, text, CHECKS[name]["remedy"])]
    return []


def in_words(rows: Sequence[str | Sequence[str]]) -> str:
    """The names of rows, or of pairs of rows, for the screen: each file once, in front of its lines."""
    said, file = [], ""
    for row in rows:
        names = [row] if isinstance(row, str) else row
        for place, name in enumerate(names):
            shown = name.removeprefix(f"{file}, ")
            file = name.rpartition(", ")[0]
            said.append(f"{' and ' if place else '; '}{shown}")
    return "".join(said).removeprefix("; ")


def judged(findings: Sequence[Finding]) -> dict[str, Any]:
    """The findings and the verdict (ok, warnings or failures) for preflight.json."""
    levels = {finding.level for finding in findings}
    verdict = "failures" if "failure" in levels else "warnings" if levels else "ok"
    return {"findings": [asdict(finding) for finding in findings], "verdict": verdict}


def finding_lines(findings: Sequence[Finding]) -> list[str]:
    """The findings for the screen, the failures first, one line each; beyond the fourth their names."""
    ranked = sorted(findings, key=lambda finding: finding.level)
    lines = [f"{found.level.capitalize()} ({found.name}): {found.text} {found.remedy}" for found in ranked[:_SHOWN]]
    rest = [found.name for found in ranked[_SHOWN:]]
    return [*lines, f"{len(rest)} more: {', '.join(rest)}"] if rest else lines


def show_findings(findings: Sequence[Finding]) -> None:
    """Prints the findings, also under --quiet."""
    if findings:
        say("\n".join(finding_lines(findings)), always=True)


def refuse_failures(findings: Sequence[Finding]) -> None:
    """Raises RecipeError if a finding is a failure."""
    if names := [finding.name for finding in findings if finding.level == "failure"]:
        flags = " ".join(f"{name}_failure=1" for name in names)
        raise RecipeError(
            f"The pairs are not fit to train on: {', '.join(names)}. Mend that, or go on all the same: "
            f"--threshold {flags}"
        )
