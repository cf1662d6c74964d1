"""The tools of every dataset adapter: `adapt` turns rows into checked pairs and counts the rows it drops."""

import ast
import hashlib
import inspect
import json
import logging
import math
import os
import re
import tomllib
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from datasets import Audio, Dataset, Features, Image, Json, List, Value, Video

from dpo_recipes.dataset_adapters.ledger import current_ledger
from dpo_recipes.errors import RecipeError

logger = logging.getLogger(__name__)

Row = dict[str, Any]
"""A row of a dataset: its values by column."""
ROW = "_row"
"""The column in which `load_rows` names each row by its file and line. Dataset adapters keep it; no trainer sees it."""


class Message(TypedDict):
    """One turn of a conversation."""

    role: str  # system, user, assistant or tool
    content: str  # may be None where there are tool_calls
    tool_calls: NotRequired[list[Any]]  # this field, and any other such as reasoning_content, goes to the chat template


class Pair(TypedDict):
    """The prompt ends in a user or tool turn; both completions say something, begin with the assistant and differ."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    preference_strength: NotRequired[float]  # how much better chosen is; enters no loss
    source: NotRequired[str]
    id: NotRequired[str]


class Drop(Exception):
    """This row makes no pair: `raise Drop("reason")`, the reason being one of DROP_REASONS or a name of your own."""


_REASONS: dict[str, dict[str, str]] = tomllib.loads(Path(__file__).with_name("drop_reasons.toml").read_text("utf-8"))
DROP_CHOICES = frozenset(_REASONS["choices"])
DROP_REASONS = _REASONS["faults"] | _REASONS["choices"]
PAIR_FEATURES = dict.fromkeys(
    ("prompt", "chosen", "rejected"), List({"role": Value("string"), "content": Value("string")})
)
_OPTIONAL_FEATURES = {
    "preference_strength": Value("float64"),
    "margin": Value("float64"),  # RewardTrainer takes it into its loss
    "source": Value("string"),
    "id": Value("string"),
    "tools": Value("string"),  # JSON text; TRL passes tools and chat_template_kwargs to the chat template
    "chat_template_kwargs": Json(),
    ROW: Value("string"),
}
_RICH_MESSAGES = List(Json())  # keeps whichever fields each message has
_PLAIN_FIELDS = {"role", "content", "from", "value"}
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
_ROLES = ("system", "user", "assistant", "tool")
_SERIALISED = r"""^\s*(array\()?\[?\s*\{\s*['"](role|content|from|value)['"]\s*:"""
_PROMPT_NAMES = ("question", "instruction", "query", "messages", "input")  # for the advice in an error
_PROBED = 100  # rows
_PARALLEL_FROM = 50_000  # rows; below, starting processes costs more than it saves


def adapt(
    dataset: Dataset, read_pair: Callable[[Row], Pair], *, name: str, columns: Sequence[str], adds: Sequence[str] = ()
) -> Dataset:
    """Returns the pairs that `read_pair` makes of the rows; the rows it drops are counted in the current ledger.

    Args:
        dataset: Raw rows.
        read_pair: One row to one pair, or `raise Drop("reason")`. What it returns is checked by `check_pair`.
        name: The dataset adapter's name, for messages.
        columns: Columns without which no row can be read.
        adds: Columns that `read_pair` returns in addition to the pair: preference_strength, source or id. Columns of
            the dataset with these names are kept anyway; so are margin, which RewardTrainer takes into its loss, and
            tools and chat_template_kwargs, which go to the chat template.

    Raises:
        RecipeError: If a column is missing, the rows hold images, or a margin is no number.
    """
    require_columns(dataset, columns, name=name)
    _refuse_media(dataset)
    extra = {column: kind for column, kind in _OPTIONAL_FEATURES.items() if column in {*adds, *dataset.column_names}}
    note_unread(dataset, used={*columns, *extra, *_columns_read(dataset, read_pair)})
    rich = any(_has_rich_messages(dataset, column) for column in dataset.column_names)
    messages = dict.fromkeys(PAIR_FEATURES, _RICH_MESSAGES) if rich else PAIR_FEATURES
    read = partial(_checked_pair, read_pair=read_pair, extra=list(extra))
    pairs = read_rows(dataset, read, name=name, features={**messages, **extra}, code=code_hash(read_pair))
    _refuse_missing_margins(pairs)
    return pairs


def read_rows(
    dataset: Dataset, read: Callable[[Row], Row], *, name: str, features: dict[str, Any], code: str
) -> Dataset:
    """Returns what `read` makes of each row; the rows it drops are counted in the current ledger.

    Args:
        dataset: Raw rows.
        read: One row to one row, or `raise Drop("reason")`.
        name: The dataset adapter's name, for messages.
        features: Columns of the result.
        code: The `code_hash` of the function behind `read`.
    """
    split = str(dataset.split or "train")
    columns = Features({**features, "drop_reason": Value("string")})
    given = {"read": read, "columns": list(columns), "code": code}
    marked = map_rows(dataset, _read_batch, features=columns, desc=f"{name} ({split})", **given)
    return keep_pairs(marked, name=name, split=split, new=True)


def code_hash(read: Callable[..., Any]) -> str:
    """Returns a hash of the code behind a map: datasets keys its cache on the *name* of an imported function alone."""
    module = inspect.getmodule(getattr(read, "func", read))  # of a partial
    # A function typed into a shell has no file; datasets hashes those by value.
    files = [Path(__file__), Path(getattr(module, "__file__", None) or "")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files if file.is_file())).hexdigest()


def as_messages(value: Any, *, role: str) -> list[Message]:
    """Returns a string as one turn of that role; a message or a list of messages with the fields that hold something.

    Text that holds messages as JSON, or as Python prints them, is read as messages. ShareGPT's `from` and `value`
    become role and content, and a content of text parts becomes one text.
    """
    if value is None:
        raise Drop("missing_value")
    value = _deserialised(value)
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise Drop("not_text_or_messages")
    if not value:
        raise Drop("empty_prompt" if role == "user" else "empty_completion")
    return [_message(message) for message in value]


def check_pair(pair: Pair) -> None:
    """Raises Drop, with the first reason found, unless the pair is as `Pair` says."""
    prompt, chosen, rejected = pair["prompt"], pair["chosen"], pair["rejected"]
    for message in (*prompt, *chosen, *rejected):
        if message["role"] not in _ROLES:
            raise Drop("unknown_role")
        if not isinstance(message["content"], str) and not message.get("tool_calls"):
            raise Drop("content_not_text")
    if not any(message["role"] == "user" for message in prompt):
        raise Drop("no_user_turn")
    if prompt[-1]["role"] not in ("user", "tool"):
        raise Drop("prompt_not_ending_in_user")
    if not _text(prompt[-1]):
        raise Drop("empty_prompt")
    for completion in (chosen, rejected):
        if not completion or not all(_text(turn) or turn.get("tool_calls") for turn in completion):
            raise Drop("empty_completion")
        if completion[0]["role"] != "assistant":
            raise Drop("completion_not_assistant")
    if [{**turn, "content": _text(turn)} for turn in chosen] == [{**turn, "content": _text(turn)} for turn in rejected]:
        raise Drop("identical_completions")


def number(value: Any) -> float | None:
    """Returns the number that a cell holds, also as text ("8", "4/5"); None for anything else."""
    text, _, scale = str(value).partition("/")
    try:
        found = float(text) / float(scale or 1)
    except (ValueError, ZeroDivisionError):
        return None
    return found if math.isfinite(found) else None


def require_columns(dataset: Dataset, columns: Sequence[str], *, name: str) -> None:
    """Raises RecipeError, which says how to name the columns of one's own, unless the dataset has all columns."""
    names = [column for column in dataset.column_names if column != ROW]
    if missing := [column for column in columns if column not in names]:
        likely = {column: [*get_close_matches(column, names, n=1), "..."][0] for column in missing}
        likely |= {"prompt": next((column for column in _PROMPT_NAMES if column in names), likely.get("prompt"))}
        ours = ",".join(f"{column}={likely[column]}" for column in missing)
        needed = " and ".join(filter(None, [", ".join(columns[:-1]), columns[-1]]))
        reads_one = name.startswith(("hh_rlhf", "shp", "oasst", "ultrafeedback"))
        other = "take the recipe preference-lora" if reads_one else "write a dataset adapter"
        raise RecipeError(
            f"{name} needs the columns {needed}, got {names}. Name yours with --columns {ours}; if they "
            f'hold another layout, {other}: recipes/README.md, "Your own data".'
        )


def rename_columns(dataset: Dataset, **theirs: str) -> Dataset:
    """Returns the dataset with columns renamed: `rename_columns(rows, prompt="instruction", chosen="good")`.

    A column may be named without regard to case and blanks around its name. A column that already has one of the new
    names, and is not renamed itself, is called `unused_` and its name.

    Raises:
        RecipeError: If a column does not exist, or is named twice.
    """
    names = [column for column in dataset.column_names if column != ROW]
    alike = {plain_name(name): name for name in reversed(names)}
    theirs = {ours: name if name in names else alike.get(plain_name(name), name) for ours, name in theirs.items()}
    if not set(theirs.values()) <= set(names) or len(set(theirs.values())) < len(theirs):
        wanted = ",".join(f"{ours}={column}" for ours, column in theirs.items())
        raise RecipeError(f"Got --columns {wanted}, which needs a column of its own for each; the dataset has {names}.")
    shadowed = [name for name in names if name in theirs and name not in theirs.values()]
    dataset = dataset.rename_columns({name: f"unused_{name}" for name in shadowed})
    return dataset.rename_columns({column: ours for ours, column in theirs.items() if column != ours})


def plain_name(column: str) -> str:
    """Returns the name of a column in lower case, without blanks around it."""
    return column.strip().lower()


def row_names(dataset: Dataset) -> list[str]:
    """Returns the file and line of each row, as `load_rows` noted them; else the number of the row, from 1."""
    if ROW in dataset.column_names:
        return list(dataset[ROW][:])
    return [f"row {number}" for number in range(1, len(dataset) + 1)]


def keep_pairs(marked: Dataset, *, name: str, split: str, new: bool = False) -> Dataset:
    """Returns the rows of `marked` whose `drop_reason` is null, without that column; `keep_rows` counts the others.

    Counting a column, instead of counting while mapping, is right also when the map came from the cache or from
    several processes.
    """
    return keep_rows(marked.remove_columns("drop_reason"), marked["drop_reason"][:], stage=name, split=split, new=new)


def keep_rows(dataset: Dataset, reasons: Sequence[str | None], *, stage: str, split: str, new: bool = False) -> Dataset:
    """Returns the rows without a reason to drop them; the others are counted by reason in the current ledger.

    Args:
        dataset: Rows or pairs.
        reasons: A reason, or None, for each row.
        stage: The function that drops the rows.
        split: Name of the split.
        new: True if the rows come from the dataset and not from an earlier stage.
    """
    dropped: dict[str, list[str]] = {}
    for name, reason in zip(row_names(dataset), reasons, strict=True):
        if reason is not None:
            dropped.setdefault(reason, []).append(name)
    kept = [row for row, reason in enumerate(reasons) if reason is None]
    current_ledger().record(stage, split, came=len(dataset), kept=len(kept), dropped=dropped, new=new)
    counts = {reason: len(rows) for reason, rows in dropped.items()}
    logger.info("%s kept %d of %d in the %s split, dropped %s", stage, len(kept), len(dataset), split, counts)
    return dataset.select(kept) if dropped else dataset


def map_rows(
    dataset: Dataset, function: Callable[..., Any], *, features: Features, desc: str, **arguments: Any
) -> Dataset:
    """Maps `function` over batches; the result has exactly the columns of `features`. Large datasets use processes."""
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


def matches(dataset: Dataset, column: str, pattern: str) -> bool:
    """Returns True if a text of the column matches a regular expression; False for columns without text."""
    return _is_text(dataset.features.get(column)) and any(
        cell is not None and re.search(pattern, cell) for cell in _cells(dataset, column)
    )


def holds_messages(dataset: Dataset, column: str) -> bool:
    """Returns True for cells that are messages, JSON text of messages, or anything else that is not text."""
    return not _is_text(dataset.features.get(column)) or matches(dataset, column, _SERIALISED)


def note_unread(dataset: Dataset, *, used: Collection[str]) -> None:
    """Notes in the current ledger the columns that hold text and are not used, each with its number of rows."""
    for column, feature in dataset.features.items():
        if column not in used and _may_hold_text(feature):  # embeddings have too many numbers to be looked at
            rows = sum(map(_holds_text, _cells(dataset, column)))
            current_ledger().note_unread(column, rows, len(dataset))


# Helpers of adapt, in the order of their use


def _refuse_media(dataset: Dataset) -> None:
    """Raises RecipeError if a column holds images, sound or videos, as TRL does for a model of text."""
    for column, feature in dataset.features.items():
        kind = getattr(feature, "feature", feature)
        is_media = column in _MEDIA or isinstance(kind, (Audio, Image, Video))
        if is_media and (count := sum(map(bool, _cells(dataset, column)))):
            raise RecipeError(
                f"The column {column} holds images, sound or videos in {count:,} of {len(dataset):,} rows, and "
                "only text is trained here. Remove these rows, or remove the column if the texts do without it."
            )


def _columns_read(dataset: Dataset, read_pair: Callable[[Row], Pair]) -> set[str]:
    """Returns the columns that a dataset adapter reads of some rows of the dataset."""
    read: set[str] = set()
    for row in dataset.select(range(0, len(dataset), len(dataset) // _PROBED + 1)):
        with suppress(Drop):
            read_pair(_NotedRow(row, read))
    return read


class _NotedRow(dict[str, Any]):
    """A row that notes which of its columns are read."""

    def __init__(self, row: Row, read: set[str]) -> None:
        super().__init__(row)
        self.read = read

    def __getitem__(self, column: str) -> Any:
        self.read.add(column)
        return super().__getitem__(column)

    def get(self, column: str, default: Any = None) -> Any:
        self.read.add(column)
        return super().get(column, default)


def _has_rich_messages(dataset: Dataset, column: str) -> bool:
    """Returns True if messages of the column may have more fields than role and content, such as tool_calls."""
    feature = dataset.features[column]
    inner = getattr(feature, "feature", feature)
    if isinstance(inner, dict) and {"role", "from"} & set(inner):
        return not set(inner) <= _PLAIN_FIELDS
    return isinstance(inner, Json) or matches(dataset, column, _SERIALISED)


def _read_batch(batch: Row, *, read: Callable[[Row], Row], columns: list[str], code: str) -> Row:
    """Returns the rows that `read` makes of a batch, with `drop_reason`. `code` is part of the cache's key alone."""
    rows = [dict(zip(batch, cells, strict=True)) for cells in zip(*batch.values(), strict=True)]
    found = [_read_or_drop(row, read) for row in rows]
    return {column: [row.get(column) for row in found] for column in columns}


def _read_or_drop(row: Row, read: Callable[[Row], Row]) -> Row:
    try:
        return {ROW: row.get(ROW), **read(row), "drop_reason": None}
    except Drop as drop:
        empty: Row = {"prompt": [], "chosen": [], "rejected": [], "chat_template_kwargs": {}}
        return {**empty, ROW: row.get(ROW), "drop_reason": str(drop)}


def _checked_pair(row: Row, *, read_pair: Callable[[Row], Pair], extra: list[str]) -> Row:
    """Returns the pair of a row with the optional columns `extra`."""
    pair = read_pair(row)
    check_pair(pair)
    given = {**row, **pair}
    return {**pair, **{column: _optional_cell(column, given.get(column)) for column in extra}}


def _optional_cell(column: str, value: Any) -> Any:
    """Returns a cell of an optional column as `_OPTIONAL_FEATURES` has it."""
    if _OPTIONAL_FEATURES[column] == Value("float64"):
        return number(value)
    if column not in ("tools", "chat_template_kwargs"):
        return value
    try:
        value = _without_nulls(json.loads(value) if isinstance(value, str) and value.strip() else value)
    except ValueError as error:
        raise Drop("tools_unreadable") from error
    if column == "chat_template_kwargs":
        return value or {}
    if value and not isinstance(value, list):
        raise Drop("tools_unreadable")
    return json.dumps(value) if value else None


def _refuse_missing_margins(pairs: Dataset) -> None:
    if "margin" not in pairs.column_names:
        return
    if missing := [name for name, margin in zip(row_names(pairs), pairs["margin"], strict=True) if margin is None]:
        raise RecipeError(
            f"The column margin holds no number in {len(missing):,} of {len(pairs):,} pairs ({missing[0]}), and "
            "RewardTrainer takes it into its loss. Fill these cells, or leave margin out of --columns."
        )


# Helpers of as_messages and check_pair


def _deserialised(value: Any) -> Any:
    """Returns the messages that a text holds as JSON or as Python prints them; any other value as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{", "array(")):
        return value
    for read in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError, RecursionError):
            found = read(value.strip())
            turns = [found] if isinstance(found, dict) else found
            are_messages = isinstance(turns, list) and turns and all(map(_is_message, turns))
            return turns if are_messages else value
    is_cut = value.count("{") > value.count("}")
    if re.match(_SERIALISED, value) and (is_cut or value.rstrip().endswith(("]", "}", ")"))):
        raise Drop("messages_unreadable")
    return value


def _is_message(turn: Any) -> bool:
    return isinstance(turn, dict) and (turn.keys() >= {"role", "content"} or turn.keys() >= {"from", "value"})


def _message(given: Row) -> Message:
    """Returns role and content, ShareGPT's too, and the other fields that hold neither nothing nor a number."""
    given = _without_nulls(given)
    if not given.get("role") and given.get("from"):
        speaker = given.pop("from")
        given |= {"role": _SHAREGPT_ROLES.get(speaker, speaker), "content": given.pop("value", None)}
    content = _one_text(given.pop("content", None))
    if not isinstance(content, str) and not given.get("tool_calls"):
        raise Drop("content_not_text")
    role = str(given.pop("role", None))
    more = {name: value for name, value in given.items() if value and not isinstance(value, float | int)}
    return {"role": role, "content": content, **more}  # type: ignore[typeddict-item]


def _one_text(content: Any) -> Any:
    """Returns the text of a content that is a list of text parts; any other content as it is."""
    if not isinstance(content, list):
        return content
    kinds = {part.get("type") if isinstance(part, dict) else None for part in content}
    if kinds != {"text"}:
        raise Drop("holds_media" if kinds > {"text"} or not kinds & {None, "text"} else "content_not_text")
    return "".join(str(part.get("text", "")) for part in content)


def _without_nulls(value: Any) -> Any:
    """Returns the value without the nulls that Arrow puts where one row has a key and another has not."""
    if isinstance(value, dict):
        return {name: _without_nulls(part) for name, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


def _text(turn: Message) -> str:
    return (turn["content"] or "").strip()


# Helpers that look at a column


def _cells(dataset: Dataset, column: str) -> list[Any]:
    """Returns the cells of a column as Arrow holds them; images are not decoded."""
    return dataset.select_columns(column).with_format("arrow")[:][column].to_pylist()  # type: ignore[no-any-return]


def _is_text(feature: Any) -> bool:
    """Returns True for columns of text, in any of Arrow's types of it."""
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string", "string_view")


def _may_hold_text(feature: Any) -> bool:
    """Returns True for columns of text, and for lists and dicts with text somewhere inside."""
    parts = list(feature.values()) if isinstance(feature, dict) else [getattr(feature, "feature", None)]
    return _is_text(feature) or isinstance(feature, Json) or any(map(_may_hold_text, filter(None, parts)))


def _holds_text(cell: Any) -> bool:
    """Returns True if there is text anywhere in a cell."""
    parts = list(cell.values()) if isinstance(cell, dict) else cell
    return any(map(_holds_text, parts)) if isinstance(parts, list) else isinstance(cell, str) and bool(cell.strip())
