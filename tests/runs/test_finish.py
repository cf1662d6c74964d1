"""What was trained survives: 16-bit bases, and failures in whatever comes after the training."""

import json
import math

import pytest
import torch
from commands import run_train
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dpo_recipes.models import merge
from dpo_recipes.models.merge import merge_adapter
from dpo_recipes.runs import run as runs
from dpo_recipes.runs.page import remake

PROFILE = """\
use_cpu: true
dtype: bfloat16
bf16: true
per_device_train_batch_size: 4
per_device_eval_batch_size: 4
activation_checkpointing: true
dataloader_pin_memory: false
"""
FEW = [
    "--max_steps",
    "2",
    "--pairs_per_update",
    "4",
    "--eval_pairs",
    "4",
    "--logging_steps",
    "1",
    "--max_length",
    "256",
]


@pytest.fixture
def profile(tmp_path):
    """What a profile for a GPU asks for, on a CPU."""
    file = tmp_path / "bf16.yaml"
    file.write_text(PROFILE)
    return file


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory, tiny_model):
    """A random Llama of 24 layers in bfloat16, whose weights have no room for a small update."""
    folder = tmp_path_factory.mktemp("deep") / "model"
    config = LlamaConfig.from_pretrained(tiny_model, num_hidden_layers=24)
    torch.manual_seed(0)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


def trained(name, *flags, cwd, profile, dataset, model):
    words = [name, "--profile", profile, "--dataset_name", dataset, "--model_name_or_path", model]
    result = run_train(*words, *FEW, *flags, cwd=cwd)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rate", "kept"),
    [
        pytest.param("1e-5", "float32", id="small"),
        pytest.param("3e-2", "bfloat16", id="large", marks=pytest.mark.slow),
    ],
)
def test_a_16_bit_base_keeps_what_it_was_taught(rate, kept, tmp_path, profile, deep_model, hh_rows):
    """A small update is saved in float32, a large one in the base's dtype; DPO starts from either at ln 2."""
    options = dict(cwd=tmp_path, profile=profile, dataset=hh_rows)
    for name in ("hh-rlhf-sft", "hh-rlhf-reward"):
        folder = name.replace("-", "_")
        flags = ["--learning_rate", rate, "--warmup_steps", "0"]
        said = trained(name, *flags, model=deep_model, **options).stdout
        if name == "hh-rlhf-sft":  # a new score head is most of what a reward model learns
            assert f"saved in {kept}" in said, said
            weights = load_file(tmp_path / "outputs" / folder / "model.safetensors")
            assert {str(weight.dtype) for weight in weights.values()} == {f"torch.{kept}"}
        done = json.loads((tmp_path / "outputs" / folder / "done.json").read_text())
        assert done["warnings"] == []
    said = trained("hh-rlhf-lora", model="outputs/hh_rlhf_sft", **options).stdout
    assert ("was saved in float32 and is loaded so" in said) == (kept == "float32")
    history = json.loads((tmp_path / "outputs/hh_rlhf_lora/checkpoint-2/trainer_state.json").read_text())["log_history"]
    assert next(log["loss"] for log in history if "loss" in log) == pytest.approx(math.log(2), abs=1e-4)


@pytest.mark.parametrize("update", [0.0, 1e-6, 1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_merge_of_any_size_answers_as_before(update, dtype, deep_model):
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(deep_model, dtype=dtype)
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(base, lora)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data = weight.data.float() * (update if "lora_B" in name else 1.0)
    ids = torch.arange(2, 130).view(2, 64)
    probe = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        before = model.float()(**probe).logits
        with model.disable_adapter():
            start = model(**probe).logits
        for module in model.modules():
            if hasattr(module, "base_layer"):
                module.base_layer.to(dtype)
        model.get_base_model().model.embed_tokens.to(dtype)
        merged = merge_adapter(model, probe).float()
        after = merged(**probe).logits
    off = (after - before).norm() / max((before - start).norm(), 1e-5 * before.norm())
    assert off <= merge.MOST_LOST + 1e-3


def fail(*_, **__):
    raise OSError(28, "No space left on device")


LATER = {
    "measure": "Measuring the model",
    "merge_adapter": "Merging the LoRA adapter",
    "replace_adapter": "Merging the LoRA adapter",
    "draw_curves": "Drawing the curves",
    "write_model_card": "Writing the model card",
    "write_run_page": "Writing the page",
    "check_reloads": "Checking the saved reward model",
}


@pytest.mark.slow
@pytest.mark.parametrize("part", LATER)
def test_a_failure_after_training_loses_nothing_of_it(part, tmp_path, tiny_model, hh_rows, monkeypatch):
    monkeypatch.setattr(runs, part, fail)
    name = "hh-rlhf-reward" if part == "check_reloads" else "hh-rlhf-sft" if part[-7:] == "adapter" else "hh-rlhf-lora"
    said = trained(name, cwd=tmp_path, profile="cpu", dataset=hh_rows, model=tiny_model)
    run = tmp_path / "outputs" / name.replace("-", "_")
    warnings = json.loads((run / "done.json").read_text())["warnings"]
    assert len(warnings) == 1, warnings
    [warning] = warnings
    assert warning.startswith(f"{LATER[part]} failed (OSError: [Errno 28] No space left on device). Repeat it with: ")
    assert f"WARNING: {warning}" in said.stdout
    assert "Traceback" not in said.stderr
    if part[-7:] == "adapter" or name == "hh-rlhf-lora":
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), run)
        assert any(weight.any() for name, weight in model.named_parameters() if "lora_B" in name)
    assert not [file for file in run.iterdir() if file.name.startswith((".merged", ".report"))]


@pytest.mark.slow
def test_curves_card_and_page_are_made_again_from_the_run_s_files(tmp_path, tiny_model, hh_rows):
    trained("hh-rlhf-lora", cwd=tmp_path, profile="cpu", dataset=hh_rows, model=tiny_model)
    run = tmp_path / "outputs" / "hh_rlhf_lora"
    before = {name: (run / name).read_bytes() for name in ("curves.png", "README.md", "report.html")}
    for name in before:
        (run / name).unlink()
    remake(str(run))
    assert {name: (run / name).read_bytes() for name in before} == before
