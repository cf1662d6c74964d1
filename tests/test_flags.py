"""Misspelt flags are refused before a library is imported, and no flag that a recipe may take is."""

import dataclasses

import pytest
from trl import DPOConfig, ModelConfig, RewardConfig, RLOOConfig, SFTConfig

from dpo_recipes.cli import main
from dpo_recipes.errors import RecipeError
from dpo_recipes.flags import known_settings, refuse_misspelt
from dpo_recipes.launch.launch import Launch
from dpo_recipes.ppo import PPOConfig
from dpo_recipes.recipe import OnlineArguments


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["train", "quickstart", "--lerning_rate", "1"], "no setting --lerning_rate. Did you mean --learning_rate?"),
        (["train", "quickstart", "--learning-rat=1"], "Did you mean --learning_rate?"),
        (["train", "quickstart", "--sweep", "betta=0.1,0.2"], "no setting --betta. Did you mean --beta?"),
        (["train", "quickstart", "--evaluation_strategy", "no"], "Did you mean --eval_strategy?"),
        (["inspect", "hh-rlhf-lora", "--max_lenght", "1"], "Did you mean --max_length?"),
        (["compare", "quickstart", "--profle", "cpu"], "Did you mean --profile?"),
        (["compare", "quickstart", "--dpo.max_stps", "9"], "no setting --dpo.max_stps. Did you mean --dpo.max_steps"),
        (["evaluate", "quickstart", "--max_new_token", "8"], "Did you mean --max_new_tokens?"),
    ],
)
def test_a_misspelt_flag_is_refused_with_the_close_name(words, told, capsys):
    assert main(words) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    "part", [DPOConfig, SFTConfig, RewardConfig, RLOOConfig, PPOConfig, ModelConfig, OnlineArguments]
)
def test_every_setting_is_known_from_the_sources(part):
    assert {entry.name for entry in dataclasses.fields(part) if entry.init} <= known_settings()


def test_a_flag_of_the_recipes_own_passes(tmp_path, monkeypatch):
    recipe = tmp_path / "mine.py"
    recipe.write_text("class Mine(RecipeArguments):\n    betas: str = ''\n")
    monkeypatch.setattr(Launch, "run", lambda self: 0)
    assert main(["train", str(recipe), "--profile", "cpu", "--betas", "1", "--no_bf16"]) == 0
    assert main(["train", str(recipe), "--profile", "cpu", "--nothing_like_it", "1"]) == 0  # its own parser refuses it
    refuse_misspelt(["dpo.max_steps", "reward.learning_rate"])
    with pytest.raises(RecipeError, match="--betas"):
        refuse_misspelt(["betas"])
