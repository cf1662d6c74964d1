"""A command that is killed at any moment can be resumed, keeps finished work, and comes to the same result."""

import json
import shutil

import pytest
from commands import run_forked
from kills import (
    COMPARISON,
    EVALUATION,
    ROUNDS,
    TRAINING,
    came_to_the_same,
    is_same,
    kill_all,
    moment,
    names,
    prints,
    run,
    weights,
)

pytestmark = pytest.mark.faults

PHASES = {
    "hh-rlhf-sft": set(TRAINING) - {"exit"},
    "hh-rlhf-lora": set(TRAINING) - {"exit", "start", "merging"},
    "hh-rlhf-ppo": set(TRAINING) - {"exit", "start", "merging", "page"},
}


@pytest.mark.parametrize(
    ("name", "phase"),
    [(name, phase) for name, phases in PHASES.items() for phase in TRAINING if phase in phases],
)
def test_a_killed_training_goes_on_to_the_same_weights(name, phase, train, undisturbed, seed, tmp_path):
    whole, times = undisturbed(name)
    delay = moment(phase, times, f"{seed} {name} {phase}")
    _, killed = run(train(name), tmp_path, TRAINING, output="run", at=(phase, delay, kill_all))
    there = tmp_path / "run"
    told = f"--fault-seed {seed}: killed {delay:.3f} s into {phase}, status {killed}\n{(tmp_path / 'log').read_text()}"
    resume = ["--resume_from_checkpoint", "true"] if any(there.glob("checkpoint-*")) else []
    _, status = run(train(name, *resume), tmp_path, TRAINING, output="run")
    told += (tmp_path / "log").read_text()
    assert status == 0, told
    came_to_the_same(there, whole, told)
    again = run_forked(*train(name)[1:], cwd=tmp_path)
    assert "holds this run, finished: nothing to do" in again.stdout, told + again.stdout + again.stderr


def test_rounds_that_are_killed_again_and_again_come_to_the_same_weights(train, seed, tmp_path):
    """Kills come in sampling, in ranking, in training, between rounds and at the end; finished rounds are kept."""
    folder, whole = tmp_path / "killed", tmp_path / "whole"
    folder.mkdir(), whole.mkdir()
    times, status = run(train("hh-rlhf-rounds"), whole, ROUNDS, output="run")
    assert status == 0, (whole / "log").read_text()
    assert {*ROUNDS} <= {*times}
    told, first = "", {}
    for phase in (*ROUNDS, None):
        delay = moment(phase, times, f"{seed} rounds {phase}") if phase else 0.0
        there = [*folder.glob("run/round-*/checkpoint-*")]
        resume = ["--resume_from_checkpoint", "true"] if there else []
        call, at = train("hh-rlhf-rounds", *resume), (phase, delay, kill_all) if phase else None
        _, status = run(call, folder, ROUNDS, output="run", at=at)
        told += f"--fault-seed {seed}: killed {delay:.3f} s into {phase}\n{(folder / 'log').read_text()}"
        assert {file: file.stat().st_mtime_ns for file in first} == first, told
        if (folder / "run" / "round-2").exists():
            first = {file: file.stat().st_mtime_ns for file in (folder / "run" / "round-1").glob("*.json*")}
    assert status == 0, told
    came_to_the_same(folder / "run", whole / "run", told)
    for number in (1, 2):
        of = [(place / "run" / f"round-{number}" / "pairs.jsonl").read_text() for place in (folder, whole)]
        assert of[0] == of[1], told


@pytest.mark.parametrize(
    "phase",
    [phase for phase in EVALUATION if phase != "start"],
)
def test_a_killed_evaluation_goes_on_to_the_same_results(
    phase, undisturbed, seed, dpo_recipes, reward_model, rows_of, tmp_path
):
    """Finished answers are kept."""

    def evaluate(folder):
        folder.mkdir()
        shutil.copytree(undisturbed("hh-rlhf-lora")[0], folder / "run")
        call = [dpo_recipes, "evaluate", "run", "--profile", "cpu", "--dataset_name", rows_of["hh"]]
        call += ["--output_dir", "run", "--judge", reward_model, "--prompts", "2", "--max_new_tokens", "8"]
        return [str(word) for word in call]

    def results(folder):
        found = json.loads((folder / "run" / "eval.json").read_text())
        return {key: value for key, value in found.items() if key != "made"}

    whole, folder = tmp_path / "whole", tmp_path / "killed"
    times, status = run(evaluate(whole), whole, EVALUATION, output="run")
    assert status == 0, (whole / "log").read_text()
    delay, call = moment(phase, times, f"{seed} evaluate {phase}"), evaluate(folder)
    _, killed = run(call, folder, EVALUATION, output="run", at=(phase, delay, kill_all))
    told = f"--fault-seed {seed}: killed {delay:.3f} s into {phase}, status {killed}\n{(folder / 'log').read_text()}"
    kept = {file: file.stat().st_mtime_ns for file in (folder / "run" / "eval" / "answers").glob("*.json")}
    _, status = run(call, folder, EVALUATION, output="run")
    told += (folder / "log").read_text()
    assert status == 0, told
    assert results(folder) == results(whole), told
    assert {file: file.stat().st_mtime_ns for file in kept} == kept, told
    assert len(kept) >= {"answers of the initial model": 0, "answers of the tuned model": 1}.get(phase, 2), told
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
    run(call, folder, numbers, output="run", at=(at, delay, kill_all))
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


def test_a_comparison_killed_again_and_again_comes_to_the_same_results(
    seed, dpo_recipes, tiny_model, hh_rows, tmp_path
):
    """Kills come in the training of judge, DPO and PPO, in answers and report; no finished stage is trained again."""
    few = (
        "--max_length 256 --pairs_per_update 4 --per_device_train_batch_size 4 --max_completion_length 8 --save_steps 1"
    )
    few += " --generation_batch_size 8 --num_iterations 2 --dpo.max_steps 4 --reward.max_steps 3 --eval_strategy no"
    few += " --methods dpo,ppo --warmup_steps 0"
    call = f"{dpo_recipes} compare hh-rlhf-lora --profile cpu --seeds 0 --prompts 4 {few}".split()
    call += ["--dataset_name", str(hh_rows), "--model_name_or_path", str(tiny_model), "--output_dir", "out"]
    folder, whole = tmp_path / "killed", tmp_path / "whole"
    folder.mkdir(), whole.mkdir()
    times, status = run(call, whole, COMPARISON, output="out")
    assert status == 0, (whole / "log").read_text()
    told, finished = "", {}
    for phase in ("stage 1", "stage 2", "stage 4", "answers", "report", None):
        delay = moment(phase, times, f"{seed} compare {phase}") if phase else 0.0
        _, status = run(call, folder, COMPARISON, output="out", at=(phase, delay, kill_all) if phase else None)
        told += f"--fault-seed {seed}: killed {delay:.3f} s into {phase}\n{(folder / 'log').read_text()}"
        assert {file: file.stat().st_mtime_ns for file in finished} == finished, told
        finished = {file: file.stat().st_mtime_ns for file in (folder / "out").glob("*/done.json")}
    assert status == 0, told
    assert len(finished) == 4, told
    of = [json.loads((place / "out" / "results.json").read_text())["runs"] for place in (folder, whole)]
    assert of[0] == of[1], told
