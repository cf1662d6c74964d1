"""The commands that the tests run, and the two folders that they run them on.

torch, trl and dpo_recipes are imported within the functions, once conftest.py has set the environment.
"""

import logging
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
RECIPES = REPOSITORY / "recipes"


def run_command(*command: str | Path, cwd: Path, timeout: int = 300, **environment: str) -> subprocess.CompletedProcess:
    """Runs a command that a user types, in a folder of its own; returns its exit status and what it printed."""
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def run_train(*words: str | Path, cwd: Path, timeout: int = 300) -> subprocess.CompletedProcess:
    """Runs `dpo-recipes train` in a fork of this process; returns its exit status and what it printed."""
    return run_forked("train", *words, cwd=cwd, timeout=timeout)


def run_forked(*words: str | Path, cwd: Path, timeout: int = 300) -> subprocess.CompletedProcess:
    """Runs `dpo-recipes` in a fork of this process; returns its exit status and what it printed.

    A new process would spend ten seconds on imports, which this process has behind it. The recipe runs in the fork
    itself, where the command would start it with accelerate.
    """
    from trl import DPOTrainer  # noqa: F401  # imported here, so that no fork has to

    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("stdout", "stderr")]
        call = [*map(str, words)]
        child = multiprocessing.get_context("fork").Process(target=_run, args=(call, cwd, files))
        child.start()
        child.join(timeout)
        if child.exitcode is None:
            child.kill()
            raise subprocess.TimeoutExpired(call, timeout)
        return subprocess.CompletedProcess(call, child.exitcode, *(file.read_text() for file in files))


def _run(call: list[str], cwd: Path, files: list[Path]) -> None:
    import torch
    from accelerate.state import AcceleratorState, GradientState

    from dpo_recipes import cli
    from dpo_recipes.launch import processes

    def recipe(command: list[str], environment: dict[str, str]) -> int:
        os.environ.update(environment)
        first = next(at for at, word in enumerate(command) if word.endswith(".py"))
        sys.argv = command[first:]
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    os.chdir(cwd)
    sys.argv = ["dpo-recipes", *call]
    warnings.resetwarnings()
    logging.getLogger().handlers.clear()  # pytest's
    AcceleratorState._reset_state(reset_partial_state=True)  # of the tests before
    GradientState._reset_state()
    processes.supervise = recipe
    torch.set_num_threads(1)  # as run_command has it
    sys.exit(cli.main(call))
