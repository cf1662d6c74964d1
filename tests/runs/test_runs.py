import json
import shutil
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
from accelerate.data_loader import BatchSamplerShard
from commands import run_train
from datasets import Dataset, concatenate_datasets
from safetensors.torch import load_file, save_file
from torch.utils.data import BatchSampler

from dpo_recipes.errors import RecipeError
from dpo_recipes.machine import peak_memory
from dpo_recipes.runs.model_card import data_hash
from dpo_recipes.runs.run import _lock, _said_of_the_end

ROWS = [{"prompt": f"p{number}", "chosen": f"c{number}", "rejected": "no", "id": number} for number in range(2500)]


def test_the_data_hash_sees_the_pairs_and_nothing_else():
    pairs = Dataset.from_list(ROWS)
    same = data_hash(pairs)
    halves = concatenate_datasets([pairs.select(range(700)), pairs.select(range(700, 2500))])
    assert data_hash(halves) == data_hash(pairs.remove_columns("id")) == same
    assert data_hash(pairs.select(range(2499, -1, -1))) != same
    assert data_hash(Dataset.from_list([*ROWS[:-1], ROWS[-1] | {"chosen": "other"}])) != same


def test_two_runs_never_train_in_one_folder(tmp_path):
    _lock(tmp_path / "run")
    _lock(tmp_path / "other")
    with pytest.raises(RecipeError, match="Another run is training in"):
        _lock(tmp_path / "run")


@pytest.mark.slow
def test_a_run_that_replaces_another_leaves_nothing_of_it(tmp_path, tiny_model, hh_rows):
    """A LoRA adapter beside a full model would be loaded on top of it."""
    flags = ["--profile", "cpu", "--dataset_name", hh_rows, "--model_name_or_path", tiny_model, "--output_dir", "run"]
    flags += ["--pairs_per_update", "4", "--eval_pairs", "2"]
    updates = ["--max_steps", "3"]
    for name in ("hh-rlhf-lora", "hh-rlhf-full"):
        result = run_train(name, *flags, *updates, "--overwrite", "true", cwd=tmp_path)
        assert result.returncode == 0, result.stdout + result.stderr
        updates = ["--max_steps", "1"]
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"model.safetensors", "done.json", "preflight.json", "checkpoint-1"} <= files
    assert not files & {"adapter_config.json", "adapter_model.safetensors", "checkpoint-3"}
    assert json.loads((tmp_path / "run" / "done.json").read_text())["updates"] == 1


@pytest.mark.slow
def test_peak_memory_is_that_of_the_process_itself():
    """Not that of the process that started it, which getrusage keeps on Linux."""
    held = bytearray(2**31)
    held[:: 2**12] = b"x" * (2**31 // 2**12)  # touched, so that it is resident
    code = "from dpo_recipes.machine import peak_memory; print(peak_memory())"
    peak = int(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()[-1]
    )
    assert 2**22 < peak < 1.9e9
    assert peak_memory() > len(held)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "weight", "value"),
    [
        ("hh-rlhf-lora", "model.embed_tokens.weight", float("nan")),
        ("hh-rlhf-sft", "model.layers.1.mlp.up_proj.weight", float("nan")),
        ("hh-rlhf-reward", "model.norm.weight", float("inf")),
    ],
)
def test_an_initial_model_with_broken_weights_is_blamed_and_not_the_learning_rate(
    recipe, weight, value, tmp_path, tiny_model, hh_rows
):
    shutil.copytree(tiny_model, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights[weight].view(-1)[3] = value
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    result = run_train(
        *(recipe, "--profile", "cpu", "--dataset_name", hh_rows, "--model_name_or_path", "model"),
        *("--max_steps", "1", "--pairs_per_update", "4", "--eval_pairs", "4", "--output_dir", "run"),
        cwd=tmp_path,
    )
    assert result.returncode == 2, result.stderr
    assert f"1 weights of the initial model are NaN or infinite ({weight}" in result.stderr.replace(
        "base_model.model.", ""
    ).replace(".base_layer", "")
    assert not (tmp_path / "run" / "settings.json").exists()


@pytest.mark.parametrize(("rows", "repeated"), [(16, 0), (13, 3), (3, 1)])
def test_uneven_data_loses_no_row_and_the_rows_that_count_twice_are_said(rows, repeated):
    """Two processes with two rows each at a time, as accelerate divides them."""
    whole = BatchSampler(range(rows), batch_size=2, drop_last=False)
    shards = [BatchSamplerShard(whole, num_processes=2, process_index=rank) for rank in (0, 1)]
    trained = Counter(row for shard in shards for batch in shard for row in batch)
    assert set(trained) == set(range(rows))
    assert sum(trained.values()) - rows == repeated
    args = SimpleNamespace(per_device_train_batch_size=2, world_size=2, dataloader_drop_last=False)
    said = _said_of_the_end(SimpleNamespace(args=args, train_dataset=range(rows)))
    assert (f"with {repeated} of its first ones" in said) == bool(repeated)
