"""The quickstart teaches what it says: its recipes, three seeds, 200 prompts of combinations not trained on."""

import json
from statistics import mean

import pytest
from conftest import run_command
from PIL import Image

from dpo_recipes import playground

SEEDS = (0, 1, 2)
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("quickstart")]  # one worker trains, for all of them


@pytest.fixture(scope="module")
def runs(tmp_path_factory, dpo_recipes):
    """The folder of both stages for each seed, and what the second printed."""
    results = []
    for seed in SEEDS:
        folder = tmp_path_factory.mktemp(f"seed{seed}")
        flags = ["--profile", "cpu", "--seed", str(seed)]
        stages = [("quickstart-sft", []), ("quickstart", ["--model_name_or_path", "outputs/quickstart_sft"])]
        for name, more in stages:
            result = run_command(dpo_recipes, "train", name, *flags, *more, cwd=folder, timeout=900)
            assert result.returncode == 0, result.stdout + result.stderr
        results.append((folder / "outputs" / "quickstart", result.stdout))
    return results


@pytest.fixture(scope="module")
def metrics(runs):
    return [json.loads((folder / "metrics.json").read_text()) for folder, _ in runs]


def means(metrics, *path):
    """The mean over seeds of a metric before and after."""
    values = []
    for entry in metrics:
        for key in path:
            entry = entry[key]
        values.append(entry)
    return tuple(mean(value[side]["mean"] for value in values) for side in ("before", "after"))


def test_sampled_answers_become_safe(metrics):
    before, after = means(metrics, "scores", "temperature 0.7", "exact reward")
    assert 0.40 <= before <= 0.60
    assert after >= 0.90
    assert means(metrics, "scores", "temperature 0.7", "all parts right")[1] >= 0.80
    assert means(metrics, "scores", "temperature 0.7", "grammatical")[1] >= 0.95
    assert metrics[0]["scores"]["temperature 0.7"]["exact reward"]["after"]["n"] == 200


def test_greedy_answers_are_safe(metrics):
    assert means(metrics, "scores", "greedy", "exact reward")[1] >= 0.95


def test_chosen_answers_stay_as_likely(metrics):
    logps = [entry["preference_accuracy"]["chosen_logps"] for entry in metrics]
    assert mean(entry["after"] - entry["before"] for entry in logps) >= -1.0  # nats


def test_accuracy_is_reported_for_one_fault_and_for_all_beside_the_sft_model(metrics):
    for name in ("summed", "summed, faults = 1"):
        before, after = means(metrics, "preference_accuracy", name)
        assert before > 0.8  # the SFT likelihood alone ranks most pairs
        assert after > before


def test_the_end_of_the_run_shows_what_happened(runs):
    for folder, output in runs:
        end = output[output.rindex("before") :]
        assert "exact reward, temperature 0.7" in end
        assert end.count("\nPrompt ") == end.count("\nAfter ") == 3
        for name in ("metrics.json", "samples.jsonl", "curves.png"):
            assert f"outputs/quickstart/{name}" in end
            assert (folder / name).exists()
        with Image.open(folder / "curves.png") as picture:
            assert min(picture.size) > 600
        answered = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        prompts = {str(prompt) for prompt in playground.evaluation_prompts()}
        assert {str(answer["prompt"]) for answer in answered} == prompts
        assert len(prompts) == 200


def test_memory_stays_under_4_gib(metrics):
    assert max(entry["cost"]["peak_memory_mib"] for entry in metrics) < 4096
