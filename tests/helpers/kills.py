"""Kills commands at moments drawn with a seed, and compares their files with the files of undisturbed commands."""

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

from dpo_recipes.files import MANIFEST, read_json
from dpo_recipes.runs.page import remake

Phases = dict[str, Callable[[str, Path], bool]]
"""Phases by name, in order. Its function of printed text and output folder returns true once a phase has begun."""

Fault = tuple[str, float, Callable[[subprocess.Popen], object]]
Ending = tuple[dict[str, float], int]


def prints(text: str) -> Callable[[str, Path], bool]:
    return lambda said, _: text in said


def has(name: str) -> Callable[[str, Path], bool]:
    return lambda _, folder: (folder / name).exists()


def is_open(_: str, run: Path) -> bool:
    """Returns true while the final save has declared its files and not listed them yet."""
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
    "exit": has("report.html"),
}
EVALUATION: Phases = {
    "start": lambda *_: True,
    "answers of the initial model": prints("Answers of before"),
    "answers of the tuned model": has("eval/answers/before.json"),
    "judging": has("eval/answers/after.json"),
    "pages": has("eval.json"),
}

ROUNDS: Phases = {
    "sampling": lambda _, run: any(run.glob("round-1/answers.jsonl.*.part")),
    "ranking": has("round-1/answers.jsonl"),
    "training of round 1": has("round-1/checkpoint-2"),
    "end of round 1": has("round-1/checkpoint-6/trainer_state.json"),
    "between rounds": prints("Round 2 of 2"),
    "training of round 2": has("round-2/checkpoint-2/trainer_state.json"),
    "save": is_open,
    "pages": has("metrics.json"),
}

COMPARISON: Phases = {
    **{f"stage {number}": prints(f"Stage {number} of 4") for number in range(1, 5)},
    "answers": prints("Answers of "),
    "report": has("answers/ppo-0.1-0.json"),
}


def run(command: list[str], folder: Path, phases: Phases, *, output: str, at: Fault | None = None) -> Ending:
    """Runs a command to its end; returns the seconds after which each phase began, and the exit status.

    Args:
        command: The command that a user types.
        folder: Folder that the command runs in.
        phases: Phases whose beginnings are timed.
        output: The output folder, within `folder`.
        at: A phase, the seconds after its beginning, and the fault that the process then meets.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    log, times, begun = folder / "log", {}, time.monotonic()
    with log.open("wb") as stream:
        options = dict(stdout=stream, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
        hang_up = dict(preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))  # nohup ignores SIGHUP
        process = subprocess.Popen(command, cwd=folder, **options, **hang_up)
    try:
        while process.poll() is None:
            said, now = log.read_text(errors="replace"), time.monotonic() - begun
            assert now < 600, said
            times |= {
                name: now for name, begins in phases.items() if name not in times and begins(said, folder / output)
            }
            if at and now >= times.get(at[0], 600) + at[1]:
                at[2](process)
                at = None
            time.sleep(0.002)
    finally:
        kill_all(process)
    return times | {"end": time.monotonic() - begun}, process.returncode


def kill_all(process: subprocess.Popen) -> None:
    """Kills a command and its descendants, which are in sessions of their own; the training process comes first."""
    with suppress(psutil.NoSuchProcess):
        processes = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for each in reversed(processes):
            with suppress(psutil.NoSuchProcess):
                each.kill()
        psutil.wait_procs(processes[1:])
    process.wait()


def moment(phase: str, times: dict[str, float], seed: str) -> float:
    """Seconds into a phase, drawn evenly from its duration in the undisturbed command.

    A phase that passed between two polls has the duration 0: the fault then comes as soon as the phase is seen.
    """
    begun = times.get(phase, times["end"])
    end = min((other for other in times.values() if other > begun), default=begun)
    return random.Random(seed).random() * (end - begun)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return {f"{file.name} {key}": value for file in run.glob("*.safetensors") for key, value in load_file(file).items()}


def is_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return bool(one) and one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def came_to_the_same(there: Path, whole: Path, told: str, *, saved: Collection[str] = ()) -> None:
    """Asserts that two runs have the same weights, losses, updates and files.

    A run that was stopped after it wrote `done.json` is finished; the command that it names makes its page.

    Args:
        there: Folder of the run that was stopped.
        whole: Folder of the undisturbed run.
        told: Text of a failure.
        saved: Names of checkpoints that only the stopped run has, because an interrupt saved them.
    """
    if not (there / "report.html").exists():
        assert "Its page is missing: dpo-recipes page" in told, told
        remake(str(there))
    assert is_same(weights(there), weights(whole)), told
    assert losses(there) == losses(whole), told
    assert read_json(there / "done.json")["updates"] == read_json(whole / "done.json")["updates"], told
    assert names(there) == names_with(whole, saved), told


def names_with(whole: Path, saved: Collection[str]) -> set[str]:
    """The files of a run as `names` gives them, with further checkpoints; the newest ones of all stay."""
    kept = [folder.name for folder in whole.glob("checkpoint-*")]
    newest = sorted({*kept, *saved}, key=lambda name: int(name.rpartition("-")[2]))[-len(kept) :]
    parts = [name.partition("/") for name in names(whole)]
    within = {rest for top, _, rest in parts if top in kept}
    return {top + slash + rest for top, slash, rest in parts if top not in kept} | {
        f"{checkpoint}/{rest}" for checkpoint in newest for rest in within
    }


def losses(run: Path) -> list[tuple[int, float]]:
    """Update and loss of every log up to the last checkpoint, or of all rounds."""
    held = run / "log.json"
    if not held.exists():
        held = max(run.glob("checkpoint-*"), key=lambda folder: int(folder.name.rpartition("-")[2]))
        held /= "trainer_state.json"
    history = json.loads(held.read_text())["log_history"]
    return [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]


def names(folder: Path) -> set[str]:
    """Names of the files in a folder, without the temporary files that a killed writer leaves."""
    files = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    return {name for name in files if not name.endswith(".tmp")}
