"""Trains one recipe with every combination of some settings, one after the other, and tabulates what came of it."""

import itertools
import signal
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

from dpo_recipes.errors import RecipeError
from dpo_recipes.files import read_json, write_json, write_text
from dpo_recipes.launch.launch import HOW_NOT_WHAT, Launch, grouped
from dpo_recipes.manifest import claim
from dpo_recipes.terminal import say

MEASURES = {  # column of the table: where it is in metrics.json
    "held-out loss": ("held_out", "eval_loss"),
    "accuracy": ("preference_accuracy", "all", "summed", "after", "mean"),
    "implicit accuracy": ("preference_accuracy", "all", "implicit reward", "after", "mean"),
    "reward accuracy": ("reward_accuracy", "all", "mean"),
    "KL, nats": ("kl", "nats"),
    "reward, temperature 0.7": ("scores", "temperature 0.7", "exact reward", "after", "mean"),
    "reward, greedy": ("scores", "greedy", "exact reward", "after", "mean"),
    "seconds": ("cost", "train_seconds"),
}
STOPPED = [128 + number for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)]


def sweep(launch: Launch, words: Sequence[str]) -> int:
    """Trains the launch once for each combination, and writes sweep.md and sweep.json beside the runs' folders.

    A finished run of the same request is left as it is, an unfinished one is resumed; with `overwrite` all begin anew.

    Args:
        launch: Its output_dir is where the runs' folders go; by default `sweep` in the recipe's own.
        words: "beta=0.05,0.1" and the like.

    Returns:
        0; 1 if a run failed, after the others; 2 if the recipe refuses a value, before any; 128 + n if signal n came.

    Raises:
        RecipeError: If a word makes no sense.
    """
    given = dict(grouped(launch.flags))
    values = read_grid(words, taken={*given, "output_dir", "config", *HOW_NOT_WHAT})
    root = Path(launch.setting("output_dir") or "outputs", *([] if "output_dir" in given else ["sweep"]))
    points = [dict(zip(values, combination, strict=True)) for combination in itertools.product(*values.values())]
    folders = [root / ",".join(f"{key}={point[key].replace('/', '_')}" for key in point) for point in points]
    launches = [_at(launch, point, folder) for point, folder in zip(points, folders, strict=True)]
    if launch.is_dry_run():
        say("\n".join([f"{len(folders)} runs, of which this is the first:", *map(str, folders)]))
        return launches[0].run()
    finished = [_is_done(each, folder) for each, folder in zip(launches, folders, strict=True)]
    missing = [each for each, done in zip(launches, finished, strict=True) if not done]
    if missing and (status := missing[0].check(*missing[1:])):
        return status
    if "output_dir" not in given:  # the folder of the recipe's own run
        claim(root.parent, root.name)
    results: list[dict[str, Any]] = []
    for number, (point, folder, done) in enumerate(zip(points, folders, finished, strict=True), start=1):
        say(f"\nSweep, run {number} of {len(points)}: {folder}{', finished before' if done else ''}")
        status = 0 if done else launches[number - 1].run()
        if status in STOPPED:
            say(f"The sweep was stopped in {folder}. The same command goes on there.")
            return status
        results.append({"settings": point, "folder": str(folder), "status": status})
        results[-1] |= _measures(read_json(folder / "metrics.json")) if not status else {}
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


def _at(launch: Launch, point: dict[str, str], folder: Path) -> Launch:
    """The launch at a point of the grid, told to resume what it finds there of itself."""
    chosen = [part for key, value in point.items() for part in (f"--{key}", value)]
    there = replace(launch, flags=(*launch.flags, *chosen, "--output_dir", str(folder)))
    begun = read_json(folder / "settings.json").get("request") == there.request()
    if begun and not {"overwrite", "resume_from_checkpoint"} & {*dict(grouped(launch.flags))}:
        there = replace(there, flags=(*there.flags, "--resume_from_checkpoint", "true"))
    return there


def _is_done(launch: Launch, folder: Path) -> bool:
    return launch.is_done(folder) and "overwrite" not in dict(grouped(launch.flags))


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
