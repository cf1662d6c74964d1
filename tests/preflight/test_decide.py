"""What the memory estimate decides: activation checkpointing, and the budget of tokens_per_step=auto."""

import json
import re
from types import SimpleNamespace

import pytest
from commands import RECIPES, run_train
from datasets import Dataset
from transformers import AutoConfig
from trl import DPOConfig

from dpo_recipes.errors import RecipeError
from dpo_recipes.files import write_json
from dpo_recipes.preflight import decide as module
from dpo_recipes.preflight.decide import BUSY, MARGIN, choose, decide, this_machine
from dpo_recipes.preflight.memory import count_weights, memory_parts
from dpo_recipes.recipe import RecipeArguments

ROWS = Dataset.from_dict({"prompt_tokens": [60, 9], "chosen_tokens": [30, 8], "rejected_tokens": [10, 4]})


def cost_of(checkpointing, budget):
    """Bytes of a made-up model: 1,000 of weights, and 10 a token or with checkpointing 2."""
    return 1000 + (2 if checkpointing else 10) * (budget or 100)


@pytest.mark.parametrize(
    ("have", "asked", "budget", "expected"),
    [
        (6000, "auto", 500, (False, 500)),
        (5999, "auto", 500, (True, 500)),
        (100, "auto", 500, (True, 500)),  # nothing fits
        (100, False, 500, (False, 500)),  # a value that was given wins
        (1e9, True, 500, (True, 500)),
        (2000, "auto", None, (False, None)),
        (1000 + 10 * 1024, False, "auto", (False, 1024)),
        (999 + 10 * 1024, False, "auto", (False, 768)),
        (1e9, False, "auto", (False, 100_096)),  # a whole update
        (1000, False, "auto", (False, 256)),
        (1000 + 10 * BUSY, "auto", "auto", (False, BUSY)),
        (999 + 10 * BUSY, "auto", "auto", (True, 5 * BUSY - 256)),  # more tokens are worth the second forward pass
    ],
)
def test_the_largest_budget_that_fits_and_checkpointing_only_where_it_is_needed(have, asked, budget, expected):
    settings = {"activation_checkpointing": asked, "tokens_per_step": budget}
    assert choose(cost_of, have, settings, most=100_000) == expected


@pytest.fixture
def decided(tiny_model, tmp_path, monkeypatch):
    """Decides for a small model on a card with so many MiB, which stands in for this machine's."""

    def decided(mib, *, resume=None, **given):
        monkeypatch.setattr(module, "gpu_cards", lambda: [(mib + 9, 8.0), (mib, 8.0)])
        args = DPOConfig(
            str(tmp_path), bf16=False, use_cpu=True, per_device_train_batch_size=4, activation_checkpointing=True
        )
        args.use_cpu, args.gradient_accumulation_steps, args.resume_from_checkpoint = False, 2, resume
        script_args = RecipeArguments(tokens_per_step=given.get("tokens_per_step"))
        script_args.settings = args.to_dict() | {"activation_checkpointing": "auto", "tokens_per_step": None} | given
        line = decide(script_args, args, ROWS, name=str(tiny_model), task="preference")
        return line, script_args, args

    return decided


def test_a_decision_is_in_the_arguments_and_in_the_settings(decided, tiny_model):
    line, script_args, args = decided(16, tokens_per_step="auto")
    assert line.startswith(f"activation checkpointing off, tokens_per_step {args.tokens_per_step:,}: about ")
    assert "of the 17 MB of this machine's card" in line
    assert args.activation_checkpointing is args.gradient_checkpointing is False
    assert args.tokens_per_step == script_args.tokens_per_step == script_args.settings["tokens_per_step"]
    assert args.budget_is_estimated
    assert 0 < args.tokens_per_step < 8 * 100 + 256
    assert args.tokens_per_step % 256 == 0
    config = AutoConfig.from_pretrained(tiny_model)
    settings = script_args.settings | {"max_length": 90, "longest_pair": 100}
    weights = count_weights(config, settings)
    assert sum(memory_parts(config, weights, settings, task="preference").values()) <= (1 - MARGIN) * 16 * 2**20
    _, script_args, args = decided(8, tokens_per_step=400)
    assert (script_args.settings["activation_checkpointing"], args.activation_checkpointing) == (True, True)
    assert not args.budget_is_estimated
    assert decided(8, activation_checkpointing=True)[0] == ""


