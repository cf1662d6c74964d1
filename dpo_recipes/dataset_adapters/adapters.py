"""Dataset adapters: one function for each published dataset or layout, followed by the function that reads its rows."""

import math
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

from datasets import Dataset, Features, Value

from dpo_recipes.dataset_adapters.adapting import (
    PAIR_FEATURES,
    Drop,
    Message,
    Pair,
    Row,
    adapt,
    as_messages,
    holds_messages,
    map_rows,
    matches,
    note_unread,
    number,
    rename_columns,
    require_columns,
)
from dpo_recipes.dataset_adapters.gsm8k import gsm8k, is_gsm8k
from dpo_recipes.dataset_adapters.oasst import oasst1
from dpo_recipes.errors import RecipeError

_SHP_COLUMNS = ["history", "human_ref_A", "human_ref_B", "labels", "score_A", "score_B", "post_id", "domain"]
_ULTRAFEEDBACK_RATINGS = [  # of HuggingFaceH4 and trl-lib; argilla's -cleaned; argilla's first
    ("score_chosen", "score_rejected"),
    ("chosen-rating", "rejected-rating"),
    ("chosen_avg_rating", "rejected_avg_rating"),
]
_SYSTEM_COLUMNS = ("system", "system_prompt", "system_message")


def recognise(dataset: Dataset) -> Callable[[Dataset], Dataset]:
    """Returns the dataset adapter for the columns of the dataset; `preference_jsonl` where no other fits."""
    names = set(dataset.column_names)
    if names.issuperset(_SHP_COLUMNS):
        return shp
    if "message_tree_id" in names:
        return oasst1
    if any(names.issuperset(ratings) for ratings in _ULTRAFEEDBACK_RATINGS):
        return ultrafeedback_binarized
    if "conversations" in names and "prompt" not in names:
        return sharegpt_pairs
    if is_gsm8k(dataset):
        return gsm8k
    dialogues = "prompt" not in names and matches(dataset, "chosen", r"\A\s*Human:(?s:.*)\n\nAssistant:")
    return hh_rlhf if dialogues else preference_jsonl


def hh_rlhf(dataset: Dataset) -> Dataset:
    r"""Pairs of Anthropic/hh-rlhf: `chosen` and `rejected` hold whole dialogues of "\n\nHuman:" and "\n\nAssistant:".

    The completion is the text after the last "\n\nAssistant:". The longest common prefix (TRL's implicit prompt) would
    move the words with which both replies begin into the prompt. Turns of one role in a row are merged.
    """
    return adapt(dataset, _hh_rlhf_pair, name="hh_rlhf", columns=["chosen", "rejected"])


def _hh_rlhf_pair(row: Row) -> Pair:
    context, chosen = _split_at_last_reply(row["chosen"])
    other_context, rejected = _split_at_last_reply(row["rejected"])
    if context != other_context:
        raise Drop("contexts_differ")
    return _pair(_with_system(row, _hh_rlhf_turns(context)), chosen=chosen, rejected=rejected)


def _pair(prompt: list[Message], *, chosen: Any, rejected: Any) -> Pair:
    """Returns the pair of a prompt and two completions, as text or as messages."""
    return {
        "prompt": prompt,
        "chosen": as_messages(chosen, role="assistant"),
        "rejected": as_messages(rejected, role="assistant"),
    }


def _split_at_last_reply(dialogue: Any) -> tuple[str, str]:
    if not isinstance(dialogue, str):
        raise Drop("missing_value" if dialogue is None else "not_text_or_messages")
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


def _with_system(row: Row, turns: list[Message]) -> list[Message]:
    """Returns the turns after the row's system prompt, if a column holds one and the turns do not begin with it."""
    text = next((text for column in _SYSTEM_COLUMNS if (text := row.get(column)) and str(text).strip()), None)
    if text is None or not turns:
        return turns
    [system] = as_messages(text, role="system")
    if turns[0]["role"] != "system":
        return [system, *turns]
    if turns[0]["content"].strip() != system["content"].strip():
        raise Drop("system_differs")
    return turns


