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

import math
import re
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

from datasets import Dataset, Features, Value

from dpo_recipes.dataset_adapters.adapting import DROP_REASONS as DROP_REASONS
from dpo_recipes.dataset_adapters.adapting import PAIR_FEATURES, require_columns
from dpo_recipes.dataset_adapters.adapting import Drop as Drop
from dpo_recipes.dataset_adapters.adapting import Message as Message
from dpo_recipes.dataset_adapters.adapting import Pair as Pair
from dpo_recipes.dataset_adapters.adapting import Row as Row
from dpo_recipes.dataset_adapters.adapting import adapt as adapt
from dpo_recipes.dataset_adapters.adapting import as_messages as as_messages
from dpo_recipes.dataset_adapters.adapting import check_pair as check_pair
from dpo_recipes.dataset_adapters.adapting import keep_pairs as keep_pairs
from dpo_recipes.dataset_adapters.adapting import map_rows as map_rows
from dpo_recipes.dataset_adapters.adapting import rename_columns as rename_columns
from dpo_recipes.dataset_adapters.oasst import oasst1 as oasst1
from dpo_recipes.errors import RecipeError

_SHP_COLUMNS = ["history", "human_ref_A", "human_ref_B", "labels", "score_A", "score_B", "post_id", "domain"]
_ULTRAFEEDBACK_RATINGS = [  # of HuggingFaceH4 and trl-lib; argilla's -cleaned; argilla's first
    ("score_chosen", "score_rejected"),
    ("chosen-rating", "rejected-rating"),
    ("chosen_avg_rating", "rejected_avg_rating"),
]
_SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


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
    whole = {"chosen", "rejected"} <= set(dataset.column_names) - texts  # conversations, which may hold the prompt
    columns = ["chosen", "rejected"] if whole else ["prompt", "chosen", "rejected"]
    return adapt(dataset, _preference_pair, name="preference_jsonl", columns=columns)


def _preference_pair(row: Row) -> Pair:
    chosen = as_messages(row["chosen"], role="assistant")
    rejected = as_messages(row["rejected"], role="assistant")
    if {chosen[0]["role"], rejected[0]["role"]} <= {"system", "user"}:
        return _pair_of_conversations(chosen, rejected, prompt=row.get("prompt"))
    text = row.get("prompt")
    if isinstance(text, str) and text and all(turns[0]["content"].startswith(text) for turns in (chosen, rejected)):
        raise Drop("completion_repeats_prompt")
    return {"prompt": as_messages(text, role="user"), "chosen": chosen, "rejected": rejected}


def _pair_of_conversations(chosen: list[Message], rejected: list[Message], *, prompt: Any) -> Pair:
    if chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        raise Drop("ends_in_user_turn")
    context = chosen[:-1]
    if context != rejected[:-1]:
        raise Drop("contexts_differ")
    if prompt is not None and as_messages(prompt, role="user")[-1] not in context:
        raise Drop("prompt_differs")
    return {"prompt": context, "chosen": chosen[-1:], "rejected": rejected[-1:]}


def plain_text(dataset: Dataset) -> Dataset:
    """Pairs of rows with prompt, chosen and rejected as plain text, which stays so: TRL's string format.

    The completions go on with the prompt, white space included, and no chat template is put around them.

    Raises:
        RecipeError: If a column is missing, or holds messages.
    """
    kinds = {side: dataset.features.get(side, Value("string")) for side in PAIR_FEATURES}
    if messages := [side for side, kind in kinds.items() if kind != Value("string")]:
        raise RecipeError(f"plain_text reads text, and {messages} hold something else. Read it by preference_jsonl.")
    pairs = preference_jsonl(dataset)
    return map_rows(pairs, _contents, features=Features({**pairs.features, **kinds}), desc="plain text")


def _contents(batch: Row) -> Row:
    return {**batch, **{side: [turns[0]["content"] for turns in batch[side]] for side in PAIR_FEATURES}}


def prompts_alone(dataset: Dataset) -> Dataset:
    """Rows of prompts with sides that say nothing, so that a prompt is checked and counted as in a pair."""
    for side in ("chosen", "rejected"):
        dataset = dataset.add_column(side, [side] * len(dataset))
    return dataset


