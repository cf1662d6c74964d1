"""Fixtures of the fault tests: the command that trains a recipe on tiny models, and its undisturbed run."""

from functools import cache
from pathlib import Path

import pytest
from kills import TRAINING, run

FEW = ["--max_steps", "6", "--save_steps", "2", "--eval_steps", "3", "--logging_steps", "1", "--eval_pairs", "2"]
FEW += ["--pairs_per_update", "4", "--per_device_train_batch_size", "2", "--learning_rate", "1e-3"]
ONLINE = ["--generation_batch_size", "8", "--num_iterations", "1", "--max_prompt_length", "200"]
ONLINE += ["--max_completion_length", "8"]
ROUNDS = [*ONLINE[4:], "--num_rounds", "2", "--num_prompts", "40", "--num_generations", "2"]


@pytest.fixture(scope="session")
def seed(request):
    return request.config.getoption("fault_seed")


@pytest.fixture(scope="session")
def train(dpo_recipes, tiny_model, reward_model, hh_rows):
    """The command that trains a recipe on tiny models, into the folder `run`."""

    def train(name, *more):
        models = ["--model_name_or_path", tiny_model, "--dataset_name", hh_rows]
        online = ONLINE if name.endswith("ppo") else ROUNDS if name.endswith("rounds") else []
        online = [*online, "--reward_model_name_or_path", reward_model] if online else []
        call = [dpo_recipes, "train", name, "--profile", "cpu", *models, *FEW, *online, "--output_dir", "run", *more]
        return [str(word) for word in call]

    return train


@pytest.fixture(scope="session")
def undisturbed(train, tmp_path_factory):
    """An undisturbed run: its folder, and the seconds after which each phase began."""

    @cache
    def undisturbed(name) -> tuple[Path, dict[str, float]]:
        folder = tmp_path_factory.mktemp(name)
        times, status = run(train(name), folder, TRAINING, output="run")
        assert status == 0, (folder / "log").read_text()
        return folder / "run", times

    return undisturbed
