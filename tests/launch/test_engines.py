"""ZeRO-2, ZeRO-3 and FSDP2 train on two processes as one process does, with the shipped settings, on CPUs."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from commands import RECIPES, REPOSITORY, run_train
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

ENGINES = ["zero2", "zero3", "fsdp2"]
RUNS = ["sft", "lora", "reward", "full"]  # recipes hh_rlhf_*; SFT and reward model merge their LoRA adapter at the end
FLAGS = "--max_length 256 --pairs_per_update 4 --max_steps 4 --save_steps 2 --eval_pairs 4 --learning_rate 1e-3"
FLAGS += " --logging_steps 1 --warmup_steps 0"
LOADS = {"lora": AutoPeftModelForCausalLM, "reward": AutoModelForSequenceClassification}


@pytest.fixture(scope="module")
def flags(tiny_model, hh_rows):
    return [*FLAGS.split(), "--model_name_or_path", str(tiny_model), "--dataset_name", str(hh_rows)]


@pytest.fixture(scope="module")
def one(flags, tmp_path_factory):
    """The folder of all runs in one process, as plain TRL."""
    folder = tmp_path_factory.mktemp("one")
    for name in RUNS:
        plain = ["--shared_prefix", "false"] * (name in ("lora", "full"))
        words = [*flags, *plain, "--per_device_train_batch_size", "4", "--output_dir", name]
        done = run_train(f"hh_rlhf_{name}", *words, "--profile", "cpu", cwd=folder)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def start(flags, tmp_path):
    """Start all runs on two processes under an engine, in the background."""

    def start_all(engine, *more, runs=RUNS):
        if engine.startswith("zero") and not importlib.util.find_spec("deepspeed"):
            pytest.skip("deepspeed is not installed: pip install deepspeed")
        settings = yaml.safe_load((RECIPES / "accelerate" / f"{engine}.yaml").read_text())
        settings |= {"use_cpu": True, "num_processes": 2}
        (tmp_path / "engine.yaml").write_text(yaml.safe_dump(settings))
        config = ["--config", str(RECIPES / "profiles" / "cpu.yaml"), "--per_device_train_batch_size", "2"]
        calls = [[f"{RECIPES}/hh_rlhf_{name}.py", *config, *flags, *more, "--output_dir", name] for name in runs]
        several = [REPOSITORY / "tests" / "helpers" / "several_runs.py", json.dumps(calls)]
        launcher = [Path(sys.executable).parent / "accelerate", "launch", "--config_file", "engine.yaml"]
        with (tmp_path / "log").open("wb") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
            options = dict(cwd=tmp_path, env=environment, stdout=log, stderr=log)
            return subprocess.Popen([*launcher, *several], **options)

    return start_all


def _losses(folder):
    state = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def _assert_same(there, one):
    """Losses to 1e-5, weights to 1e-4 and log-probs of the loaded model to 1e-3 are those of one process."""
    for name in RUNS:
        assert _losses(there / name) == pytest.approx(_losses(one / name), abs=1e-5), name
        [file] = [path.name for path in (one / name).glob("*model.safetensors")]
        weights, expected = load_file(there / name / file), load_file(one / name / file)
        torch.testing.assert_close(weights, expected, atol=1e-4, rtol=0)
        loads, ids = LOADS.get(name, AutoModelForCausalLM), torch.arange(2, 34)[None]
        logps = [loads.from_pretrained(at / name)(input_ids=ids).logits.log_softmax(-1) for at in (there, one)]
        torch.testing.assert_close(*logps, atol=1e-3, rtol=0)
    assert len(_losses(one / "full")) == 4


@pytest.mark.parametrize(
    "engine",
    [pytest.param(engine, marks=pytest.mark.slow if engine == "fsdp2" else pytest.mark.faults) for engine in ENGINES],
)
def test_divided_weights_train_as_one_process_does(engine, one, start, tmp_path):
    """DPO shares its prompts here, and the single process does not."""
    assert start(engine).wait(timeout=500) == 0, (tmp_path / "log").read_text()
    assert "Prompts are not shared" not in (tmp_path / "log").read_text()
    _assert_same(tmp_path, one)


@pytest.mark.faults
@pytest.mark.parametrize("engine", ENGINES)
def test_divided_weights_resume_after_a_kill(engine, one, start, tmp_path):
    """The last run is killed after its first checkpoint; the others lose what came after theirs."""
    process = start(engine)
    while not (tmp_path / "full" / "checkpoint-2" / "trainer_state.json").exists():
        assert process.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.05)
    killed = psutil.Process(process.pid).children(recursive=True)
    for each in [*killed, psutil.Process(process.pid)]:
        each.kill()
    process.wait()
    for name in RUNS:
        shutil.rmtree(tmp_path / name / "checkpoint-4", ignore_errors=True)
        (tmp_path / name / "done.json").unlink(missing_ok=True)
    assert start(engine, "--resume_from_checkpoint", "true").wait(timeout=500) == 0, (tmp_path / "log").read_text()
    assert (tmp_path / "log").read_text().count("checkpoint-2.") >= len(RUNS), "each run went on"
    _assert_same(tmp_path, one)
