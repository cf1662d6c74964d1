"""Trains one recipe with every combination of some settings, one after the other, and tabulates the results."""

import itertools
import signal
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

from dpo_recipes.errors import RecipeError
from dpo_recipes.files import read_json, write_json, write_text
from dpo_recipes.launch.launch import HOW_NOT_WHAT, Launch
from dpo_recipes.manifest import claim
from dpo_recipes.terminal import say

MEASURES = {  # column of the table: where it is in metrics.json
    "held-out loss": ("held_out", "eval_loss"),
    "preference accuracy, summed": ("preference_accuracy", "all", "summed", "after", "mean"),
    "implicit-reward accuracy": ("preference_accuracy", "all", "implicit reward", "after", "mean"),
    "reward-model accuracy": ("reward_accuracy", "all", "mean"),
    "KL to the reference model, nats": ("kl", "nats"),
    "exact reward, temperature 0.7": ("scores", "temperature 0.7", "exact reward", "after", "mean"),
    "exact reward, greedy": ("scores", "greedy", "exact reward", "after", "mean"),
    "seconds": ("cost", "train_seconds"),
}
STOPPED = [128 + number for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)]


def sweep(launch: Launch, words: Sequence[str]) -> int:
    """Trains the launch once for each combination, and writes sweep.md and sweep.json beside the runs' folders.

    A finished run of the same request is left as it is and an unfinished one is resumed. `overwrite` trains all again.

    Args:
        launch: The recipe; the runs' folders go into its output_dir, by default into `sweep` in the recipe's own.
        words: "beta=0.05,0.1" and the like.

    Returns:
        0; 1 if a run failed, after the others; 2 if the recipe refuses a value, before any; 128 + n if signal n came.

    Raises:
        RecipeError: If a word makes no sense.
    """
    given = launch.given()
    values = read_grid(words, taken={*given, "output_dir", "config", *HOW_NOT_WHAT})
    root = Path(launch.setting("output_dir") or "outputs", *([] if "output_dir" in given else ["sweep"]))
    points = [dict(zip(values, each, strict=True)) for each in itertools.product(*values.values())]
    launches = [_at(launch, point, root) for point in points]
    if launch.is_dry_run():
        folders = [str(each.folder()) for each in launches]
        say("\n".join([f"{len(points)} runs, of which this is the first:", *folders]))
        return launches[0].run()
    missing = [each for each in launches if "overwrite" in given or not each.is_done(each.folder())]
    if missing and (status := missing[0].check(*missing[1:])):
        return status
    if "output_dir" not in given:  # the folder of the recipe's own run
        claim(root.parent, root.name)
    results: list[dict[str, Any]] = []
    for point, each in zip(points, launches, strict=True):
        folder, done = each.folder(), each not in missing
        say(f"\nSweep, run {len(results) + 1} of {len(points)}: {folder}{', finished before' if done else ''}")
        status = 0 if done else each.run()
        if status in STOPPED:
            say(f"The sweep was stopped in {folder}. The same command goes on there.", always=True)
            return status
        measured = {} if status else _measures(read_json(folder / "metrics.json"))
        results.append({"settings": point, "folder": str(folder), "status": status} | measured)
    _report(root, results)
    return int(any(result["status"] for result in results))


def read_grid(words: Sequence[str], *, taken: set[str]) -> dict[str, list[str]]:
    """The values of each key, numbers in one spelling, so that 1e-6 and 0.000001 are the same run."""
    values: dict[str, list[str]] = {}
    for word in words:
        key, _, listed = word.partition("=")
        key = key.removeprefix("--").replace("-", "_")
        found = [spelling(value) for value in listed.split(",")]
        if not (key and all(found)) or key in taken | {*values} or len({*found}) < len(found):
            raise RecipeError(
                f"Got --sweep {word}, which is not of the form beta=0.05,0.1: a setting that is no other flag, that "
                "says what is trained, and different values of it."
            )
        values[key] = found
    return values


def spelling(value: str) -> str:
    """A number in one spelling; other text without spaces around it."""
    try:
        return repr(float(value)).removesuffix(".0")
    except ValueError:
        return value.strip()


def _at(launch: Launch, point: dict[str, str], root: Path) -> Launch:
    """The launch with these settings: it resumes its own run where it finds it, unless a flag says what to do."""
    folder = root / ",".join(f"{key}={value.replace('/', '_')}" for key, value in point.items())
    chosen = [word for key, value in point.items() for word in (f"--{key}", value)]
    there = replace(launch, flags=(*launch.flags, *chosen, "--output_dir", str(folder)))
    is_told = {"overwrite", "resume_from_checkpoint"} & {*launch.given()}
    return there if is_told else there.going_on(keep=True)


def _measures(metrics: Any) -> dict[str, float]:
    found = {name: reduce(lambda held, key: (held or {}).get(key), path, metrics) for name, path in MEASURES.items()}
    return {name: value for name, value in found.items() if value is not None}


def _report(root: Path, results: Sequence[dict[str, Any]]) -> None:
    from dpo_recipes.runs.curves import table

    names = [name for name in MEASURES if any(name in result for result in results)]
    header = [*results[0]["settings"], "run", *names]
    rows = []
    for result in results:
        shown = [f"{result[name]:.{0 if name == 'seconds' else 3}f}" if name in result else "-" for name in names]
        state = f"failed ({result['status']})" if result["status"] else "done"
        rows.append([*result["settings"].values(), state, *shown])
    lines = [f"| {' | '.join(map(str, row))} |" for row in (header, ["---"] * len(header), *rows)]
    files = write_text(root / "sweep.md", "\n".join(lines) + "\n"), write_json(root / "sweep.json", results)
    say("\n".join(["", table(header, rows), "", *(f"{file.name:<13} {file}" for file in files)]))
