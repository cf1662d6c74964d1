"""The quickstart teaches what it says: its recipes, three seeds, 200 prompts of combinations not trained on."""

import json
import shlex
import shutil
from statistics import mean

import numpy as np
import pytest
from commands import REPOSITORY, run_command
from manual import README, commands, shown_output
from PIL import Image

from dpo_recipes import playground
from dpo_recipes.models.best_of import best_of
from dpo_recipes.models.generation import generate
from dpo_recipes.models.open import open_model
from dpo_recipes.models.rewards import model_judge

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("quickstart")]  # one worker: `first` is trained once


def health(folder, name):
    """What the health rules found."""
    return json.loads((folder / "outputs" / name.replace("-", "_") / "health.json").read_text())["findings"]


def make_train(folder, *words):
    """What it prints in a copy of the repository whose .venv is there."""
    result = run_command("make", "train", *words, cwd=folder, timeout=1800)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "Installing" not in result.stdout
    return result.stdout


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A copy of the repository in which `make train` was called, and what it printed."""
    folder = tmp_path_factory.mktemp("first")
    (folder / ".venv").mkdir()
    for part in (REPOSITORY / ".venv").iterdir():
        if part.name != ".installed":
            (folder / ".venv" / part.name).symlink_to(part)
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, folder)
    for name in ("dpo_recipes", "recipes"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / ".venv" / ".installed").write_text(f"{folder.resolve()}\n")  # as make writes it
    return folder, make_train(folder)


def metrics(folder, printed):
    """Those of `quickstart`, once what it shows at its end was looked at."""
    assert health(folder, "quickstart-sft") == health(folder, "quickstart") == [], "healthy"
    run = folder / "outputs" / "quickstart"
    end = printed[printed.rindex("before  ") :]
    assert "exact reward, temperature 0.7" in end
    assert end.count("\nPrompt ") == end.count("\nAfter ") == 3
    for name in ("metrics.json", "samples.jsonl", "curves.png"):
        assert f"outputs/quickstart/{name}" in end
    with Image.open(run / "curves.png") as picture:
        assert min(picture.size) > 600
    answered = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    prompts = {str(prompt) for prompt in playground.evaluation_prompts()}
    assert {str(answer["prompt"]) for answer in answered} == prompts
    assert len(prompts) == 200
    return json.loads((run / "metrics.json").read_text())


def test_make_train_prints_what_the_readme_shows(first):
    expected = [line for line in shown_output().splitlines() if "outputs/" in line]
    assert expected
    assert shlex.split(commands(README)[0]) == ["make", "train"]
    printed = first[1].splitlines()
    for line in expected:
        assert line in printed, "the README shows what a run prints"


def test_the_reward_model_is_learned_and_raised(first):
    """What PPO and RLOO gain on the reward model is a gain in the exact reward, which neither sees."""
    folder, trained = first[0], []
    part = "--max_steps 24 --eval_steps 24 --save_steps 24"  # of 56
    for name, flags, exact_after, raised in (("ppo", "", 0.85, 1.0), ("rloo", part, 0.7, 0.5)):
        printed = make_train(folder, f"RECIPE=quickstart-{name}", f"ARGS={flags}")
        assert health(folder, f"quickstart-{name}") == [], "healthy"
        trained += [line.split()[2].rstrip(",") for line in printed.splitlines() if "trained first" in line]
        scores = json.loads((folder / "outputs" / f"quickstart_{name}" / "metrics.json").read_text())["scores"]
        exact, reward = (scores["temperature 0.7"][key] for key in ("exact reward", "reward-model score"))
        assert exact["before"]["mean"] < 0.65
        assert exact["after"]["mean"] > exact_after
        assert reward["after"]["mean"] > reward["before"]["mean"] + raised
        assert scores["temperature 0.7"]["grammatical"]["after"]["mean"] > 0.9
    assert trained == ["quickstart_reward"], "once, and the start not again"
    assert health(folder, "quickstart-reward") == [], "healthy"
    measured = json.loads((folder / "outputs" / "quickstart_reward" / "metrics.json").read_text())
    assert measured["reward_accuracy"]["all"]["low"] > 0.85
    assert measured["reward_accuracy"]["faults = 1"]["mean"] > 0.75
    assert measured["calibration"]["log_loss"] < 0.3
    assert measured["warnings"] == []
    gain = best_of_four(folder / "outputs")["over_chance"]
    assert gain["low"] > 0.05, "the best of 4 by the reward model is right more often than a random one"


def best_of_four(outputs):
    """The four ways to choose one of 4 answers of the SFT model; the exact reward says which answers are right."""
    model, tokenizer = open_model(str(outputs / "quickstart_sft"))
    asked = [prompt for prompt in playground.evaluation_prompts()[:100] for _ in range(4)]
    sampling = dict(max_new_tokens=playground.MAX_NEW_TOKENS, temperature=1.0, batch_size=64)
    texts = [answer["text"] for answer in generate(model, tokenizer, asked, **sampling)]
    right = [playground.reward(*both) == 1 for both in zip(asked, texts, strict=True)]
    scores = model_judge(outputs / "quickstart_reward")(asked, texts)
    return best_of(scores.reshape(-1, 4), np.reshape(right, (-1, 4)))["by_size"]["4"]


def test_the_quickstart_makes_the_chatbot_safe(first, tmp_path, dpo_recipes):
    """Three seeds of DPO, the second and the third from another start than the first."""
    runs = [metrics(*first)]
    start = ["--model_name_or_path", "outputs/quickstart_sft", "--overwrite", "true"]
    for name, seed, more in (("quickstart-sft", "0", []), ("quickstart", "0", start), ("quickstart", "1", start)):
        call = (dpo_recipes, "train", name, "--profile", "cpu", "--seed", seed, *more)
        result = run_command(*call, cwd=tmp_path, timeout=1200)
        assert result.returncode == 0, result.stdout + result.stderr
        if name == "quickstart":
            runs.append(metrics(tmp_path, result.stdout))

    def before_and_after(*path):
        values = runs
        for key in path:
            values = [value[key] for value in values]
        return tuple(mean(value[side]["mean"] for value in values) for side in ("before", "after"))

    before, after = before_and_after("scores", "temperature 0.7", "exact reward")
    assert 0.40 <= before <= 0.60
    assert after >= 0.90
    assert before_and_after("scores", "temperature 0.7", "all parts right")[1] >= 0.80
    assert before_and_after("scores", "temperature 0.7", "grammatical")[1] >= 0.95
    assert before_and_after("scores", "greedy", "exact reward")[1] >= 0.95
    for stratum in ("all", "faults = 1"):
        before, after = before_and_after("preference_accuracy", stratum, "summed")
        assert before > 0.8  # the SFT likelihood alone ranks most pairs
        assert after > before
    logps = [run["chosen_logps"] for run in runs]
    assert mean(entry["after"] - entry["before"] for entry in logps) >= -1.0  # nats
    assert max(run["cost"]["peak_memory_mib"] for run in runs) < 4096
