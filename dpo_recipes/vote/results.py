"""Makes a result of the votes: a win rate with its interval, the voters' agreement, pairs for a next round."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import krippendorff
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dpo_recipes.dataset_adapters import DROP_REASONS, Drop, as_messages, check_pair
from dpo_recipes.estimates import two_way, wilson
from dpo_recipes.files import read_json, write_json, write_jsonl
from dpo_recipes.runs.page import write_run_page
from dpo_recipes.runs.verdict import of_share, said
from dpo_recipes.terminal import say
from dpo_recipes.vote.answers import read_pairs
from dpo_recipes.vote.log import CHOICES, QUESTIONS, SIDES, UNDO, Vote, read_votes, repeats, standing

WORTH = {"before": 0.0, "tie": 0.5, "both bad": 0.5, "after": 1.0}  # in the win rate; a skip is no vote
LABELS = {
    "win_rate": ("win rate", 3, "share of votes for the tuned model; ties and two bad answers count one half"),
    "left": ("preferences for the first answer shown", 3, "0.5 if its place did not matter"),
    **{name: (words.lower(), 3, "for the tuned model; equal counts one half") for name, words in QUESTIONS.items()},
}


def write_result(run: Path, name: str, against: str | None) -> dict[str, Any]:
    """Writes votes.json, the run's page and the pairs for a next round, prints the result and returns it.

    Args:
        run: The run's folder.
        name: Of the comparison: its folder in `votes/`.
        against: The other run or model; None is the initial model.
    """
    folder = run / "votes" / name
    (pairs, equal), (votes, torn) = read_pairs(folder / "answers.json"), read_votes(folder / "votes.jsonl")
    known = {pair["pair"] for pair in pairs}
    ours = [vote for vote in votes if vote["pair"] in known]
    counted = standing(ours)
    made, next_round = next_pairs(pairs, list(counted.values()))
    found = {
        "against": against or "its initial model",
        **measure(list(counted.values())),
        "shown": len(pairs),
        "equal": equal,
        "repeats": repeats(ours),
        "undone": sum(vote["vote"] == UNDO for vote in ours),
        "of_other_answers": len(votes) - len(ours),
        "torn": torn,
        "next_round": next_round,
        "labels": LABELS,
    }
    ready = write_jsonl(folder / "pairs.jsonl", made)
    file, page = write_json(run / "votes.json", read_json(run / "votes.json") | {name: found}), write_run_page(run)
    say("\n".join([*_lines(found), f"{'Result':<14}{file}, on the page {page.name}"]))
    if made:
        say(f"{'Pairs':<14}{ready}")
        say(f"{'Next round':<14}dpo-recipes train preference-lora --dataset_name {ready} --model_name_or_path MODEL")
    say(f"\n{found['verdict']['sentence']}")
    return found


def measure(votes: Sequence[Vote]) -> dict[str, Any]:
    """Win rates, agreement and verdict of the votes that count."""
    cast = [vote for vote in votes if vote["vote"] in WORTH]
    rate, by_voter = _two_way(cast), Counter(vote["voter"] for vote in cast)
    decided = [vote for vote in cast if vote["vote"] in SIDES]
    first = sum(vote["vote"] == vote["first"] for vote in decided)
    alpha, why = agreement(cast)
    return {
        "verdict": verdict(rate, len(by_voter)),
        "win_rate": rate,
        "agreement": {"alpha": alpha, "why": why},
        "votes": {choice: sum(vote["vote"] == choice for vote in votes) for choice in CHOICES},
        "voters": sorted(by_voter.values(), reverse=True),  # their numbers of votes; names stay in votes.jsonl
        "left": asdict(wilson(first, len(decided))) if decided else None,
        "questions": {name: {"after": found} for name in QUESTIONS if (found := _two_way(cast, name))},
    }


def _table(votes: Sequence[Vote], question: str | None = None) -> NDArray[np.float64]:
    """The worth of each vote, or of its answer to a question, NaN where there is none. Shape (pairs, voters)."""
    choices = [vote["questions"].get(question) if question else vote["vote"] for vote in votes]
    cells = [(vote["pair"], vote["voter"], WORTH.get(choice)) for vote, choice in zip(votes, choices, strict=True)]
    table = pd.DataFrame(cells, columns=["pair", "voter", "worth"]).dropna().pivot(index="pair", columns="voter")
    return np.asarray(table.to_numpy(dtype=np.float64))


def _two_way(votes: Sequence[Vote], question: str | None = None) -> dict[str, Any] | None:
    table = _table(votes, question)
    return asdict(two_way(table)) if table.size else None


def agreement(votes: Sequence[Vote]) -> tuple[float | None, str]:
    """Krippendorff's alpha of the votes, ordinal (before, equal, after), and if it is not known the reason why."""
    values = _table(votes)
    if values.shape[1] < 2:
        return None, "it takes two voters"
    shared = values[(~np.isnan(values)).sum(axis=1) > 1]
    if not len(shared):
        return None, "no two voters judged the same pair"
    if len(np.unique(shared[~np.isnan(shared)])) < 2:
        return None, f"all votes on the {len(shared)} pairs that several voters judged are the same"
    return float(krippendorff.alpha(reliability_data=shared.T, level_of_measurement="ordinal")), ""


