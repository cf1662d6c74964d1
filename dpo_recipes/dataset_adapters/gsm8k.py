"""Right and wrong solutions of GSM8K's questions (Cobbe et al. 2021), and the checker that marks a solution."""

import json
import random
import re
from collections import defaultdict
from collections.abc import Mapping
from itertools import product
from typing import Any

from datasets import Dataset, DatasetDict, Features, List, Value

from dpo_recipes.dataset_adapters.adapting import (
    PAIR_FEATURES,
    ROW,
    Drop,
    Row,
    as_messages,
    code_hash,
    note_unread,
    read_rows,
    row_names,
)
from dpo_recipes.dataset_adapters.ledger import current_ledger
from dpo_recipes.errors import RecipeError

_QUESTIONS = ("prompt", "question")
_REFERENCES = ("reference", "ground_truth", "answer")
_CALCULATION = re.compile(r"<<.*?>>")  # GSM8K's calls of a calculator: <<48/2=24>>
_MARKER = re.compile(r"####(.*)|^A:(.*)\s*\Z", re.MULTILINE)  # of GSM8K's references, and of its models' solutions


def final_answer(text: str) -> str | None:
    """Returns the number that a solution ends in, "1000" for "#### $1,000."; None for a text without one.

    The answer follows the first `####`, or `A:` in the last line. A text without either is searched by math-verify,
    which prefers a boxed expression and takes the last one otherwise. An answer that is no number stays as it is read.

    Raises:
        RecipeError: If math-verify is missing.
    """
    found = _parse(text)
    if not found:
        return None
    try:
        return f"{float(found[0]):.12g}"
    except (TypeError, ValueError):
        return str(found[-1])


def is_right(solution: str, reference: str) -> bool | None:
    """Returns True if both texts end in the same number; None for a reference without one.

    Calculations on the way are not looked at: a solution with a wrong one may be right, as in GSM8K's own marks. A
    solution without an answer is wrong. Commas, currencies, units, a final period and trailing zeros do not count, a
    fraction equals its decimal number, and 25 % equals both 25 and 0.25.

    Raises:
        RecipeError: If math-verify is missing.
    """
    wanted = _parse(reference)
    return _math_verify().verify(wanted, _parse(solution)) if wanted else None


def marked_solutions(dataset: Dataset) -> Dataset:
    """Returns the questions with their solutions: `prompt`, `completions`, `right` and `votes` (the final answers).

    The question is in a column `question` or `prompt`. Each column of `{is_correct, solution}` holds a marked solution,
    as in OpenAI's example_model_solutions.jsonl. `completions`, as `dpo-recipes sample` writes them, are marked by
    `is_right` against the column `reference`, `ground_truth` or `answer`.

    Raises:
        RecipeError: If the columns hold no solutions that are marked or can be marked, or math-verify is missing.
    """
    names = dataset.column_names
    if not is_gsm8k(dataset):
        raise RecipeError(
            "gsm8k needs a question (question, prompt), and solutions: columns of {is_correct, solution}, or "
            "completions with a reference (reference, ground_truth, answer). Got "
            f"{[name for name in names if name != ROW]}. Name yours with --columns question=...,reference=..., or "
            "sample solutions: docs/verifier.md."
        )
    references = _REFERENCES if "completions" in names else ()
    note_unread(dataset, used={*_QUESTIONS, *_marked_columns(dataset), "completions", *references, ROW})
    features = {"prompt": PAIR_FEATURES["prompt"], "completions": List(Value("string")), "right": List(Value("bool"))}
    features |= {"votes": List(Value("string"))} | dict.fromkeys({ROW}.intersection(names), Value("string"))
    return read_rows(dataset, _read_question, name="gsm8k", features=features, code=code_hash(_read_question))


def right_against_wrong(questions: Mapping[str, Dataset], *, pairs_per_question: int = 8) -> DatasetDict:
    """Returns pairs of a right and a wrong solution to one question; a question that has only one kind is dropped.

    Args:
        questions: By split, as `marked_solutions` returns them.
        pairs_per_question: Most pairs of a question; they are drawn by a seed of the question.
    """
    return DatasetDict({split: _pair_up(rows, split, pairs_per_question) for split, rows in questions.items()})