def test_the_next_round_of_a_run_takes_what_the_first_one_decided(decided, tiny_model):
    _, script_args, first = decided(16, tokens_per_step="auto")
    later = SimpleNamespace(activation_checkpointing=True, gradient_checkpointing=True, tokens_per_step="auto")
    assert decide(script_args, later, None, name=str(tiny_model), task="preference") == ""
    assert vars(later) == {name: getattr(first, name) for name in vars(later)}
    assert later.budget_is_estimated


def test_a_resumed_run_keeps_what_was_decided(decided, tmp_path):
    (tmp_path / "settings.json").write_text(json.dumps({"tokens_per_step": 128, "activation_checkpointing": True}))
    _, script_args, args = decided(8, tokens_per_step="auto", resume=str(tmp_path / "checkpoint-1"))
    assert (args.tokens_per_step, args.activation_checkpointing) == (128, True)
    assert script_args.settings["tokens_per_step"] == 128
    assert decided(8, tokens_per_step="auto")[2].tokens_per_step > 128


def test_a_model_without_a_configuration_needs_a_number(decided, monkeypatch):
    def missing(*_, **__):
        raise OSError("There is no config.json.")

    monkeypatch.setattr(module, "load_config", missing)
    line, script_args, args = decided(8)
    assert (line, script_args.settings["activation_checkpointing"]) == ("", args.activation_checkpointing)
    with pytest.raises(RecipeError, match=r"tokens_per_step=auto needs the configuration of .* Give a number"):
        decided(8, tokens_per_step="auto")


def test_a_cpu_has_its_main_memory_for_all_processes(monkeypatch):
    monkeypatch.setattr(module, "gpu_cards", lambda: [(8, 8.0)])
    args = DPOConfig("-", bf16=False, use_cpu=True, activation_checkpointing=False)
    name, size = this_machine(args)
    assert (name, size > 2**28) == ("this machine", True)


def test_profiles_for_cards_leave_checkpointing_to_the_estimate():
    for name in ("turing", "local", "gpu"):
        text = (RECIPES / "profiles" / f"{name}.yaml").read_text()
        assert re.search("^# activation_checkpointing is on where the estimate", text, re.MULTILINE)


@pytest.mark.slow
def test_a_run_decides_says_so_and_a_resumed_run_takes_the_same_budget(tmp_path, tiny_model, hh_rows):
    (tmp_path / "mine.yaml").write_text("use_cpu: true\nbf16: false\ndataloader_pin_memory: false\n")
    flags = [
        "--dataset_name",
        hh_rows,
        "--model_name_or_path",
        tiny_model,
        "--pairs_per_update",
        "8",
        "--save_steps",
        "1",
    ]
    flags += ["--eval_pairs", "2", "--output_dir", "run", "--tokens_per_step", "auto"]
    train = ["hh-rlhf-lora", "--profile", tmp_path / "mine.yaml", *flags]
    planned = run_train(*train, "--dry_run", "true", cwd=tmp_path)
    said = "Memory: activation checkpointing off, tokens_per_step ([0-9,]+): about .* of this machine"
    [budget] = re.findall(said, planned.stdout)
    first = run_train(*train, "--max_steps", "1", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert re.findall(said, first.stdout) == [budget]
    settings = tmp_path / "run" / "settings.json"
    held = json.loads(settings.read_text())
    assert (f"{held['tokens_per_step']:,}", held["activation_checkpointing"]) == (budget, False)
    write_json(settings, held | {"tokens_per_step": 512})  # as a halved budget is stored
    again = run_train(*train, "--max_steps", "2", "--resume_from_checkpoint", "true", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "tokens_per_step 512" in again.stdout
    assert json.loads(settings.read_text())["tokens_per_step"] == 512
