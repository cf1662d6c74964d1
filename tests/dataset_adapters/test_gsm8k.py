"""Right and wrong solutions of GSM8K: the checker of answers, the marks, the pairs, and the account of questions."""

import json
import os
import sys
from pathlib import Path

import pytest
from commands import REPOSITORY
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from pair_contract import keeps_the_contract

from dpo_recipes.dataset_adapters import (
    final_answer,
    gsm8k,
    is_right,
    marked_solutions,
    preference_jsonl,
    recognise,
    right_against_wrong,
)
from dpo_recipes.dataset_adapters.ledger import Ledger
from dpo_recipes.errors import RecipeError
from dpo_recipes.loading import load_rows, prompt_hashes, split_pairs
from dpo_recipes.preflight.account import account_lines
from dpo_recipes.recipe import RecipeArguments

FIXTURES = REPOSITORY / "tests" / "fixtures"
DATA = os.environ.get("DPO_RECIPES_DATA")


def rows_of(name):
    return load_rows(RecipeArguments(dataset_name=str(FIXTURES / name)))["train"]


def counted(function, *given, **options):
    """What the function returns, and the account of its rows, which adds up."""
    with Ledger() as ledger:
        found = function(*given, **options)
    return found, ledger.total()


def dropped(account):
    return {reason: drop.count for reason, drop in account.dropped.items()}


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("48/2 = <<48/2=24>>24 clips\n#### 24", "24"),
        ("48/2 = <<48/2=12>>24 clips\n#### 24", "24"),  # a calculator's fault is not the answer
        ("so there are <<48/2=12>>24 clips", "24"),
        ("#### 1,450,000", "1450000"),
        ("#### $1,234.50", "1234.5"),
        ("#### 18.", "18"),
        ("#### -$5", "-5"),
        ("A: $-5", "-5"),
        ("a\nA: 3.0\n", "3"),
        ("A: 5 apples\nso 7 are left", "7"),  # not the last line
        ("#### 1/2", "0.5"),
        ("It is $\\frac{3}{4}$, so \\boxed{\\frac{3}{4}}.", "0.75"),
        ("The answer is 18 dollars.", "18"),
        ("#### 18\nQuestion: and 20?\n#### 20", "18"),  # a model that goes on
        ("####", None),
        ("I cannot say.", None),
        ("", None),
    ],
)
def test_the_answer_is_the_number_that_a_solution_ends_in(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("1000", "#### 1,000", True),
        ("0.5", "#### 1/2", True),
        ("25%", "#### 25", True),
        ("25", "#### 25%", True),
        ("-3", "#### 3", False),
        ("0.333", "#### 1/3", False),
        ("2.750", "#### 2,750", False),
        ("nobody knows", "#### 3", False),
        ("3", "nobody knows", None),
    ],
)
def test_equal_numbers_are_right_however_they_are_written(answer, reference, right):
    assert is_right(f"#### {answer}", reference) is right


def test_marks_and_votes_come_with_each_question():
    questions, account = counted(marked_solutions, rows_of("gsm8k.jsonl"))
    assert questions["right"][:] == [[True, False, True, False], [True] * 4, [False] * 4, [True, False, False, True]]
    assert questions["votes"][2] == ["1250", "250", None, "2570"]
    assert (account.rows, account.kept, dropped(account)) == (4, 4, {})


def test_answers_of_ones_own_are_marked_by_the_checker():
    questions, account = counted(marked_solutions, rows_of("gsm8k_own.jsonl"))
    assert questions["right"][:] == [[True, True, False, True], [False, False, False, True]]
    assert questions["votes"][0] == ["144", "144", "40", "144"]
    assert dropped(account) == {"no_reference_answer": 1}


def test_pairs_are_right_against_wrong_and_every_question_is_counted():
    pairs, account = counted(gsm8k, rows_of("gsm8k.jsonl"))
    texts = [[pair[side][0]["content"] for side in ("chosen", "rejected")] for pair in pairs]
    assert len(texts) == 6
    assert all(right.endswith(("A: 144", "A: -2")) and wrong.endswith(("40", "134", "A: 2")) for right, wrong in texts)
    assert sum(wrong.endswith("A: 2") for _, wrong in texts) == 2, "the same wrong solution twice counts once"
    assert all(keeps_the_contract(pair) for pair in pairs)
    assert dropped(account) == {"only_right": 1, "only_wrong": 1}
    assert (account.rows, account.in_pairs, account.pairs_made, account.kept) == (4, 2, 6, 6)


