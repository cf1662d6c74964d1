"""Tasks of lm-evaluation-harness before and after: shows abilities that the training has cost."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_recipes.errors import RecipeError
from dpo_recipes.evaluate.answers import BATCH, open_reference
from dpo_recipes.evaluate.results import SIDES
from dpo_recipes.terminal import say

Z = 1.959964  # standard errors of a 95 % interval


def find_tasks(names: Sequence[str], folder: str | None) -> Any:
    """The harness's TaskManager, which knows all of the tasks.

    Args:
        names: Tasks or groups of tasks.
        folder: Task files of the user, which are added to those of the harness.

    Raises:
        RecipeError: If the harness is not installed, or does not know a task.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise RecipeError("--tasks needs lm-evaluation-harness: pip install 'dpo-recipes[lm-eval]'") from error
    say("Reading which tasks lm-evaluation-harness has.")  # some 14,000: seconds
    manager = TaskManager(include_path=folder)
    if unknown := sorted(set(names).difference(manager.all_tasks)):
        raise RecipeError(
            f"lm-evaluation-harness has no task {', '.join(unknown)}. Its names: lm_eval ls tasks; a folder of "
            "your own: --tasks_path."
        )
    return manager


def general_tasks(
    names: Sequence[str],
    manager: Any,
    *,
    models: Mapping[str, str],
    hashes: Mapping[str, str | None],
    folder: Path,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """`rows`, one for each metric, with both sides and their difference, and `words`.

    The prompts are the harness's own, without the chat template. The replies are kept in `folder`, so that the same
    call goes on after the last of them.

    Args:
        names: Names of the tasks.
        manager: As `find_tasks` returned it.
        models: By side.
        hashes: Of their weights.
        folder: Keeps the replies.
        trust_remote_code: Whether code that comes with a model may run.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    start = models["before"]
    folder.mkdir(parents=True, exist_ok=True)
    reference = open_reference(start, [*models.values()], trust_remote_code=trust_remote_code)
    found = {}
    for side in SIDES:
        say(f"Tasks, {side}: {', '.join(names)}.")
        key = f"{models[side]} {hashes[side]} {start} {hashes['before']}"
        replies = folder / f"{side}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        with reference.opened(models[side]) as (model, tokenizer):
            lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH)
            found[side] = simple_evaluate(lm, tasks=list(names), task_manager=manager, use_cache=str(replies))
    rows = _rows(*(found[side] for side in SIDES))
    return {"rows": rows, "words": _words(rows)}


def _rows(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each metric that has a standard error; the other entries are names and counts."""
    rows = []
    for task, metrics in before["results"].items():
        for key in metrics:
            metric, _, filtered = key.partition(",")
            if f"{metric}_stderr,{filtered}" in metrics:
                rows.append(_row(before, after, task, metric, filtered))
    return rows


def _row(before: Mapping[str, Any], after: Mapping[str, Any], task: str, metric: str, filtered: str) -> dict[str, Any]:
    sides = []
    for found in (before["results"][task], after["results"][task]):
        error = found[f"{metric}_stderr,{filtered}"]
        mean = found[f"{metric},{filtered}"]
        sides.append({"mean": mean, "standard_error": error if isinstance(error, float) else None})
    gaps = np.subtract(*(_by_question(found, task, metric, filtered) for found in (after, before)))
    difference = sides[1]["mean"] - sides[0]["mean"]
    spread = None
    if len(gaps) > 1 and np.isclose(gaps.mean(), difference):  # the same questions before and after
        spread = float(gaps.std(ddof=1) / len(gaps) ** 0.5)
    elif None not in (errors := [side["standard_error"] for side in sides]):  # wider: as if the questions were others
        spread = math.hypot(*errors)
    is_better_higher = before["higher_is_better"].get(task, {}).get(metric, True)
    lost = -difference if is_better_higher else difference
    return {
        "name": f"{task}, {metric}" + ("" if filtered == "none" else f" ({filtered})"),
        "n": len(gaps) or None,  # the harness keeps no questions of a group of tasks
        "better": "higher" if is_better_higher else "lower",
        **dict(zip(SIDES, sides, strict=True)),
        "difference": {"mean": difference, "standard_error": spread},
        "degraded": None if spread is None else lost > Z * spread,
    }


def _by_question(found: Mapping[str, Any], task: str, metric: str, filtered: str) -> NDArray[np.float64]:
    """The metric of each question, where it is a number."""
    kept = [line.get(metric) for line in found["samples"].get(task, []) if line["filter"] == filtered]
    return np.array([value for value in kept if isinstance(value, int | float | np.number)], dtype=np.float64)


def _words(rows: Sequence[Mapping[str, Any]]) -> str:
    worse = "; ".join(row["name"] for row in rows if row["degraded"])
    unknown = sum(row["degraded"] is None for row in rows)
    told = f"It got worse at {worse}, by" if worse else "It got worse at none of the tasks that were run by"
    left = f" Of {unknown} metrics that is not known." if unknown else ""
    return f"{told} more than 1.96 standard errors of the difference.{left}"
