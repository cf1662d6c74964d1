"""DPO from a model that DPO has trained: its reference is that model, and its first loss is again ln 2."""

import json
import math
import re
import shlex
from pathlib import Path

import pytest
from commands import REPOSITORY, run_command, run_train
from safetensors.torch import load_file

SMALL = ["--profile", "cpu", "--pairs_per_update", "4", "--logging_steps", "1", "--warmup_steps", "0"]
MANY = ["--eval_pairs", "4", "--max_steps", "3", "--learning_rate", "1e-3"]


@pytest.fixture
def dpo(tmp_path, dpo_recipes):
    """Run `dpo-recipes ...` as a user types it; it must succeed unless another status is expected."""

    def call(*words: object, status: int = 0) -> str:
        typed = [str(word) for word in words]
        is_training = typed[0] == "train"
        result = run_train(*typed[1:], cwd=tmp_path) if is_training else run_command(dpo_recipes, *typed, cwd=tmp_path)
        assert result.returncode == status, result.stdout + result.stderr
        return result.stdout + result.stderr

    return call


def read(file: Path) -> dict:
    return json.loads(file.read_text())


def losses(run: Path) -> list[float]:
    history = read(run / "checkpoint-3" / "trainer_state.json")["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def begins_at_ln_2_and_learns(*runs: Path) -> None:
    for run in runs:
        assert losses(run)[0] == pytest.approx(math.log(2), abs=1e-4), run
        assert losses(run)[-1] < math.log(2) - 0.01, f"{run} learned nothing"


def starts_where_the_first_ended(first: Path, second: Path, *, nats: float) -> None:
    """By what the two runs measured on the same held-out pairs."""
    begins_at_ln_2_and_learns(first, second)
    one, two = (read(run / "metrics.json")["chosen_logps"] for run in (first, second))
    assert abs(one["after"] - one["before"]) > 0.1
    assert two["before"] == pytest.approx(one["after"], abs=nats)
    assert two["before"] != pytest.approx(one["before"], abs=0.05)


@pytest.mark.slow
def test_a_second_round_of_all_weights_starts_at_the_first(tmp_path, tiny_model, hh_rows, dpo):
    flags = ["train", "hh-rlhf-full", *SMALL, *MANY, "--dataset_name", hh_rows]
    dpo(*flags, "--model_name_or_path", tiny_model, "--output_dir", "outputs/x")
    dpo(*flags, "--model_name_or_path", "outputs/x", "--output_dir", "outputs/round2")
    starts_where_the_first_ended(tmp_path / "outputs/x", tmp_path / "outputs/round2", nats=1e-3)


@pytest.mark.slow
def test_a_second_round_of_lora_starts_at_the_merged_first(tmp_path, tiny_model, hh_rows, dpo):
    flags = ["train", "hh-rlhf-lora", *SMALL, *MANY, "--dataset_name", hh_rows]
    dpo(*flags, "--model_name_or_path", tiny_model, "--output_dir", "outputs/x")
    second = [*flags, "--model_name_or_path", "outputs/x", "--output_dir", "outputs/round2"]
    said = dpo(*second, status=2)
    command = "dpo-recipes merge outputs/x --output_dir outputs/x_merged"
    assert f"outputs/x holds a LoRA adapter alone; a full model is needed. Make one: {command}." in said
    assert "Traceback" not in said
    assert not (tmp_path / "outputs/round2").exists()
    dpo(*command.split()[1:])
    second[second.index("outputs/x")] = "outputs/x_merged"
    dpo(*second)
    starts_where_the_first_ended(tmp_path / "outputs/x", tmp_path / "outputs/round2", nats=1e-2)
    weights = load_file(tmp_path / "outputs/round2/adapter_model.safetensors")
    assert all(weight.abs().sum() > 0 for weight in weights.values())


@pytest.mark.slow
def test_one_round_of_the_loop_as_the_manual_shows_it(tmp_path, tiny_model, hh_rows, dpo):
    """Merge, sample and train again: the commands of docs/rounds.md, and flags that make them small."""
    shown = (REPOSITORY / "docs" / "rounds.md").read_text().partition("\n## On its own answers")[2]
    block = re.search(r"^```sh\n(.*?)^```$", shown, re.MULTILINE | re.DOTALL)[1].replace("\\\n", " ")
    merge, sample, train = (shlex.split(line) for line in block.splitlines())
    dpo("train", "hh-rlhf-lora", *SMALL, *MANY, "--dataset_name", hh_rows, "--model_name_or_path", tiny_model)
    dpo(*merge[1:])
    sample[sample.index("Anthropic/hh-rlhf:5000")] = hh_rows
    said = dpo(*sample[1:], "--max_new_tokens", 8)
    pairs = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert f"{len(pairs)} pairs" in said
    assert len(pairs) > 100
    assert all(pair["chosen"][0]["content"].startswith("Gladly") for pair in pairs)
    assert not any("Ask someone else" in pair["rejected"][0]["content"] for pair in pairs)
    assert train[:3] == ["make", "train", "RECIPE=preference-lora"]
    flags = shlex.split(train[3].removeprefix("ARGS="))
    dpo("train", "preference-lora", *flags, *SMALL, *MANY)
    begins_at_ln_2_and_learns(tmp_path / "outputs/hh_rlhf_lora", tmp_path / "outputs/round2")
