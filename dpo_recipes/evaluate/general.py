"""Tasks of lm-evaluation-harness before and after: what the model could do, and can do still."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from peft import PeftModel

from dpo_recipes.errors import RecipeError
from dpo_recipes.evaluate.answers import BATCH
from dpo_recipes.evaluate.results import SIDES
from dpo_recipes.models.open import open_model, read_adapter
from dpo_recipes.terminal import say

Z = 1.959964  # standard errors of a 95 % interval


def find_tasks(names: Sequence[str], folder: str | None) -> Any:
    """The harness's TaskManager, which knows all of the tasks.

    Args:
        names: Tasks or groups of tasks.
        folder: Of task files of one's own, beside those of the harness.

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
    """`rows`, a metric each, with both sides and their difference, and `words`.

    Prompts are the harness's own, without the chat template. The replies are kept in `folder`: a call that was stopped
    goes on after the last of them.

    Args:
        names: Of the tasks.
        manager: What `find_tasks` returned.
        models: By side. Of a LoRA adapter the base is in memory once.
        hashes: Of their weights.
        folder: Of the replies.
        trust_remote_code: Whether code that comes with a model may run.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    start, tuned = (models[side] for side in SIDES)
    folder.mkdir(parents=True, exist_ok=True)
    model = None
    found = {}
    for side in SIDES:
        say(f"Tasks, {side}: {', '.join(names)}.")
        if not isinstance(model, PeftModel):
            name, base = (tuned, start) if read_adapter(tuned) else (models[side], None)
            model, tokenizer = open_model(name, base=base, trust_remote_code=trust_remote_code)
        is_base = side == SIDES[0] and isinstance(model, PeftModel)
        made_by = hashlib.sha256(f"{models[side]} {hashes[side]} {start} {hashes[SIDES[0]]}".encode()).hexdigest()[:16]
        with model.disable_adapter() if is_base else nullcontext():
            lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH)
            replies = str(folder / f"{side}-{made_by}")
            found[side] = simple_evaluate(lm, tasks=list(names), task_manager=manager, use_cache=replies)
    rows = _rows(*(found[side] for side in SIDES))
    return {"rows": rows, "words": _words(rows)}


def _rows(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for task, metrics in before["results"].items():
        for key in metrics:
            metric, _, filtered = key.partition(",")
            error = f"{metric}_stderr,{filtered}"
            if error not in metrics:
                continue  # a name, a number of questions, or an error itself
            sides = [
                {"mean": found[key], "standard_error": found[error] if isinstance(found[error], float) else None}
                for found in (metrics, after["results"][task])
            ]
            gaps = np.subtract(*(_singly(found, task, metric, filtered) for found in (after, before)))
            difference = sides[1]["mean"] - sides[0]["mean"]
            spread = None
            if len(gaps) > 1 and np.isclose(gaps.mean(), difference):  # the same questions before and after
                spread = float(gaps.std(ddof=1) / len(gaps) ** 0.5)
            elif all(side["standard_error"] is not None for side in sides):  # as if they were other questions: wider
                spread = math.hypot(*(side["standard_error"] for side in sides))
            higher = before["higher_is_better"].get(task, {}).get(metric, True)
            lost = -difference if higher else difference
            rows.append(
                {
                    "name": f"{task}, {metric}" if filtered == "none" else f"{task}, {metric} ({filtered})",
                    "n": len(gaps) or None,  # of a group of tasks the harness keeps no questions
                    "better": "higher" if higher else "lower",
                    **dict(zip(SIDES, sides, strict=True)),
                    "difference": {"mean": difference, "standard_error": spread},
                    "degraded": None if spread is None else lost > Z * spread,
                }
            )
    return rows


def _singly(found: Mapping[str, Any], task: str, metric: str, filtered: str) -> NDArray[np.float64]:
    """The metric of each question, where it is a number."""
    kept = [line.get(metric) for line in found["samples"].get(task, []) if line["filter"] == filtered]
    return np.array([value for value in kept if isinstance(value, int | float | np.number)], dtype=np.float64)


def _words(rows: Sequence[Mapping[str, Any]]) -> str:
    worse = "; ".join(row["name"] for row in rows if row["degraded"])
    unknown = sum(row["degraded"] is None for row in rows)
    told = f"It got worse at {worse}, by" if worse else "It got worse at none of the tasks that were run by"
    left = f" Of {unknown} metrics that is not known." if unknown else ""
    return f"{told} more than 1.96 standard errors of the difference.{left}"
