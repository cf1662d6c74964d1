"""The estimate of memory, and the plan that a dry run prints."""

import re
import runpy
import shutil

import pytest
from commands import RECIPES, run_train
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from dpo_recipes.preflight.memory import TILE, count_weights, memory_parts
from dpo_recipes.presets import LORA, QLORA


def test_weights_are_counted_from_the_configuration(tiny_model):
    config = AutoConfig.from_pretrained(tiny_model)
    total = sum(weight.numel() for weight in AutoModelForCausalLM.from_pretrained(tiny_model).parameters())
    assert count_weights(config, {}) == {"trained": total, "frozen": 0, "quantised": 0}
    linear = {"q": (64, 64), "k": (64, 32), "v": (64, 32), "o": (64, 64)}
    linear |= {"gate": (64, 128), "up": (64, 128), "down": (128, 64)}
    lora = 2 * sum(16 * (inputs + outputs) for inputs, outputs in linear.values())
    assert count_weights(config, LORA) == {"trained": lora, "frozen": total, "quantised": 0}
    quantised = 2 * sum(inputs * outputs for inputs, outputs in linear.values())
    assert count_weights(config, QLORA) == {"trained": lora, "frozen": total, "quantised": quantised}


CONFIG = LlamaConfig(hidden_size=10, num_attention_heads=1, intermediate_size=20, num_hidden_layers=3, vocab_size=50)
SETTINGS = {"per_device_train_batch_size": 2, "max_length": 100, "optim": "adamw_torch_fused"}
NUMBERS = 2 * 10 + 3 * 10 + 3 * 10 + 4 * 20  # a token and layer: inputs, queries and output, keys and values, MLP
NORMS = 2 * 10  # numbers that are float32 in any run


def test_memory_of_all_weights_holds_a_reference_model():
    weights = {"trained": 1000, "frozen": 0, "quantised": 0}
    assert memory_parts(CONFIG, weights, SETTINGS | {"dtype": "bfloat16"}, task="preference") == {
        "frozen weights": 2000,  # the reference model
        "trained weights": 4000,
        "gradients": 4000,
        "optimizer": 8000,
        "activations": 400 * (3 * 4 * (NUMBERS + 2 * NORMS) + 3 * 4 * 10),  # 2 pairs of 200 tokens, 3 layers
        "logits": 400 * 50 * 4,
    }
    assert "frozen weights" not in memory_parts(CONFIG, weights, SETTINGS, task="answer")


def test_the_tile_of_logits_is_trls_and_held_several_times_on_a_cpu():
    from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    assert TILE == (TOKEN_CHUNK_SIZE, _CHUNKED_LOGPROB_CHUNK_SIZE)
    weights = {"trained": 10, "frozen": 1000, "quantised": 0}
    large = LlamaConfig(hidden_size=10, num_attention_heads=1, intermediate_size=20, vocab_size=100_000)
    settings = SETTINGS | {"bf16": True, "max_length": 2000}
    assert memory_parts(large, weights, settings, task="preference")["logits"] == 2 * 4096 * 32768
    on_cpu = memory_parts(large, weights, settings | {"use_cpu": True}, task="preference")
    assert on_cpu["logits"] == 9 * 4 * 4096 * 32768


def test_memory_of_lora_on_four_bits_with_checkpointing():
    weights = {"trained": 10, "frozen": 1000, "quantised": 900}
    settings = SETTINGS | {"dtype": "bfloat16", "bf16": True, "activation_checkpointing": True, "optim": "adamw_8bit"}
    parts = memory_parts(CONFIG, weights, settings, task="preference")
    assert parts["frozen weights"] == pytest.approx(2 * 100 + 0.52 * 900)
    assert parts["optimizer"] == 20
    layer = 2 * (NUMBERS + 7 * 16) + 4 * NORMS  # bytes a token; LoRA's rank is 16 on seven linear layers
    assert parts["activations"] == 400 * (6 * 2 * 10 + layer)  # the inputs of 3 layers, and of the head


def test_memory_of_a_token_budget_is_that_of_its_tokens():
    weights = {"trained": 10, "frozen": 1000, "quantised": 0}

    def tokens(budget, batch=64):
        settings = SETTINGS | {"per_device_train_batch_size": batch, "tokens_per_step": budget}
        kept = 3 * 4 * (NUMBERS + 7 * 16 + NORMS) + 3 * 4 * 10
        return memory_parts(CONFIG, weights, settings, task="preference")["activations"] / kept

    assert tokens(1000) == 1000
    assert tokens(1000, batch=2) == 400  # an update has no more
    assert tokens(150) == 200  # a pair of 100 and 100 tokens is not divided
    assert tokens(0) == tokens(None) == 64 * 200


