"""Pairs of OpenAssistant's message trees: replies to one message, ranked by people."""

from collections import defaultdict
from collections.abc import Collection, Iterator
from itertools import combinations
from typing import Any

from datasets import Dataset, Features

from dpo_recipes.dataset_adapters.adapting import (
    EXTRA_FEATURES,
    PAIR_FEATURES,
    Drop,
    Row,
    check_pair,
    note_unread,
    number,
    require_columns,
)
from dpo_recipes.dataset_adapters.ledger import current_ledger

_COLUMNS = ["message_id", "parent_id", "text", "role", "lang", "rank", "deleted", "synthetic", "review_result"]
_ROLES = {"prompter": "user", "assistant": "assistant"}
_FEATURES = Features({**PAIR_FEATURES, **{name: EXTRA_FEATURES[name] for name in ("preference_strength", "id")}})


def oasst1(dataset: Dataset, *, languages: Collection[str] | None = ("en",)) -> Dataset:
    """Pairs of OpenAssistant/oasst1 and oasst2, whose rows are messages, or of their exports of whole trees.

    Where people ranked two or more replies to a message, every two of different rank make a pair, after the whole
    thread up to there. Messages that were deleted, written by a model or not passed by review are left out, and so is
    what hangs below them. The preference strength is the difference of the ranks. The account counts messages, then
    pairs.

    Args:
        dataset: Messages, or trees.
        languages: Of every message in a pair; None: any.

    Raises:
        RecipeError: If a column is missing.
    """
    if {"message_tree_id", "prompt"} <= set(dataset.column_names):
        messages = [message for root in dataset["prompt"] if root for message in _with_replies(root)]
    else:
        require_columns(dataset, _COLUMNS, name="oasst1")
        messages = dataset.select_columns(_COLUMNS).to_list()
    note_unread(dataset, used={*_COLUMNS, "message_tree_id", "prompt", "tree_state"})
    reasons, pairs, in_pairs = _read_threads(messages, languages=languages)
    kept: list[Any] = []
    dropped: dict[str, list[int]] = defaultdict(list)
    for row, reason in enumerate(reasons):
        if row not in in_pairs:
            dropped[reason].append(row)
    for row, pair in pairs:
        try:
            check_pair(pair)
            kept.append(pair)
        except Drop as drop:
            dropped[str(drop)].append(row)
    counts = {"came": len(messages), "in_pairs": len(in_pairs), "pairs_made": len(pairs), "kept": len(kept)}
    current_ledger().record("oasst1", str(dataset.split or "train"), dropped=dropped, new=True, **counts)
    columns = {column: [pair[column] for pair in kept] for column in _FEATURES}
    return Dataset.from_dict(columns, features=_FEATURES, split=dataset.split)


def _with_replies(message: Row, *, parent: str | None = None) -> Iterator[Row]:
    """The message of a tree and all replies below it, as rows."""
    yield {**{column: message.get(column) for column in _COLUMNS}, "parent_id": parent}
    for reply in message.get("replies") or []:
        yield from _with_replies(reply, parent=message["message_id"])


def _read_threads(
    messages: list[Row], *, languages: Collection[str] | None
) -> tuple[list[str], list[tuple[int, Any]], set[int]]:
    """Why each message is in no pair, if it is in none; pairs, each with the row of its chosen reply; rows in pairs."""
    own = [_own_reason(message, languages=languages) for message in messages]
    reasons = [reason or "thread_is_broken" for reason in own]  # unless reached from a first message
    replies: dict[str | None, list[int]] = defaultdict(list)
    for row, message in enumerate(messages):
        replies[message["parent_id"]].append(row)
    pairs: list[tuple[int, Any]] = []
    in_pairs: set[int] = set()
    walk: list[tuple[int, tuple[int, ...]]] = [(row, (row,)) for row in replies[None] if own[row] is None]
    for row, thread in walk:  # grows as it goes: a reply comes after what it replies to
        reasons[row] = "not_a_pair_of_replies"
        usable = [reply for reply in replies[messages[row]["message_id"]] if own[reply] is None]
        walk += [(reply, (*thread, reply)) for reply in usable]
        ranks = {reply: rank for reply in usable if (rank := number(messages[reply]["rank"])) is not None}
        for better, worse in combinations(sorted(ranks, key=lambda reply: ranks[reply]), 2):
            if ranks[better] < ranks[worse]:
                pair = _pair([messages[earlier] for earlier in thread], messages[better], messages[worse])
                pairs.append((better, pair))
                in_pairs.update(thread, (better, worse))
    return reasons, pairs, in_pairs


def _own_reason(message: Row, *, languages: Collection[str] | None) -> str | None:
    checks = {
        "missing_value": message["text"] is None or message["message_id"] is None,
        "unknown_role": message["role"] not in _ROLES,
        "deleted": message["deleted"],
        "synthetic": message["synthetic"],
        "not_reviewed": not message["review_result"],
        "language": languages is not None and message["lang"] not in languages,
    }
    return next((reason for reason, holds in checks.items() if holds), None)


def _pair(thread: list[Row], better: Row, worse: Row) -> Any:
    turns = [{"role": _ROLES[message["role"]], "content": message["text"]} for message in (*thread, better, worse)]
    return {
        "prompt": turns[:-2],
        "chosen": turns[-2:-1],
        "rejected": turns[-1:],
        "preference_strength": (number(worse["rank"]) or 0.0) - (number(better["rank"]) or 0.0),
        "id": f"{better['message_id']} {worse['message_id']}",
    }
