"""What every dataset adapter is made of: rows in, checked pairs out, drops counted."""

import ast
import hashlib
import inspect
import json
import logging
import math
import os
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Audio, Dataset, Features, Image, Json, List, Value, Video

from dpo_recipes.dataset_adapters.ledger import current_ledger
from dpo_recipes.errors import RecipeError

logger = logging.getLogger(__name__)

Row = dict[str, Any]


class Message(TypedDict):
    """One turn of a conversation."""

    role: str  # system, user, assistant or tool
    content: str  # may be None beside tool_calls
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


DROP_REASONS = {
    "missing_value": "prompt, chosen or rejected is null",
    "not_text_or_messages": "neither a string nor a list of messages",
    "content_not_text": "a message whose content is not a string",
    "messages_unreadable": "text like messages that cannot be parsed",
    "tools_unreadable": "tools that are no JSON list",
    "holds_media": "a message with an image, sound or video",
    "system_differs": "two system prompts that differ",
    "unknown_role": "a role other than system, user, assistant, tool",
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
EXTRA_FEATURES = {"preference_strength": Value("float64"), "source": Value("string"), "id": Value("string")}
_RICH_MESSAGES = List(Json())  # keeps whichever fields each message has
_FOR_TEMPLATES = {"tools": Value("string"), "chat_template_kwargs": Json()}  # columns that TRL passes to chat templates
_NUMBERS = ("margin", "preference_strength")
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
    """The pairs that `read_pair` makes of the rows; the rows it drops are counted in the open ledger.

    Args:
        dataset: Raw rows.
        read_pair: One row to one pair, or `raise Drop("reason")`. What it returns is checked by `check_pair`.
        name: The dataset adapter's name, for messages.
        columns: Columns without which no row can be read.
        adds: What `read_pair` returns beside the pair: preference_strength, source or id. Columns of these names are
            kept anyway; so are margin, which RewardTrainer takes into its loss, and tools and chat_template_kwargs,
            which go to the chat template.

    Raises:
        RecipeError: If a column is missing, the rows hold images, or a margin is no number.
    """
    require_columns(dataset, columns, name=name)
    _refuse_media(dataset)
    split = str(dataset.split or "train")
    extra = {column: dataset.features[column] for column in ("source", "id") if column in dataset.column_names}
    typed = _FOR_TEMPLATES | EXTRA_FEATURES | {"margin": Value("float64")}
    extra |= {column: kind for column, kind in typed.items() if column in adds or column in dataset.column_names}
    note_unread(dataset, used={*columns, *extra, *_columns_read(dataset, read_pair)})
    rich = any(_message_fields(dataset, column) - {"role", "content", "from", "value"} for column in dataset.features)
    messages = dict.fromkeys(PAIR_FEATURES, _RICH_MESSAGES) if rich else PAIR_FEATURES
    features = Features({**messages, **extra, "drop_reason": Value("string")})
    marked = map_rows(
        dataset,
        _mark_rows,
        features=features,
        desc=f"{name} ({split})",
        read_pair=read_pair,
        extra=list(extra),
        code=_code_hash(read_pair),
    )
    pairs = keep_pairs(marked, name=name, split=split, new=True)
    if "margin" in extra and (missing := sum(margin is None for margin in pairs["margin"])):
        raise RecipeError(
            f"The column margin holds no number in {missing:,} of {len(pairs):,} pairs, and RewardTrainer takes it "
            "into its loss. Fill these cells, or leave margin out of --columns."
        )
    return pairs


def require_columns(dataset: Dataset, columns: Sequence[str], *, name: str) -> None:
    """Nothing, if the dataset has the columns; else raises RecipeError, which says how to name one's own."""
    if not set(columns) <= set(dataset.column_names):
        likely = {"prompt": next((column for column in _PROMPT_NAMES if column in dataset.column_names), "...")}
        missing = [column for column in columns if column not in dataset.column_names]
        ours = ",".join(f"{column}={likely.get(column, '...')}" for column in missing)
        raise RecipeError(
            f"{name} needs the columns {_and(columns)}, got {dataset.column_names}. Name yours with --columns {ours} "
            'or write a dataset adapter: recipes/README.md, "Your own data".'
        )


def rename_columns(dataset: Dataset, **theirs: str) -> Dataset:
    """The dataset with its columns renamed: `rename_columns(rows, prompt="instruction", chosen="good")`.

    A column that already has one of the new names, and is not renamed itself, is called `unused_` and its name.

    Raises:
        RecipeError: If a column does not exist, or is named twice.
    """
    names = dataset.column_names
    if not set(theirs.values()) <= set(names) or len(set(theirs.values())) < len(theirs):
        wanted = ",".join(f"{ours}={column}" for ours, column in theirs.items())
        raise RecipeError(f"Got --columns {wanted}, which needs a column of its own for each; the dataset has {names}.")
    shadowed = [name for name in names if name in theirs and name not in theirs.values()]
    dataset = dataset.rename_columns({name: f"unused_{name}" for name in shadowed})
    return dataset.rename_columns({column: ours for ours, column in theirs.items() if column != ours})


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
        if message["role"] not in _ROLES:
            raise Drop("unknown_role")
        if not isinstance(message["content"], str) and not message.get("tool_calls"):
            raise Drop("content_not_text")
    if not any(message["role"] == "user" for message in prompt):
        raise Drop("no_user_turn")
    if prompt[-1]["role"] not in ("user", "tool"):
        raise Drop("prompt_not_ending_in_user")
    if not (prompt[-1]["content"] or "").strip():
        raise Drop("empty_prompt")
    for completion in (chosen, rejected):
        if not completion or not all((turn["content"] or "").strip() or turn.get("tool_calls") for turn in completion):
            raise Drop("empty_completion")
        if completion[0]["role"] != "assistant":
            raise Drop("completion_not_assistant")
    one, other = (
        [{**turn, "content": (turn["content"] or "").strip()} for turn in side] for side in (chosen, rejected)
    )
    if one == other:
        raise Drop("identical_completions")


def as_messages(value: Any, *, role: str) -> list[Message]:
    """A string as one turn of that role; a message or a list of messages with the fields that say something.

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


def _deserialised(value: Any) -> Any:
    """The messages that a text holds as JSON or as Python prints them; any other value as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{", "array(")):
        return value
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(value.strip())
        except (ValueError, SyntaxError, RecursionError):
            continue
        turns = [found] if isinstance(found, dict) else found
        are_messages = isinstance(turns, list) and turns and all(_is_message(turn) for turn in turns)
        return turns if are_messages else value
    is_cut = value.count("{") > value.count("}")
    if re.match(_SERIALISED, value) and (is_cut or value.rstrip().endswith(("]", "}", ")"))):
        raise Drop("messages_unreadable")
    return value


def _is_message(turn: Any) -> bool:
    return isinstance(turn, dict) and (turn.keys() >= {"role", "content"} or turn.keys() >= {"from", "value"})


def _message(given: Row) -> Message:
    if given.keys() == {"role", "content"} and isinstance(given["content"], str):
        return {"role": str(given["role"]), "content": given["content"]}
    fields = {
        name: value for name, value in _without_nulls(given).items() if value and not isinstance(value, float | int)
    }
    if "role" not in fields and "from" in fields:
        fields["role"] = _SHAREGPT_ROLES.get(fields["from"], fields["from"])
        fields["content"] = fields.pop("value", given.get("value"))
        del fields["from"]
    content = fields.pop("content", given.get("content"))
    if isinstance(content, list):
        kinds = {part.get("type") if isinstance(part, dict) else None for part in content}
        if kinds != {"text"}:
            raise Drop("holds_media" if kinds > {"text"} or not kinds & {None, "text"} else "content_not_text")
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str) and not fields.get("tool_calls"):
        raise Drop("content_not_text")
    message: Any = {"role": str(fields.pop("role", None)), "content": content, **fields}
    return message  # type: ignore[no-any-return]


def _without_nulls(value: Any) -> Any:
    """The value without the nulls that Arrow puts where one row has a key and another has not."""
    if isinstance(value, dict):
        return {name: _without_nulls(part) for name, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


def number(value: Any) -> float | None:
    """The number that a cell holds, also as text ("8", "4/5"); None for anything else."""
    text, _, scale = str(value).partition("/")
    try:
        found = float(text) / float(scale or 1)
    except (ValueError, ZeroDivisionError):
        return None
    return found if math.isfinite(found) else None


def is_text(feature: Any) -> bool:
    """Returns True for cells of text, in any of Arrow's types of it."""
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string", "string_view")


def matches(dataset: Dataset, column: str, pattern: str) -> bool:
    """Returns True if a text of the column matches a regular expression (RE2); False for columns without text."""
    if not is_text(dataset.features.get(column)):
        return False
    cells = dataset.select_columns(column).with_format("arrow")[:][column].cast(pa.large_string())
    return bool(pc.any(pc.match_substring_regex(cells, pattern)).as_py())


def holds_messages(dataset: Dataset, column: str) -> bool:
    """Returns True for cells that are messages, JSON text of messages, or anything else that is not text."""
    return not is_text(dataset.features.get(column)) or matches(dataset, column, _SERIALISED)


def _message_fields(dataset: Dataset, column: str) -> set[str]:
    """The fields of the messages that a column holds; all there may be where its type does not say."""
    feature = dataset.features[column]
    inner = getattr(feature, "feature", feature)
    if isinstance(inner, Json) or matches(dataset, column, _SERIALISED):
        return {"tool_calls"}
    return set(inner) if isinstance(inner, dict) and {"role", "from"} & set(inner) else set()


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


def _columns_read(dataset: Dataset, read_pair: Callable[[Row], Pair]) -> set[str]:
    """The columns that a dataset adapter reads of some rows of the dataset."""
    read: set[str] = set()
    for row in dataset.select(range(0, len(dataset), len(dataset) // _PROBED + 1)):
        try:
            read_pair(_NotedRow(row, read))
        except Drop:
            continue
    return read


def note_unread(dataset: Dataset, *, used: Collection[str]) -> None:
    """Notes the columns that hold text and are not used, each with its number of rows, in the open ledger."""
    for column, feature in dataset.features.items():
        if column in used or not _holds_text(feature):
            continue
        cells = dataset.select_columns(column).with_format("arrow")[:][column]
        if is_text(feature):
            cells = pc.utf8_trim_whitespace(cells.cast(pa.large_string()))
            count = pc.sum(pc.greater(pc.utf8_length(cells), 0)).as_py() or 0
        else:
            count = len(cells) - cells.null_count
        current_ledger().note_unread(column, count, len(dataset))


def _holds_text(feature: Any) -> bool:
    if isinstance(feature, dict):
        return any(map(_holds_text, feature.values()))
    inner = getattr(feature, "feature", None)
    return is_text(feature) or isinstance(feature, Json) or (inner is not None and _holds_text(inner))


def _refuse_media(dataset: Dataset) -> None:
    """Raises RecipeError if a column holds images, sound or videos, as TRL does for a model of text."""
    for column, feature in dataset.features.items():
        kind = getattr(feature, "feature", feature)
        if column in _MEDIA or isinstance(kind, (Audio, Image, Video)):
            cells = dataset.select_columns(column).with_format("arrow")[:][column]  # not decoded
            if count := sum(map(bool, cells.to_pylist())):
                raise RecipeError(
                    f"The column {column} holds images, sound or videos in {count:,} of {len(dataset):,} rows, and "
                    "only text is trained here. Remove these rows, or remove the column if the texts do without it."
                )


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
            made |= {column: number(made.get(column)) for column in extra if column in _NUMBERS}
            made |= {column: _for_template(column, row.get(column)) for column in extra if column in _FOR_TEMPLATES}
        except Drop as drop:
            made = {"prompt": [], "chosen": [], "rejected": [], "chat_template_kwargs": {}, "drop_reason": str(drop)}
        for column, cells in marked.items():
            cells.append(made.get(column))
    return marked


def _for_template(column: str, value: Any) -> Any:
    """Tools as JSON text, None for none; arguments of the chat template as a dict."""
    try:
        value = _without_nulls(json.loads(value) if isinstance(value, str) and value.strip() else value)
    except ValueError as error:
        raise Drop("tools_unreadable") from error
    if column == "chat_template_kwargs":
        return value or {}
    if value and not isinstance(value, list):
        raise Drop("tools_unreadable")
    return json.dumps(value) if value else None


def _code_hash(read_pair: Callable[[Row], Pair]) -> str:
    """A hash of the code behind a map: datasets keys its cache on the *name* of an imported function alone."""
    module = inspect.getmodule(getattr(read_pair, "func", read_pair))  # of a partial
    # A function typed into a shell has no file; datasets hashes those by value.
    files = [Path(__file__), Path(getattr(module, "__file__", None) or "")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files if file.is_file())).hexdigest()


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
