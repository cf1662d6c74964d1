"""Reads the README files and the manual in docs/, and checks the commands that they give."""

import re
import runpy
import shlex
import subprocess
from pathlib import Path

import pytest
from commands import RECIPES, REPOSITORY
from transformers import TrainingArguments
from trl import ModelConfig, TrlParser

from dpo_recipes.catalog import find_recipe, find_settings
from dpo_recipes.cli import build_parser
from dpo_recipes.compare.plan import read_recipes
from dpo_recipes.launch.launch import prepare
from dpo_recipes.launch.sweep import read_grid
from dpo_recipes.preflight.findings import THRESHOLDS
from dpo_recipes.recipe import RecipeArguments

README = REPOSITORY / "README.md"
RECIPES_README = RECIPES / "README.md"
DOCS = REPOSITORY / "docs"


def blocks(document: Path, language: str) -> list[str]:
    """Contents of the fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", document.read_text(), re.MULTILINE | re.DOTALL)


def commands(document: Path) -> list[str]:
    """Commands of a document, one a line of its sh blocks."""
    return [line for block in blocks(document, "sh") for line in block.splitlines() if line]


def shown_output() -> str:
    """Last lines of the output of `make train`, as the README shows them."""
    found = blocks(README, "text")
    assert found, "README.md shows no output of a run"
    return found[0]


def from_make(command: str) -> str:
    """The last command that make would run."""
    dry = subprocess.run(
        ["make", "-n", "PYTHON=no-python", *shlex.split(command, comments=True)[1:]],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert dry.returncode == 0, f"{command}: {dry.stderr}"
    return dry.stdout.replace("\\\n", " ").strip().splitlines()[-1].strip().removeprefix("exec ")


def check_flags(recipe: Path, flags: list[str]) -> None:
    """Raises an error if the recipe would refuse a flag. Writes no file and loads no model."""
    namespace = runpy.run_path(str(recipe))
    classes = [value for value in namespace.values() if isinstance(value, type)]
    parts = [part for part in classes if issubclass(part, (TrainingArguments, RecipeArguments, ModelConfig))]
    assert len(parts) == 3
    parser = TrlParser(parts)
    assert parser.set_defaults_with_config(**namespace["RECIPE"]) == []
    cpu = ["--config", str(RECIPES / "profiles" / "cpu.yaml")]
    parser.parse_args_and_config([*cpu, *flags, "--use_cpu", "true", "--bf16", "false"])


def check_train(words: list[str]) -> None:
    """Raises an error unless the recipe, profile and accelerate file exist and the flags are known."""
    name, *flags = words
    recipe = RECIPES / "hh_rlhf_lora.py" if name == "mine.py" else find_recipe(name)
    for flag, kind in (("--profile", "profiles"), ("--accelerate", "accelerate")):
        if flag in flags:
            at = flags.index(flag)
            assert find_settings(kind, flags[at + 1], recipe=recipe).is_file()
            del flags[at : at + 2]
    if "--sweep" in flags:
        at = flags.index("--sweep")
        end = next((number for number in range(at + 1, len(flags)) if flags[number].startswith("--")), len(flags))
        grid = read_grid(flags[at + 1 : end], taken=set())
        flags[at:end] = [part for key, values in grid.items() for part in (f"--{key}", values[-1])]
    check_flags(recipe, flags)


def check_inspect(words: list[str]) -> None:
    """Raises an error unless a recipe, or a dataset with the name of a model, is given and the flags are known."""
    name, *flags = words
    for own in ("--gpu", "--with_model", "--profile"):
        if own in flags:
            del flags[flags.index(own) : flags.index(own) + 2]
    if name.endswith(".jsonl") or "/" in name:
        assert "--model_name_or_path" in flags
        name = "hh-rlhf-lora"
    if "--threshold" in flags:
        names = [word.partition("=")[0] for word in flags[flags.index("--threshold") + 1 :]]
        assert set(names) <= set(THRESHOLDS)
    check_flags(find_recipe(name), flags)


def check_compare(words: list[str]) -> None:
    """Raises an error unless the recipe and its siblings exist and one of them knows each flag."""
    options, flags = build_parser().parse_known_args(words)
    launch = prepare(options.recipe, profile="cpu")
    recipes = read_recipes(launch, options.stages or ["dpo", "ppo"], flags=flags)
    assert {"dpo", "reward", "ppo"} <= {*recipes}


def check_launch(words: list[str]) -> None:
    """Raises an error unless the files of an `accelerate launch` exist and the recipe knows the flags."""
    at = next(number for number, word in enumerate(words) if word.endswith(".py"))
    assert words[0] == "--config_file"
    assert words[at + 1] == "--config"
    for file in (words[1], words[at], words[at + 2]):
        assert (REPOSITORY / file).is_file(), file
    check_flags(REPOSITORY / words[at], words[at + 3 :])


def check_command(command: str) -> None:
    """Raises an error if a documented command could not run."""
    words = shlex.split(from_make(command) if command.startswith("make ") else command)
    match words:
        case [".venv/bin/dpo-recipes", "train", *rest]:
            check_train(rest)
        case [".venv/bin/dpo-recipes", "inspect", *rest]:
            check_inspect(rest)
        case [".venv/bin/dpo-recipes", "compare", *_]:
            check_compare(words[1:])
        case [".venv/bin/dpo-recipes", "evaluate", *_]:
            options, flags = build_parser().parse_known_args(words[1:])
            check_flags(find_recipe("hh-rlhf-lora" if "/" in options.model else options.model), flags)
        case [".venv/bin/dpo-recipes", "copy", name, "mine.py"]:
            assert find_recipe(name).is_file()
        case [".venv/bin/dpo-recipes", "answer" | "doctor" | "merge" | "sample" | "try", *_]:
            build_parser().parse_args(words[1:])
        case [".venv/bin/accelerate", "launch", *rest]:
            check_launch(rest)
        case [".venv/bin/python", file, "--help"]:
            assert (REPOSITORY / file).is_file()
        case [".venv/bin/dpo-recipes", "list"] | [".venv/bin/pre-commit", "install"]:
            pass
        case _ if command.startswith("make "):
            assert len(words) > 1
        case _:
            pytest.fail(f"nothing here knows how to check: {command}")
