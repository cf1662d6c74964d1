"""Files of an evaluation: eval.json, eval.jsonl, its sections of the run's page, and its part of the model card."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dpo_recipes.evaluate.measures import MEASURES
from dpo_recipes.evaluate.results import SIDES
from dpo_recipes.files import write_json, write_jsonl, write_text
from dpo_recipes.pages.markdown import fence, inline
from dpo_recipes.recipe import DONE_FILE
from dpo_recipes.runs.curves import table
from dpo_recipes.runs.model_card import BEGIN, END, LIBRARIES
from dpo_recipes.runs.page import write_run_page
from dpo_recipes.terminal import say


def origin() -> dict[str, Any]:
    """The time and the versions of the libraries, for the results of this moment."""
    versions = [f"{library} {version(library)}" for library in LIBRARIES]
    return {"made": datetime.now(UTC).isoformat(timespec="minutes"), "versions": versions}


def write_report(folder: Path, results: Mapping[str, Any], answers: Sequence[Mapping[str, Any]]) -> Path:
    """Writes the files of an evaluation, prints its table, and returns the path of eval.json."""
    path = write_json(folder / "eval.json", json.loads(json.dumps({**results, "labels": MEASURES}, default=asdict)))
    write_jsonl(folder / "eval.jsonl", answers)
    page = write_run_page(folder)
    shown, words = table(("", *SIDES), _rows(results)), results["verdict"]["sentence"]
    if (folder / "README.md").exists() and (folder / DONE_FILE).exists():
        _put_into_card(folder / "README.md", results, words, shown)
    say(f"\n{shown}\n(95 % intervals)\n")
    for warning in results["warnings"]:
        say(f"WARNING: {warning}", always=True)
    say(f"{path}, beside it eval.jsonl (the answers) and {page.name}\n")
    say(words, always=True)
    return path


def _put_into_card(card: Path, results: Mapping[str, Any], words: str, shown: str) -> None:
    """Replaces the evaluation's part of the model card, or adds it at the end; the other parts stay."""
    text = card.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    before, after = (before, rest.partition(END)[2]) if END in rest else (text, "")
    about = f"{results['pairs']} held-out pairs of {inline(results['dataset'])}, {results['prompts']} prompts"
    section = f"## Evaluation\n\n{words}\n\n{fence(shown)}\n\n({about}; judge: {inline(results['judge'])})"
    write_text(card, f"{before.rstrip()}\n\n{BEGIN}\n{section}\n{END}\n{after.rstrip()}\n")


def _rows(results: Mapping[str, Any]) -> list[list[Any]]:
    found: dict[str, Any] = {}
    if results["win_rate"]:
        names = {"win rate": "win_rate", "win rate at equal length": "length_controlled", "ties": "ties"}
        found |= {label: {"after": results[key]} for label, key in names.items()}
    for stratum, kinds in results["preference_accuracy"].items():
        if stratum == "all":
            found |= {f"preference accuracy, {kind}": kinds[kind] for kind in ("summed", "per token")}
            found["implicit-reward accuracy"] = kinds["implicit reward"]
        else:
            found[f"preference accuracy, summed, {stratum} ({kinds['summed']['after'].n})"] = kinds["summed"]
    if fit := results["calibration"]:
        found["calibration error"] = {"after": f"{fit['expected_calibration_error']:.3f}"}
    found["perplexity on chosen"] = results["perplexity"]
    found |= {MEASURES[key][0]: sides for key, sides in results["measures"].items()}
    return [[label, *(sides.get(side, "-") for side in SIDES)] for label, sides in found.items()]
