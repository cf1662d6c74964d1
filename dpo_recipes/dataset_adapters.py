"""Dataset adapters: raw rows become preference pairs, one function a dataset, every row kept or counted.

A dataset adapter of your own reads one row and says which columns it needs:

    def forum(dataset: Dataset) -> Dataset:
        return adapt(dataset, forum_pair, name="forum", columns=["question", "best", "worst", "votes"])

    def forum_pair(row: Row) -> Pair:
        if row["votes"] < 3:
            raise Drop("too_few_votes")
        return {
            "prompt": as_messages(row["question"], role="user"),
            "chosen": as_messages(row["best"], role="assistant"),
            "rejected": as_messages(row["worst"], role="assistant"),
        }

`adapt` then checks what every pair must be (`check_pair`), counts each drop in the open `Ledger`, and returns the pairs
that are left. Columns named margin, source or id are kept; all others are not.
"""

import hashlib
import inspect
import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypedDict

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
    "too_long": "last user turn + completion over max_length",
    "template_refuses": "the chat template refuses the conversation",
    "empty_in_template": "the chat template leaves nothing of a completion",
    "removed_by_load_pairs": "removed in load_pairs without a reason",
}

_MESSAGES = List({"role": Value("string"), "content": Value("string")})
_PAIR_FEATURES = {"prompt": _MESSAGES, "chosen": _MESSAGES, "rejected": _MESSAGES}
_EXTRA_COLUMNS = ("margin", "source", "id")
_PARALLEL_FROM = 50_000  # rows; below, starting processes costs more than it saves


# -------------------------------------------------------------------------------- the dataset adapters


def hh_rlhf(dataset: Dataset) -> Dataset:
    r"""Pairs of Anthropic/hh-rlhf: `chosen` and `rejected` hold whole dialogues of "\n\nHuman:" and "\n\nAssistant:".

    The completion is what follows the last "\n\nAssistant:". The longest common prefix (TRL's implicit prompt) would
    move the words with which both replies begin into the prompt. Turns of one role in a row are merged.
    """
    return adapt(dataset, _hh_rlhf_pair, name="hh_rlhf", columns=["chosen", "rejected"])


def _hh_rlhf_pair(row: Row) -> Pair:
    context, chosen = _split_at_last_reply(row["chosen"])
    other_context, rejected = _split_at_last_reply(row["rejected"])
    if context != other_context:
        raise Drop("contexts_differ")
    return {
        "prompt": _hh_rlhf_turns(context),
        "chosen": as_messages(chosen, role="assistant"),
        "rejected": as_messages(rejected, role="assistant"),
    }


def _split_at_last_reply(dialogue: Any) -> tuple[str, str]:
    if dialogue is None:
        raise Drop("missing_value")
    if not isinstance(dialogue, str):
        raise Drop("not_text_or_messages")
    context, marker, reply = dialogue.rpartition("\n\nAssistant:")
    if not marker:
        raise Drop("no_assistant_turn")
    if "\n\nHuman:" in reply:
        raise Drop("ends_in_user_turn")
    return context, reply.strip()


def _hh_rlhf_turns(context: str) -> list[Message]:
    before, *speakers_and_texts = re.split(r"\n\n(Human|Assistant):", context)
    if before.strip():
        raise Drop("text_before_first_turn")
    turns: list[Message] = []
    for speaker, text in zip(speakers_and_texts[::2], speakers_and_texts[1::2], strict=True):
        role = "user" if speaker == "Human" else "assistant"
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += "\n\n" + text.strip()
        else:
            turns.append({"role": role, "content": text.strip()})
    if turns and turns[0]["role"] == "assistant":
        raise Drop("begins_with_assistant")
    return turns


def preference_jsonl(dataset: Dataset) -> Dataset:
    """Pairs of rows with prompt, chosen and rejected, each a string or a list of messages.

    A string prompt becomes one user turn, a string completion one assistant turn. Where chosen and rejected are whole
    conversations (HuggingFaceH4, trl-lib), everything before the last reply is the prompt: it must be the same on both
    sides and contain the row's own prompt, if there is one. Strings that both repeat the prompt are refused, since
    nothing tells where the completion begins.
    """
    texts = {name for name, kind in dataset.features.items() if kind == Value("string")}
    columns = ["prompt", "chosen", "rejected"] if texts & {"chosen", "rejected"} else ["chosen", "rejected"]
    return adapt(dataset, _preference_pair, name="preference_jsonl", columns=columns)


