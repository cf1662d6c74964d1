"""The verdict on a run: the word, and the number it is decided by."""

import pytest

from dpo_recipes.runs.verdict import FEW, verdict

REWARD = {"exact reward, temperature 0.7": dict(before=0.594, after=0.948, mean=0.354, low=0.287, high=0.417, n=200)}
ACCURACY = {"preference accuracy, summed": dict(before=0.55, after=0.62, mean=0.07, low=0.03, high=0.11, n=512)}
SCORE = {"reward-model score, greedy": dict(before=0.07, after=2.86, mean=2.79, low=2.5, high=3.0, n=64)}
FINE = {
    "answers": {"ended": {"before": 1.0, "after": 0.98}, "repeated": {"before": 0.05, "after": 0.1}},
    "kl": {"nats": 1.3, "n": 64, "tokens": 2560},
    "chosen_logps": {"before": -9.5, "after": -9.0, "tokens": 38.0},
}


def differences(found, **changes):
    unit = "held-out pairs" if found is ACCURACY else "prompts"
    return {name: values | {"of": unit} | changes for name, values in found.items()}


@pytest.mark.parametrize(
    ("found", "word", "told"),
    [
        (differences(REWARD), "better", "exact reward, temperature 0.7: 0.594 -> 0.948 (95 % interval of the diff"),
        (differences(REWARD, low=-0.4, high=-0.1), "worse", "[-0.400, -0.100], 200 prompts)."),
        (differences(REWARD, low=-0.02, high=0.1), "not known", "0.120 wide, and four times the prompts would halve"),
        (differences(REWARD, n=FEW - 1), "not known", f"29 prompts are too few for an interval, so take {FEW}"),
        (differences(REWARD, low=0.0, high=0.0), "not known", "none of the prompts changed"),
        (differences(ACCURACY), "better", "0.550 -> 0.620 (95 %"),
        (differences(ACCURACY) | differences(REWARD, low=-0.4, high=-0.1), "worse", "exact reward"),
        (differences(SCORE), "not known", "training raises this score directly"),
        (differences(SCORE, low=-1.0, high=-0.5), "worse", "reward-model score"),
        (differences(SCORE) | differences(REWARD), "better", "exact reward"),
    ],
)
def test_the_number_that_decides_is_named_with_its_interval(found, word, told):
    said = verdict(FINE | {"preference_accuracy": {}, "differences": found})
    assert said["word"] == word
    assert said["sentence"].startswith(word.capitalize())
    assert told in said["sentence"]


@pytest.mark.parametrize(
    ("broken", "sign"),
    [
        ({"answers": FINE["answers"] | {"repeated": {"before": 0.1, "after": 0.97}}}, "97% of the 4-grams"),
        (
            {"kl": {"nats": 80, "n": 64, "tokens": 2560}, "chosen_logps": FINE["chosen_logps"] | {"after": -60.0}},
            "chosen answers lost 1.33 nats a token",
        ),
        (
            {
                "kl": {"nats": 80, "n": 64, "tokens": 2560},
                "answers": FINE["answers"] | {"ended": {"before": 1.0, "after": 0.2}},
            },
            "20% of the answers end, at the start 100%; the policy is 2.00 nats a token",
        ),
    ],
)
def test_a_model_whose_text_is_lost_is_destroyed_although_its_accuracy_rose(broken, sign):
    said = verdict(FINE | {"differences": differences(ACCURACY)} | broken)
    assert said["word"] == "destroyed"
    assert sign in said["sentence"]


@pytest.mark.parametrize(
    "meant",
    [
        {"answers": FINE["answers"] | {"ended": {"before": 1.0, "after": 0.2}}},  # longer answers are cut
        {"kl": {"nats": 80, "n": 64, "tokens": 2560}},
        {"answers": FINE["answers"] | {"repeated": {"before": 0.7, "after": 0.8}}},  # as the initial model did
    ],
)
def test_one_sign_that_may_be_meant_destroys_nothing(meant):
    assert verdict(FINE | {"differences": differences(ACCURACY)} | meant)["word"] == "better"


@pytest.mark.parametrize(
    ("low", "high", "n", "word"),
    [(0.92, 0.97, 400, "better"), (0.2, 0.4, 400, "worse"), (0.48, 0.6, 400, "not known"), (0.6, 1, 8, "not known")],
)
def test_a_reward_model_is_compared_with_a_coin(low, high, n, word):
    found = {"mean": (low + high) / 2, "low": low, "high": high, "n": n}
    said = verdict({"reward_accuracy": {"all": found}})
    assert said["word"] == word
    assert f"reward-model accuracy {found['mean']:.3f}, where a coin has 0.5" in said["sentence"]


def test_nothing_measured_is_not_known_and_says_why():
    said = verdict({"preference_accuracy": {}})
    assert said == {"word": "not known", "sentence": f"Not known: {NO_PAIRS}."}
    assert "held-out loss is 0.4120" in verdict({"held_out": {"eval_loss": 0.412}})["sentence"]


NO_PAIRS = "there are no held-out pairs and no scores to compare both models by"
