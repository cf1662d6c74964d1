"""Bad input is refused with a message before a model is trained, and no file is changed."""

import shlex
import shutil
import tomllib
from pathlib import Path

import pytest
import torch
from commands import run_forked
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

CASES = tomllib.loads(Path(__file__).with_name("bad_inputs.toml").read_text())["case"]
SOON = {"code", "disks", "reference", "secrets"}  # kinds that `make test-all` runs too
ROW = '{"prompt": "Question #?", "chosen": "Good #.", "rejected": "Bad #."}'
FLAGS = (
    "--profile cpu --model_name_or_path {tiny} --dataset_name rows.jsonl --pairs_per_update 4 "
    "--per_device_train_batch_size 2 --eval_pairs 2 --max_steps 1 --output_dir run"
)
ONLINE = "--generation_batch_size 8 --num_generations 2 --max_prompt_length 64 --max_completion_length 4"

pytestmark = pytest.mark.faults


@pytest.fixture(scope="session")
def models(tiny_model, reward_model, tmp_path_factory):
    """Folders of models by their names in bad_inputs.toml."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    LlamaForCausalLM(LlamaConfig.from_pretrained(tiny_model, hidden_size=32)).save_pretrained(folder / "wider")
    tokenizer.save_pretrained(folder / "wider")
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")).save_pretrained(
        folder / "adapter"
    )
    tokenizer.save_pretrained(folder / "adapter")
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    torch.nn.init.constant_(model.lm_head.weight, torch.nan)
    model.save_pretrained(folder / "nan")
    tokenizer.save_pretrained(folder / "nan")
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(folder / "wide")
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(folder / "wide")
    return {"tiny": tiny_model, "reward": reward_model} | {path.name: path for path in folder.iterdir()}


def write(file, text):
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = ([line.replace("#", str(n)) for n in range(40)] if "#" in line else [line] for line in text.split("\n"))
    file.write_text("\n".join(part for group in lines for part in group))


def everything_in(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case["id"], marks=[pytest.mark.slow] if case["kind"] in SOON else []) for case in CASES],
)
def test_it_is_refused_in_words_and_changes_nothing(case, models, tmp_path):
    for name, model in case.get("copies", {}).items():
        shutil.copytree(models[model], tmp_path / name)
    for name, text in ({"rows.jsonl": ROW} | case.get("files", {})).items():
        write(tmp_path / name, text)
    call = case["call"].replace("{flags}", FLAGS).replace("{online}", ONLINE)
    for name, folder in models.items():
        call = call.replace(f"{{{name}}}", str(folder))
    before = everything_in(tmp_path)
    result = run_forked(*shlex.split(call), cwd=tmp_path, timeout=120)
    said = result.stdout + result.stderr
    assert result.returncode == case["status"], said
    assert not [words for words in case["says"] if words not in said], said
    assert not [words for words in ["Traceback", *case.get("never", [])] if words in said], said
    assert not {path: text for path, text in before.items() if not path.exists() or path.read_bytes() != text}
    assert not (tmp_path / "ran").exists()
    assert "Training " not in said