def test_a_question_gives_at_most_so_many_pairs_always_the_same():
    own = Dataset.from_list(
        [{"question": "1+1?", "answer": "#### 2", "completions": [f"#### {n}" for n in range(9)] + ["2"]}]
    )
    few, again = (
        right_against_wrong({"train": marked_solutions(own)}, pairs_per_question=3)["train"].to_list() for _ in range(2)
    )
    assert few == again
    assert len({json.dumps(pair) for pair in few}) == 3


def test_no_question_is_in_train_and_test_with_or_without_pairs():
    rows = Dataset.from_list(
        [
            {"question": f"{n}+1?", "answer": f"#### {n + 1}", "completions": [f"{n + 1}", f"{n + k % 2}"]}
            for n in range(60)
            for k in range(2)
        ]
    )
    with Ledger(0.3) as ledger:
        questions = split_pairs({"train": marked_solutions(rows)})
        pairs = right_against_wrong(questions)
    of = {split: set(prompt_hashes(part)) for split, part in questions.items()}
    assert len(of["train"] | of["test"]) == 60
    assert not of["train"] & of["test"]
    for split, part in pairs.items():
        assert set(prompt_hashes(part)) <= of[split]
    assert all(account.adds_up() for account in ledger.accounts.values())
    assert ledger.accounts["test"].dropped["only_right"].count == len(of["test"])
    assert "rows that the pairs are made of" in "\n".join(account_lines(ledger, limit=""))


def test_the_columns_tell_marked_solutions_from_pairs():
    assert recognise(rows_of("gsm8k.jsonl")) is recognise(rows_of("gsm8k_own.jsonl")) is gsm8k
    assert recognise(Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])) is preference_jsonl
    with pytest.raises(RecipeError, match=r"gsm8k needs a question .* Got \['question', 'answer'\]"):
        marked_solutions(Dataset.from_list([{"question": "1+1?", "answer": "#### 2"}]))


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "question": st.sampled_from([None, "", "a", "b"]),
                "answer": st.sampled_from([None, "", "none", "#### 1"]),
                "completions": st.lists(st.sampled_from([None, "", " ", "1", "#### 1", "#### 2", "A: x"]), max_size=4),
            }
        ),
        min_size=1,
        max_size=6,
    )
)
def test_any_questions_are_kept_or_counted(rows):
    features = rows_features()
    pairs, account = counted(gsm8k, Dataset.from_list(rows, features=features))
    assert account.rows == len(rows) == account.in_pairs + sum(dropped(account).values())
    assert all(keeps_the_contract(pair) for pair in pairs)


def rows_features():
    return Dataset.from_list([{"question": "a", "answer": "b", "completions": ["c"]}]).features


def test_a_missing_library_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(RecipeError, match=r"math-verify, which is missing: pip install 'dpo-recipes\[maths\]'"):
        final_answer("#### 1")


@pytest.mark.slow
@pytest.mark.skipif(DATA is None, reason="DPO_RECIPES_DATA names no folder of real data")
def test_the_checker_agrees_with_every_mark_of_the_real_solutions():
    file = Path(str(DATA)) / "gsm8k" / "example_model_solutions.jsonl.gz"
    rows = load_rows(RecipeArguments(dataset_name=str(file)))["train"]
    solutions = [cell | row for row in rows for cell in row.values() if isinstance(cell, dict)]
    assert len(solutions) == 4 * len(rows) > 4000
    assert [row for row in solutions if is_right(row["solution"], row["ground_truth"]) is not row["is_correct"]] == []
    with Ledger(0.2) as ledger:
        right_against_wrong(split_pairs({"train": marked_solutions(rows)}))
    assert ledger.total().rows == len(rows)
    assert set(ledger.total().dropped) == {"only_right", "only_wrong"}
