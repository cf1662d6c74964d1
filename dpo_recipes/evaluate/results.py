"""The numbers of an evaluation, and what they mean in words."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from dpo_recipes import statistics
from dpo_recipes.errors import RecipeError
from dpo_recipes.evaluate.answers import Scorer, records
from dpo_recipes.evaluate.judges import Judge, Judged
from dpo_recipes.evaluate.measures import MEASURES, columns, of_model
from dpo_recipes.intervals import Estimate, wilson
from dpo_recipes.models.likelihood import PreferenceLogps
from dpo_recipes.models.rewards import calibration

SIDES = ("before", "after")
WORKS, COIN = 0.55, 0.5  # win rates: all above the first the tuning was worth it, all below the second it did harm


def judging(found: Mapping[str, Any], pairs: Dataset, judge: Judge | None, judged: Judged | None) -> dict[str, Any]:
    """Win rates, how the judging went, and the verdict.

    Args:
        found: The answers, as `answer_all` returns them under `SIDES`.
        pairs: Held-out ones, which show how far to trust a judge that scores each answer by itself.
        judge: Who judged; None: nobody.
        judged: What it said.

    Raises:
        RecipeError: If no verdict could be read.
    """
    if judge is None or judged is None:
        return {"verdict": verdict(None), "win_rate": None}
    known = ~np.isnan(judged.won)
    if not known.any():
        told = "no number for any answer" if judge.scorer else "no verdict that can be read: see judgements.jsonl"
        raise RecipeError(f"{judge.name} gave {told}.")
    won, facts = judged.won[known], judged.facts | {"unknown": int((~known).sum())}
    tokens = [np.array([answer["tokens"] for answer in found[side]["answers"]], float)[known] for side in SIDES]
    longer = tokens[1] - tokens[0]
    if judge.scorer and all(isinstance(side, str) or len(side) == 1 for side in pairs["chosen"]):
        facts["labels"] = _as_labelled(pairs, judge.scorer)
    rate = wilson(float(won.sum()), len(won))
    return {
        "verdict": verdict(rate),
        "win_rate": rate,
        "length_controlled": _estimate(statistics.length_controlled, won, longer) if np.ptp(won) else rate,
        "ties": wilson(float((won == 0.5).sum()), len(won)),
        "judging": facts,
    }


def _as_labelled(pairs: Dataset, scorer: Scorer) -> Estimate | None:
    """The share of held-out pairs that the judge ranks as their labels do, of those that it ranks."""
    sides = [*pairs["chosen"], *pairs["rejected"]]
    texts = [side if isinstance(side, str) else side[0]["content"] for side in sides]
    won = statistics.wins(*np.split(scorer([*pairs["prompt"]] * 2, texts), 2))
    won = won[~np.isnan(won)]
    return wilson(float(won.sum()), len(won)) if len(won) else None


def _estimate(statistic: statistics.Statistic, *arrays: NDArray[np.float64]) -> Estimate:
    return _of(statistics.estimate(statistic, [arrays], resamples=statistics.RESAMPLES_OF_FITS))


def _of(estimated: Mapping[str, Any]) -> Estimate:
    return Estimate(*(estimated[key] for key in ("mean", "low", "high", "n")))


def verdict(rate: Estimate | None) -> dict[str, str]:
    """Whether the tuning was worth it: a `level`, and `words` that say no more than the whole interval does."""
    if rate is None:
        words = "Nobody judged the answers. Name a judge: --judge, as docs/evaluation.md says."
        return {"level": "unjudged", "words": words}
    found = (
        f"the judge prefers the tuned model's answer to {100 * rate.mean:.1f} % of {rate.n} prompts, ties counting one "
        f"half (95 % interval {100 * rate.low:.1f} to {100 * rate.high:.1f} %)"
    )
    if rate.low > WORKS:
        return {"level": "works", "words": f"It works: {found}, and all of the interval is above 55 %."}
    if rate.high < COIN:
        words = f"It is worse than its start: {found}, and all of the interval is below 50 %."
        return {"level": "worse", "words": words}
    why = {
        (True, True): "it is better than its start, but by less than the 55 % that would make it worth it",
        (True, False): "it is better than its start, but perhaps by less than the 55 % that would make it worth it",
        (False, True): "it does not reach 55 %, and may be worse than its start",
        (False, False): "it may be worse than its start (below 50 %) or work (above 55 %)",
    }[rate.low > COIN, rate.high < WORKS]
    return {"level": "not known", "words": f"Not known: {found}; {why}. More --prompts narrow the interval."}


def preference(found: Mapping[str, Any], beta: float | None) -> dict[str, Any]:
    """Accuracy on the held-out pairs, within strata of length too, calibration, and perplexity on the chosen side.

    Args:
        found: Log-probs, as `answer_all` returns them under `SIDES`.
        beta: Of the implicit reward; None: it is not calibrated.
    """
    names = [f"{side}{kind}" for kind in ("", "_tokens") for side in ("chosen", "rejected")]
    logps = {side: PreferenceLogps(*(np.array(found[side][name], float) for name in names)) for side in SIDES}
    before, after = logps.values()
    ratio = before.chosen_tokens / before.rejected_tokens
    strata = {"all": ratio > 0, "chosen longer": ratio > 1.1, "chosen shorter": ratio < 1 / 1.1}
    strata["about as long"] = ~(strata["chosen longer"] | strata["chosen shorter"])
    accuracy: dict[str, Any] = {}
    for stratum, members in strata.items():
        if members.any():
            accuracy[stratum] = {
                "summed": {side: each[members].accuracy() for side, each in logps.items()},
                "per token": {side: each[members].accuracy(per_token=True) for side, each in logps.items()},
                "implicit reward": {"after": after[members].accuracy_against(before[members])},
            }
    margins = (after.chosen - before.chosen) - (after.rejected - before.rejected)
    return {
        "preference_accuracy": accuracy,
        "calibration": calibration(beta * margins) if beta else None,
        "perplexity": {side: _estimate(_perplexity, each.chosen, each.chosen_tokens) for side, each in logps.items()},
    }


def _perplexity(logps: NDArray[np.float64], tokens: NDArray[np.float64]) -> float:
    return float(np.exp(-logps.sum() / tokens.sum()))


def measures(
    found: Mapping[str, Any], prompts: Sequence[Any], judged: Judged | None, *, greedy: bool
) -> dict[str, Any]:
    """Those of a comparison, of each side's answers; the KL, with its standard error, is none of greedy ones."""
    rows = records(found, prompts=prompts, judge=None, rewards={})
    of = {side: columns(rows[side], found[side]) for side in SIDES}
    if judged and judged.scores:
        known = np.isfinite(judged.scores).all(axis=0)
        for side, scores in zip(SIDES, judged.scores, strict=True):
            of[side]["judge"] = scores[known].tolist() or None
    measured = {side: of_model([of[side]], [of["before"]]) for side in SIDES}
    left_out = {"preference_accuracy", *(["kl"] if greedy else [])}  # `preference` says more of the first
    names = [name for name in MEASURES if name in measured["after"] and name not in left_out]
    kept = {
        name: {side: _of(measured[side][name]) for side in SIDES if (name, side) != ("kl", SIDES[0])} for name in names
    }
    return {"measures": kept, "kl_standard_error": None if greedy else measured["after"]["kl"]["standard_error"]}


def answer_pairs(found: Mapping[str, Any], prompts: Sequence[Any], judged: Judged | None) -> list[dict[str, Any]]:
    """Each prompt with both answers, and what the judge says of them."""
    lines = []
    for row, prompt in enumerate(prompts):
        line = {"prompt": prompt, **{side: dict(found[side]["answers"][row]) for side in SIDES}}
        for side, scores in zip(SIDES, (judged and judged.scores) or (), strict=False):
            line[side]["score"] = float(scores[row]) if np.isfinite(scores[row]) else None
        if judged:
            line["won"] = None if np.isnan(judged.won[row]) else float(judged.won[row])
        lines.append(line)
    return lines
