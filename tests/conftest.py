import logging
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("WANDB_MODE", "offline")
# A sixth of what every process imports is for what bitsandbytes gives torch.compile, and nobody calls.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import pytest

from dpo_recipes.doctor import miniature
from dpo_recipes.doctor.miniature import CHAT_TEMPLATE as CHAT_TEMPLATE

for name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL"):  # of a `make test` that runs these tests, not of the makes in them
    os.environ.pop(name, None)

REPOSITORY = Path(__file__).parent.parent
RECIPES = REPOSITORY / "recipes"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fault-seed", type=int, default=0, help="draws the moments at which tests/faults kills commands")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of two layers and a byte tokenizer with a chat template."""
    return miniature.tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def reward_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a reward model of random weights, its scores apart, and the tokenizer of `tiny_model`."""
    return miniature.tiny_reward_model(tmp_path_factory.mktemp("reward") / "model", tiny_model)


@pytest.fixture(scope="session")
def rows_of(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By the first word of a dataset adapter's name, a jsonl file of 120 rows in the schema that it reads."""
    files = miniature.write_rows(tmp_path_factory.mktemp("published"))
    return {name.partition("_")[0]: file for name, file in files.items()}


@pytest.fixture(scope="session")
def hh_rows(rows_of: dict[str, Path]) -> Path:
    """A jsonl file of 120 rows in the schema of hh-rlhf, written for these tests."""
    return rows_of["hh"]


def run_command(*command: str | Path, cwd: Path, timeout: int = 300, **environment: str) -> subprocess.CompletedProcess:
    """Run what a user types, in a folder of its own."""
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def run_train(*words: str | Path, cwd: Path, timeout: int = 300) -> subprocess.CompletedProcess:
    """What `dpo-recipes train` does, in a fork of this process."""
    return run_forked("train", *words, cwd=cwd, timeout=timeout)


def run_forked(*words: str | Path, cwd: Path, timeout: int = 300) -> subprocess.CompletedProcess:
    """What `dpo-recipes` does, in a fork of this process, which has imported what takes a new one ten seconds.

    Only accelerate is left out, by which the other processes of a run are started.
    """
    from trl import DPOTrainer  # noqa: F401

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


@pytest.fixture(scope="session")
def dpo_recipes() -> Path:
    """The installed command."""
    return Path(sys.executable).parent / "dpo-recipes"
