"""One recipe with every combination of some settings."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import run_command

from dpo_recipes.cli import main
from dpo_recipes.launch import processes, sweep
from dpo_recipes.launch.launch import Launch

STAND_IN = '''"""A stand-in that trains nothing, and leaves what a run leaves."""
import json, os, sys, time
from pathlib import Path

RECIPE = dict(output_dir="outputs/stand_in")

if __name__ == "__main__":
    flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
    folder = Path(flags["--output_dir"])
    folder.mkdir(parents=True, exist_ok=True)
    with open("log", "a") as file:
        file.write(f"{folder.name} {'resumed' if '--resume_from_checkpoint' in flags else 'begun'}\\n")
    request = json.dumps({"request": os.environ["DPO_RECIPES_REQUEST"]})
    (folder / "settings.json").write_text(request)
    if Path("wait").exists():
        time.sleep(60)
    if status := int(Path(f"end {flags['--beta']}").read_text() if Path(f"end {flags['--beta']}").exists() else 0):
        sys.exit(status)
    metrics = {"held_out": {"eval_loss": float(flags["--beta"])}, "kl": {"nats": 2.0}, "cost": {"train_seconds": 61.5}}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "done.json").write_text(request)
'''


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder with a recipe without torch."""
    (tmp_path / "recipes" / "profiles").mkdir(parents=True)
    (tmp_path / "recipes" / "profiles" / "cpu.yaml").write_text("use_cpu: true\n")
    (tmp_path / "recipes" / "stand_in.py").write_text(STAND_IN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


@pytest.fixture
def swept(monkeypatch):
    """Sweep with the stand-in, without accelerate; returns what ran."""

    def run_directly(arguments, environment):
        return subprocess.run([sys.executable, *arguments[2:]], env=environment, check=False).returncode

    monkeypatch.setattr(processes, "supervise", run_directly)
    monkeypatch.setattr(Launch, "check", lambda self, *_: 0)

    def call(*flags, status=0):
        Path("log").write_text("")
        assert main(["train", "stand_in", "--profile", "cpu", "--sweep", *flags]) == status
        return Path("log").read_text().splitlines()

    return call


def test_every_combination_is_run_and_tabulated(swept, capsys):
    assert swept("beta=0.05,0.10", "learning_rate=1e-6,5e-6", "--max_steps", "3") == [
        f"beta={beta},learning_rate={rate} begun" for beta in ("0.05", "0.1") for rate in ("1e-06", "5e-06")
    ]
    root = Path("outputs/stand_in/sweep")
    results = json.loads((root / "sweep.json").read_text())
    assert results[2] == {
        "settings": {"beta": "0.1", "learning_rate": "1e-06"},
        "folder": str(root / "beta=0.1,learning_rate=1e-06"),
        "status": 0,
        "held-out loss": 0.1,
        "KL to the reference model, nats": 2.0,
        "seconds": 61.5,
    }
    lines = (root / "sweep.md").read_text().splitlines()
    assert lines[0] == "| beta | learning_rate | run | held-out loss | KL to the reference model, nats | seconds |"
    assert lines[2] == "| 0.05 | 1e-06 | done | 0.050 | 2.000 | 62 |"
    assert len(lines) == 6
    output = capsys.readouterr().out
    assert f"Sweep, run 4 of 4: {root / 'beta=0.1,learning_rate=5e-06'}" in output
    assert "held-out loss" in output


def test_output_dir_names_the_folder_of_the_folders(swept):
    swept("beta=0.1", "--output_dir", "mine")
    assert sorted(path.name for path in Path("mine").iterdir()) == ["beta=0.1", "sweep.json", "sweep.md"]
    assert not Path("outputs").exists()


def test_finished_runs_stay_unfinished_ones_resume_and_others_begin(swept, capsys):
    assert len(swept("beta=0.1,0.2")) == 2
    Path("outputs/stand_in/sweep/beta=0.2/done.json").unlink()
    assert swept("beta=0.10,0.2,0.3") == ["beta=0.2 resumed", "beta=0.3 begun"]
    assert "beta=0.1, finished before" in capsys.readouterr().out
    assert len(json.loads(Path("outputs/stand_in/sweep/sweep.json").read_text())) == 3
    assert swept("beta=0.1,0.2,0.3") == []
    assert swept("beta=0.1,0.2", "--overwrite", "true") == ["beta=0.1 begun", "beta=0.2 begun"]
    assert swept("beta=0.1", "--max_steps", "9") == ["beta=0.1 begun"]  # another request


def test_a_failed_run_is_reported_and_the_others_go_on(swept):
    Path("end 0.1").write_text("1")
    assert swept("beta=0.1,0.2", status=1) == ["beta=0.1 begun", "beta=0.2 begun"]
    lines = Path("outputs/stand_in/sweep/sweep.md").read_text().splitlines()
    assert lines[2] == "| 0.1 | failed (1) | - | - | - |"
    assert lines[3].startswith("| 0.2 | done | 0.200")
    Path("end 0.1").unlink()
    assert swept("beta=0.1,0.2") == ["beta=0.1 resumed"]


@pytest.mark.parametrize("status", [130, 143])
def test_a_stopped_run_stops_the_sweep(swept, status, capsys):
    Path("end 0.2").write_text(str(status))
    assert swept("beta=0.1,0.2,0.3", status=status) == ["beta=0.1 begun", "beta=0.2 begun"]
    assert (
        "The sweep was stopped in outputs/stand_in/sweep/beta=0.2. The same command goes on" in capsys.readouterr().out
    )
    Path("end 0.2").unlink()
    assert swept("beta=0.1,0.2,0.3") == ["beta=0.2 resumed", "beta=0.3 begun"]


@pytest.mark.parametrize(
    "words",
    [
        ["beta"],
        ["beta="],
        ["beta=0.1,"],
        ["=0.1"],
        ["beta=0.1,0.10"],
        ["beta=0.1", "beta=0.2"],
        ["output_dir=a,b"],
        ["overwrite=true"],
        ["max_steps=1,2", "--max_steps", "3"],
    ],
    ids=" ".join,
)
def test_a_sweep_that_makes_no_sense_is_refused(swept, words, capsys):
    assert swept(*words, status=2) == []
    assert "which is not of the form beta=0.05,0.1" in capsys.readouterr().err


def test_a_dry_run_names_the_runs_and_plans_the_first(swept, capsys):
    assert swept("beta=0.1,0.2", "--dry_run", "true") == ["beta=0.1 begun"]
    assert "2 runs, of which this is the first:\noutputs/stand_in/sweep/beta=0.1\n" in capsys.readouterr().out
    assert not Path("outputs/stand_in/sweep/sweep.md").exists()


@pytest.mark.parametrize("flags", [("--dry_run",), ("--dry_run", "yes"), ("--beta", "1", "--dry-run=T")], ids=" ".join)
def test_a_dry_run_is_known_by_every_spelling_that_the_recipe_takes(flags):
    assert Launch(Path("recipes/stand_in.py"), Path("p"), Path("a"), flags=flags).is_dry_run()
    assert not Launch(Path("recipes/stand_in.py"), Path("p"), Path("a"), flags=("--dry_run", "no")).is_dry_run()


def test_a_run_is_another_when_a_part_of_its_mixture_has_changed(swept):
    for name in ("one.jsonl", "two.jsonl"):
        Path(name).write_text("{}\n")
    mixture = ["beta=0.1", "--dataset_name", "one.jsonl:5+two.jsonl"]
    assert len(swept(*mixture)) == 1
    assert swept(*mixture) == []
    Path("one.jsonl").write_text('{"a": 1}\n')
    assert swept(*mixture) == ["beta=0.1 begun"]


def test_every_measure_is_found_where_a_run_writes_it():
    estimate = {"before": {"mean": 0.1}, "after": {"mean": 0.9}}
    scores = {"temperature 0.7": {"exact reward": estimate}, "greedy": {"exact reward": estimate}}
    metrics = {
        "held_out": {"eval_loss": 0.5},
        "preference_accuracy": {"all": {"summed": estimate, "implicit reward": {"after": {"mean": 0.8}}}},
        "kl": {"nats": 1.5},
        "scores": scores,
        "cost": {"train_seconds": 3.0},
    }
    assert list(sweep._measures(metrics).values()) == [0.5, 0.9, 0.8, 1.5, 0.9, 0.9, 3.0]


@pytest.mark.slow
def test_ctrl_c_stops_the_whole_sweep(folder, dpo_recipes):
    Path("wait").touch()
    command = [dpo_recipes, "train", "stand_in", "--profile", "cpu", "--sweep", "beta=0.1,0.2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        end = time.monotonic() + 120
        while not Path("log").exists():
            assert time.monotonic() < end
            time.sleep(0.1)
        os.kill(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, output
    assert Path("log").read_text() == "beta=0.1 begun\n"


@pytest.mark.slow
def test_a_sweep_of_a_recipe(tmp_path, tiny_model, hh_rows, dpo_recipes):
    """Refused before anything trains, then trained, with one run that fails, then not trained again."""
    call = ["train", "hh-rlhf-lora", "--profile", "cpu", "--dataset_name", hh_rows, "--model_name_or_path", tiny_model]
    call += ["--max_steps", "1", "--pairs_per_update", "4", "--eval_pairs", "4", "--output_dir", "swept", "--sweep"]
    for wrong, reason in ((["betta=1,2"], "--betta"), (["beta=0.1,high"], "invalid float value: 'high'")):
        result = run_command(dpo_recipes, *call, *wrong, cwd=tmp_path)
        assert result.returncode == 2, result.stdout + result.stderr
        assert reason in result.stderr
        assert "Traceback" not in result.stderr
        assert not (tmp_path / "swept").exists()
    # No pair fits in 8 tokens.
    result = run_command(dpo_recipes, *call, "max_length=8,512", cwd=tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    failed, done = json.loads((tmp_path / "swept" / "sweep.json").read_text())
    assert (failed["status"], done["status"]) == (2, 0)
    measured = {"held-out loss", "preference accuracy, summed", "implicit-reward accuracy", "seconds"}
    assert measured <= set(done)
    assert not measured & set(failed)
    assert "| 8 | failed (2) | - " in (tmp_path / "swept" / "sweep.md").read_text()
    before = (tmp_path / "swept" / "max_length=512" / "done.json").read_text()
    result = run_command(dpo_recipes, *call, "max_length=512", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "finished before" in result.stdout
    assert (tmp_path / "swept" / "max_length=512" / "done.json").read_text() == before
