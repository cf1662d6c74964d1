"""What every dataset adapter is made of: rows in, checked pairs out, drops counted."""

import hashlib
import inspect
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from datasets import Dataset, Features, List, Value

from dpo_recipes.errors import RecipeError
from dpo_recipes.ledger import current_ledger

logger = logging.getLogger(__name__)

Row = dict[str, Any]


class Message(TypedDict):
    """One turn of a conversation."""

    role: str  # system, user or assistant
    content: str


class Pair(TypedDict):
    """The prompt ends in a user turn; both completions are non-empty, begin with an assistant turn and differ."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    margin: NotRequired[float]
    source: NotRequired[str]
    id: NotRequired[str]


class Drop(Exception):
    """This row makes no pair: `raise Drop("reason")`, the reason being one of DROP_REASONS or a name of your own."""


DROP_REASONS = {
    "missing_value": "prompt, chosen or rejected is null",
    "not_text_or_messages": "neither a string nor a list of messages",
    "content_not_text": "a message whose content is not a string",
    "unknown_role": "a role other than system, user and assistant",
    "text_before_first_turn": "text in front of the first speaker",
    "begins_with_assistant": "the dialogue begins with the assistant",
    "no_assistant_turn": "a dialogue without a reply",
    "ends_in_user_turn": "the dialogue goes on after the last reply",
    "contexts_differ": "the two sides differ before the last reply",
    "prompt_differs": "the prompt is not in the conversations",
    "completion_repeats_prompt": "both completions begin with the prompt",
    "no_user_turn": "a prompt without a user turn",
    "prompt_not_ending_in_user": "the prompt does not end in a user turn",
    "empty_prompt": "the last user turn is blank",
    "completion_not_assistant": "a completion not begun by the assistant",
    "empty_completion": "a blank completion",
    "identical_completions": "chosen and rejected say the same",
    "prompt_in_test": "the prompt is in the test split as well",
    "other_part": "the prompt is in another part (--part)",
    "too_long": "last user turn + completion over max_length",
    "prompt_too_long": "last user turn over max_prompt_length",
    "text_too_long": "a text with its end token over max_length",
    "same_prompt": "a prompt that came before",
    "template_refuses": "the chat template refuses the conversation",
    "no_room": "the prompt fills the model's context",
    "empty_in_template": "the chat template leaves nothing of a completion",
    "no_rating": "a score, rating or label is missing",
    "not_rated_higher": "chosen is not rated higher than rejected",
    "low_score_ratio": "the two scores are too close",
    "post_has_enough": "over the most pairs for one post",
    "deleted": "a deleted message",
    "synthetic": "a message written by a model",
    "not_reviewed": "a message that passed no review",
    "language": "a message in another language",
    "thread_is_broken": "an earlier message is missing or left out",
    "not_a_pair_of_replies": "a message without two replies of different rank",
    "removed_by_load_pairs": "removed in load_pairs without a reason",
}

_MESSAGES = List({"role": Value("string"), "content": Value("string")})
PAIR_FEATURES = {"prompt": _MESSAGES, "chosen": _MESSAGES, "rejected": _MESSAGES}
EXTRA_FEATURES = {"margin": Value("float64"), "source": Value("string"), "id": Value("string")}
_PARALLEL_FROM = 50_000  # rows; below, starting processes costs more than it saves


def adapt(
    dataset: Dataset, read_pair: Callable[[Row], Pair], *, name: str, columns: Sequence[str], adds: Sequence[str] = ()
) -> Dataset:
    """The pairs that `read_pair` makes of the rows; the rows it drops are counted in the open ledger.

    Args:
        dataset: Raw rows.
        read_pair: One row to one pair, or `raise Drop("reason")`. What it returns is checked by `check_pair`.
        name: The dataset adapter's name, for messages.
        columns: Columns without which no row can be read.
        adds: What `read_pair` returns beside the pair: margin, source or id. Columns of these names are kept anyway.

    Raises:
        RecipeError: If a column is missing.
    """
    require_columns(dataset, columns, name=name)
    split = str(dataset.split or "train")
    extra = {column: dataset.features[column] for column in EXTRA_FEATURES if column in dataset.column_names}
    extra |= {column: EXTRA_FEATURES[column] for column in adds}
    features = Features({**PAIR_FEATURES, **extra, "drop_reason": Value("string")})
    marked = map_rows(
        dataset,
        _mark_rows,
        features=features,
        desc=f"{name} ({split})",
        read_pair=read_pair,
        extra=list(extra),
        code=_code_hash(read_pair),
    )
    return keep_pairs(marked, name=name, split=split, new=True)


def require_columns(dataset: Dataset, columns: Sequence[str], *, name: str) -> None:
    """Nothing, if the dataset has the columns; else raises RecipeError, which says how to name one's own."""
    if not set(columns) <= set(dataset.column_names):
        ours = ",".join(f"{column}=..." for column in columns if column not in dataset.column_names)
        raise RecipeError(
            f"{name} needs the columns {_and(columns)}, got {dataset.column_names}. Name yours with --columns {ours} "
            'or write a dataset adapter: recipes/README.md, "Your own data".'
        )