def _preference_pair(row: Row) -> Pair:
    chosen = as_messages(row["chosen"], role="assistant")
    rejected = as_messages(row["rejected"], role="assistant")
    if _has_context(chosen) and _has_context(rejected):
        return _pair_of_conversations(chosen, rejected, prompt=row.get("prompt"))
    text = row.get("prompt")
    if isinstance(text, str) and text and all(turns[0]["content"].startswith(text) for turns in (chosen, rejected)):
        raise Drop("completion_repeats_prompt")
    return {"prompt": as_messages(text, role="user"), "chosen": chosen, "rejected": rejected}


def _has_context(turns: list[Message]) -> bool:
    return turns[0]["role"] in ("system", "user")


def _pair_of_conversations(chosen: list[Message], rejected: list[Message], *, prompt: Any) -> Pair:
    if chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        raise Drop("ends_in_user_turn")
    context = chosen[:-1]
    if context != rejected[:-1]:
        raise Drop("contexts_differ")
    if prompt is not None and as_messages(prompt, role="user")[-1] not in context:
        raise Drop("prompt_differs")
    return {"prompt": context, "chosen": chosen[-1:], "rejected": rejected[-1:]}


# --------------------------------------------------------------- what every dataset adapter is made of


def adapt(
    dataset: Dataset, read_pair: Callable[[Row], Pair], *, name: str, columns: Sequence[str], split: str | None = None
) -> Dataset:
    """The pairs that `read_pair` makes of the rows; the rows it drops are counted in the open ledger.

    Args:
        dataset: Raw rows.
        read_pair: One row to one pair, or `raise Drop("reason")`. What it returns is checked by `check_pair`.
        name: The dataset adapter's name, for messages.
        columns: Columns without which no row can be read.
        split: Under which split the rows are counted; by default the dataset's own, else train.

    Raises:
        RecipeError: If a column is missing.
    """
    if not set(columns) <= set(dataset.column_names):
        raise RecipeError(
            f"{name} needs the columns {_and(columns)}, got {dataset.column_names}. Rename yours in load_pairs "
            f'(rows.rename_columns({{"theirs": "{columns[0]}"}})) or write a dataset adapter: recipes/README.md, '
            '"Your own data".'
        )
    split = split or str(dataset.split or "train")
    extra = {column: dataset.features[column] for column in _EXTRA_COLUMNS if column in dataset.column_names}
    features = Features({**_PAIR_FEATURES, **extra, "drop_reason": Value("string")})
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


def _mark_rows(batch: dict[str, list[Any]], *, read_pair: Callable[[Row], Pair], extra: list[str], code: str) -> Row:
    """The batch as pairs, with the reason beside each row that makes none."""
    pairs: list[Pair] = []
    reasons: list[str | None] = []
    for values in zip(*batch.values(), strict=True):
        try:
            pair = read_pair(dict(zip(batch, values, strict=True)))
            check_pair(pair)
            reasons.append(None)
        except Drop as drop:
            pair = {"prompt": [], "chosen": [], "rejected": []}
            reasons.append(str(drop))
        pairs.append(pair)
    columns = {column: [pair[column] for pair in pairs] for column in _PAIR_FEATURES}  # type: ignore[literal-required]
    return {**columns, **{column: batch[column] for column in extra}, "drop_reason": reasons}


def _code_hash(read_pair: Callable[[Row], Pair]) -> str:
    """A hash of the code behind a map: datasets keys its cache on the *name* of an imported function alone."""
    try:
        files = [Path(__file__), Path(inspect.getfile(read_pair))]
    except TypeError:  # a function typed into a shell has no file; datasets hashes those by value
        files = [Path(__file__)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files if file.is_file())).hexdigest()


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
