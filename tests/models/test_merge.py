"""A full model made of a run's adapter: what it answers, and which files it may replace."""

import json
import shutil

import pytest
import torch
from lora_runs import save_lora_run
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from dpo_recipes.cli import main
from dpo_recipes.errors import RecipeError
from dpo_recipes.files import write_json
from dpo_recipes.manifest import claim, settle, strangers
from dpo_recipes.models import merge as merging
from dpo_recipes.models.merge import merge, merge_adapter
from dpo_recipes.models.open import open_model

INPUTS = torch.arange(40).reshape(2, 20) + 5


@pytest.fixture
def start(tiny_model, request, tmp_path):
    """The tiny model, in float32 or in the dtype that a test asks for."""
    dtype = getattr(request, "param", "float32")
    if dtype == "float32":
        return tiny_model
    AutoModelForCausalLM.from_pretrained(tiny_model).to(getattr(torch, dtype)).save_pretrained(tmp_path / dtype)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / dtype)
    return tmp_path / dtype


@pytest.fixture
def run(start, tmp_path):
    return save_lora_run(tmp_path / "outputs" / "run", start)


@torch.no_grad()
def logits(model):
    return model(INPUTS).logits.float()


@pytest.mark.parametrize("start", ["float32", "bfloat16"], indirect=True)
def test_a_merged_run_is_a_full_model_of_the_bases_dtype_that_answers_like_the_run(run, start, capsys):
    lora, _ = open_model(str(run))
    expected, base = logits(lora), logits(AutoModelForCausalLM.from_pretrained(start))
    assert main(["merge", str(run)]) == 0
    folder = run.with_name("run_merged")
    assert f"Model         {folder}" in capsys.readouterr().out
    weights = load_file(folder / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {
        load_file(start / "model.safetensors")["lm_head.weight"].dtype
    }
    assert not list(folder.glob("adapter_*"))
    merged = AutoModelForCausalLM.from_pretrained(folder)
    assert (logits(merged) - expected).abs().max() < (1e-4 if merged.dtype == torch.float32 else 0.2)
    assert (base - expected).abs().max() > 0.5
    assert AutoTokenizer.from_pretrained(folder).chat_template.endswith("{# the run's #}")


def test_a_four_bit_base_is_merged_into_the_weights_it_was_made_from(run, start):
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "dtype": "bfloat16"}
    (run / "settings.json").write_text(json.dumps(settings))
    lora, _ = open_model(str(run))
    assert lora.is_quantized  # tried as it was trained
    merged = load_file(merge(str(run)) / "model.safetensors")
    begun = load_file(start / "model.safetensors")
    pair = load_file(run / "adapter_model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    a, b = (pair[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    torch.testing.assert_close(merged[f"{name}.weight"], begun[f"{name}.weight"] + (8 / 4) * b @ a)
    assert torch.equal(merged["lm_head.weight"], begun["lm_head.weight"])


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_merging_again_replaces_the_earlier_merge(run):
    folder = merge(str(run))
    before, weights = names_in(folder), load_file(folder / "model.safetensors")
    (run / "tokenizer_config.json").unlink()  # what the first merge wrote more than the second does not stay
    assert merge(str(run)) == folder
    assert names_in(folder) == before
    assert all(torch.equal(weight, weights[name]) for name, weight in load_file(folder / "model.safetensors").items())
    assert names_in(folder.parent) == ["run", "run_merged"]


@pytest.mark.parametrize("change", ["a file is added", "a file is changed", "a folder is added", "no merge.json"])
def test_a_folder_with_anything_but_an_earlier_merge_is_refused_and_left_alone(change, run, capsys):
    folder = merge(str(run))
    named = {"a file is added": "notes.txt", "a file is changed": "config.json", "a folder is added": "mine"}
    named = named.get(change, "chat_template.jinja")
    if change == "a folder is added":
        (folder / named).mkdir()
    elif change == "no merge.json":
        (folder / "merge.json").unlink()
    else:
        (folder / named).write_text("mine")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    capsys.readouterr()
    with pytest.raises(RecipeError, match=rf"{folder} holds {named}.* Name another folder with --output_dir, or move"):
        merge(str(run))
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert "Merging" not in capsys.readouterr().out, "refused before a model is loaded"


def test_a_file_that_comes_while_models_are_merged_is_left_alone(run, monkeypatch):
    folder = merge(str(run))

    def slowly(*given):
        (folder / "notes.txt").write_text("mine")
        return merge_adapter(*given)

    monkeypatch.setattr(merging, "merge_adapter", slowly)
    with pytest.raises(RecipeError, match=r"holds notes\.txt"):
        merge(str(run))
    assert {"notes.txt", "model.safetensors", "merge.json"} <= set(names_in(folder))
    assert names_in(folder.parent) == ["run", "run_merged"]


def test_another_runs_merge_is_not_replaced(run):
    folder = merge(str(run))
    other = shutil.copytree(run, run.with_name("other"))
    with pytest.raises(RecipeError, match=r"holds chat_template\.jinja, .*, and no merge of .*other is known"):
        merge(str(other), str(folder))


def test_in_its_own_folder_the_full_model_takes_the_place_of_a_runs_adapter(run):
    """And of nothing else: what a user put there stays."""
    expected = logits(open_model(str(run))[0])
    claim(run)
    settle(run, *names_in(run))
    (run / "notes.txt").write_text("mine")
    with pytest.raises(RecipeError, match="Name another folder with --output_dir"):  # no run of ours: no settings
        merge(str(run), str(run))
    write_json(run / "settings.json", {})
    assert main(["merge", str(run), "--output_dir", str(run)]) == 0
    assert not list(run.glob("adapter_*"))
    assert not list(run.glob(".merged*"))
    assert (run / "notes.txt").read_text() == "mine"
    assert strangers(run) == ["notes.txt"], "the full model is known as the run's"
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(run)), expected, atol=1e-4, rtol=0)


