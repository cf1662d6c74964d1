"""Fixtures, options and the environment of the tests. What their files share is in helpers/."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
# A sixth of what every process imports is for what bitsandbytes gives torch.compile, and nobody calls.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

from dpo_recipes import machine

os.environ |= machine.ENVIRONMENT | os.environ  # before torch is imported: its threads soon sleep when they wait

import pytest

from dpo_recipes.doctor import miniature

# As after `source .venv/bin/activate`: messages then name the command by its name alone.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

for name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL"):  # of a `make test` that runs these tests, not of the makes in them
    os.environ.pop(name, None)

# A helper's assertion that fails shows its values, as one in a test does.
pytest.register_assert_rewrite(*(file.stem for file in Path(__file__).parent.glob("helpers/*.py")))


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


@pytest.fixture(scope="session")
def dpo_recipes() -> Path:
    """The installed command."""
    return Path(sys.executable).parent / "dpo-recipes"
