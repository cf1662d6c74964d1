"""Commands that are killed at any moment go on, lose nothing that was finished, and come to the same result."""

import json
import shutil
from functools import cache
from pathlib import Path

import pytest
from conftest import run_forked
from kills import EVALUATION, TRAINING, is_same, losses, moment, names, prints, run, weights

pytestmark = pytest.mark.faults

UPDATES = 6
FEW = ["--max_steps", "6", "--save_steps", "2", "--eval_steps", "3", "--logging_steps", "1", "--eval_pairs", "2"]
FEW += ["--pairs_per_update", "4", "--per_device_train_batch_size", "2", "--learning_rate", "1e-3"]
ONLINE = ["--generation_batch_size", "8", "--num_iterations", "1", "--max_prompt_length", "200"]
ONLINE += ["--max_completion_length", "8"]
PHASES = {
    "hh-rlhf-sft": [
        "start",
        "model",
        "steps",
        "checkpoint",
        "later steps",
        "save",
        "measuring",
        "merging",
        "pages",
        "page",
    ],
    "hh-rlhf-lora": ["model", "steps", "checkpoint", "later steps", "save", "measuring", "pages", "page"],
    "hh-rlhf-ppo": ["model", "steps", "checkpoint", "later steps", "save", "measuring", "pages"],
}
SOON = {("hh-rlhf-sft", "merging"), ("hh-rlhf-lora", "checkpoint"), ("hh-rlhf-ppo", "later steps")}


@pytest.fixture(scope="session")
def seed(request):
    return request.config.getoption("fault_seed")


@pytest.fixture(scope="session")
def train(dpo_recipes, tiny_model, reward_model, hh_rows):
    """The command that trains a recipe on tiny models, into the folder `run`."""

    def train(name, *more):
        models = ["--model_name_or_path", str(tiny_model), "--dataset_name", str(hh_rows)]
        online = [*ONLINE, "--reward_model_name_or_path", str(reward_model)] if name.endswith("ppo") else []
        return [
            str(dpo_recipes),
            "train",
            name,
            "--profile",
            "cpu",
            *models,
            *FEW,
            *online,
            "--output_dir",
            "run",
            *more,
        ]

    return train


@pytest.fixture(scope="session")
def undisturbed(train, tmp_path_factory):
    """A training that nothing disturbs: its folder, and when it came into each phase."""

    @cache
    def undisturbed(name) -> tuple[Path, dict[str, float]]:
        folder = tmp_path_factory.mktemp(name)
        times, status = run(train(name), folder, TRAINING, output="run")
        assert status == 0, (folder / "log").read_text()
        return folder / "run", times

    return undisturbed


@pytest.mark.parametrize(
    ("name", "phase"),
    [
        pytest.param(name, phase, marks=[pytest.mark.slow] if (name, phase) in SOON else [])
        for name, phases in PHASES.items()
        for phase in phases
    ],
)
def test_a_killed_training_goes_on_to_the_same_weights(name, phase, train, undisturbed, seed, tmp_path):
    whole, times = undisturbed(name)
    delay = moment(phase, times, f"{seed} {name} {phase}")
    _, killed = run(train(name), tmp_path, TRAINING, output="run", kill=(phase, delay))
    there = tmp_path / "run"
    told = f"--fault-seed {seed}: killed {delay:.3f} s into {phase}, status {killed}\n{(tmp_path / 'log').read_text()}"
    resume = ["--resume_from_checkpoint", "true"] if any(there.glob("checkpoint-*")) else []
    _, status = run(train(name, *resume), tmp_path, TRAINING, output="run")
    told += (tmp_path / "log").read_text()
    assert status == 0, told
    assert is_same(weights(there), weights(whole)), told
    assert losses(there, UPDATES) == losses(whole, UPDATES), told
    assert json.loads((there / "done.json").read_text())["updates"] == UPDATES, told
    assert names(there) == names(whole), told
    again = run_forked(*train(name)[1:], cwd=tmp_path)
    assert "holds this run, finished: nothing to do" in again.stdout, told + again.stdout + again.stderr


@pytest.mark.parametrize(
    "phase",
    ["answers of the start", pytest.param("answers of the run", marks=pytest.mark.slow), "judging", "pages"],
)
def test_a_killed_evaluation_goes_on_to_the_same_results(
    phase, undisturbed, seed, dpo_recipes, reward_model, rows_of, tmp_path
):
    """Answers that are there are kept."""

    def evaluate(folder):
        folder.mkdir()
        shutil.copytree(undisturbed("hh-rlhf-lora")[0], folder / "run")
        call = [
            dpo_recipes,
            "evaluate",
            "run",
            "--profile",
            "cpu",
            "--dataset_name",
            rows_of["hh"],
            "--output_dir",
            "run",
        ]
        call += ["--judge", reward_model, "--prompts", "2", "--max_new_tokens", "8"]
        return [str(word) for word in call]

    def results(folder):
        found = json.loads((folder / "run" / "eval.json").read_text())
        return {key: value for key, value in found.items() if key != "made"}

    whole, folder = tmp_path / "whole", tmp_path / "killed"
    times, status = run(evaluate(whole), whole, EVALUATION, output="run")
    assert status == 0, (whole / "log").read_text()
    delay, call = moment(phase, times, f"{seed} evaluate {phase}"), evaluate(folder)
    _, killed = run(call, folder, EVALUATION, output="run", kill=(phase, delay))
    told = f"--fault-seed {seed}: killed {delay:.3f} s into {phase}, status {killed}\n{(folder / 'log').read_text()}"
    kept = {file: file.stat().st_mtime_ns for file in (folder / "run" / "eval" / "answers").glob("*.json")}
    _, status = run(call, folder, EVALUATION, output="run")
    told += (folder / "log").read_text()
    assert status == 0, told
    assert results(folder) == results(whole), told
    assert {file: file.stat().st_mtime_ns for file in kept} == kept, told
    assert len(kept) >= ["answers of the start", "answers of the run", "judging", "pages"].index(phase), told
    assert names(folder / "run") == names(whole / "run"), told


@pytest.mark.parametrize("at", ["Sweep, run 1 of 2", "Sweep, run 2 of 2"])
def test_a_killed_sweep_trains_no_finished_run_again(at, train, seed, tmp_path):
    numbers = {f"Sweep, run {number} of 2": prints(f"Sweep, run {number} of 2") for number in (1, 2)}
    call = train("hh-rlhf-sft", "--sweep", "seed=1,2")
    folder, whole = tmp_path / "killed", tmp_path / "whole"
    folder.mkdir(), whole.mkdir()
    times, status = run(call, whole, numbers, output="run")
    assert status == 0, (whole / "log").read_text()
    delay = moment(at, times, f"{seed} {at}")
    run(call, folder, numbers, output="run", kill=(at, delay))
    told = f"--fault-seed {seed}: killed {delay:.3f} s after {at}\n{(folder / 'log').read_text()}"
    finished = {file: file.stat().st_mtime_ns for file in (folder / "run").glob("*/done.json")}
    _, status = run(call, folder, numbers, output="run")
    told += (folder / "log").read_text()
    assert status == 0, told
    assert {file: file.stat().st_mtime_ns for file in finished} == finished, told
    assert len(finished) >= int(at.split()[2]) - 1, told
    for point in ("seed=1", "seed=2"):
        assert is_same(weights(folder / "run" / point), weights(whole / "run" / point)), told
    assert names(folder / "run") == names(whole / "run"), told
