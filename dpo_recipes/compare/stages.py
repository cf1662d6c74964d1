"""Runs the stages of a comparison one after the other, and leaves finished stages as they are."""

import time
from collections.abc import Sequence

from dpo_recipes.compare.plan import Stage, is_done
from dpo_recipes.files import write_json
from dpo_recipes.launch.sweep import STOPPED
from dpo_recipes.manifest import claim
from dpo_recipes.terminal import say

# Relative time of a stage, until one of its kind has been measured.
WEIGHTS = {"sft": 2.0, "judge": 1.0, "dpo": 1.0, "reward": 1.0, "rounds": 3.0, "ppo": 4.0, "rloo": 3.0}


class Clock:
    """Times of the stages that have run, from which it estimates the time of the others."""

    def __init__(self) -> None:
        self.since = time.monotonic()
        self.took: dict[str, list[float]] = {}  # seconds, by kind

    def left(self, stages: Sequence[Stage]) -> str:
        """A phrase with the time that the unfinished stages will take; empty until one stage has run."""
        times = {kind: sum(took) / len(took) for kind, took in self.took.items()}
        if not times:
            return ""
        unit = sum(seconds / WEIGHTS[kind] for kind, seconds in times.items()) / len(times)
        left = sum(times.get(stage.kind, WEIGHTS[stage.kind] * unit) for stage in stages if not is_done(stage))
        return f"; {(time.monotonic() - self.since) / 60:.0f} min so far, about {left / 60:.0f} min left"


def run_stages(
    stages: Sequence[Stage], clock: Clock, *, done: int = 0, total: int | None = None
) -> dict[str, int | None]:
    """Runs the stages, up to one that a signal stops, and returns their exit statuses by name.

    The status is None where a stage that this one needs has failed.

    Args:
        stages: In an order in which each comes after the stages that it needs.
        clock: Learns the time of each stage.
        done: Number of stages that were run before these.
        total: Number of stages of the whole comparison, for the progress.
    """
    statuses: dict[str, int | None] = {}
    for number, stage in enumerate(stages):
        if any(statuses.get(needed.name, 0) != 0 for needed in stage.needs):
            statuses[stage.name] = None
            continue
        state = ", finished before" if is_done(stage) else clock.left(stages[number:])
        say(f"\nStage {done + number + 1} of {total or len(stages)}: {stage.name}{state}")
        statuses[stage.name] = _run(stage, clock)
        if statuses[stage.name] in STOPPED:
            say(f"The comparison was stopped in {stage.folder}. The same command goes on there.", always=True)
            break
    return statuses


def _run(stage: Stage, clock: Clock) -> int:
    if is_done(stage):
        return 0
    since, launch = time.monotonic(), stage.launch
    if stage.kind != "sft":  # the launcher goes on with SFT by itself
        key, held = stage.key(), stage.read("stage.json").get("key")
        launch = launch.going_on(anew=held != key, keep=held is None)  # None: not a run of a comparison
        if held or not stage.folder.exists():
            claim(stage.folder, "stage.json")  # a stage that is made anew keeps it
            write_json(stage.folder / "stage.json", {"key": key})
    status = launch.run()
    if not status:
        clock.took.setdefault(stage.kind, []).append(time.monotonic() - since)
    return status