def verdict(rate: Mapping[str, Any] | None, voters: int) -> dict[str, str]:
    """The verdict on the run's model, `word` and `sentence` as a run's verdict has them."""
    if rate is None:
        return said("not known", "nobody has voted")
    besides = f", {voters} voter{'s' * (voters > 1)}"
    return of_share("win rate by votes", rate, "prompts", equal="equal models have 0.5", besides=besides)


def next_pairs(
    pairs: Sequence[Mapping[str, Any]], votes: Sequence[Vote]
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Preference pairs by the majority of the votes on each, and the account of votes and pairs that make none.

    Args:
        pairs: As `read_pairs` gives them.
        votes: Votes that count.

    Returns:
        Rows of `prompt`, `chosen` and `rejected`; and `votes_left_out` (ties, two bad answers, skips), and of the pairs
        `kept`, `no_preference`, `equal_split`, `overruled` (kept against some votes) and `unfit` (for training).
    """
    tally: dict[str, Counter[str]] = defaultdict(Counter)
    for vote in votes:
        tally[vote["pair"]][vote["vote"]] += 1
    account = dict.fromkeys(("kept", "overruled", "no_preference", "equal_split", "unfit"), 0)
    kept = []
    for pair in pairs:
        if not (given := tally.get(pair["pair"])):
            continue
        fewer, more = sorted(SIDES, key=given.__getitem__)
        row = {"prompt": pair["prompt"], "chosen": pair[more], "rejected": pair[fewer]}
        if given[fewer] == given[more]:
            account["equal_split" if given[more] else "no_preference"] += 1
        elif _is_unfit(row):
            account["unfit"] += 1
        else:
            account["kept"] += 1
            account["overruled"] += given[fewer] > 0
            kept.append(row)
    left_out = sum(vote["vote"] not in SIDES for vote in votes)
    return kept, account | {"votes_left_out": left_out}


def _is_unfit(row: Mapping[str, Any]) -> bool:
    """Returns True for a pair that no dataset adapter would keep, such as one with an empty answer."""
    prompt = as_messages(row["prompt"], role="user")
    chosen, rejected = (as_messages(row[side], role="assistant") for side in ("chosen", "rejected"))
    try:
        check_pair({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    except Drop as reason:
        say(f"A pair is left out: {DROP_REASONS.get(str(reason), reason)}.")
        return True
    return False


def _lines(found: Mapping[str, Any]) -> list[str]:
    """The result in lines for a terminal."""
    rate, alpha, account, repeated = (found[key] for key in ("win_rate", "agreement", "next_round", "repeats"))
    left_out = {"no_preference": "without a preference", "equal_split": "split equally", "unfit": "unfit for training"}
    counts = ", ".join(f"{account[key]} {words}" for key, words in left_out.items())
    changes = f"{repeated['changed']} votes changed, {repeated['same']} given again, {found['undone']} undone"
    rows = {
        "Against": found["against"],
        "Win rate": f"{rate['mean']:.3f} [{rate['low']:.3f}, {rate['high']:.3f}]" if rate else "not known",
        "Agreement": f"not known: {alpha['why']}" if alpha["alpha"] is None else f"alpha {alpha['alpha']:.3f}",
        "Votes": ", ".join(f"{count} {choice}" for choice, count in found["votes"].items()),
        "Voters": f"{len(found['voters'])}; {changes}",
        "For training": f"{account['kept']} pairs, {account['overruled']} against some votes; left out: {counts}",
    }
    warnings = {
        "torn": "lines of votes.jsonl were cut short by a kill and are left out",
        "of_other_answers": "votes are about answers that are no longer compared and are left out",
        "equal": "prompts have equal answers and were not shown",
    }
    told = [f"{found[key]} {words}." for key, words in warnings.items() if found[key]]
    return [*(f"{label:<14}{value}" for label, value in rows.items()), *told]
