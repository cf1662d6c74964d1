"""Pairs of OpenAssistant's message trees: replies to one message, ranked by people."""

from collections import defaultdict
from collections.abc import Collection, Iterator
from itertools import combinations

from datasets import Dataset, Features, Value

from dpo_recipes.dataset_adapters.adapting import (
    PAIR_FEATURES,
    ROW,
    Drop,
    Message,
    Pair,
    Row,
    check_pair,
    note_unread,
    number,
    require_columns,
    row_names,
)
from dpo_recipes.dataset_adapters.ledger import current_ledger

_COLUMNS = ["message_id", "parent_id", "text", "role", "lang", "rank", "deleted", "synthetic", "review_result"]
_ROLES = {"prompter": "user", "assistant": "assistant"}
_FEATURES = Features({**PAIR_FEATURES, "preference_strength": Value("float64"), "id": Value("string")})


def oasst1(dataset: Dataset, *, languages: Collection[str] | None = ("en",)) -> Dataset:
    """Pairs of OpenAssistant/oasst1 and oasst2, whose rows are messages, or of their exports of whole trees.

    Where people ranked two or more replies to a message, every two replies of different rank make a pair; its prompt is
    the whole thread up to that message. Messages that were deleted, written by a model or not passed by review are left
    out, and so are the replies below them. The preference strength is the difference of the ranks. The account counts
    messages, then pairs.

    Args:
        dataset: Messages, or trees.
        languages: Languages that every message of a pair may have; None: any.

    Raises:
        RecipeError: If a column is missing.
    """
    if {"message_tree_id", "prompt"} <= set(dataset.column_names):
        trees = zip(dataset["prompt"], row_names(dataset), strict=True)
        messages = [message | {ROW: name} for root, name in trees if root for message in _with_replies(root)]
    else:
        require_columns(dataset, _COLUMNS, name="oasst1")
        rows = zip(dataset.select_columns(_COLUMNS).to_list(), row_names(dataset), strict=True)
        messages = [message | {ROW: name} for message, name in rows]
    note_unread(dataset, used={*_COLUMNS, "message_tree_id", "prompt", "tree_state", ROW})
    reasons, pairs = _read_threads(messages, [_own_reason(message, languages=languages) for message in messages])
    dropped: dict[str, list[str]] = defaultdict(list)
    for row, reason in enumerate(reasons):
        if reason is not None:
            dropped[reason].append(messages[row][ROW])
    kept = []
    for row, pair in pairs:
        try:
            check_pair(pair)
            kept.append(pair)
        except Drop as drop:
            dropped[str(drop)].append(messages[row][ROW])
    counts = {"came": len(messages), "in_pairs": reasons.count(None), "pairs_made": len(pairs), "kept": len(kept)}
    current_ledger().record("oasst1", str(dataset.split or "train"), dropped=dropped, new=True, **counts)
    features = Features({**_FEATURES, **dict.fromkeys({ROW}.intersection(dataset.column_names), Value("string"))})
    return Dataset.from_dict(
        {column: [pair.get(column) for pair in kept] for column in features}, features=features, split=dataset.split
    )


def _with_replies(message: Row, *, parent: str | None = None) -> Iterator[Row]:
    """Yields the message of a tree and all replies below it, as rows."""
    yield {**{column: message.get(column) for column in _COLUMNS}, "parent_id": parent}
    for reply in message.get("replies") or []:
        yield from _with_replies(reply, parent=message["message_id"])


def _own_reason(message: Row, *, languages: Collection[str] | None) -> str | None:
    """Returns the reason why a message itself can be in no pair; None for a good message."""
    checks = {
        "missing_value": message["text"] is None or message["message_id"] is None,
        "unknown_role": message["role"] not in _ROLES,
        "deleted": message["deleted"],
        "synthetic": message["synthetic"],
        "not_reviewed": not message["review_result"],
        "language": languages is not None and message["lang"] not in languages,
    }
    return next((reason for reason, holds in checks.items() if holds), None)


def _read_threads(
    messages: list[Row], own_reasons: list[str | None]
) -> tuple[list[str | None], list[tuple[int, Pair]]]:
    """Walks every thread from its first message through the messages that are good themselves.

    Returns:
        For each message the reason why it is in no pair, None if it is in one; the pairs, each with the row of its
        chosen reply.
    """
    replies: dict[str | None, list[int]] = defaultdict(list)
    for row, message in enumerate(messages):
        if own_reasons[row] is None:
            replies[message["parent_id"]].append(row)
    reasons = [reason or "thread_is_broken" for reason in own_reasons]  # unless the walk comes by
    pairs: list[tuple[int, Pair]] = []
    in_pairs: set[int] = set()
    walk: list[tuple[int, ...]] = [(row,) for row in replies[None]]
    for thread in walk:  # grows on the way: a reply comes after the message that it replies to
        reasons[thread[-1]] = "not_a_pair_of_replies"
        answers = [reply for reply in replies[messages[thread[-1]]["message_id"]] if reply not in thread]
        walk += [(*thread, reply) for reply in answers]
        for better, worse in _ranked(answers, messages):
            pairs.append((better, _pair([messages[row] for row in (*thread, better, worse)])))
            in_pairs.update(thread, (better, worse))
    return [None if row in in_pairs else reason for row, reason in enumerate(reasons)], pairs


def _ranked(replies: list[int], messages: list[Row]) -> list[tuple[int, int]]:
    """Returns every two replies of different rank, the better first (people's best reply has rank 0)."""
    ranks = {reply: rank for reply in replies if (rank := number(messages[reply]["rank"])) is not None}
    both = combinations(sorted(ranks, key=ranks.__getitem__), 2)
    return [(better, worse) for better, worse in both if ranks[better] < ranks[worse]]


def _pair(messages: list[Row]) -> Pair:
    """Returns the pair of a thread whose last two messages are the better reply and the worse.

    The pair has the row of the better reply.
    """
    turns: list[Message] = [{"role": _ROLES[message["role"]], "content": message["text"]} for message in messages]
    better, worse = messages[-2:]
    return {
        "prompt": turns[:-2],
        "chosen": turns[-2:-1],
        "rejected": turns[-1:],
        "preference_strength": (number(worse["rank"]) or 0.0) - (number(better["rank"]) or 0.0),
        "id": f"{better['message_id']} {worse['message_id']}",
        ROW: better[ROW],  # type: ignore[misc]
    }
