"""The names that recipes import: a recipe that was copied before a change still trains after it."""

import ast
import importlib

import pytest
from commands import RECIPES

NAMES = {
    "catalog": ["recipe_folders"],
    "dataset_adapters": [
        *("Drop", "Message", "Pair", "Row", "adapt", "as_messages", "check_pair", "rename_columns", "recognise"),
        *("hh_rlhf", "oasst1", "plain_text", "preference_jsonl", "prompts_alone", "shp", "ultrafeedback_binarized"),
        *("is_right", "marked_solutions", "right_against_wrong"),
    ],
    "health": ["HealthCallback"],
    "loading": ["load_rows", "mix_pairs", "split_pairs"],
    "playground": [
        *("MAX_NEW_TOKENS", "both_answers", "build_model", "evaluation_prompts", "load_pairs", "parts", "reward"),
        "scores",
    ],
    "ppo": ["PPOConfig", "PPOTrainer", "RLOOTrainer"],
    "preflight": ["prepare_pairs", "prepare_prompts"],
    "presets": ["LORA", "QLORA"],
    "recipe": ["OnlineArguments", "RecipeArguments", "load_tokenizer", "parse_recipe", "run"],
    "runs": ["finish_run", "start_run"],
    "rounds": [
        *("RoundsConfig", "begin_rounds", "finish_round", "load_policy", "rank", "sample", "start_round"),
    ],
    "shared_prefix": ["SharedPrefixDPOTrainer"],
}


@pytest.mark.parametrize("module", NAMES)
def test_names_that_recipes_import_stay_where_they_are(module):
    there = importlib.import_module(f"dpo_recipes.{module}")
    assert [name for name in NAMES[module] if not hasattr(there, name)] == []


def test_every_name_that_a_recipe_imports_is_pinned():
    files = sorted(RECIPES.glob("*.py"))
    assert files
    found = [
        node for file in files for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)
    ]
    ours = [
        (node.module, name.name) for node in found if str(node.module).startswith("dpo_recipes") for name in node.names
    ]
    assert ours
    for module, name in ours:
        assert (module == "dpo_recipes" and name in NAMES) or name in NAMES[module.removeprefix("dpo_recipes.")]
