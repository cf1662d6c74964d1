"""Reference log-probs are computed once for all runs that share tokens and reference model, and never taken stale."""

import json
import os
import sys

import datasets
import numpy as np
import pytest
import torch
import xxhash
from commands import run_command
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from dpo_recipes.shared_prefix import SharedPrefixDPOTrainer, reference_cache
from dpo_recipes.shared_prefix.reference_cache import cache_folder

LORA = dict(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def rows():
    return [
        {"prompt": f"Question {index}: " + "why " * index, "chosen": f" because of {index}", "rejected": " no" * index}
        for index in range(1, 8)
    ]


@pytest.fixture
def build(tiny_model, tmp_path, rows):
    """A trainer with cached reference log-probs: LoRA by default, `lora=None` for full fine-tuning."""

    def build(*, trainer=SharedPrefixDPOTrainer, model=None, lora=LORA, rows=rows, tokenizer=None, others=None, **args):
        settings = dict(output_dir=str(tmp_path / "run"), per_device_train_batch_size=4, max_length=64, seed=1)
        fixed = dict(use_cpu=True, bf16=False, report_to="none", dataloader_pin_memory=False, save_strategy="no")
        fixed |= dict(precompute_ref_log_probs=True, disable_tqdm=True, activation_checkpointing=False)
        return trainer(
            model=model or str(tiny_model),
            args=DPOConfig(**(settings | fixed | args)),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer or AutoTokenizer.from_pretrained(tiny_model),
            peft_config=LoraConfig(**lora) if lora else None,
            **(others or {}),
        )

    return build


@pytest.fixture
def passes(monkeypatch):
    """Number of pairs in each batch that went through a reference model."""
    counted = []
    forward = DPOTrainer.compute_ref_log_probs

    def count(self, model, inputs):
        counted.append(len(inputs["input_ids"]) // 2)
        return forward(self, model, inputs)

    monkeypatch.setattr(DPOTrainer, "compute_ref_log_probs", count)
    return counted


def logps(trainer, dataset=None):
    dataset = trainer.train_dataset if dataset is None else dataset
    return np.array([dataset["ref_chosen_logps"][:], dataset["ref_rejected_logps"][:]])


def model_of(tiny_model, **settings):
    return AutoModelForCausalLM.from_pretrained(tiny_model, **settings)


# What it gives


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
def test_cached_log_probs_are_those_of_trl(build, lora, passes):
    plain = build(trainer=DPOTrainer, lora=lora)
    fresh = build(lora=lora)
    np.testing.assert_allclose(logps(fresh), logps(plain), rtol=1e-5)
    passes.clear()
    assert (logps(build(lora=lora)) == logps(fresh)).all()
    assert passes == []
    assert set(plain.train_dataset.column_names) == set(fresh.train_dataset.column_names)


def test_the_first_loss_is_log_two_and_training_reads_the_cache(build, passes):
    build()
    passes.clear()
    trainer = build(max_steps=3, logging_steps=1, learning_rate=1e-3)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-5)
    assert losses[2] < losses[0]
    assert passes == []


def test_a_resumed_run_reads_the_cache_and_ends_as_the_whole_one(build, passes, tmp_path):
    settings = dict(max_steps=4, save_strategy="steps", save_steps=2, logging_steps=1, learning_rate=1e-3)
    whole = build(**settings)
    whole.train()
    passes.clear()
    resumed = build(**settings, output_dir=str(tmp_path / "again"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert passes == []
    losses = [[entry["loss"] for entry in each.state.log_history if "loss" in entry] for each in (whole, resumed)]
    assert losses[0] == losses[1]
    assert all(map(torch.equal, whole.model.parameters(), resumed.model.parameters()))


def test_evaluation_sets_are_cached_by_what_they_hold(build, rows, passes):
    evaluation = {"a": Dataset.from_list(rows[:3]), "b": Dataset.from_list(rows[3:])}
    build(others={"eval_dataset": evaluation})
    passes.clear()
    trainer = build(others={"eval_dataset": dict(zip("xy", evaluation.values(), strict=True))})
    assert passes == []
    assert trainer.evaluate(Dataset.from_list(rows[:3]))["eval_loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert passes == []


# What changes nothing


@pytest.mark.parametrize(
    "change",
    [
        {"beta": 0.5},
        {"learning_rate": 1e-2},
        {"seed": 5},
        {"output_dir": "elsewhere"},
        {"num_train_epochs": 7},
        {"per_device_train_batch_size": 2},
        {"loss_type": ["ipo"]},
        {"max_length": 100},  # no pair has 64 tokens
        {"lora": {**LORA, "r": 8}},
        {"lora": {**LORA, "target_modules": "all-linear"}},
        {"lora": {**LORA, "modules_to_save": ["lm_head"]}},
        {"lora": None},
    ],
    ids=lambda change: "-".join(map(str, *change.items())),
)
def test_what_log_probs_do_not_depend_on_reuses_them(build, change, passes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    build()
    passes.clear()
    build(**change)
    assert passes == []
    assert len([*cache_folder().iterdir()]) == 1


def test_tokens_are_hashed_as_the_collator_keeps_them():
    def hashed(pairs, **settings):
        digest = xxhash.xxh3_128()
        rows = [dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), pair, strict=True)) for pair in pairs]
        features = datasets.Features({name: datasets.List(datasets.Value("int64")) for name in rows[0]})
        collator = DataCollatorForPreference(pad_token_id=0, **settings)
        reference_cache._hash_tokens(digest, Dataset.from_list(rows, features=features), collator)
        return digest.hexdigest()

    pair = ([1, 2, 3], [4, 5], [6])
    assert hashed([pair]) == hashed([pair], max_length=5) != hashed([pair], max_length=4)
    assert hashed([pair], max_length=4) == hashed([([1, 2, 3], [4, 9], [6])], max_length=4)
    assert hashed([pair], max_length=2, truncation_mode="keep_end") == hashed(
        [([0, 2, 3], [4, 5], [6])], max_length=2, truncation_mode="keep_end"
    )
    assert hashed([pair]) != hashed([([1, 2], [3, 4, 5], [3, 6])])
    assert hashed([pair]) != hashed([([1, 2, 3], [6], [4, 5])])
    assert hashed([([], [4], [5, 5])]) != hashed([([4], [], [5, 5])])


def test_a_sweep_over_beta_pays_once(build, passes):
    for beta in (0.01, 0.1, 0.5):
        build(beta=beta, learning_rate=beta / 100)
    assert passes == [4, 3]


def test_a_moved_model_reuses_them(build, tiny_model, tmp_path, passes):
    (tmp_path / "moved").symlink_to(tiny_model)
    build()
    passes.clear()
    build(model=str(tmp_path / "moved"))
    build(model=model_of(tiny_model))
    assert passes == []


# What changes the log-probs


def another_template(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = tokenizer.chat_template.replace("Bot", "Assistant")
    return tokenizer


def with_a_shorter_prompt(row):
    """The same texts, with a completion that begins one letter earlier."""
    last = row["prompt"][-1]
    return {"prompt": row["prompt"][:-1], "chosen": last + row["chosen"], "rejected": last + row["rejected"]}


CHANGES = {
    "length": lambda folder, rows: {"max_length": 40},
    "side that is cut": lambda folder, rows: {"max_length": 40, "truncation_mode": "keep_end"},
    "no length": lambda folder, rows: {"max_length": None},
    "ld_alpha": lambda folder, rows: {"ld_alpha": 0.5},
    "precision": lambda folder, rows: {"bf16": True},
    "order": lambda folder, rows: {"rows": rows[::-1]},
    "fewer rows": lambda folder, rows: {"rows": rows[1:]},
    "sides": lambda folder, rows: {"rows": [{**r, "chosen": r["rejected"], "rejected": r["chosen"]} for r in rows]},
    "boundary": lambda folder, rows: {"rows": [with_a_shorter_prompt(row) for row in rows]},
    "dtype": lambda folder, rows: {"model": model_of(folder, dtype=torch.bfloat16)},
    "config": lambda folder, rows: {"model": model_of(folder, rms_norm_eps=0.1)},
}


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode is deprecated:FutureWarning")
@pytest.mark.parametrize("change", CHANGES)
def test_what_log_probs_depend_on_does_not_reuse_them(build, change, rows, tiny_model, passes):
    rows = [*rows[:-1], {**rows[-1], "chosen": " very long" * 12}]  # over 64 tokens
    build(rows=rows)
    passes.clear()
    trainer = build(**{"rows": rows} | CHANGES[change](tiny_model, rows))
    assert passes
    plain = build(trainer=DPOTrainer, **{"rows": rows} | CHANGES[change](tiny_model, rows))
    np.testing.assert_allclose(logps(trainer), logps(plain), rtol=2e-2 if change in ("precision", "dtype") else 1e-5)


def test_another_chat_template_does_not_reuse_them(build, tiny_model, passes):
    turn = lambda role, text: [{"role": role, "content": text}]  # noqa: E731
    rows = [{"prompt": turn("user", "a"), "chosen": turn("assistant", "b"), "rejected": turn("assistant", "c")}] * 4
    build(rows=rows)
    passes.clear()
    build(rows=rows)
    assert passes == []
    build(rows=rows, tokenizer=another_template(tiny_model))
    assert passes == [4]


def changed_in_memory(folder):
    model = model_of(folder)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1.0
    return model


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
def test_a_model_changed_after_it_was_loaded_does_not_reuse_them(build, lora, tiny_model, passes):
    build(lora=lora)
    passes.clear()
    trainer = build(model=changed_in_memory(tiny_model), lora=lora)
    assert passes == [4, 3]
    assert (logps(trainer) != logps(build(lora=lora))).all()
    passes.clear()
    build(model=changed_in_memory(tiny_model), lora=lora)
    assert passes == []


def test_a_reference_model_of_its_own_is_part_of_the_key(build, tiny_model, passes):
    build(lora=None)
    passes.clear()
    given = build(lora=None, others={"ref_model": changed_in_memory(tiny_model)})
    assert passes == [4, 3]
    passes.clear()
    again = build(model=changed_in_memory(tiny_model))  # the same reference, reached through LoRA
    assert passes == []
    assert (logps(given) == logps(again)).all()


def test_the_lora_adapter_that_training_starts_from_is_part_of_the_key(build, tiny_model, tmp_path, passes):
    def saved(seed):
        torch.manual_seed(seed)
        model = get_peft_model(model_of(tiny_model), LoraConfig(**LORA, init_lora_weights=False))
        model.save_pretrained(tmp_path / f"adapter{seed}")
        return tmp_path / f"adapter{seed}"

    def continued(folder, **config):
        model = PeftModel.from_pretrained(model_of(tiny_model), folder, is_trainable=True)
        for name, value in config.items():
            setattr(model.peft_config["default"], name, value)
        return build(model=model, lora=None)

    base = build()
    folders = [saved(0), saved(1)]
    passes.clear()
    first = continued(folders[0])
    assert passes == [4, 3]
    assert (logps(continued(folders[1])) != logps(first)).all()
    passes.clear()
    assert (logps(continued(folders[0])) == logps(first)).all()
    assert passes == []
    assert (logps(first) != logps(base)).all()


def test_a_base_of_four_bits_has_a_key_of_its_own_and_is_reused(build, tiny_model, passes):
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    build()
    passes.clear()
    first = build(others={"quantization_config": quantised})
    assert passes == [4, 3]
    passes.clear()
    assert (logps(build(others={"quantization_config": quantised}, seed=9)) == logps(first)).all()
    assert passes == []
    fp4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_compute_dtype=torch.float32)
    build(others={"quantization_config": fp4})
    assert passes == [4, 3]


# Files


@pytest.mark.parametrize(
    "spoil",
    [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: data[:-1] + bytes([data[-1] ^ 1])],
    ids=["half", "empty", "one bit"],
)
def test_a_damaged_file_is_computed_again_and_replaced(build, spoil, passes, caplog):
    good = logps(build())
    (file,) = cache_folder().iterdir()
    file.write_bytes(spoil(file.read_bytes()))
    passes.clear()
    assert (logps(build()) == good).all()
    assert passes == [4, 3]
    assert "is damaged" in caplog.text
    build()
    assert passes == [4, 3]
    assert [*cache_folder().iterdir()] == [file]


def test_an_interrupted_pass_leaves_nothing(build, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(DPOTrainer, "compute_ref_log_probs", stop)
    with pytest.raises(KeyboardInterrupt):
        build()
    assert not cache_folder().exists()


def test_a_folder_that_cannot_be_written_costs_a_pass_and_no_run(build, passes, tmp_path, monkeypatch, caplog):
    good = logps(build())
    (tmp_path / "file").touch()  # where a folder is needed: refused to everyone, root included
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file")
    passes.clear()
    assert (logps(build()) == good).all()
    assert passes == [4, 3]
    assert "computes the reference log-probs again: [Errno" in caplog.text


def test_the_oldest_files_give_way(build, monkeypatch, rows):
    monkeypatch.setattr(reference_cache, "_MOST_FILES", 2)
    for count in (3, 4, 5):
        build(rows=rows[:count])
        newest = max(cache_folder().iterdir(), key=lambda file: file.stat().st_mtime)
        os.utime(newest, (count, count))
    assert sorted(file.stat().st_mtime for file in cache_folder().iterdir()) == [4, 5]


# Processes


TWO = """
import json, sys
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer
from dpo_recipes.shared_prefix import SharedPrefixDPOTrainer

model, rows, length = sys.argv[1:]
passes = []
forward = DPOTrainer.compute_ref_log_probs
DPOTrainer.compute_ref_log_probs = lambda *args: passes.append(1) or forward(*args)
trainer = SharedPrefixDPOTrainer(
    model=model,
    args=DPOConfig("run", use_cpu=True, bf16=False, report_to="none", precompute_ref_log_probs=True,
        per_device_train_batch_size=2, max_length=int(length), activation_checkpointing=False,
        disable_tqdm=True, dataloader_pin_memory=False),
    train_dataset=Dataset.from_list(json.loads(rows)),
    processing_class=AutoTokenizer.from_pretrained(model),
    peft_config=LoraConfig(r=4),
)
logps = [trainer.train_dataset[name][:] for name in ("ref_chosen_logps", "ref_rejected_logps")]
rank = trainer.accelerator.process_index
with open(f"rank{rank}-{len(passes)}.json", "w") as stream:
    json.dump(logps, stream)
"""


@pytest.mark.slow
def test_two_processes_compute_once_and_both_read_it(build, tiny_model, tmp_path, rows):
    one = logps(build())
    (tmp_path / "two.py").write_text(TWO)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "two.py"]
    arguments = [str(tiny_model), json.dumps(rows)]
    folders = {"HF_DATASETS_CACHE": str(tmp_path / "theirs"), "ACCELERATE_USE_CPU": "true"}

    def run(length):
        result = run_command(*launch, *arguments, length, cwd=tmp_path, **folders)
        assert result.returncode == 0, result.stderr
        found = {file.stem: np.array(json.loads(file.read_text())) for file in tmp_path.glob("rank*.json")}
        for file in tmp_path.glob("rank*.json"):
            file.unlink()
        return found

    first, second = run("64"), run("64")
    assert sorted(first) == ["rank0-2", "rank1-2"]  # of seven pairs, two batches of two each
    assert sorted(second) == ["rank0-0", "rank1-0"]
    for found in (*first.values(), *second.values()):
        np.testing.assert_allclose(found, one, rtol=1e-5)