def test_a_full_model_that_is_not_written_whole_leaves_the_adapter(run, monkeypatch):
    def stop(*_):
        raise RuntimeError("not what was trained")

    claim(run)
    write_json(run / "settings.json", {})
    monkeypatch.setattr(merging, "check_saved", stop)
    with pytest.raises(RuntimeError, match="not what was trained"):
        merge(str(run), str(run))
    assert (run / "adapter_model.safetensors").exists()
    assert not (run / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [("nothing", "holds no adapter_config.json: name the folder of a run"), ("model", "holds a full model already")],
)
def test_what_is_no_lora_adapter_is_refused_with_the_way_out(name, message, tiny_model, capsys):
    assert main(["merge", str(tiny_model.with_name(name))]) == 2
    assert message in capsys.readouterr().err


def test_a_base_that_moved_can_be_named(run, tiny_model, tmp_path, capsys):
    config = json.loads((run / "adapter_config.json").read_text())
    (run / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "outputs/moved"}))
    assert main(["merge", str(run)]) == 2
    said = capsys.readouterr().err
    assert f"Cannot load outputs/moved, the base of {run}: " in said
    assert f"Name the base: dpo-recipes merge {run} --base MODEL" in said
    assert main(["merge", str(run), "--base", str(tiny_model), "--output_dir", str(tmp_path / "named")]) == 0
    assert (tmp_path / "named" / "model.safetensors").exists()


def test_a_run_named_by_a_dot_is_merged_beside_it(run, monkeypatch):
    monkeypatch.chdir(run)
    assert main(["merge", "."]) == 0
    assert (run.parent / "run_merged" / "model.safetensors").exists()


@pytest.mark.parametrize("fault", ["cut short", "missing", "another base"])
def test_weights_that_do_not_load_are_named(fault, run, start, tmp_path, capsys):
    weights, base = run / "adapter_model.safetensors", start
    if fault == "cut short":
        weights.write_bytes(weights.read_bytes()[:500])
    elif fault == "missing":
        weights.unlink()
    else:
        base = tmp_path / "wider"
        config = AutoConfig.from_pretrained(start, hidden_size=128)
        AutoModelForCausalLM.from_config(config).save_pretrained(base)
    assert main(["merge", str(run), "--base", str(base)]) == 2
    on = f" on {base}" if fault == "another base" else ""
    assert f"Cannot load {run}{on}: " in capsys.readouterr().err
    assert not run.with_name("run_merged").exists()
