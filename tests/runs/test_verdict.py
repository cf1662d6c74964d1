"""The verdict on a run: the word, and the number it is decided by."""

from types import SimpleNamespace

import pytest

from dpo_recipes.estimates import wilson
from dpo_recipes.runs.before_after import _easy
from dpo_recipes.runs.callbacks import ProgressLines
from dpo_recipes.runs.metrics import LABELS, NAMES, PANELS
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
            "the reference model; 20% of the answers end, at the start 100%; for another run, raise beta",
        ),
        (
            {
                "kl": {"nats": 150, "n": 64, "tokens": 3539},
                "answers": {"ended": {"before": 1.0, "after": 0.59}, "repeated": {"before": 0.0, "after": 0.43}},
            },
            "repeats, at the start 0%; the policy is 2.71 nats a token from the reference model; 59% of the",
        ),
        (
            {
                "kl": {"nats": 80, "n": 64, "tokens": 2560},
                "scores": {"greedy": {"grammatical": {"before": {"mean": 0.98}, "after": {"mean": 0.1}}}},
            },
            "grammatical, greedy, fell from 0.980 to 0.100; for another run, raise beta",
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
        {"scores": {"greedy": {"refuses": {"before": {"mean": 0.9}, "after": {"mean": 0.1}}}}},
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


@pytest.mark.parametrize(
    ("low", "high", "n", "word", "more"),
    [
        (0.02, 0.2, 200, "better", "questions)."),
        (-0.2, -0.02, 200, "worse", "questions)."),
        (-0.02, 0.05, 200, "not known", "; no better than chance as far as this shows; the interval is 0.070 wide"),
        (0.02, 0.2, 20, "not known", "20 questions are too few for an interval"),
    ],
)
def test_a_verifier_is_compared_with_a_random_answer_by_the_largest_n(low, high, n, word, more):
    gains = {"1": {"over_chance": dict(mean=0.0, low=0.0, high=0.0, n=n)}}
    gains["4"] = {
        "over_chance": dict(mean=0.1, low=low, high=high, n=n),
        "best_of": dict(mean=0.5),
        "chance": dict(mean=0.4),
    }
    accuracy = {"all": {"mean": 0.9, "low": 0.8, "high": 1.0, "n": 400}}
    said = verdict({"best_of": {"by_size": gains}, "reward_accuracy": accuracy})
    assert said["word"] == word
    assert "right answers, best of 4 by the reward model 0.500, where a random one has 0.400" in said["sentence"]
    assert more in said["sentence"]


def test_nothing_measured_is_not_known_and_says_why():
    said = verdict({"preference_accuracy": {}})
    assert said == {"word": "not known", "sentence": f"Not known: {NO_PAIRS}."}
    assert "held-out loss is 0.4120" in verdict({"held_out": {"eval_loss": 0.412}})["sentence"]


NO_PAIRS = "there are no held-out pairs and no scores to compare both models by"


def test_the_note_on_easy_pairs_stands_only_where_the_reference_model_ranks_most_of_them():
    assert "already ranks 97 % of them correctly" in _easy(wilson(388, 400))
    assert _easy(wilson(9, 10)) == "", "the interval reaches down to 60 %"
    assert _easy(wilson(220, 400)) == ""


def test_a_number_has_one_name_wherever_it_is_shown(capsys):
    assert NAMES["rewards/accuracies"] == LABELS["implicit reward"] == "implicit-reward accuracy"
    assert NAMES["accuracy"] == LABELS["reward_accuracy"] == "reward-model accuracy"
    assert NAMES["logps/chosen"] == LABELS["chosen_logps"]
    assert PANELS["implicit-reward accuracy"] == ["rewards/accuracies", "eval_rewards/accuracies"]
    lines = ProgressLines()
    lines.training_bar = SimpleNamespace(write=print)
    state = SimpleNamespace(is_world_process_zero=True, global_step=44)
    logs = {"loss": 0.5, "rewards/accuracies": 0.75, "logps/chosen": -9.5, "mean_token_accuracy": 0.9}
    lines.on_log(None, state, None, logs)
    lines.on_log(
        None, state, None, {f"eval_{key}": value for key, value in logs.items()} | {"eval_rewards/margins": 1.0}
    )
    training, held_out = capsys.readouterr().out.splitlines()
    assert training.endswith(
        "loss 0.5000  implicit-reward accuracy 0.750  chosen log-prob -9.5 nats  token accuracy 0.900"
    )
    assert "held out: loss 0.5000  implicit-reward accuracy 0.750  margin +1.000" in held_out
    assert "token accuracy" not in held_out
