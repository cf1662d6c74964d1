"""Best of N: the answer that a reward model scores highest, against chance, a majority vote and an oracle."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any

import numpy as np

from dpo_recipes.estimates import Array, mean_with_interval, wins

SIZES = (1, 2, 4)
DRAWS = 70  # choices of N answers to a question, at most; 4 of 8 have as many
WAYS = ("best_of", "chance", "majority", "oracle")


def best_of(
    scores: Sequence[Sequence[float]],
    right: Sequence[Sequence[bool]],
    votes: Sequence[Sequence[str | None]] | None = None,
    *,
    sizes: Sequence[int] = SIZES,
) -> dict[str, Any]:
    """Share of questions whose chosen answer is right, by four ways to choose one of N answers (Cobbe et al. 2021).

    The reward model takes the answer with the highest score, chance a random one, a majority vote one of those that
    say the most frequent thing (Wang et al. 2023), and the oracle a right one if there is one. A tie is the mean over
    the tied answers. A question with more answers than N is the mean over its choices of N answers; above `DRAWS` of
    them, `DRAWS` are drawn by seed 0.

    Args:
        scores: Scores of the answers to each question.
        right: Says of each answer whether it is right.
        votes: What each answer says; None for an answer that says nothing, which no vote goes to. Without it there is
            no majority.
        sizes: Values of N; those above the least number of answers to a question are left out.

    Returns:
        `questions`, their number; `pairs`, the mean over questions with both kinds of the share of their right and
        wrong answers that the scores rank correctly, None if there is no such question; `by_size`: for each N a share
        of each of WAYS, and `over_chance` and `over_majority`, the differences of the reward model. Each has a 95 %
        interval, the bootstrap's over questions, which is paired for the differences.
    """
    marks, given = [np.asarray(each, float) for each in right], [np.asarray(each, float) for each in scores]
    said = votes or [[None] * len(each) for each in marks]
    ranked = [_ranked(*each) for each in zip(given, marks, strict=True) if 0 < each[1].sum() < len(each[1])]
    rng = np.random.default_rng(0)
    by_size = {}
    for size in (size for size in sizes if size <= min(map(len, marks))):
        shares = np.array([_shares(*each, size, rng) for each in zip(given, marks, said, strict=True)])
        columns = dict(zip(WAYS, shares.T, strict=True))
        columns |= {f"over_{way}": columns["best_of"] - columns[way] for way in ("chance", "majority")}
        kept = {way: column for way, column in columns.items() if votes or "majority" not in way}
        by_size[str(size)] = {way: asdict(mean_with_interval(column)) for way, column in kept.items()}
    pairs = asdict(mean_with_interval(ranked)) if ranked else None
    return {"questions": len(marks), "pairs": pairs, "by_size": by_size}


def _ranked(scores: Array, right: Array) -> float:
    """Share of the pairs of a right and a wrong answer whose right one has the higher score, ties one half."""
    return float(wins(scores[right == 1][:, None], scores[right == 0]).mean())


def _shares(scores: Array, right: Array, votes: Sequence[str | None], size: int, rng: np.random.Generator) -> Array:
    """Mean rightness over the choices of `size` answers, by each of WAYS."""
    count = len(right)
    if math.comb(count, size) <= DRAWS:
        choices = np.array(list(combinations(range(count), size)))
    else:
        choices = rng.permuted(np.tile(np.arange(count), (DRAWS, 1)), axis=1)[:, :size]
    marks = right[choices]  # (choices, size)
    agree = np.array([[vote is not None and vote == other for other in votes] for vote in votes])
    agreeing = agree[choices[:, :, None], choices[:, None, :]].sum(axis=2)
    shares = [_highest(scores[choices], marks), right.mean(), _highest(agreeing, marks), marks.max(axis=1).mean()]
    return np.array(shares)


def _highest(keys: Array, marks: Array) -> float:
    """Mean over choices of the rightness of the answers with the highest key. Both have shape (choices, size)."""
    best = keys == keys.max(axis=1, keepdims=True)
    return float(((marks * best).sum(axis=1) / best.sum(axis=1)).mean())
