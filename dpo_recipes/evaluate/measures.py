"""Measures of a model by its answers and log-probs, and rates of one model against another."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_recipes import estimates

MEASURES = {  # key: label, decimals, a hint for the reader
    "judge": ("judge's reward", 3, "higher is better"),
    "reward_model": ("reward model's score", 3, "what all but offline DPO raise; higher is not better by itself"),
    "kl": ("KL to the reference model, nats", 2, "of an answer, from samples; how far the model has moved"),
    "tokens": ("tokens of an answer", 1, ""),
    "unended": ("share without an end token", 3, "cut at the token limit"),
    "preference_accuracy": ("preference accuracy", 3, "of the log-probs on held-out pairs, ties one half"),
    "distinct_1": ("distinct-1", 3, f"different words, in {estimates.GROUP} answers together"),
    "distinct_2": ("distinct-2", 3, f"different pairs of words, in {estimates.GROUP} answers together"),
    "repetition": ("self-repetition", 3, "4-grams of an answer that it has said before"),
    "surprise": ("surprise to the reference model", 3, "nats a token, as a ratio to its own answers: 1.1 is odd text"),
}
"""Measures of every model."""
RATES = {
    "win_rate": ("win rate", "ties one half"),
    "length_controlled": ("length-controlled win rate", "had both answered at the same length"),
    "ties": ("share of ties", ""),
    "difference": ("difference in the judge's reward", ""),
}
"""Rates of one model against another, on the same prompts and by the same seed."""
SHARES = {*RATES, *MEASURES} - {"difference", "judge", "reward_model", "kl", "tokens", "surprise"}


def columns(
    found: Mapping[str, Any], *, judge: Sequence[float] | None = None, reward_model: Sequence[float] | None = None
) -> dict[str, Sequence[float] | None]:
    """The numbers from which the measures of one run are made: by prompt, by pair, or by group of answers.

    Args:
        found: Answers and log-probs of the run's model, as `answer_all` returns them.
        judge: Scores of the answers by the judge.
        reward_model: Scores of the answers by the reward model that PPO optimised.
    """
    answers = found["answers"]
    texts = [answer["text"] for answer in answers]
    return {
        "judge": judge,
        "reward_model": reward_model,
        "kl": [answer["policy"] - answer["start"] for answer in answers],
        "tokens": [float(answer["tokens"]) for answer in answers],
        "unended": [float(not answer["ended"]) for answer in answers],
        "repetition": [estimates.repetition(text) for text in texts],
        "nll": [-answer["start"] for answer in answers],
        "scored": [float(answer["scored"]) for answer in answers],
        "preference_accuracy": estimates.wins(np.array(found["chosen"]), np.array(found["rejected"])).tolist(),
        **{f"distinct_{n}": estimates.distinct(texts, n).tolist() for n in (1, 2)},
    }


def of_model(runs: Sequence[Mapping[str, Any]], starts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Measures of one model, an algorithm with one beta, over its seeds.

    Args:
        runs: Numbers of each seed's run, as `columns` returns them.
        starts: The same of the reference model, for the same seeds.
    """
    arrays = [{name: np.array(values) for name, values in run.items() if values is not None} for run in runs]
    measured: dict[str, Any] = {}
    for name in MEASURES:
        if name == "surprise":
            by_seed = [
                [run["nll"], run["scored"], np.array(start["nll"]), np.array(start["scored"])]
                for run, start in zip(arrays, starts, strict=True)
            ]
            measured[name] = estimates.estimate(estimates.ratio, by_seed)
        elif all(name in run for run in arrays):
            measured[name] = estimates.estimate(estimates.mean, [[run[name]] for run in arrays], share=name in SHARES)
    over_prompts = np.mean([run["kl"] for run in arrays], axis=0)
    measured["kl"]["standard_error"] = float(np.std(over_prompts, ddof=1) / len(over_prompts) ** 0.5)
    return measured


def against(
    one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]], *, rows: slice = slice(None)
) -> dict[str, Any]:
    """Rates of one model against another.

    Args:
        one: Numbers of each seed's run, as `columns` returns them.
        other: The same of the other model, for the same seeds.
        rows: The prompts to take.
    """

    def of_both(name: str) -> list[list[NDArray[np.float64]]]:
        """A list for each seed, with an array for each model."""
        return [[np.array(run[name])[rows] for run in runs] for runs in zip(one, other, strict=True)]

    scores, tokens = of_both("judge"), of_both("tokens")
    won = [estimates.wins(*each) for each in scores]
    longer = [first - second for first, second in tokens]
    return {
        "win_rate": estimates.estimate(estimates.mean, [[rate] for rate in won], share=True, nothing=0.5),
        "length_controlled": estimates.estimate(
            estimates.length_controlled,
            [list(each) for each in zip(won, longer, strict=True)],
            resamples=estimates.RESAMPLES_OF_FITS,
            share=True,
        ),
        "ties": estimates.estimate(estimates.mean, [[(rate == 0.5).astype(float)] for rate in won], share=True),
        "difference": estimates.estimate(estimates.mean, [[first - second] for first, second in scores]),
    }
