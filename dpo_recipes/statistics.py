"""What is said of the answers: a number for each run, a mean over seeds, and two 95 % intervals."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap, t
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

Array = NDArray[np.float64]
Statistic = Callable[..., float]

RESAMPLES = 1000
RESAMPLES_OF_FITS = 200  # each of them fits a regression for every seed
ALPACA_EVAL = 805  # its instructions
GROUP = 20  # answers that distinct-n counts together: it falls as a text grows, so that all groups must be alike


def estimate(statistic: Statistic, seeds: Sequence[Sequence[Array]], *, resamples: int = RESAMPLES) -> dict[str, Any]:
    """The mean over seeds of a statistic of what the prompts gave, with intervals over prompts and over seeds.

    The prompts are resampled for all arrays and seeds together (paired bootstrap, percentiles): how far the number
    would move with other prompts. The t interval of the seeds' values is how far it would move with other seeds.

    Args:
        statistic: Of one seed's arrays.
        seeds: For each seed the arrays, each of shape (prompts,), the same prompts in all of them.
        resamples: Of the bootstrap, by seed 0.

    Returns:
        `mean`; `low` and `high`, `n` prompts; `by_seed`, the values; `seeds_low` and `seeds_high`, None for one seed.
    """
    n = len(seeds[0][0])
    values = [statistic(*arrays) for arrays in seeds]

    def of_rows(rows: Any) -> float:
        return float(np.mean([statistic(*(array[rows] for array in arrays)) for arrays in seeds]))

    low = high = float(np.mean(values))
    if n > 1 and any(np.ptp(array) > 0 for arrays in seeds for array in arrays):
        drawn = bootstrap(
            (np.arange(n),), of_rows, vectorized=False, method="percentile", n_resamples=resamples, rng=0
        ).confidence_interval
        low, high = float(drawn.low), float(drawn.high)
    over_seeds = t_interval(values)
    return {
        "mean": float(np.mean(values)),
        "low": low,
        "high": high,
        "n": n,
        "by_seed": values,
        "seeds_low": over_seeds and over_seeds[0],
        "seeds_high": over_seeds and over_seeds[1],
    }


def t_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % t interval of a mean; None for a single value."""
    if len(values) < 2:
        return None
    half = float(t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return float(np.mean(values)) - half, float(np.mean(values)) + half


def wins(one: Array, other: Array) -> Array:
    """For each prompt 1 where the first score is higher, 0 where it is lower, one half where they are equal."""
    return np.where(np.isnan(one) | np.isnan(other), np.nan, (one > other) + (one == other) / 2)  # inf ties with inf


def length_controlled(won: Array, longer: Array) -> float:
    """The win rate had both answered at the same length (Dubois et al. 2024, section 3).

    A logistic regression of the wins on tanh of the standardised difference in length; its prediction at 0. A tie is
    half a win and half a loss; the term for how hard a prompt is drops out, there being two models only. The penalty
    is as strong for each prompt whatever their number, that of AlpacaEval's 805 being scikit-learn's own: one that does
    not shrink with them hides a part of what length did with few.

    Args:
        won: As `wins` gives it.
        longer: Tokens of the first answer less those of the second.
    """
    spread = float(np.std(longer))
    if spread == 0 or np.ptp(won) == 0:
        return float(np.mean(won))
    scaled = np.tanh(longer / spread)[:, None]
    outcomes = np.repeat([1, 0], len(won))
    weights = np.concatenate([won, 1 - won])
    features = np.concatenate([scaled, scaled])
    with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):  # it goes on with another solver
        model = LogisticRegression(C=ALPACA_EVAL / len(won), solver="newton-cholesky")
        fit = model.fit(features, outcomes, sample_weight=weights)
    return float(1 / (1 + np.exp(-fit.intercept_[0])))


def ratio(part: Array, whole: Array, other_part: Array, other_whole: Array) -> float:
    """How one total per unit relates to another: 1.1 is 10 % more."""
    return float(part.sum() / whole.sum() / (other_part.sum() / other_whole.sum()))


def mean(values: Array) -> float:
    """The mean, as a plain number."""
    return float(np.mean(values))


def distinct(texts: Sequence[str], n: int) -> Array:
    """Share of the n-grams of words that are different, in each group of answers. Shape (groups,).

    Groups are of `GROUP` answers in the order of the prompts, so that each model's are to the same prompts.
    """
    groups = [texts[start : start + GROUP] for start in range(0, len(texts), GROUP)]
    shares = []
    for group in groups:
        grams = [gram for text in group for gram in n_grams(text, n)]
        shares.append(len(set(grams)) / len(grams) if grams else 1.0)
    return np.array(shares)


def repetition(text: str, n: int = 4) -> float:
    """Share of an answer's n-grams that it has said before."""
    grams = n_grams(text, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def n_grams(text: str, n: int) -> list[tuple[str, ...]]:
    """The runs of n words, in order."""
    words = text.split()
    return list(zip(*(words[start:] for start in range(n)), strict=False))


def is_noise(found: Mapping[str, Any], nothing: float = 0.5) -> bool:
    """Whether the interval over prompts or, where there are several seeds, the one over seeds holds `nothing`."""
    over_seeds = found["seeds_low"] is not None and found["seeds_low"] <= nothing <= found["seeds_high"]
    return bool(over_seeds or found["low"] <= nothing <= found["high"])
