"""Means and shares with 95 % intervals: Wilson's for a share, the bootstrap over prompts, Student's t over seeds."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap, norm, t, ttest_1samp

Array = NDArray[np.float64]
Statistic = Callable[..., float]
Seeds = Sequence[Sequence[Array]]

ALPHA = 0.05  # of all intervals and decisions
RESAMPLES = 1000
RESAMPLES_OF_FITS = 200  # each of them fits a regression for every seed
ALPACA_EVAL = 805  # its instructions
GROUP = 20  # answers that distinct-n counts together: it falls as a text grows, so that all groups must be alike


@dataclass
class Estimate:
    """A mean with its 95 % interval and the number of observations."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        """The mean and its interval to three places."""
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def wilson(wins: float, n: int) -> Estimate:
    """A share with its 95 % Wilson score interval (Wilson 1927); a tie may count as half a win.

    scipy.stats.binomtest gives the same interval, but refuses half wins.
    """
    z = float(norm.ppf(0.975))
    share, centre = wins / n, (wins + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * (wins * (n - wins) / n + z * z / 4) ** 0.5
    return Estimate(share, max(0.0, centre - half), min(1.0, centre + half), n)


def mean_with_interval(values: Sequence[float] | Array) -> Estimate:
    """A mean with its 95 % percentile bootstrap interval (2,000 resamples)."""
    return over_prompts(estimate(mean, [[np.asarray(values, dtype=np.float64)]], resamples=2000))


def over_prompts(found: Mapping[str, Any]) -> Estimate:
    """The mean of `estimate` with its interval over prompts."""
    return Estimate(*(found[key] for key in ("mean", "low", "high", "n")))


def estimate(
    statistic: Statistic, seeds: Seeds, *, resamples: int = RESAMPLES, share: bool = False, nothing: float | None = None
) -> dict[str, Any]:
    """The mean over seeds of a statistic of the prompts' values, with an interval over prompts and one over seeds.

    The interval over prompts says how far the mean would move with other prompts: a percentile bootstrap that draws the
    same prompts for all arrays and seeds (paired). The t interval says how far it would move with other seeds.

    Args:
        statistic: Maps one seed's arrays to a number.
        seeds: The arrays of each seed, each of shape (prompts,), with the same prompts in all of them.
        resamples: Draws of the bootstrap, whose random seed is 0.
        share: Whether the statistic is a share, so that the t interval is cut off at 0 and at 1.
        nothing: Value of the statistic where there is no difference.

    Returns:
        `mean`; `low` and `high`, `n` prompts; `by_seed`, the values; `seeds_low` and `seeds_high`, None for one seed.
        With `nothing` also `p_value`, the larger one of the two that belong to the intervals.
    """
    n = len(seeds[0][0])
    values = [statistic(*arrays) for arrays in seeds]

    def of_rows(rows: Any) -> float:
        return float(np.mean([statistic(*(array[rows] for array in arrays)) for arrays in seeds]))

    low = high = float(np.mean(values))
    resampled = np.array([low])
    if n > 1 and any(np.ptp(array) > 0 for arrays in seeds for array in arrays):
        drawn = bootstrap((np.arange(n),), of_rows, vectorized=False, method="percentile", n_resamples=resamples, rng=0)
        low, high = map(float, drawn.confidence_interval)
        resampled = drawn.bootstrap_distribution
    seeds_low, seeds_high = t_interval(values, (0.0, 1.0) if share else (-math.inf, math.inf))
    return {
        **{"mean": float(np.mean(values)), "low": low, "high": high, "n": n},
        **{"by_seed": values, "seeds_low": seeds_low, "seeds_high": seeds_high},
        **({} if nothing is None else {"p_value": _p_value(values, resampled, nothing)}),
    }


def two_way(values: Array) -> Estimate:
    """The mean of judgements with a 95 % interval over prompts and judges, as `n` prompts.

    The bootstrap draws prompts and judges anew, each on its own (Owen 2007, "The pigeonhole bootstrap"), and adds up
    how far their judgements are from the mean, so that a judge of few prompts moves it little. Where it is narrower
    than Wilson's interval of as many prompts, as with few prompts or equal judgements, that one counts.

    Args:
        values: Each between 0 and 1, NaN where a judge gave none. Shape (prompts, judges).
    """
    values = values[~np.isnan(values).all(axis=1)]
    found, rng = float(np.nanmean(values)), np.random.default_rng(0)
    prompts, judges = (rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES) for n in values.shape)
    off = np.einsum("bp,pj,bj->b", prompts, np.nan_to_num(values - found), judges) / (~np.isnan(values)).sum()
    low, high = np.clip(found + np.quantile(off, (0.025, 0.975)), 0, 1)
    alone = wilson(found * len(values), len(values))
    return Estimate(found, min(float(low), alone.low), max(float(high), alone.high), len(values))


def _p_value(values: Sequence[float], resampled: Array, nothing: float) -> float:
    """The larger one of two two-sided p-values: over prompts by the bootstrap, over several seeds by Student's t."""
    below, above = ((side.sum() + 1) / (len(side) + 1) for side in (resampled <= nothing, resampled >= nothing))
    of_prompts, of_seeds = min(1.0, 2 * float(min(below, above))), 0.0
    if len(values) > 1:
        of_seeds = float(ttest_1samp(values, nothing).pvalue) if np.ptp(values) else float(values[0] == nothing)
    return max(of_prompts, of_seeds)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values after the correction of Holm (1979) for their number, in the order given."""
    found, least = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        found[place] = least = min(1.0, max(least, (len(p_values) - rank) * p_values[place]))
    return found


def t_interval(values: Sequence[float], within: tuple[float, float]) -> tuple[float, float] | tuple[None, None]:
    """The part of a mean's 95 % t interval that lies within two bounds; None twice for a single value.

    Equal values give an interval without width.
    """
    if len(values) < 2:
        return None, None
    half = float(t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return max(float(np.mean(values)) - half, within[0]), min(float(np.mean(values)) + half, within[1])


def is_noise(found: Mapping[str, Any], nothing: float = 0.5) -> bool:
    """Returns True if `nothing` lies in the interval over prompts, or in the interval over several seeds."""
    over_seeds = found["seeds_low"] is not None and found["seeds_low"] <= nothing <= found["seeds_high"]
    return bool(over_seeds or found["low"] <= nothing <= found["high"])


def mean(values: Array) -> float:
    """The mean, as a plain number."""
    return float(np.mean(values))


def ratio(part: Array, whole: Array, other_part: Array, other_whole: Array) -> float:
    """The ratio of two rates, each a total over a total: 1.1 says that the first rate is 10 % higher."""
    return float(part.sum() / whole.sum() / (other_part.sum() / other_whole.sum()))


def wins(one: Array, other: Array) -> Array:
    """For each prompt 1 where the first score is higher, 0 where it is lower, one half where they are equal."""
    return np.where(np.isnan(one) | np.isnan(other), np.nan, (one > other) + (one == other) / 2)  # inf ties with inf


def length_controlled(won: Array, longer: Array) -> float:
    """The win rate had both answered at the same length (Dubois et al. 2024, section 3).

    A logistic regression of the wins on tanh of the standardised difference in length gives it: the prediction at 0. A
    tie is half a win and half a loss. The term for how hard a prompt is drops out, because there are only two models.
    The penalty is as strong for each prompt whatever their number: scikit-learn's own for AlpacaEval's 805 prompts. A
    penalty that does not shrink with few prompts hides a part of the effect of length.

    Args:
        won: As `wins` gives it.
        longer: Tokens of the first answer less tokens of the second.
    """
    from sklearn.exceptions import ConvergenceWarning  # a second that no training needs
    from sklearn.linear_model import LogisticRegression

    spread = float(np.std(longer))
    if spread == 0 or np.ptp(won) == 0:
        return mean(won)
    features = np.tile(np.tanh(longer / spread), 2)[:, None]
    outcomes, weights = np.repeat([1, 0], len(won)), np.concatenate([won, 1 - won])
    with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):  # it goes on with another solver
        model = LogisticRegression(C=ALPACA_EVAL / len(won), solver="newton-cholesky")
        fit = model.fit(features, outcomes, sample_weight=weights)
    return float(1 / (1 + np.exp(-fit.intercept_[0])))


def distinct(texts: Sequence[str], n: int) -> Array:
    """Share of the n-grams of words that are different, in each group of answers. Shape (groups,).

    A group holds `GROUP` answers in the order of the prompts, so that two models' groups answer the same prompts.
    """
    groups = [texts[start : start + GROUP] for start in range(0, len(texts), GROUP)]
    return np.array([_share_of_different([gram for text in group for gram in n_grams(text, n)]) for group in groups])


def repetition(text: str, n: int = 4) -> float:
    """Share of an answer's n-grams that the answer has used before."""
    return 1 - _share_of_different(n_grams(text, n))


def n_grams(text: str, n: int) -> list[tuple[str, ...]]:
    """The sequences of n neighbouring words, in order."""
    words = text.split()
    return list(zip(*(words[start:] for start in range(n)), strict=False))


def _share_of_different(grams: Sequence[tuple[str, ...]]) -> float:
    return len(set(grams)) / len(grams) if grams else 1.0
