"""Every recipe has flags that train it on tiny models and rows."""

import runpy
import sys
from pathlib import Path

import pytest
from commands import RECIPES
from trl import ModelConfig

from dpo_recipes import dataset_adapters
from dpo_recipes.dataset_adapters.ledger import Ledger
from dpo_recipes.doctor import miniature_flags
from dpo_recipes.doctor.miniature import write_rows
from dpo_recipes.errors import RecipeError
from dpo_recipes.loading import load_rows
from dpo_recipes.recipe import RecipeArguments, argument_classes, parse_recipe

NAMES = sorted(path.stem for path in RECIPES.glob("*.py"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("miniature")


def value(flags, name):
    return flags[flags.index(f"--{name}") + 1]


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_parses_with_its_miniature_flags(name, folder, tmp_path, monkeypatch):
    flags = miniature_flags(RECIPES / f"{name}.py", folder)
    profile = str(RECIPES / "profiles" / "cpu.yaml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--config", profile, *flags])
    recipe = runpy.run_path(str(RECIPES / f"{name}.py"))
    kinds = [kind for kind in argument_classes(recipe) if kind is not ModelConfig or "--model_name_or_path" in flags]
    parsed = parse_recipe(recipe["RECIPE"], kinds)
    settings = next(part for part in parsed if isinstance(part, RecipeArguments)).settings
    assert settings["max_steps"] == 2
    for key in ("model_name_or_path", "reward_model_name_or_path"):
        assert (key in recipe["RECIPE"]) == (key in settings and settings[key] is not None)
        if settings.get(key):
            assert (Path(settings[key]) / "config.json").exists()
    assert name.startswith("quickstart") == ("--dataset_name" not in flags)


@pytest.mark.parametrize(
    "adapter", ["gsm8k", "hh_rlhf", "shp", "oasst1", "ultrafeedback_binarized", "preference_jsonl"]
)
def test_a_dataset_adapter_keeps_all_rows_that_are_written_for_it(adapter, tmp_path):
    file = write_rows(tmp_path)["marked_solutions" if adapter == "gsm8k" else adapter]
    rows = load_rows(RecipeArguments(dataset_name=str(file)))["train"]
    with Ledger() as ledger:
        pairs = getattr(dataset_adapters, adapter)(rows)
    assert len(pairs) == 120
    assert ledger.total().dropped == {}


def test_a_mixture_gets_the_rows_of_every_dataset_adapter_in_it(folder):
    mixed = value(miniature_flags(RECIPES / "mixture_lora.py", folder), "dataset_name")
    names = sorted(Path(part).stem for part in mixed.split("+"))
    assert names == ["hh_rlhf", "shp", "ultrafeedback_binarized"]


def test_a_file_that_is_no_recipe_is_refused(folder, tmp_path):
    (tmp_path / "other.py").write_text("SETTINGS = dict()\n")
    with pytest.raises(RecipeError, match=r"other\.py has no RECIPE"):
        miniature_flags(tmp_path / "other.py", folder)