def shp(dataset: Dataset, *, least_ratio: float = 2.0, pairs_per_post: int = 5) -> Dataset:
    """Pairs of stanfordnlp/SHP: two comments on a Reddit post, the one with the higher score being chosen.

    As the dataset's card advises, the better score is at least `least_ratio` times the worse, and a post gives at most
    `pairs_per_post` pairs: those of the highest ratios. The prompt is the post, so that `split_pairs` keeps a post on
    one side. The margin is the ratio's logarithm to base 2, and the source is the subreddit.
    """
    require_columns(dataset, _SHP_COLUMNS, name="shp")
    ratios = list(map(_score_ratio, dataset["labels"][:], dataset["score_A"][:], dataset["score_B"][:]))
    reasons = [None if ratio >= least_ratio else "low_score_ratio" if ratio else "no_rating" for ratio in ratios]
    by_post = defaultdict(list)
    for row, post in enumerate(dataset["post_id"][:]):
        if reasons[row] is None:
            by_post[post].append(row)
    for rows in by_post.values():
        for row in sorted(rows, key=lambda row: -ratios[row])[pairs_per_post:]:
            reasons[row] = "post_has_enough"
    marked = dataset.add_column("_ratio", ratios).add_column("_reason", reasons)
    return adapt(marked, _shp_pair, name="shp", columns=_SHP_COLUMNS, adds=["margin", "source"])


def _score_ratio(label: int | None, score_a: int | None, score_b: int | None) -> float:
    """The preferred comment's score by the other's; 0 where one is missing or not above 0."""
    if label not in (0, 1) or min(score_a or 0, score_b or 0) <= 0:
        return 0.0
    return score_a / score_b if label == 1 else score_b / score_a  # type: ignore[operator]


def _shp_pair(row: Row) -> Pair:
    if row["_reason"]:
        raise Drop(row["_reason"])
    better, worse = ("human_ref_A", "human_ref_B") if row["labels"] == 1 else ("human_ref_B", "human_ref_A")
    return {
        "prompt": as_messages(row["history"], role="user"),
        "chosen": as_messages(row[better], role="assistant"),
        "rejected": as_messages(row[worse], role="assistant"),
        "margin": math.log2(row["_ratio"]),
        "source": re.sub("_(train|validation|test)$", "", row["domain"] or ""),
    }


def ultrafeedback_binarized(dataset: Dataset) -> Dataset:
    """Pairs of UltraFeedback as HuggingFaceH4, trl-lib and argilla have binarized it.

    The margin is the difference of the ratings. Rows whose chosen answer is not rated higher are dropped.
    """
    names = set(dataset.column_names)
    if {"instruction", "chosen_response", "rejected_response"} <= names:
        dataset = rename_columns(dataset, prompt="instruction", chosen="chosen_response", rejected="rejected_response")
    ratings = next((both for both in _ULTRAFEEDBACK_RATINGS if names.issuperset(both)), _ULTRAFEEDBACK_RATINGS[0])
    read_pair = partial(_ultrafeedback_pair, ratings=ratings)
    columns = ["chosen", "rejected", *ratings]
    return adapt(dataset, read_pair, name="ultrafeedback_binarized", columns=columns, adds=["margin"])


def _ultrafeedback_pair(row: Row, *, ratings: tuple[str, str]) -> Pair:
    chosen, rejected = (row[rating] for rating in ratings)
    if chosen is None or rejected is None:
        raise Drop("no_rating")
    if not chosen > rejected:
        raise Drop("not_rated_higher")
    return {**_preference_pair(row), "margin": chosen - rejected}


def sharegpt_pairs(dataset: Dataset) -> Dataset:
    """Pairs of `conversations`, `chosen` and `rejected`, whose messages are of `from` and `value` (ShareGPT)."""
    return adapt(dataset, _sharegpt_pair, name="sharegpt_pairs", columns=["conversations", "chosen", "rejected"])


def _sharegpt_pair(row: Row) -> Pair:
    return {
        "prompt": as_messages(_from_sharegpt(row["conversations"]), role="user"),
        "chosen": as_messages(_from_sharegpt(row["chosen"]), role="assistant"),
        "rejected": as_messages(_from_sharegpt(row["rejected"]), role="assistant"),
    }


def _from_sharegpt(value: Any) -> Any:
    """The messages with `role` and `content`; a single message as a list of one."""
    turns = [value] if isinstance(value, dict) else value
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return turns
    return [{"role": _SHAREGPT_ROLES.get(turn.get("from"), ""), "content": turn.get("value")} for turn in turns]


def recognise(dataset: Dataset) -> Callable[[Dataset], Dataset]:
    """The dataset adapter whose columns the dataset has, else `preference_jsonl`, which says what it needs."""
    names = set(dataset.column_names)
    if names.issuperset(_SHP_COLUMNS):
        return shp
    if "message_tree_id" in names:
        return oasst1
    if any(names.issuperset(ratings) for ratings in _ULTRAFEEDBACK_RATINGS):
        return ultrafeedback_binarized
    if "conversations" in names:
        return sharegpt_pairs
    texts = dataset.features.get("chosen") == Value("string")
    return hh_rlhf if texts and "prompt" not in names else preference_jsonl
