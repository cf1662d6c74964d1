"""Interrupted runs, with real processes."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from commands import RECIPES, run_command, run_train
from safetensors.torch import load_file

FLAGS = ["--max_steps", "12", "--save_steps", "3", "--eval_steps", "3", "--logging_steps", "1", "--eval_pairs", "2"]
FLAGS += ["--pairs_per_update", "4", "--per_device_train_batch_size", "2", "--learning_rate", "1e-3"]
ONLINE = ["--generation_batch_size", "8", "--num_iterations", "2", "--max_prompt_length", "200"]  # a rollout: 4 updates
ONLINE += ["--max_completion_length", "8", "--beta", "0.1"]


@pytest.fixture
def flags(tiny_model, reward_model, hh_rows):
    """A recipe's flags for the test's own models and rows."""

    def flags(name):
        online = [*ONLINE, "--reward_model_name_or_path", str(reward_model)] if name.endswith("ppo") else []
        flags = ["--dataset_name", str(hh_rows), "--model_name_or_path", str(tiny_model), *FLAGS, *online]
        if name.endswith("by tokens"):  # 4 pairs in some three micro-batches
            place = flags.index("--per_device_train_batch_size")
            flags[place : place + 2] = ["--tokens_per_step", "400"]
        return flags

    return flags


def history(folder):
    """Loss and gradient norm of each step, from the last checkpoint."""
    state = json.loads((folder / "checkpoint-12" / "trainer_state.json").read_text())
    return [(entry["step"], entry["loss"], entry["grad_norm"]) for entry in state["log_history"] if "loss" in entry]


def same_weights(one, other):
    files = [[*folder.glob("*model.safetensors")] for folder in (one, other)]
    assert all(len(group) == 1 for group in files)
    left, right = (load_file(group[0]) for group in files)
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def wait_for(process, log, text, seconds=120):
    """Until the process has printed the text."""
    deadline = time.monotonic() + seconds
    while text not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)


def start(command, cwd, log):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with log.open("w") as stream:
        return subprocess.Popen(command, cwd=cwd, stdout=stream, stderr=subprocess.STDOUT, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "hh_rlhf_lora",
        pytest.param("hh_rlhf_lora by tokens", marks=pytest.mark.slow),
        pytest.param("hh_rlhf_full", marks=pytest.mark.slow),
        pytest.param("hh_rlhf_qlora", marks=pytest.mark.slow),
        pytest.param("hh_rlhf_ppo", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_resumes_bit_identically(name, flags, tmp_path):
    given, name = flags(name), name.partition(" ")[0]
    train = partial(run_train, name, "--profile", "cpu", *given, cwd=tmp_path)
    resume = partial(train, "--output_dir", "killed", "--resume_from_checkpoint", "true")
    whole = train("--output_dir", "whole")
    assert whole.returncode == 0, whole.stdout + whole.stderr
    assert "Prompts are not shared" not in whole.stdout + whole.stderr

    step = random.Random(os.getpid()).randint(5, 10)
    log = tmp_path / "log"
    recipe = [sys.executable, str(RECIPES / f"{name}.py"), "--config", str(RECIPES / "profiles" / "cpu.yaml")]
    process = start([*recipe, *given, "--output_dir", "killed"], tmp_path, log)
    wait_for(process, log, f"\n  {step:>5}  loss")
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "done.json").exists()

    again = resume()
    assert again.returncode == 0, again.stdout + again.stderr
    assert "Resuming from killed/checkpoint-" in again.stdout
    assert history(tmp_path / "killed") == history(tmp_path / "whole"), f"killed after step {step}"
    assert same_weights(tmp_path / "killed", tmp_path / "whole")

    # Killed after the last update, before the end: no update more than there are.
    (tmp_path / "killed" / "done.json").unlink()
    late = resume()
    assert late.returncode == 0, late.stdout + late.stderr
    assert json.loads((tmp_path / "killed" / "done.json").read_text())["updates"] == 12
    assert history(tmp_path / "killed") == history(tmp_path / "whole")
    assert same_weights(tmp_path / "killed", tmp_path / "whole")

    # A newer checkpoint that is half-written is skipped, and the run that continues is again the same.
    shutil.rmtree(tmp_path / "killed" / "checkpoint-12")
    (tmp_path / "killed" / "checkpoint-12").mkdir()
    (tmp_path / "killed" / "checkpoint-12" / "adapter_model.safetensors").write_bytes(b"half")
    (tmp_path / "killed" / "done.json").unlink()
    third = resume()
    assert third.returncode == 0, third.stdout + third.stderr
    assert "checkpoint-12 is half-written" in third.stderr
    assert history(tmp_path / "killed") == history(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(("epochs", "updates"), [("0.6", 5), pytest.param("1.5", 12, marks=pytest.mark.slow)])
@pytest.mark.parametrize("phase", ["training", "report"])
def test_a_run_of_a_part_of_an_epoch_resumes_to_the_same_weights(epochs, updates, phase, flags, tmp_path):
    """Eight updates are an epoch; the only checkpoint before the end is the third update's."""
    own = [*flags("hh_rlhf_lora"), "--num_train_epochs", epochs, "--max_steps", "-1", "--pairs_per_update", "16"]
    at = own.index("--eval_steps")
    own[at : at + 2] = ["--eval_strategy", "no"]
    whole = run_train("hh_rlhf_lora", "--profile", "cpu", *own, "--output_dir", "whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    log = tmp_path / "log"
    recipe = [sys.executable, str(RECIPES / "hh_rlhf_lora.py"), "--config", str(RECIPES / "profiles" / "cpu.yaml")]
    process = start([*recipe, *own, "--output_dir", "killed"], tmp_path, log)
    wait_for(process, log, "\n      4  loss", seconds=300)
    while phase == "report" and not (tmp_path / "killed" / "adapter_model.safetensors").exists():
        assert process.poll() is None, log.read_text()
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    for _ in range(2):
        resume = ["--output_dir", "killed", "--resume_from_checkpoint", "true"]
        again = run_train("hh_rlhf_lora", "--profile", "cpu", *own, *resume, cwd=tmp_path)
        assert again.returncode == 0, again.stdout + again.stderr
        assert json.loads((tmp_path / "killed" / "done.json").read_text())["updates"] == updates
        assert same_weights(tmp_path / "killed", tmp_path / "whole")
        (tmp_path / "killed" / "done.json").unlink()  # as if killed again while the report was written


@pytest.mark.slow
def test_a_finished_run_is_neither_trained_again_nor_changed(tmp_path, tiny_model, hh_rows):
    call = ["hh_rlhf_lora", "--profile", "cpu", "--dataset_name", hh_rows, "--model_name_or_path", tiny_model]
    call += ["--output_dir", "run", "--pairs_per_update", "4", "--eval_pairs", "2", "--max_steps", "1"]
    first = run_train(*call, cwd=tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    (tmp_path / "run" / "eval.json").write_text("{}")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert len(before) > 15
    for more in ([], ["--resume_from_checkpoint", "true"]):
        again = run_train(*call, *more, cwd=tmp_path)
        assert again.returncode == 0, again.stdout + again.stderr
        assert "run holds this run, finished" in again.stdout
        assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    refused = run_train(*call, "--overwrite", "true", cwd=tmp_path)
    assert refused.returncode == 2
    assert "run holds eval.json, which no run wrote" in refused.stderr
    (tmp_path / "run" / "eval.json").unlink()
    replaced = run_train(*call, "--overwrite", "true", cwd=tmp_path)
    assert replaced.returncode == 0, replaced.stdout + replaced.stderr
    assert "Removed the earlier run in run: " in replaced.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_interrupt_saves_and_exits_with_its_status(number, status, tmp_path, tiny_model, hh_rows, dpo_recipes):
    command = [dpo_recipes, "train", "hh-rlhf-lora", "--profile", "cpu", "--dataset_name", hh_rows]
    flags = ["--model_name_or_path", tiny_model, *FLAGS, "--max_steps", "2000", "--output_dir", "run"]
    log = tmp_path / "log"
    process = start([str(part) for part in command + flags], tmp_path, log)
    wait_for(process, log, "\n      4  loss")
    children = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True, check=False).stdout
    process.send_signal(number)
    assert process.wait(timeout=60) == status, log.read_text()
    saved = sorted((tmp_path / "run").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))[-1]
    assert int(saved.name.split("-")[1]) >= 4
    assert f"Saved run/{saved.name}" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert not (tmp_path / "run" / "done.json").exists()
    for child in children.split():
        assert not os.path.exists(f"/proc/{child}"), f"{child} is an orphan"

    refused = run_command(*command, *flags, cwd=tmp_path)
    assert refused.returncode == 2
    assert "--resume_from_checkpoint true" in refused.stderr


@pytest.mark.slow
def test_two_processes_match_one_of_the_same_global_batch(tmp_path, tiny_model, hh_rows, dpo_recipes):
    """Each update sees the same four pairs; the sum is taken in another order."""
    for accelerate, batch in (("cpu", "4"), ("cpu2", "2")):
        result = run_command(
            *(dpo_recipes, "train", "hh-rlhf-lora", "--profile", "cpu", "--accelerate", accelerate),
            *("--dataset_name", hh_rows, "--model_name_or_path", tiny_model, *FLAGS),
            *("--per_device_train_batch_size", batch, "--output_dir", accelerate),
            cwd=tmp_path,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        assert result.stdout.count("Data account") == 1
        assert "Prompts are not shared" not in result.stdout + result.stderr
    one, two = history(tmp_path / "cpu"), history(tmp_path / "cpu2")
    assert len(one) == 12
    for expected, got in zip(one, two, strict=True):
        assert got == pytest.approx(expected, rel=1e-4, abs=1e-6)
    metrics = [
        json.loads((tmp_path / name / "metrics.json").read_text())["preference_accuracy"] for name in ("cpu", "cpu2")
    ]
    assert metrics[0]["all"]["summed"] == metrics[1]["all"]["summed"]