def preference_jsonl(dataset: Dataset) -> Dataset:
    """Pairs of rows with prompt, chosen and rejected, each a string or a list of messages.

    A string prompt becomes one user turn, a string completion one assistant turn. A column `system` becomes a system
    turn, and `input` (Alpaca) is put below a string prompt. Where chosen and rejected are whole
    conversations (HuggingFaceH4, trl-lib), everything before the last reply is the prompt: it must be the same on both
    sides and contain the row's own prompt, if there is one. Strings that both repeat the prompt are refused, since
    nothing tells where the completion begins.
    """
    sides = [side for side in ("chosen", "rejected") if side in dataset.column_names]
    whole = len(sides) == 2 and all(holds_messages(dataset, side) for side in sides)  # these may hold the prompt
    columns = ["chosen", "rejected"] if whole else ["prompt", "chosen", "rejected"]
    return adapt(dataset, _preference_pair, name="preference_jsonl", columns=columns)


def _preference_pair(row: Row) -> Pair:
    chosen = as_messages(row["chosen"], role="assistant")
    rejected = as_messages(row["rejected"], role="assistant")
    if {chosen[0]["role"], rejected[0]["role"]} <= {"system", "user"}:
        turns = _shared_context(chosen, rejected, prompt=row.get("prompt"))
        chosen, rejected = chosen[-1:], rejected[-1:]
    else:
        turns = _own_prompt(row, completions=(chosen, rejected))
    return {"prompt": _with_system(row, turns), "chosen": chosen, "rejected": rejected}


def _shared_context(chosen: list[Message], rejected: list[Message], *, prompt: Any) -> list[Message]:
    """Returns the turns before the last reply of two whole conversations."""
    if chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        raise Drop("ends_in_user_turn")
    context = chosen[:-1]
    if context != rejected[:-1]:
        raise Drop("contexts_differ")
    if prompt is not None and as_messages(prompt, role="user")[-1] not in context:
        raise Drop("prompt_differs")
    return context


def _own_prompt(row: Row, *, completions: tuple[list[Message], list[Message]]) -> list[Message]:
    """Returns the turns of the row's prompt, with the row's `input` below a prompt of text."""
    text = row.get("prompt")
    turns = as_messages(text, role="user")
    if not isinstance(text, str):
        return turns
    if text and all((side[0]["content"] or "").startswith(text) for side in completions):
        raise Drop("completion_repeats_prompt")
    more = row.get("input")
    if len(turns) == 1 and isinstance(more, str) and more.strip() and more not in turns[0]["content"]:
        turns[0]["content"] += "\n\n" + more
    return turns


def plain_text(dataset: Dataset) -> Dataset:
    """Pairs of rows with prompt, chosen and rejected as plain text, which stays so: TRL's string format.

    The completions continue the prompt, white space included, and no chat template is put around them.

    Raises:
        RecipeError: If a column is missing, or holds messages.
    """
    if messages := [side for side in PAIR_FEATURES if side in dataset.column_names and holds_messages(dataset, side)]:
        raise RecipeError(f"plain_text reads text, and {messages} hold something else. Read it by preference_jsonl.")
    without_place = [column for column in (*_SYSTEM_COLUMNS, "input", "tools") if column in dataset.column_names]
    plain = dataset.remove_columns(without_place)
    note_unread(dataset, used=plain.column_names)
    pairs = preference_jsonl(plain)
    features = Features({**pairs.features, **dict.fromkeys(PAIR_FEATURES, Value("string"))})
    return map_rows(pairs, _contents, features=features, desc="plain text")


def _contents(batch: Row) -> Row:
    return {**batch, **{side: [turns[0]["content"] for turns in batch[side]] for side in PAIR_FEATURES}}


def prompts_alone(dataset: Dataset) -> Dataset:
    """Rows of prompts with completions that say nothing, so that a prompt is checked and counted as in a pair."""
    for side in ("chosen", "rejected"):
        dataset = dataset.add_column(side, [side] * len(dataset))
    return dataset


