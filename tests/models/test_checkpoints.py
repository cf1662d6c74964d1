import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_recipes.models.checkpoints import (
    check_saved,
    incomplete_reason,
    latest_checkpoint,
    trained_weights,
)
from dpo_recipes.models.merge import merge_adapter


@pytest.fixture
def run_folder(tmp_path):
    """Checkpoints 10 and 20 with the files that transformers writes."""
    for step in (10, 20):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        save_file({"weight": torch.arange(100.0)}, folder / "adapter_model.safetensors")
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            torch.save({"step": step}, folder / name)
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return tmp_path


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


FAULTS = {
    "empty folder": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
    "no state": lambda folder: (folder / "trainer_state.json").unlink(),
    "state cut short": lambda folder: cut(folder / "trainer_state.json"),
    "weights cut short": lambda folder: cut(folder / "adapter_model.safetensors"),
    "weights missing": lambda folder: (folder / "adapter_model.safetensors").unlink(),
    "optimizer cut short": lambda folder: cut(folder / "optimizer.pt"),
    "optimizer missing": lambda folder: (folder / "optimizer.pt").unlink(),
    "random state missing": lambda folder: (folder / "rng_state.pth").unlink(),
    "state of another step": lambda folder: (folder / "trainer_state.json").write_text('{"global_step": 3}'),
}


def test_latest_checkpoint_is_the_highest_number(run_folder):
    shutil.copytree(run_folder / "checkpoint-20", run_folder / "checkpoint-9")
    (run_folder / "checkpoint-9" / "trainer_state.json").write_text('{"global_step": 9}')
    assert latest_checkpoint(run_folder).name == "checkpoint-20"


def test_a_checkpoint_at_the_last_update_is_not_gone_on_from(run_folder):
    assert latest_checkpoint(run_folder, before=21).name == "checkpoint-20"
    assert latest_checkpoint(run_folder, before=20).name == "checkpoint-10"
    assert latest_checkpoint(run_folder, before=10) is None


def test_no_checkpoint_is_none(tmp_path):
    assert latest_checkpoint(tmp_path / "nothing") is None


@pytest.mark.parametrize("fault", FAULTS)
def test_a_half_written_checkpoint_is_skipped_with_a_warning(run_folder, fault, caplog):
    FAULTS[fault](run_folder / "checkpoint-20")
    assert latest_checkpoint(run_folder).name == "checkpoint-10"
    assert "checkpoint-20 is half-written" in caplog.text


def test_a_complete_checkpoint_has_no_reason(run_folder):
    assert incomplete_reason(run_folder / "checkpoint-10") is None


@pytest.fixture
def lora_model(tiny_model):
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model),
        LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False),
    )
    return model.eval()


def test_saved_weights_are_those_trained(lora_model, tmp_path):
    lora_model.save_pretrained(tmp_path)
    check_saved(tmp_path, trained_weights(lora_model))


def test_a_weight_that_moved_after_saving_is_found(lora_model, tmp_path):
    lora_model.save_pretrained(tmp_path)
    with torch.no_grad():
        next(weight for name, weight in lora_model.named_parameters() if "lora_B" in name).add_(1e-3)
    with pytest.raises(RuntimeError, match="lora_B"):
        check_saved(tmp_path, trained_weights(lora_model))


def test_a_missing_weight_is_found(lora_model, tmp_path):
    lora_model.save_pretrained(tmp_path)
    weights = trained_weights(lora_model) | {"model.extra": torch.zeros(3)}
    with pytest.raises(RuntimeError, match=r"lacks model\.extra"):
        check_saved(tmp_path, weights)


def test_tied_weights_are_not_missing(tiny_model, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path)
    check_saved(tmp_path, trained_weights(model))


def test_a_merged_adapter_answers_as_before(lora_model, tiny_model, tmp_path):
    probe = AutoTokenizer.from_pretrained(tiny_model)("User: Hello.\nBot: Good day.", return_tensors="pt")
    inputs = {"input_ids": probe["input_ids"], "attention_mask": probe["attention_mask"]}
    with torch.no_grad():
        before = lora_model(**inputs).logits
    merge_adapter(lora_model, inputs).save_pretrained(tmp_path)
    with torch.no_grad():
        after = AutoModelForCausalLM.from_pretrained(tmp_path)(**inputs).logits
        base = AutoModelForCausalLM.from_pretrained(tiny_model)(**inputs).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    assert (before - base).abs().max() > 0.1  # the LoRA adapter does something


def test_a_wrong_merge_is_refused(lora_model, tiny_model, monkeypatch):
    probe = AutoTokenizer.from_pretrained(tiny_model)("User: Hello.", return_tensors="pt")
    inputs = {"input_ids": probe["input_ids"], "attention_mask": probe["attention_mask"]}
    monkeypatch.setattr(type(lora_model.base_model), "merge_and_unload", lambda model, **_: model.unload())
    with pytest.raises(RuntimeError, match="Merging the LoRA adapter moved the logits"):
        merge_adapter(lora_model, inputs)
