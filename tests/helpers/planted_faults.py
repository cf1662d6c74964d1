"""A clean dataset of 400 preference pairs, and a corrupted one with thirty planted faults."""

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]

_FIRST, _SECOND = "ba ce di fe gu ha je ki lo mu", "dan fer gil hom jun kas lev mip"
_WORDS = [first + second for first in _FIRST.split() for second in _SECOND.split()]
MAX_LENGTH = 700  # tokens of a tokenizer that makes one a byte

# In a row of its own each, where the account of rows must name the reason.
ROW_FAULTS: dict[str, tuple[str, Callable[[Row], Row]]] = {
    "prompt is null": ("missing_value", lambda row: {**row, "prompt": None}),
    "chosen is null": ("missing_value", lambda row: {**row, "chosen": None}),
    "rejected is null": ("missing_value", lambda row: {**row, "rejected": None}),
    "prompt without turns": ("empty_prompt", lambda row: {**row, "prompt": []}),
    "blank last user turn": ("empty_prompt", lambda row: {**row, "prompt": _user(" \n\t")}),
    "chosen without turns": ("empty_completion", lambda row: {**row, "chosen": []}),
    "blank rejected": ("empty_completion", lambda row: {**row, "rejected": _assistant("  ")}),
    "the same answer twice": ("identical_completions", lambda row: {**row, "rejected": row["chosen"]}),
    "the same but for blanks": (
        "identical_completions",
        lambda row: {**row, "rejected": _assistant(f"  {row['chosen'][0]['content']}\n")},
    ),
    "a role that is none": ("unknown_role", lambda row: {**row, "prompt": [_turn("human", "Who am I?")]}),
    "content is null": ("content_not_text", lambda row: {**row, "chosen": [_turn("assistant", None)]}),
    "prompt ends in an answer": (
        "prompt_not_ending_in_user",
        lambda row: {**row, "prompt": row["prompt"] + _assistant("Said already.")},
    ),
    "prompt of a system message alone": ("no_user_turn", lambda row: {**row, "prompt": [_turn("system", "Be brief.")]}),
    "chosen begins with the user": (
        "completion_not_assistant",
        lambda row: {**row, "chosen": _user("And then?") + row["chosen"]},
    ),
    "two contexts": (
        "contexts_differ",
        lambda row: {
            **row,
            "chosen": row["prompt"] + row["chosen"],
            "rejected": _user("Something else?") + row["rejected"],
        },
    ),
    "prompt is not in the conversations": (
        "prompt_differs",
        lambda row: {
            "prompt": _user("Never asked?"),
            "chosen": row["prompt"] + row["chosen"],
            "rejected": row["prompt"] + row["rejected"],
        },
    ),
    "conversations that end in a question": (
        "ends_in_user_turn",
        lambda row: {**row, **{side: row["prompt"] + row[side] + _user("Why?") for side in ("chosen", "rejected")}},
    ),
    "a question over max_length": ("too_long", lambda row: {**row, "prompt": _user("long " * MAX_LENGTH)}),
    "an answer over max_length": ("too_long", lambda row: {**row, "rejected": _assistant("long " * MAX_LENGTH)}),
}

# In many pairs, which stay: where the findings must name it.
SET_FAULTS = {
    "long histories, of which the oldest turns are cut": "completion_at_risk",
    "exact copies": "duplicates",
    "near copies": "near_duplicates",
    "a pair and its opposite": "contradictions",
    "one prompt over and over": "frequent_prompt",
    "a test prompt in training, in capitals": "near_leaks",
    "chosen is longer": "longer",
    "chosen has a list": "list",
    "chosen has Markdown": "formatting",
    "rejected is a refusal": "refusal",
}
# What follows from these: the rules that are learned find the marks too.
CONSEQUENCES = {"first_word", "bag_of_words"}
LEAKED = "a test prompt in training, word for word"
LEAKED_REASON = "prompt_in_test"


def clean(train: int = 360, test: int = 40) -> dict[str, list[Row]]:
    """Pairs of invented words in which nothing is wrong."""
    return {"train": [_pair(n) for n in range(train)], "test": [_pair(100_000 + n) for n in range(test)]}


def corrupted() -> dict[str, list[Row]]:
    """The clean pairs with every fault planted, and nothing else changed."""
    rows = clean()
    train = [_with_give_aways(row, n) for n, row in enumerate(rows["train"])]
    spare = iter(_pair(200_000 + n) for n in range(1_000))
    train += [fault(next(spare)) for _, fault in ROW_FAULTS.values()]
    train += [{**next(spare), "prompt": rows["test"][0]["prompt"]}]
    train += [_with_history(next(spare)) for _ in range(30)]
    train += copy.deepcopy(train[:8])
    train += [_all_but_the_same(row) for row in train[20:34]]
    train += [{**train[50], "chosen": train[50]["rejected"], "rejected": train[50]["chosen"]}]
    train += [{**next(spare), "prompt": _user("What is the time?")} for _ in range(25)]
    test = rows["test"] + [{**next(spare), "prompt": _user(train[60]["prompt"][0]["content"].upper())}]
    order = random.Random(0).sample(range(len(train)), len(train))
    return {"train": [train[n] for n in order], "test": test}


def write(rows: dict[str, list[Row]], folder: Path) -> Path:
    """The folder, holding a jsonl file of each split."""
    folder.mkdir(parents=True)
    for split, of_split in rows.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_split))
    return folder


def _pair(seed: int) -> Row:
    drawn = random.Random(seed)
    texts = [" ".join(drawn.choices(_WORDS, k=drawn.randint(12, 24))).capitalize() + "." for _ in range(3)]
    return {"prompt": _user(texts[0]), "chosen": _assistant(texts[1]), "rejected": _assistant(texts[2])}


def _with_give_aways(row: Row, number: int) -> Row:
    chosen, rejected = (row[side][0]["content"] for side in ("chosen", "rejected"))
    if number % 4:  # three of four: enough for any rule to see
        chosen = f"**{chosen}**\n\n- {chosen[:30]}\n- {chosen[-30:]}"
        rejected = f"I'm sorry, but {rejected}"
    return {**row, "chosen": _assistant(chosen), "rejected": _assistant(rejected)}


def _with_history(row: Row) -> Row:
    return {**row, "prompt": _user("Once " * 100) + _assistant("Upon a time.") + row["prompt"]}


def _all_but_the_same(row: Row) -> Row:
    return {side: [{**turns[0], "content": f"{turns[0]['content'].upper()} !"}] for side, turns in row.items()}


def _turn(role: str, content: str | None) -> Row:
    return {"role": role, "content": content}


def _user(content: str) -> list[Row]:
    return [_turn("user", content)]


def _assistant(content: str) -> list[Row]:
    return [_turn("assistant", content)]