def gsm8k(dataset: Dataset) -> Dataset:
    """Pairs of right and wrong solutions to the questions that `marked_solutions` reads."""
    split = str(dataset.split or "train")
    return right_against_wrong({split: marked_solutions(dataset)})[split]


def is_gsm8k(dataset: Dataset) -> bool:
    """Returns True if the columns hold questions with solutions that are marked or can be marked."""
    names = {*dataset.column_names}
    can_be_marked = "completions" in names and names.intersection(_REFERENCES)
    return bool(names.intersection(_QUESTIONS) and (can_be_marked or _marked_columns(dataset)))


def _math_verify() -> Any:
    try:
        import math_verify  # type: ignore[import-untyped]
    except ImportError as error:
        raise RecipeError(
            "Answers are read by math-verify, which is missing: pip install 'dpo-recipes[maths]'."
        ) from error
    return math_verify


def _parse(text: str) -> list[Any]:
    """Returns what math-verify reads as the answer of a text: an expression and its text, or nothing."""
    marker = _MARKER.search(text.rstrip())
    told = (marker[1] or marker[2] or "") if marker else _CALCULATION.sub("", text)
    return list(_math_verify().parse(re.sub(r"(?<![\d)])-\s*\$\s*(?=\d)", "-", told)))  # it reads $-5, not -$5


def _marked_columns(dataset: Dataset) -> list[str]:
    kinds = dataset.features.items()
    return [name for name, kind in kinds if isinstance(kind, dict) and {"is_correct", "solution"} <= kind.keys()]


def _read_question(row: Row) -> Row:
    prompt = as_messages(next((row[name] for name in _QUESTIONS if row.get(name) is not None), None), role="user")
    if not (prompt[-1]["content"] or "").strip():
        raise Drop("empty_prompt")
    cells = [cell for cell in row.values() if isinstance(cell, dict) and {"is_correct", "solution"} <= cell.keys()]
    marks = [(cell["solution"], cell["is_correct"]) for cell in cells if None not in cell.values()]
    if texts := [text for text in row.get("completions") or [] if text is not None]:
        reference = next((row[name] for name in _REFERENCES if row.get(name)), "")
        if final_answer(reference) is None:
            raise Drop("no_reference_answer")
        marks += [(text, is_right(text, reference)) for text in texts]
    if not marks:
        raise Drop("no_solutions")
    completions, right = zip(*marks, strict=True)
    votes = [*map(final_answer, completions)]
    return {"prompt": prompt, "completions": completions, "right": right, "votes": votes}


def _pair_up(rows: Dataset, split: str, most: int) -> Dataset:
    pairs: list[Row] = []
    dropped: dict[str, list[str]] = defaultdict(list)
    for name, row in zip(row_names(rows), rows, strict=True):
        marks = zip(row["completions"], row["right"], strict=True)
        mark_of = {text.strip(): mark for text, mark in marks if text.strip()}
        right, wrong = ([text for text in mark_of if mark_of[text] == mark] for mark in (True, False))
        if not (right and wrong):
            dropped["only_right" if right else "only_wrong"].append(name)
        both = list(product(right, wrong))
        for sides in random.Random(json.dumps(row["prompt"])).sample(both, min(most, len(both))):
            chosen, rejected = ([{"role": "assistant", "content": text}] for text in sides)
            pairs.append({"prompt": row["prompt"], "chosen": chosen, "rejected": rejected, ROW: name})
    made, in_pairs = len(pairs), len(rows) - sum(map(len, dropped.values()))
    counts: dict[str, Any] = {"came": len(rows), "in_pairs": in_pairs, "pairs_made": made, "kept": made}
    current_ledger().record("right_against_wrong", split, dropped=dropped, **counts)
    features = Features({**PAIR_FEATURES, **dict.fromkeys({ROW}.intersection(rows.column_names), Value("string"))})
    columns = {column: [pair[column] for pair in pairs] for column in features}
    return Dataset.from_dict(columns, features=features, split=split)
