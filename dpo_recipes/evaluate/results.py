"""The numbers of an evaluation and its verdict."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from dpo_recipes import estimates
from dpo_recipes.errors import RecipeError
from dpo_recipes.estimates import Estimate, over_prompts, wilson
from dpo_recipes.evaluate.answers import Scorer
from dpo_recipes.evaluate.judges import Judge
from dpo_recipes.evaluate.measures import MEASURES, columns, of_model
from dpo_recipes.evaluate.pairwise import Judged, share
from dpo_recipes.models.likelihood import PreferenceLogps
from dpo_recipes.models.rewards import calibration
from dpo_recipes.runs.before_after import accuracies
from dpo_recipes.runs.verdict import collapse, destroyed, of_share, said

SIDES = ("before", "after")


def judging(found: Mapping[str, Any], pairs: Dataset, judge: Judge | None, judged: Judged | None) -> dict[str, Any]:
    """Win rates and facts of the judging.

    Args:
        found: The answers, as `answer_all` returns them under `SIDES`.
        pairs: Held-out pairs, which show how far to trust a judge that scores answers one by one.
        judge: The judge; None if there is none.
        judged: Its verdicts.

    Raises:
        RecipeError: If no verdict could be read.
    """
    if judge is None or judged is None:
        return {"win_rate": None}
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
        "win_rate": rate,
        "length_controlled": _estimate(estimates.length_controlled, won, longer) if np.ptp(won) else rate,
        "ties": wilson(float((won == 0.5).sum()), len(won)),
        "judging": facts,
    }


def _as_labelled(pairs: Dataset, scorer: Scorer) -> dict[str, Any] | None:
    """Share of the held-out pairs that the judge ranks as their labels do, among the pairs that it can rank."""
    sides = [*pairs["chosen"], *pairs["rejected"]]
    texts = [side if isinstance(side, str) else side[0]["content"] for side in sides]
    return share(estimates.wins(*np.split(scorer([*pairs["prompt"]] * 2, texts), 2)))


def _estimate(statistic: estimates.Statistic, *arrays: NDArray[np.float64]) -> Estimate:
    return over_prompts(estimates.estimate(statistic, [arrays], resamples=estimates.RESAMPLES_OF_FITS))


def verdict(found: Mapping[str, Any], rate: Estimate | None, *, greedy: bool) -> dict[str, str]:
    """The verdict on the tuning, `word` and `sentence` as a run's verdict has them, by the win rate.

    Args:
        found: Answers and log-probs, as `answer_all` returns them under `SIDES`.
        rate: The win rate; None without a judge.
        greedy: Whether the answers are greedy, which have no KL.
    """
    if signs := collapse(_facts(found, greedy=greedy)):
        return destroyed(signs)
    if rate is None:
        return said("not known", "nobody judged the answers, so name a judge (--judge, docs/evaluation.md)")
    return of_share("win rate", asdict(rate), "prompts", equal="equal models have 0.5 and ties count one half")


def _facts(found: Mapping[str, Any], *, greedy: bool) -> dict[str, Any]:
    """The facts by which lost text shows, under the names of metrics.json."""
    answers = {side: found[side]["answers"] for side in SIDES}
    shares = {
        "ended": {side: float(np.mean([each["ended"] for each in answers[side]])) for side in SIDES},
        "repeated": {
            side: float(np.mean([estimates.repetition(each["text"]) for each in answers[side]])) for side in SIDES
        },
    }
    ratios = [each["policy"] - each["start"] for each in answers["after"]]
    tokens = sum(each["scored"] for each in answers["after"])
    kl = {"nats": float(np.mean(ratios)), "n": len(ratios), "tokens": tokens}
    chosen = {side: float(np.mean(found[side]["chosen"])) for side in SIDES}
    lengths = float(np.mean(found["before"]["chosen_tokens"]))
    return {"answers": shares, "kl": {} if greedy else kl, "chosen_logps": chosen | {"tokens": lengths}}


def preference(found: Mapping[str, Any], beta: float | None) -> dict[str, Any]:
    """Accuracy on the held-out pairs, overall and by length, calibration, and perplexity on the chosen completions.

    Args:
        found: Log-probs, as `answer_all` returns them under `SIDES`.
        beta: Of the implicit reward; None leaves its calibration out.
    """
    names = [f"{side}{kind}" for kind in ("", "_tokens") for side in ("chosen", "rejected")]
    logps = {side: PreferenceLogps(*(np.array(found[side][name], float) for name in names)) for side in SIDES}
    before, after = logps.values()
    ratio = before.chosen_tokens / before.rejected_tokens
    strata = {"all": ratio > 0, "chosen longer": ratio > 1.1, "chosen shorter": ratio < 1 / 1.1}
    strata["about as long"] = ~(strata["chosen longer"] | strata["chosen shorter"])
    accuracy = {
        stratum: accuracies(before[members], after[members]) for stratum, members in strata.items() if members.any()
    }
    margins = (after.chosen - before.chosen) - (after.rejected - before.rejected)
    return {
        "preference_accuracy": accuracy,
        "calibration": calibration(beta * margins) if beta else None,
        "perplexity": {side: _estimate(_perplexity, each.chosen, each.chosen_tokens) for side, each in logps.items()},
    }


def _perplexity(logps: NDArray[np.float64], tokens: NDArray[np.float64]) -> float:
    return float(np.exp(-logps.sum() / tokens.sum()))


def measures(found: Mapping[str, Any], judged: Judged | None, *, greedy: bool) -> dict[str, Any]:
    """Measures of both models' answers. The KL comes with its standard error and is left out for greedy answers."""
    scores: dict[str, list[float] | None] = dict.fromkeys(SIDES)
    if judged and judged.scores:
        known = np.isfinite(judged.scores).all(axis=0)
        scores = {side: given[known].tolist() or None for side, given in zip(SIDES, judged.scores, strict=True)}
    numbers = {side: columns(found[side], judge=scores[side]) for side in SIDES}
    measured = {side: of_model([numbers[side]], [numbers["before"]]) for side in SIDES}
    left_out = {"preference_accuracy", *(["kl"] if greedy else [])}  # `preference` says more of the first
    kept = {
        name: {side: over_prompts(measured[side][name]) for side in SIDES if (name, side) != ("kl", "before")}
        for name in MEASURES
        if name in measured["after"] and name not in left_out
    }
    return {"measures": kept, "kl_standard_error": None if greedy else measured["after"]["kl"]["standard_error"]}


def answer_pairs(found: Mapping[str, Any], prompts: Sequence[Any], judged: Judged | None) -> list[dict[str, Any]]:
    """Each prompt with both answers and the judge's verdict."""
    lines = []
    for row, prompt in enumerate(prompts):
        line = {"prompt": prompt, **{side: dict(found[side]["answers"][row]) for side in SIDES}}
        for side, scores in zip(SIDES, (judged and judged.scores) or (), strict=False):
            line[side]["score"] = float(scores[row]) if np.isfinite(scores[row]) else None
        if judged:
            line["won"] = None if np.isnan(judged.won[row]) else float(judged.won[row])
        lines.append(line)
    return lines
