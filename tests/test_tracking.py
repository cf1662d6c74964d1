"""Trackers: nobody is asked for a login, and what is read back from their files is what was logged."""

import json
import os
import pty
import re
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from uuid import uuid4

import pytest
import wandb
from hostile_pages import HOSTILE
from huggingface_hub import constants
from transformers import TrainerControl, TrainerState
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from trl import DPOConfig
from wandb.proto.wandb_internal_pb2 import Record
from wandb_records import records

from dpo_recipes import tracking
from dpo_recipes.errors import RecipeError
from dpo_recipes.terminal import shown

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
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in found
        if record.WhichOneof("record_type") == "history"
    ]
    return run, config, history


def wandb_table(run_folder: Path, name: str) -> list[dict]:
    """The rows of the table that the last entry of the history names."""
    [file] = run_folder.glob(f"wandb/offline-run-*/files/{logged(run_folder)[2][-1][f'{name}.path']}")
    table = json.loads(file.read_text())
    return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_without_a_terminal_and_with_WANDB_MODE_it_is_logged_offline_too(tmp_path, tiny_model, hh_rows, dpo_recipes):
    command = [dpo_recipes, "train", "hh-rlhf-lora", *FLAGS, "--dataset_name", hh_rows, "--run_name", "own name"]
    command += ["--model_name_or_path", tiny_model, "--output_dir", "run"]
    environment = without_wandb() | {"WANDB_MODE": "offline", "OMP_NUM_THREADS": "1", "WANDB_PROJECT": "theirs"}
    result = subprocess.run(
        [*map(str, command)], cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    run, _, history = logged(tmp_path / "run")
    assert (run.display_name, run.project) == ("own name", "theirs")
    sent, metrics = history[-1], json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert sent["eval/kl/nats"] == metrics["kl"]["nats"]
    accuracy = metrics["preference_accuracy"]["all"]["summed"]
    assert [sent[f"eval/preference_accuracy/all/summed/{side}"] for side in accuracy] == [
        found["mean"] for found in accuracy.values()
    ]
    samples = wandb_table(tmp_path / "run", "eval/samples")
    lines = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    assert [row["after text"] for row in samples] == [shown(json.loads(line)["after"]["text"]) for line in lines]
    assert [row["metric"] for row in wandb_table(tmp_path / "run", "eval/results")] == [
        line.partition("  ")[0] for line in metrics["table"].splitlines()[2:]
    ]


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


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """Returns a function that makes a trainer with one tracker, after its run has written its files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    folder, text = tmp_path / "run", f"**bold** {HOSTILE} \x1b[31m | \n\n# Title"
    folder.mkdir()
    answer = {"text": text, "tokens": 3, "ended": True, "scores": {"exact reward": 0.5}}
    sample = {"prompt": [{"role": "user", "content": text}], "temperature": 0.7, "before": answer, "after": answer}
    accuracy = {"mean": 0.75, "low": 0.5, "high": 1.0, "n": 4}
    metrics = {
        "train": {"loss": 0.6},
        "kl": {"nats": 1.5, "standard_error": None},
        "scores": {"temperature 0.7": {"exact reward": {"before": accuracy, "after": accuracy}}},
        "note": text,
        "verdict": {"word": "better", "sentence": "The exact reward rose."},
    }
    finding = {"rule": "no_end", "fatal": False, "step": 2, "sign": text, "cause": "c", "remedy": "r"}
    for name, data in (("metrics", metrics), ("health", {"findings": [finding]})):
        (folder / f"{name}.json").write_text(json.dumps(data))
    (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    (folder / "report.html").write_text("the page")

    def trainer(tracker):
        args = DPOConfig(
            output_dir=str(folder), use_cpu=True, bf16=False, activation_checkpointing=False, report_to=tracker
        )
        tracking.check_trackers(args)
        callback = INTEGRATION_TO_CALLBACK[tracker]()
        state = TrainerState(global_step=7, is_local_process_zero=True, is_world_process_zero=True)
        parts = dict(args=args, state=state, control=TrainerControl(), model=None)
        callback.on_train_begin(*(parts[name] for name in ("args", "state", "control")))
        callback.on_log(args, state, TrainerControl(), logs={"loss": 0.6})
        if tracker != "wandb":  # whose run stays open
            callback.on_train_end(args, state, TrainerControl())
        return SimpleNamespace(**parts, callback_handler=SimpleNamespace(callbacks=[callback]))

    return trainer


HEADER, ROWS = ("", "before", "after"), [["exact reward, temperature 0.7", "0.750 [0.500, 1.000]", 1.5]]
VERDICT = {"eval/verdict/word": "better", "eval/verdict/sentence": "The exact reward rose."}
NUMBERS = {
    "eval/kl/nats": 1.5,
    "eval/scores/temperature_0.7/exact_reward/before": 0.75,
    "eval/scores/temperature_0.7/exact_reward/after": 0.75,
    "eval/health_findings": 1,
}


def test_wandb_gets_the_results_and_the_page_if_asked(finished, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_LOG_PAGE", "true")
    with wandb.init(project="x", mode="offline", dir=tmp_path / "run"):
        assert tracking.send_results(finished("wandb"), HEADER, ROWS) == []
    [file] = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    end = time.monotonic() + 60
    while not any(record.WhichOneof("record_type") == "exit" for record in records(file)):
        assert time.monotonic() < end, "wandb's own process writes the file, and may be late"
        time.sleep(0.1)
    _, _, [_, sent] = logged(tmp_path / "run")
    assert (NUMBERS | VERDICT).items() <= sent.items()
    assert not any("loss" in name or name.endswith(("low", "high", "/n")) for name in sent)
    [result], [sample], [finding] = (
        wandb_table(tmp_path / "run", f"eval/{name}") for name in ("results", "samples", "health")
    )
    assert result == {"metric": ROWS[0][0], "before": ROWS[0][1], "after": "1.5"}
    assert sample["after text"] == sample["prompt"] == f"**bold** {HOSTILE} \\x1b[31m | \n\n# Title"
    assert sample["after scores exact reward"] == 0.5
    assert (finding["rule"], finding["step"]) == ("no_end", 2)
    artifacts = [record.artifact for record in records(file) if record.artifact.type == "report"]
    assert [[entry.path for entry in artifact.manifest.contents] for artifact in artifacts] == [["report.html"]]


def test_tensorboard_gets_the_results_beside_the_curves(finished, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = finished("tensorboard")
    assert tracking.send_results(trainer, HEADER, ROWS) == []
    [folder] = (tmp_path / "run" / "runs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    scalars = {name: events.Scalars(name) for name in events.Tags()["scalars"]}
    assert {*scalars} == {"train/loss", *NUMBERS}
    assert {name: scalars[name][0].value for name in NUMBERS} == NUMBERS
    assert {scalars[name][0].step for name in NUMBERS} == {7}
    texts = {
        name: events.Tensors(f"eval/{name}/text_summary")[0].tensor_proto.string_val[0].decode()
        for name in ("results", "samples", "health", "verdict/sentence")
    }
    assert texts.pop("verdict/sentence") == "The exact reward rose."
    assert texts["results"].splitlines() == [
        "| metric | before | after |",
        "| --- | --- | --- |",
        "| exact reward, temperature 0.7 | 0.750 \\[0.500, 1.000\\] | 1.5 |",
    ]
    assert [len(text.splitlines()) for text in texts.values()] == [3, 3, 3]
    assert "<" not in "".join(texts.values())
    assert r"\*\*bold\*\*" in texts["samples"]


def test_trackio_gets_the_results_in_the_run_that_training_ended(finished, monkeypatch):
    trackio = pytest.importorskip("trackio")
    monkeypatch.setattr(
        tracking, "PROJECT", f"test-{uuid4()}"
    )  # in the user's folder, which trackio fixes at its import
    try:
        assert tracking.send_results(finished("trackio"), HEADER, ROWS) == []
        [run] = trackio.Api().runs(tracking.PROJECT)
        first, sent = trackio.sqlite_storage.SQLiteStorage.get_logs(tracking.PROJECT, run.name, run_id=run.id)
    finally:
        trackio.delete_project(tracking.PROJECT, force=True)
    assert (run.name, first["train/loss"]) == ("run", 0.6)
    assert (NUMBERS | VERDICT).items() <= sent.items()
    assert [row["metric"] for row in sent["eval/results"]["_value"]] == [ROWS[0][0]]
    assert "<" not in json.dumps(sent)


def test_a_tracker_that_fails_is_a_warning(finished, tmp_path, caplog):
    with wandb.init(project="x", mode="offline", dir=tmp_path):
        trainer = finished("wandb")
    [warning] = tracking.send_results(trainer, HEADER, ROWS)
    assert re.match(r"wandb did not take the results \(.*Error: .*\)\. The files in .*run hold all of them\.", warning)
    assert warning in caplog.messages
