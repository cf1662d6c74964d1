"""Kills commands at moments that a seed draws, and compares what they leave with what undisturbed ones leave."""

import json
import os
import random
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

from dpo_recipes.files import MANIFEST, read_json

Phases = dict[str, Callable[[str, Path], bool]]
"""By name, in their order, what is true as soon as a phase has begun: of what was printed, and of the output folder."""


def prints(text: str) -> Callable[[str, Path], bool]:
    return lambda said, _: text in said


def has(name: str) -> Callable[[str, Path], bool]:
    return lambda _, folder: (folder / name).exists()


def is_open(_: str, run: Path) -> bool:
    """The final save has begun: its files are declared, but not listed yet."""
    return "*" in read_json(run / MANIFEST).get("open", [])


def is_saved(_: str, run: Path) -> bool:
    return any(
        name.endswith("model.safetensors") for name in read_json(run / MANIFEST).get("files", {}) if "/" not in name
    )


TRAINING: Phases = {
    "start": prints("accelerate launch"),
    "model": prints("Data account"),
    "steps": prints("Training "),
    "checkpoint": has("checkpoint-2"),
    "later steps": has("checkpoint-2/trainer_state.json"),
    "save": is_open,
    "measuring": is_saved,
    "merging": has(".merged"),
    "pages": has("metrics.json"),
    "page": has("done.json"),
}
EVALUATION: Phases = {
    "start": lambda *_: True,
    "answers of the start": prints("Answers of before"),
    "answers of the run": has("eval/answers/before.json"),
    "judging": has("eval/answers/after.json"),
    "pages": has("eval.json"),
}


def run(command: list[str], folder: Path, phases: Phases, *, output: str, kill: tuple[str, float] | None = None):
    """Seconds after the start at which a command came into each phase, and its exit status.

    Args:
        command: What a user types.
        folder: Where.
        phases: To be told apart.
        output: The output folder, within `folder`.
        kill: A phase, and the seconds after its beginning, at which every process of the command is killed.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    log, times, begun = folder / "log", {}, time.monotonic()
    with log.open("wb") as stream:
        options = dict(stdout=stream, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
        process = subprocess.Popen(command, cwd=folder, **options)
    try:
        while process.poll() is None:
            said, now = log.read_text(errors="replace"), time.monotonic() - begun
            assert now < 600, said
            times |= {
                name: now for name, begins in phases.items() if name not in times and begins(said, folder / output)
            }
            if kill and now >= times.get(kill[0], 600) + kill[1]:
                break
            time.sleep(0.002)
    finally:
        kill_all(process)
    return times | {"end": time.monotonic() - begun}, process.returncode


def kill_all(process: subprocess.Popen) -> None:
    """Kills a command with its descendants, which are in sessions of their own; the training first."""
    with suppress(psutil.NoSuchProcess):
        processes = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for each in reversed(processes):
            with suppress(psutil.NoSuchProcess):
                each.kill()
        psutil.wait_procs(processes[1:])
    process.wait()


def moment(phase: str, times: dict[str, float], seed: str) -> float:
    """Seconds into a phase, drawn evenly from all that it took in the undisturbed command."""
    end = min(other for other in times.values() if other > times[phase])
    return random.Random(seed).random() * (end - times[phase])


def weights(run: Path) -> dict[str, torch.Tensor]:
    return {f"{file.name} {key}": value for file in run.glob("*.safetensors") for key, value in load_file(file).items()}


def is_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return bool(one) and one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def losses(run: Path, last: int) -> list[tuple[int, float]]:
    """Update and loss of every log up to the last checkpoint."""
    history = json.loads((run / f"checkpoint-{last}" / "trainer_state.json").read_text())["log_history"]
    return [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]


def names(folder: Path) -> set[str]:
    """The files of a folder, without the temporary ones that a killed writer leaves and no run counts as strange."""
    files = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    return {name for name in files if not name.endswith(".tmp")}