def test_a_dry_run_prints_pairs_and_tokens_of_a_micro_batch(tmp_path, tiny_model, hh_rows):
    result = run_train(
        *("hh-rlhf-lora", "--profile", "cpu", "--dataset_name", hh_rows, "--dry_run", "true"),
        *("--model_name_or_path", tiny_model, "--pairs_per_update", "8", "--tokens_per_step", "600"),
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    [line] = re.findall(r"micro-batch +([\d.]+) pairs of ([\d,]+) tokens on average, of 600", result.stdout)
    assert 1 <= float(line[0]) < 8
    assert 100 < int(line[1]) <= 600
    assert "8 pairs = 8 a device x 1 process(es) x 1 accumulated" in result.stdout


def test_a_dry_run_prints_the_plan_and_leaves_nothing(tmp_path, tiny_model, hh_rows):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    (model / "model.safetensors").unlink()  # no weight is loaded
    result = run_train(
        *("hh-rlhf-lora", "--profile", "cpu", "--dataset_name", hh_rows, "--dry_run", "true"),
        *("--model_name_or_path", model, "--pairs_per_update", "8", "--beta", "0.25", "--output_dir", "run"),
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    lines = {line.split()[0]: line.split(maxsplit=1)[-1] for line in result.stdout.splitlines() if line.strip()}
    assert lines["beta"] == "0.25"
    assert "loss_type" not in lines, "as TRL has it"
    assert lines["pairs"].split() == ["116", "4"]
    assert lines["update"] == "8 pairs = 4 a device x 1 process(es) x 2 accumulated"
    assert lines["updates"] == "15"
    assert {"memory", "disk", "Nothing"} <= set(lines)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.slow
def test_a_dry_run_of_a_number_estimates_the_time_and_keeps_nothing(tmp_path, tiny_model, hh_rows):
    flags = ["--model_name_or_path", tiny_model, "--pairs_per_update", "4", "--eval_pairs", "4", "--output_dir", "run"]
    result = run_train(
        *("hh-rlhf-lora", "--profile", "cpu", "--dataset_name", hh_rows, "--dry_run", "2", *flags),
        *("--max_steps", "1000"),
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(
        r"About [\d.]+ (s|min|h) for 1,000 updates on this machine, [\d.]+ s each \(2 timed\)", result.stdout
    )
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []
    refused = run_train(*("hh-rlhf-lora", "--profile", "cpu", *flags, "--dry_run", "maybe"), cwd=tmp_path)
    assert refused.returncode == 2
    assert "Give true, false, or the number of updates to time" in refused.stderr


@pytest.mark.slow
def test_a_dry_run_plans_the_stage_before_without_training_it(tmp_path):
    result = run_train("quickstart", "--profile", "cpu", "--dry_run", "true", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "quickstart needs quickstart_sft, which would be trained first" in result.stdout
    updates = [line.split()[1] for line in result.stdout.splitlines() if line.startswith("  updates ")]
    assert updates == ["425", "88"]
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_a_dry_run_of_ppo_plans_both_stages_before_it_once_each(tmp_path):
    result = run_train("quickstart-ppo", "--profile", "cpu", "--dry_run", "true", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    said = [line for line in result.stdout.splitlines() if "which would be trained first" in line]
    assert [line.partition(",")[0] for line in said] == [
        "quickstart_ppo needs quickstart_sft",
        "quickstart_ppo needs quickstart_reward",
    ]
    recipe = runpy.run_path(str(RECIPES / "quickstart_ppo.py"))["RECIPE"]
    prompts = int(re.findall(r"^prompts +(\d+)", result.stdout, re.MULTILINE)[0])
    rollouts = prompts // recipe["generation_batch_size"] * recipe["num_train_epochs"]
    updates = recipe["generation_batch_size"] * recipe["num_iterations"] // recipe["pairs_per_update"]
    planned = [line.split()[1] for line in result.stdout.splitlines() if line.startswith("  updates ")]
    assert planned == ["425", "88", str(rollouts * updates)]
    memory = [line for line in result.stdout.splitlines() if line.startswith("  memory ")]
    assert all(part in memory[2] for part in ("critic ", "reward model ", "keys and values "))
    assert not any(tmp_path.iterdir())


def test_a_dry_run_says_what_would_be_refused(tmp_path, tiny_model, hh_rows):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "settings.json").write_text('{"beta": 0.5, "pairs_per_update": 64}')
    result = run_train(
        *("hh-rlhf-lora", "--profile", "cpu", "--dataset_name", hh_rows, "--dry_run", "true"),
        *("--model_name_or_path", tiny_model, "--output_dir", "run"),
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert "This run would not start: run holds another run" in result.stdout
