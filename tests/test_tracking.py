"""Weights & Biases without a login: nobody is asked, and what is read back from its file is what was logged."""

import json
import os
import pty
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import wandb
from huggingface_hub import constants
from trl import DPOConfig
from wandb.proto.wandb_internal_pb2 import Record
from wandb_records import records

from dpo_recipes import tracking
from dpo_recipes.errors import RecipeError

FLAGS = (
    *("--profile", "cpu", "--max_steps", "2", "--pairs_per_update", "4", "--eval_pairs", "2", "--logging_steps", "1"),
    *("--beta", "0.25", "--report_to", "wandb"),
)


def logged(run_folder: Path) -> tuple[Record, dict, list[dict]]:
    """The run, its settings and its history."""
    [file] = run_folder.glob("wandb/offline-run-*/*.wandb")
    found = records(file)
    run = next(record.run for record in found if record.WhichOneof("record_type") == "run")
    updates = [update for record in found for update in [*record.run.config.update, *record.config.update]]
    config = {update.key or update.nested_key[0]: json.loads(update.value_json) for update in updates}
    history = [
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for record in found
        if record.WhichOneof("record_type") == "history"
    ]
    return run, config, history


def without_wandb() -> dict[str, str]:
    """The environment without wandb's settings, and without the service of a run that this process had before."""
    return {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}


def on_a_terminal(command: list[str], cwd: Path, environment: dict[str, str]) -> tuple[int, str]:
    """Exit status and output of a command that has a terminal for input and output, where nobody types."""
    master, slave = pty.openpty()
    process = subprocess.Popen(command, cwd=cwd, env=environment, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    output = b""
    while True:
        try:
            chunk = os.read(master, 65536)
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        output += chunk
    os.close(master)
    return process.wait(timeout=300), output.decode()


def test_without_a_login_a_terminal_is_not_asked_and_the_run_is_logged_offline(
    tmp_path, tiny_model, hh_rows, dpo_recipes
):
    environment = without_wandb() | {
        "HOME": str(tmp_path / "home"),
        "OMP_NUM_THREADS": "1",
        "NETRC": str(tmp_path / "none"),
    }
    data = ["--dataset_name", hh_rows, "--model_name_or_path", tiny_model, "--output_dir", "outputs/mine"]
    command = [str(word) for word in (dpo_recipes, "train", "hh-rlhf-lora", *FLAGS, *data)]
    status, output = on_a_terminal(command, tmp_path, environment)
    assert status == 0, output
    assert "wandb is offline (no login, or WANDB_MODE). Send the run with: wandb sync outputs/mine/wandb/" in output
    assert "Enter your choice" not in output

    folder = tmp_path / "outputs" / "mine"
    run, config, history = logged(folder)
    assert (run.display_name, run.project, list(run.tags)) == ("mine", "dpo-recipes", ["hh_rlhf_lora", "dpo"])
    assert (config["pairs_per_update"], config["beta"], config["lora_r"]) == (4, 0.25, 16)
    state = json.loads((folder / "checkpoint-2" / "trainer_state.json").read_text())
    losses = [entry for entry in state["log_history"] if "loss" in entry]
    assert len(losses) == 2
    rows = [row for row in history if "train/loss" in row]
    for row, entry in zip(rows, losses, strict=True):
        assert row["train/global_step"] == entry.pop("step")
        assert {f"train/{key}": value for key, value in entry.items()}.items() <= row.items()


def test_without_a_terminal_and_with_WANDB_MODE_it_is_logged_offline_too(tmp_path, tiny_model, hh_rows, dpo_recipes):
    command = [dpo_recipes, "train", "hh-rlhf-lora", *FLAGS, "--dataset_name", hh_rows, "--run_name", "own name"]
    command += ["--model_name_or_path", tiny_model, "--output_dir", "run"]
    environment = without_wandb() | {"WANDB_MODE": "offline", "OMP_NUM_THREADS": "1", "WANDB_PROJECT": "theirs"}
    result = subprocess.run(
        [*map(str, command)], cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    run, _, _ = logged(tmp_path / "run")
    assert (run.display_name, run.project) == ("own name", "theirs")


@pytest.mark.parametrize(
    ("tracker", "message"),
    [
        ("trackio", r"pip install 'dpo-recipes\[trackio\]'"),
        ("mlflow", "The tracker mlflow is not installed: pip install mlflow"),
        ("wandbb", "There is no tracker wandbb"),
    ],
)
def test_a_tracker_that_cannot_be_used_is_refused(tracker, message, monkeypatch, tmp_path):
    monkeypatch.setattr(tracking, "get_available_reporting_integrations", lambda: [])
    args = DPOConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, activation_checkpointing=False, report_to=tracker
    )
    with pytest.raises(RecipeError, match=message):
        tracking.check_trackers(args)


def test_by_default_nothing_is_reported_and_no_telemetry_is_sent(monkeypatch, tmp_path):
    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
    args = DPOConfig(output_dir=str(tmp_path / "x"), use_cpu=True, bf16=False, activation_checkpointing=False)
    tracking.check_trackers(args)
    assert args.report_to == []
    assert args.run_name == "x"
    assert constants.HF_HUB_DISABLE_TELEMETRY is True
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "0")  # asked for
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
    tracking.check_trackers(args)
    assert constants.HF_HUB_DISABLE_TELEMETRY is False


@pytest.mark.parametrize(
    ("logged_in", "wanted", "mode"),
    [(True, None, None), (True, "online", None), (False, None, "offline"), (False, "online", "offline")],
)
def test_a_login_sends_the_run_and_none_keeps_it_here(logged_in, wanted, mode, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = SimpleNamespace(mode=wanted or "online")
    monkeypatch.setattr(wandb, "setup", lambda: SimpleNamespace(settings=settings))
    monkeypatch.setattr(wandb, "login", lambda prompt, verify: logged_in and not prompt and not verify)
    calls = []
    run = SimpleNamespace(offline=mode == "offline", dir="run/wandb/offline-run-1/files")
    monkeypatch.setattr(wandb, "init", lambda **given: calls.append(given) or run)
    args = SimpleNamespace(report_to=["wandb"], run_name="x", output_dir="run")
    trainer = SimpleNamespace(args=args, is_world_process_zero=lambda: True, _name="DPO")
    tracking.start_tracking(trainer, {"beta": 0.1})
    assert [call["mode"] for call in calls] == [mode]
    assert ("wandb sync run/wandb/offline-run-1" in capsys.readouterr().out) == (mode == "offline")
    args.report_to = []
    tracking.start_tracking(trainer, {})
    assert len(calls) == 1
