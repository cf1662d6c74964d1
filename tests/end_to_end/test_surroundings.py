"""Training outlives what surrounds it: a terminal, the reader of a pipe, space for its log, an evaluation set."""

import fcntl
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time

import pytest
from commands import RECIPES, run_train

FLAGS = ["--pairs_per_update", "4", "--per_device_train_batch_size", "2", "--eval_pairs", "2", "--logging_steps", "1"]


@pytest.fixture
def command(dpo_recipes, tiny_model, hh_rows):
    call = [dpo_recipes, "train", "hh-rlhf-lora", "--profile", "cpu", "--dataset_name", hh_rows, *FLAGS]
    return [str(part) for part in [*call, "--model_name_or_path", tiny_model, "--output_dir", "run"]]


def start(command, cwd, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(command, cwd=cwd, env=environment, **options)


def lead_the_terminal():
    """Makes the terminal on standard input the controlling one, as a shell's is."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def read_until(pattern, stream, seconds=120):
    """Reads what a process says until it has said the pattern."""
    said, end = b"", time.monotonic() + seconds
    while not re.search(pattern, said):
        assert time.monotonic() < end, said
        if select.select([stream], [], [], 1)[0]:
            more = os.read(stream, 4096)
            assert more, said
            said += more


@pytest.mark.slow
def test_a_closed_terminal_ends_the_run_with_a_checkpoint(command, tmp_path):
    master, slave = pty.openpty()
    streams = dict(stdin=slave, stdout=slave, stderr=slave)
    more = ["--max_steps", "5000", "--save_steps", "5000", "--eval_steps", "5000"]
    process = start([*command, *more], tmp_path, **streams, start_new_session=True, preexec_fn=lead_the_terminal)
    try:
        os.close(slave)
        read_until(rb"[\r\n] +4  loss", master)
        os.close(master)
        assert process.wait(timeout=120) == 143
    finally:
        process.kill()
    [saved] = (tmp_path / "run").glob("checkpoint-*")
    assert json.loads((saved / "trainer_state.json").read_text())["global_step"] >= 4
    assert not (tmp_path / "run" / "done.json").exists()


@pytest.mark.slow
def test_a_recipe_run_by_hand_saves_when_its_terminal_is_closed(tmp_path, tiny_model, hh_rows):
    recipe = RECIPES / "hh_rlhf_lora.py"
    call = [
        sys.executable,
        str(recipe),
        "--config",
        str(RECIPES / "profiles" / "cpu.yaml"),
        "--dataset_name",
        str(hh_rows),
    ]
    call = [*call, *FLAGS, "--model_name_or_path", str(tiny_model), "--output_dir", "run", "--max_steps", "5000"]

    reader, writer = os.pipe()
    hang_up = dict(preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))
    process = start([str(part) for part in call], tmp_path, stdout=writer, stderr=writer, **hang_up)
    try:
        os.close(writer)
        read_until(rb"[\r\n] +4  loss", reader)
        os.close(reader)
        process.send_signal(signal.SIGHUP)
        assert process.wait(timeout=120) == 129
    finally:
        process.kill()
    assert len([*(tmp_path / "run").glob("checkpoint-*")]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("where", ["a pipe that nobody reads", "a full disk"])
def test_output_that_cannot_be_written_stops_nothing(where, command, tmp_path):
    more = ["--max_steps", "2"]
    if where == "a full disk":
        with open("/dev/full", "w") as full:
            process = start([*command, *more], tmp_path, stdout=full, stderr=full)
    else:
        process = start([*command, *more], tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert process.stdout.readline().startswith(b"accelerate launch")
        process.stdout.close()
    try:
        assert process.wait(timeout=240) == 0
    finally:
        process.kill()
    assert json.loads((tmp_path / "run" / "done.json").read_text())["updates"] == 2


NONE = {
    "none": 'eval_dataset=pairs["test"],',
    "an empty one": 'eval_dataset=pairs["test"].select([]),',
    "several": 'eval_dataset={"one": pairs["test"], "two": pairs["test"]},',
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", NONE)
def test_a_recipe_without_held_out_pairs_is_trained_and_saved(kind, tmp_path, tiny_model, hh_rows):
    text = (RECIPES / "hh_rlhf_lora.py").read_text()
    assert NONE["none"] in text
    text = text.replace(NONE["none"], "" if kind == "none" else NONE[kind])
    (tmp_path / "mine.py").write_text(text.replace('eval_strategy="steps"', 'eval_strategy="no"'))
    result = run_train(
        *("mine.py", "--profile", "cpu", "--dataset_name", hh_rows, "--model_name_or_path", tiny_model),
        *(*FLAGS, "--max_steps", "2", "--output_dir", "run"),
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    run = tmp_path / "run"
    assert json.loads((run / "done.json").read_text())["updates"] == 2
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["preference_accuracy"] == {}
    assert "kl" not in metrics
    assert ("nothing was measured on it" in result.stdout) == (kind != "none")
    assert {"adapter_model.safetensors", "report.html", "README.md"} <= {path.name for path in run.iterdir()}
