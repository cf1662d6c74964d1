"""What only a card can show; `make test-gpu` runs it, and the doctor computes the same."""

import json
import shutil

import pytest
import torch
from commands import RECIPES, run_command
from safetensors.torch import load_file

from dpo_recipes.doctor import compute, miniature_flags
from dpo_recipes.doctor.speed import MAX_LENGTH, Stepper

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
]
RESUMED = 1e-3
"""Largest relative difference that a resume may make: FlashAttention's backward adds in no fixed order."""


def half():
    """The card's 16-bit dtypes."""
    has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return [torch.bfloat16, torch.float16] if has_bfloat16 else [torch.float16]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", ["LoRA", "full"])
@pytest.mark.parametrize("architecture", compute.ARCHITECTURES)
def test_shared_prompts_are_as_exact_as_plain_trl(architecture, method, dtype):
    if dtype not in (torch.float32, *half()):
        pytest.skip(f"the card has no {dtype}")
    errors = compute.gradient_errors(architecture, method, dtype, use_cpu=False)
    assert errors["ours, float32"] <= compute.EXACT
    if dtype != torch.float32:
        times, more = compute.SLACK
        assert errors["ours"] <= times * errors["TRL"] + more


@pytest.mark.parametrize("window", [None, 32])
def test_variable_length_attention_is_sdpa_of_each_segment(window):
    for dtype in half():
        assert compute.attention_error(dtype, "cuda", window=window) <= compute.LIMITS[dtype]


def test_a_layer_in_4_bits_computes_with_its_dequantised_weights():
    for dtype in half():
        assert compute.four_bit_error(dtype, "cuda") <= compute.LIMITS[dtype]


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("pairs", [4, 8])
def test_the_memory_estimate_is_within_a_quarter_of_the_peak(pairs, checkpointing, tmp_path):
    stepper = Stepper("qwen2.5-0.5b", half()[0], str(tmp_path), use_cpu=False, checkpointing=checkpointing)
    lengths = [(MAX_LENGTH // 2, MAX_LENGTH // 2, MAX_LENGTH // 2)] * pairs  # no padding
    stepper.step(lengths, shared=False)
    _, peak = stepper.step(lengths, shared=False)
    assert stepper.estimate(lengths) == pytest.approx(peak, rel=0.25)


def train(command, name, folder, *flags, timeout=600):
    result = run_command(command, "train", name, *flags, cwd=folder, timeout=timeout)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return folder / "outputs" / name.replace("-", "_")


@pytest.mark.parametrize("name", ["hh-rlhf-qlora", "ultrafeedback-qlora"])
def test_a_recipe_in_4_bits_trains(name, tmp_path, dpo_recipes):
    flags = miniature_flags(RECIPES / f"{name.replace('-', '_')}.py", tmp_path)
    run = train(dpo_recipes, name, tmp_path, *flags)
    assert torch.cuda.get_device_name() in json.loads((run / "done.json").read_text())["hardware"]
    weights = load_file(run / "adapter_model.safetensors")
    assert any(weight.abs().sum() > 0 for key, weight in weights.items() if "lora_B" in key)


def test_a_resumed_run_ends_where_the_whole_one_ends(tmp_path, dpo_recipes):
    flags = [*miniature_flags(RECIPES / "hh_rlhf_lora.py", tmp_path), "--max_steps", "4", "--save_steps", "2"]
    run = train(dpo_recipes, "hh-rlhf-lora", tmp_path, *flags)
    whole = load_file(run / "adapter_model.safetensors")
    shutil.rmtree(run / "checkpoint-4")
    train(dpo_recipes, "hh-rlhf-lora", tmp_path, *flags, "--resume_from_checkpoint", "true")
    assert compute.distance(whole, load_file(run / "adapter_model.safetensors")) <= RESUMED


def test_the_quickstart_makes_the_chatbot_safe(tmp_path, dpo_recipes):
    run = train(dpo_recipes, "quickstart", tmp_path, timeout=1800)
    scores = json.loads((run / "metrics.json").read_text())["scores"]
    assert scores["temperature 0.7"]["exact reward"]["after"]["mean"] >= 0.90
    assert scores["greedy"]["exact reward"]["after"]["mean"] >= 0.95
