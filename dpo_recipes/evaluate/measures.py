"""What is measured of a model by its answers and its log-probs, and of one model against another."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_recipes import estimates

MEASURES = {  # key: label, decimals, and what a reader should know of it
    "judge": ("judge's reward", 3, "higher is better"),
    "reward_model": ("reward model's score", 3, "what PPO and RLOO optimise; higher is not better by itself"),
    "kl": ("KL to the start, nats", 2, "of an answer, from samples; how far the model has moved"),
    "tokens": ("tokens of an answer", 1, ""),
    "unended": ("share without an end token", 3, "cut at the token limit"),
    "preference_accuracy": ("preference accuracy", 3, "of the log-probs on held-out pairs, ties one half"),
    "distinct_1": ("distinct-1", 3, f"different words, in {estimates.GROUP} answers together"),
    "distinct_2": ("distinct-2", 3, f"different pairs of words, in {estimates.GROUP} answers together"),
    "repetition": ("self-repetition", 3, "4-grams of an answer that it has said before"),
    "surprise": (
        "surprise to the start",
        3,
        "nats a token under the start; its own answers are 1, and 1.1 is odd text",
    ),
}
"""Of every model."""
RATES = {
    "win_rate": ("win rate", "ties one half"),
    "length_controlled": ("length-controlled win rate", "had both answered at the same length"),
    "ties": ("share of ties", ""),
    "difference": ("difference in the judge's reward", ""),
}
"""Of one model against another, on the same prompts and by the same seed."""


def columns(records: Sequence[Mapping[str, Any]], found: Mapping[str, Any]) -> dict[str, list[float] | None]:
    """The numbers of one run that its measures are made of: by prompt, by pair, or by group of answers."""
    texts = [record["text"] for record in records]
    scores = {name: [record[name] for record in records] for name in ("judge", "reward_model")}
    return {
        **{name: [float(record[name]) for record in records] for name in ("kl", "tokens", "repetition")},
        **{name: None if None in values else values for name, values in scores.items()},
        "unended": [float(not record["ended"]) for record in records],
        "nll": [-record["start"] for record in records],
        "scored": [float(record["scored"]) for record in records],
        "preference_accuracy": estimates.wins(np.array(found["chosen"]), np.array(found["rejected"])).tolist(),
        **{f"distinct_{n}": estimates.distinct(texts, n).tolist() for n in (1, 2)},
    }


def of_model(runs: Sequence[Mapping[str, Any]], starts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The measures of one model: an algorithm with one beta, over its seeds.

    Args:
        runs: By seed, as `columns` returns them.
        starts: The start's, for the same seeds.
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
            measured[name] = estimates.estimate(estimates.mean, [[run[name]] for run in arrays])
    over_prompts = np.mean([run["kl"] for run in arrays], axis=0)
    measured["kl"]["standard_error"] = float(np.std(over_prompts, ddof=1) / len(over_prompts) ** 0.5)
    return measured


def against(
    one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]], *, rows: slice = slice(None)
) -> dict[str, Any]:
    """The rates of one model against another.

    Args:
        one: By seed, as `columns` returns them.
        other: For the same seeds.
        rows: The prompts to take.
    """

    def pair(name: str) -> list[list[NDArray[np.float64]]]:
        both = zip(one, other, strict=True)
        return [[np.array(run[name])[rows] for run in runs] for runs in both]

    won = [estimates.wins(*scores) for scores in pair("judge")]
    longer = [first - second for first, second in pair("tokens")]
    return {
        "win_rate": estimates.estimate(estimates.mean, [[rate] for rate in won]),
        "length_controlled": estimates.estimate(
            estimates.length_controlled,
            [list(both) for both in zip(won, longer, strict=True)],
            resamples=estimates.RESAMPLES_OF_FITS,
        ),
        "ties": estimates.estimate(estimates.mean, [[(rate == 0.5).astype(float)] for rate in won]),
        "difference": estimates.estimate(estimates.mean, [[first - second] for first, second in pair("judge")]),
    }