def shp(dataset: Dataset, *, least_ratio: float = 2.0, pairs_per_post: int = 5) -> Dataset:
    """Pairs of stanfordnlp/SHP: two comments on a Reddit post, the one with the higher score being chosen.

    As the dataset's card advises, the better score is at least `least_ratio` times the worse, and a post gives at most
    `pairs_per_post` pairs, by the highest ratios. The prompt is the post, so that `split_pairs` keeps a post on
    one side. The preference strength is the ratio's logarithm to base 2, and the source is the subreddit.
    """
    require_columns(dataset, _SHP_COLUMNS, name="shp")
    ratios = list(map(_score_ratio, *(map(number, dataset[name]) for name in ("labels", "score_A", "score_B"))))
    posts = dataset["post_id"][:]
    reasons: list[str | None] = [None] * len(dataset)
    pairs_of: Counter[str] = Counter()  # by post
    for row in sorted(range(len(ratios)), key=lambda row: -ratios[row]):
        if ratios[row] < least_ratio:
            reasons[row] = "low_score_ratio" if ratios[row] else "no_rating"
        elif pairs_of[posts[row]] == pairs_per_post:
            reasons[row] = "post_has_enough"
        else:
            pairs_of[posts[row]] += 1
    marked = dataset.add_column("_ratio", ratios).add_column("_reason", reasons)
    return adapt(marked, _shp_pair, name="shp", columns=_SHP_COLUMNS, adds=["preference_strength", "source"])


def _score_ratio(label: float | None, score_a: float | None, score_b: float | None) -> float:
    """Returns the preferred comment's score divided by the other's; 0 where one is missing or not above 0."""
    if label not in (0, 1) or not score_a or not score_b or min(score_a, score_b) <= 0:
        return 0.0
    return score_a / score_b if label == 1 else score_b / score_a


def _shp_pair(row: Row) -> Pair:
    if row["_reason"]:
        raise Drop(row["_reason"])
    better, worse = ("human_ref_A", "human_ref_B") if number(row["labels"]) == 1 else ("human_ref_B", "human_ref_A")
    return {
        **_pair(as_messages(row["history"], role="user"), chosen=row[better], rejected=row[worse]),
        "preference_strength": math.log2(row["_ratio"]),
        "source": re.sub("_(train|validation|test)$", "", row["domain"] or ""),
    }


def ultrafeedback_binarized(dataset: Dataset) -> Dataset:
    """Pairs of UltraFeedback as HuggingFaceH4, trl-lib and argilla have binarized it.

    The preference strength is the difference of the ratings, which may be text. Rows whose chosen answer is not rated
    higher are dropped.
    """
    names = set(dataset.column_names)
    if {"instruction", "chosen_response", "rejected_response"} <= names:
        dataset = rename_columns(dataset, prompt="instruction", chosen="chosen_response", rejected="rejected_response")
    ratings = next((both for both in _ULTRAFEEDBACK_RATINGS if names.issuperset(both)), _ULTRAFEEDBACK_RATINGS[0])
    read_pair = partial(_ultrafeedback_pair, ratings=ratings)
    columns = ["chosen", "rejected", *ratings]
    return adapt(dataset, read_pair, name="ultrafeedback_binarized", columns=columns, adds=["preference_strength"])


def _ultrafeedback_pair(row: Row, *, ratings: tuple[str, str]) -> Pair:
    chosen, rejected = (number(row[rating]) for rating in ratings)
    if chosen is None or rejected is None or len({"/" in str(row[rating]) for rating in ratings}) == 2:
        raise Drop("no_rating")
    if not chosen > rejected:
        raise Drop("not_rated_higher")
    return {**_preference_pair(row), "preference_strength": chosen - rejected}


def sharegpt_pairs(dataset: Dataset) -> Dataset:
    """Pairs of `conversations`, `chosen` and `rejected`, whose messages have `from` and `value` (ShareGPT)."""
    return adapt(dataset, _sharegpt_pair, name="sharegpt_pairs", columns=["conversations", "chosen", "rejected"])


def _sharegpt_pair(row: Row) -> Pair:
    prompt = _with_system(row, as_messages(row["conversations"], role="user"))
    return _pair(prompt, chosen=row["chosen"], rejected=row["rejected"])
