"""Judges of two answers: a rule, a function, a reward model, or a language model at an endpoint."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import cohen_kappa_score

from dpo_recipes.errors import RecipeError
from dpo_recipes.estimates import wins
from dpo_recipes.evaluate.answers import Scorer, exact_judge
from dpo_recipes.evaluate.endpoint import Endpoint, check_address
from dpo_recipes.evaluate.pairwise import Judged, ask_all, share
from dpo_recipes.models.functions import names_function, read_function
from dpo_recipes.models.rewards import Text, check_reward_model, model_judge, read_reward_config

ADDRESS = re.compile("https?://", re.IGNORECASE)


@dataclass(frozen=True)
class Judge:
    """A judge that compares answers."""

    name: str
    compare: Callable[[Sequence[Text], Sequence[str], Sequence[str]], Judged]  # prompts, first and second answers
    scorer: Scorer | None = None  # of one answer, if the judge scores answers one by one


def open_judge(
    name: str | None,
    *,
    rule: Callable[[Any, str], float] | str | None,
    endpoint: Mapping[str, Any],
    cache: Path,
    prompts: Sequence[Text] = (),
) -> Judge | None:
    """The judge of the given name; None where neither a name nor a rule is given.

    Args:
        name: The URL of an endpoint, FILE.py:FUNCTION, or a reward model; None: the rule.
        rule: The recipe's own, a function or a model.
        endpoint: Fields of `Endpoint` but the URL.
        cache: Where an endpoint's replies are kept.
        prompts: All prompts that it will see.

    Raises:
        RecipeError: If there is no such judge, or it cannot judge answers to these prompts.
    """
    if endpoint and not ADDRESS.match(name or str(rule)):
        raise RecipeError(f"--judge_{next(iter(endpoint))} is for an endpoint: --judge https://HOST/v1.")
    if name is None and not isinstance(rule, str):
        return rule and _by_score("the recipe's exact rule", exact_judge(rule))
    name = name or str(rule)
    if ADDRESS.match(name):
        check_address(name)
        if not endpoint.get("model"):
            raise RecipeError(f"{name} is an endpoint, which may have many models. Name one with --judge_model.")
        asked = Endpoint(name.rstrip("/"), **endpoint)
        return Judge(f"{asked.model} at {asked.url}", lambda *answers: ask_all(asked, *answers, cache=cache))
    if names_function(name):
        return _by_score(name, exact_judge(read_function(name)))
    short = [prompt if isinstance(prompt, str) else [{**turn, "content": ""} for turn in prompt] for prompt in prompts]
    check_reward_model(*read_reward_config(name), short, labels=(1, 2))  # a text that is too long is scored cut
    return _by_score(f"the reward model {name}", model_judge(name))


def _by_score(name: str, scorer: Scorer) -> Judge:
    def compare(prompts: Sequence[Text], first: Sequence[str], second: Sequence[str]) -> Judged:
        one, other = np.split(scorer([*prompts, *prompts], [*first, *second]), 2)  # at once: a model is loaded once
        return Judged(wins(other, one), (one, other))

    return Judge(name, compare, scorer)


def agreement(judged: Sequence[float], annotators: Mapping[str, Sequence[float | None]]) -> dict[str, Any]:
    """Agreement of a judge with people on the same pairs of answers.

    Args:
        judged: For each pair above 0.5 the first answer is better, below it the second, 0.5 neither, NaN not known.
            `Judged.won` says it of the second answer: give `1 - judged.won`.
        annotators: By name, each person's labels in the same terms; None where there is none.

    Returns:
        Over the pairs where the judge's verdict is known and people have a majority (`pairs`; `without_majority`
        counts the others): the `share` of agreement, `kappa` (Cohen 1960; None of a single label), and the shares of
        decisions for the first answer, `prefers_first` of the judge and `people_prefer_first`. `by_annotator` has the
        share of agreement with each person. Shares have Wilson intervals, and are None where there is no pair.
    """
    verdicts, labels = _decide(judged), {name: _decide(given) for name, given in annotators.items()}
    majority = _majority(np.stack([*labels.values()]))
    ours, theirs = _where_both(verdicts, majority)
    has_chance = len({*ours, *theirs}) > 1
    return {
        "pairs": len(ours),
        "without_majority": int(np.isnan(majority).sum()),
        "share": share(ours == theirs),
        "kappa": float(cohen_kappa_score(2 * ours, 2 * theirs)) if has_chance else None,
        "prefers_first": share(ours[ours != 0.5] == 1),
        "people_prefer_first": share(theirs[theirs != 0.5] == 1),
        "by_annotator": {name: share(np.equal(*_where_both(verdicts, given))) for name, given in labels.items()},
    }


def _decide(judged: Sequence[float | None]) -> NDArray[np.float64]:
    """Returns 1 for the first answer, 0 for the second, 0.5 for neither, and NaN for None or NaN."""
    return wins(np.array(judged, float), np.full(len(judged), 0.5))


def _majority(labels: NDArray[np.float64]) -> NDArray[np.float64]:
    """The label of more than half of those who gave one, from shape (people, pairs) to (pairs,); NaN without any."""
    known = np.array([0.0, 0.5, 1.0])
    votes = (labels == known[:, None, None]).sum(axis=1)  # (labels, pairs)
    return np.where(2 * votes.max(axis=0) > votes.sum(axis=0), known[votes.argmax(axis=0)], np.nan)


def _where_both(one: NDArray[np.float64], other: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
    known = ~np.isnan(one + other)
    return one[known], other[known]