def rename_columns(dataset: Dataset, **theirs: str) -> Dataset:
    """The dataset with its columns renamed: `rename_columns(rows, prompt="instruction", chosen="good")`.

    A column that already has one of the new names, and is not renamed itself, gives way.

    Raises:
        RecipeError: If a column does not exist, or is named twice.
    """
    names = dataset.column_names
    if not set(theirs.values()) <= set(names) or len(set(theirs.values())) < len(theirs):
        wanted = ",".join(f"{ours}={column}" for ours, column in theirs.items())
        raise RecipeError(f"Got --columns {wanted}, which needs a column of its own for each; the dataset has {names}.")
    shadowed = [name for name in names if name in theirs and name not in theirs.values()]
    return dataset.remove_columns(shadowed).rename_columns({column: ours for ours, column in theirs.items()})


def keep_pairs(marked: Dataset, *, name: str, split: str, new: bool = False) -> Dataset:
    """The rows of `marked` whose `drop_reason` is null, without that column; the others are counted by reason.

    Counting a column, and not while mapping, is right also when the map came from the cache or from several processes.
    `new` says that the rows come from the dataset and not from an earlier stage.
    """
    kept: list[int] = []
    dropped: dict[str, list[int]] = {}
    for row, reason in enumerate(marked["drop_reason"][:]):
        (kept if reason is None else dropped.setdefault(reason, [])).append(row)
    current_ledger().record(name, split, came=len(marked), kept=len(kept), dropped=dropped, new=new)
    counts = {reason: len(rows) for reason, rows in dropped.items()}
    logger.info("%s kept %d of %d in the %s split, dropped %s", name, len(kept), len(marked), split, counts)
    return (marked.select(kept) if dropped else marked).remove_columns("drop_reason")


def check_pair(pair: Pair) -> None:
    """Nothing, if the pair keeps the contract; else raises Drop with the first reason that it does not."""
    prompt, chosen, rejected = pair["prompt"], pair["chosen"], pair["rejected"]
    for message in (*prompt, *chosen, *rejected):
        if message["role"] not in ("system", "user", "assistant"):
            raise Drop("unknown_role")
        if not isinstance(message["content"], str):
            raise Drop("content_not_text")
    if not any(message["role"] == "user" for message in prompt):
        raise Drop("no_user_turn")
    if prompt[-1]["role"] != "user":
        raise Drop("prompt_not_ending_in_user")
    if not prompt[-1]["content"].strip():
        raise Drop("empty_prompt")
    for completion in (chosen, rejected):
        if not completion or any(not turn["content"].strip() for turn in completion):
            raise Drop("empty_completion")
        if completion[0]["role"] != "assistant":
            raise Drop("completion_not_assistant")
    if [turn["content"].strip() for turn in chosen] == [turn["content"].strip() for turn in rejected]:
        raise Drop("identical_completions")


def as_messages(value: Any, *, role: str) -> list[Message]:
    """A string as one turn of that role; a list of messages as it is, less the fields that are no part of a message."""
    if value is None:
        raise Drop("missing_value")
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise Drop("not_text_or_messages")
    if not value:
        raise Drop("empty_prompt" if role == "user" else "empty_completion")
    if not all(isinstance(message.get("content"), str) for message in value):
        raise Drop("content_not_text")
    return [{"role": str(message.get("role")), "content": message["content"]} for message in value]


def map_rows(
    dataset: Dataset, function: Callable[..., Any], *, features: Features, desc: str, **arguments: Any
) -> Dataset:
    """`function` mapped over batches, with exactly the columns of `features`; on several processes where it pays."""
    if not len(dataset):  # map would return the old columns
        return Dataset.from_dict({column: [] for column in features}, features=features, split=dataset.split)
    return dataset.map(
        function,
        batched=True,
        fn_kwargs=arguments,
        features=features,
        remove_columns=dataset.column_names,
        num_proc=min(8, os.cpu_count() or 1) if len(dataset) >= _PARALLEL_FROM else None,
        desc=desc,
    )


def _mark_rows(batch: Row, *, read_pair: Callable[[Row], Pair], extra: list[str], code: str) -> Row:
    """The batch as pairs, with the reason beside each row that makes none."""
    marked: dict[str, list[Any]] = {column: [] for column in (*PAIR_FEATURES, *extra, "drop_reason")}
    for values in zip(*batch.values(), strict=True):
        row = dict(zip(batch, values, strict=True))
        try:
            pair = read_pair(row)
            check_pair(pair)
            made = {**row, **pair, "drop_reason": None}
        except Drop as drop:
            made = {"prompt": [], "chosen": [], "rejected": [], "drop_reason": str(drop)}
        for column, cells in marked.items():
            cells.append(made.get(column))
    return marked


def _code_hash(read_pair: Callable[[Row], Pair]) -> str:
    """A hash of the code behind a map: datasets keys its cache on the *name* of an imported function alone."""
    module = inspect.getmodule(getattr(read_pair, "func", read_pair))  # of a partial
    # A function typed into a shell has no file; datasets hashes those by value.
    files = [Path(__file__), Path(getattr(module, "__file__", None) or "")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files if file.is_file())).hexdigest()


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
