"""Every row becomes a pair that keeps the contract, or is counted under a reason."""

import gzip
import importlib
import json
import os
import sys
from pathlib import Path

import pytest
from datasets import Dataset, Features, Value, concatenate_datasets
from hypothesis import given, settings
from hypothesis import strategies as st
from pair_contract import assistant, keeps_the_contract, outcome, system, user

from dpo_recipes.dataset_adapters import Drop, adapt, adapting, as_messages, hh_rlhf, preference_jsonl
from dpo_recipes.dataset_adapters.adapting import DROP_REASONS, check_pair, rename_columns
from dpo_recipes.dataset_adapters.ledger import Ledger
from dpo_recipes.errors import RecipeError

FIXTURES = Path(__file__).parents[1] / "fixtures"
DATA = os.environ.get("DPO_RECIPES_DATA")


def dialogue(*turns):
    return "".join(f"\n\n{speaker}: {text}" for speaker, text in zip(["Human", "Assistant"] * 9, turns, strict=False))


def rows_of(name):
    return [json.loads(line) for line in (FIXTURES / name).read_text(encoding="utf-8").splitlines()]


# hh_rlhf


def test_hh_rlhf_golden_rows():
    with Ledger() as ledger:
        pairs = hh_rlhf(Dataset.from_list(rows_of("hh_rlhf.jsonl"))).to_list()
    assert pairs == [
        {
            "prompt": [user("How do I boil an egg?")],
            "chosen": [assistant("Seven minutes in boiling water.")],
            "rejected": [assistant("I cannot say.")],
        },
        {
            "prompt": [user("Name a river."), assistant("The Rhine."), user("Another?")],
            "chosen": [assistant("The river Elbe.")],
            "rejected": [assistant("The river bank is wet.")],
        },
        {
            "prompt": [user("Hello"), assistant("Hi.\n\nWhat can I do?"), user("Sing.")],
            "chosen": [assistant("La la.")],
            "rejected": [assistant("No.")],
        },
        {
            "prompt": [user("Two lines, please")],
            "chosen": [assistant("“One.”\n\nTwo.")],
            "rejected": [assistant("One.")],
        },
    ]
    account = ledger.accounts["train"]
    assert {reason: (drop.count, drop.first) for reason, drop in account.dropped.items()} == {
        "identical_completions": (1, ["row 5"]),
        "empty_completion": (1, ["row 6"]),
        "contexts_differ": (1, ["row 7"]),
        "ends_in_user_turn": (1, ["row 8"]),
        "begins_with_assistant": (1, ["row 9"]),
        "prompt_not_ending_in_user": (1, ["row 10"]),
        "text_before_first_turn": (1, ["row 11"]),
        "no_assistant_turn": (1, ["row 12"]),
        "empty_prompt": (1, ["row 13"]),
        "missing_value": (1, ["row 14"]),
    }
    assert (account.rows, account.kept) == (14, 4)


def test_words_that_both_replies_begin_with_stay_in_the_completion():
    pair = outcome(hh_rlhf, {"chosen": dialogue("Hi", "I am well."), "rejected": dialogue("Hi", "I am ill.")})
    assert (pair["chosen"][0]["content"], pair["rejected"][0]["content"]) == ("I am well.", "I am ill.")


def test_a_speaker_named_within_a_line_is_no_turn():
    pair = outcome(
        hh_rlhf, {"chosen": dialogue("Say Human: x", "Human: x"), "rejected": dialogue("Say Human: x", "No")}
    )
    assert pair["prompt"] == [user("Say Human: x")]
    assert pair["chosen"] == [assistant("Human: x")]


def test_columns_of_another_type_are_counted_not_a_crash():
    assert outcome(hh_rlhf, {"chosen": 3, "rejected": 4}) == "not_text_or_messages"


def test_missing_columns_are_refused_with_a_remedy():
    with pytest.raises(RecipeError) as error:
        hh_rlhf(Dataset.from_list([{"instruction": "a", "output": "b"}]))
    message = str(error.value)
    assert message.startswith("hh_rlhf needs the columns chosen and rejected, got ['instruction', 'output'].")
    assert "Name yours with --columns chosen=...,rejected=..." in message
    assert 'recipes/README.md, "Your own data"' in message


@pytest.mark.skipif(DATA is None, reason="DPO_RECIPES_DATA names no folder of real data")
def test_every_real_hh_rlhf_row_is_kept_or_counted():
    files = sorted(Path(DATA or "", "hh-rlhf").glob("*/*.jsonl.gz"))
    assert files
    rows = [json.loads(line) for file in files for line in gzip.decompress(file.read_bytes()).splitlines()]
    with Ledger() as ledger:
        pairs = hh_rlhf(Dataset.from_list(rows)).to_list()
    account = ledger.accounts["train"]
    counts = {reason: drop.count for reason, drop in account.dropped.items()}
    assert account.rows == len(rows) == len(pairs) + sum(counts.values())
    assert (counts["identical_completions"], counts["contexts_differ"], counts["empty_completion"]) == (29, 16, 9)
    assert all(keeps_the_contract(pair) for pair in pairs)
    replies = {(row["chosen"].rpartition("\n\nAssistant:")[2].strip()) for row in rows}
    assert all(pair["chosen"][0]["content"] in replies for pair in pairs)  # not a word has moved into the prompt


# preference_jsonl


def test_preference_jsonl_golden_rows():
    with Ledger() as ledger:
        pairs = preference_jsonl(Dataset.from_list(rows_of("preferences.jsonl"), on_mixed_types="use_json")).to_list()
    assert pairs == [
        {
            "prompt": [user("Name a colour.")],
            "chosen": [assistant("Blue.")],
            "rejected": [assistant("Seven.")],
            "margin": 1.5,
            "source": "made by hand",
        },
        {
            "prompt": [system("Be brief."), user("Name a colour.")],
            "chosen": [assistant("Green.")],
            "rejected": [assistant("A colour is a thing that ...")],
            "margin": 0.5,
            "source": "made by hand",
        },
        {
            "prompt": [user("Name a bird.")],
            "chosen": [assistant("A wren.")],
            "rejected": [assistant("A trout.")],
            "margin": 2.0,
            "source": "made by hand",
        },
    ]
    assert list(ledger.accounts["train"].dropped) == ["prompt_differs"]


def test_whole_conversations_need_no_prompt_column():
    context = [user("a"), assistant("b"), user("c")]
    pair = outcome(preference_jsonl, {"chosen": [*context, assistant("d")], "rejected": [*context, assistant("e")]})
    assert pair == {"prompt": context, "chosen": [assistant("d")], "rejected": [assistant("e")]}


def test_strings_need_a_prompt_column():
    with pytest.raises(RecipeError, match="needs the columns prompt, chosen and rejected, got"):
        preference_jsonl(Dataset.from_list([{"chosen": "a", "rejected": "b"}]))


def test_files_of_trls_conversational_format_are_taken_as_they_are():
    row = {
        "prompt": [system("Be brief."), user("Name a tree."), assistant("Oak."), user("Another?")],
        "chosen": [assistant("Elm.")],
        "rejected": [assistant("No.")],
    }
    assert outcome(preference_jsonl, row) == row
    implicit = {side: row["prompt"] + row[side] for side in ("chosen", "rejected")}
    assert outcome(preference_jsonl, implicit) == row


def test_renamed_columns_swap_and_what_they_shadow_is_kept_unused():
    rows = Dataset.from_list([{"prompt": "old", "instruction": "q", "chosen": "b", "rejected": "a", "votes": 1}])
    renamed = rename_columns(rows, prompt="instruction", chosen="rejected", rejected="chosen")
    assert renamed[0] == {"prompt": "q", "chosen": "a", "rejected": "b", "votes": 1, "unused_prompt": "old"}


@pytest.mark.parametrize("theirs", [{"prompt": "nope"}, {"prompt": "question", "chosen": "question"}])
def test_a_column_that_is_not_there_or_named_twice_is_refused_with_the_list(theirs):
    with pytest.raises(RecipeError, match=r"the dataset has \['question', 'best'\]"):
        rename_columns(Dataset.from_list([{"question": "q", "best": "a"}]), **theirs)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": None, "chosen": "a", "rejected": "b"}, "missing_value"),
        ({"prompt": "q", "chosen": "a", "rejected": None}, "missing_value"),
        ({"prompt": "q", "chosen": "a", "rejected": " \n"}, "empty_completion"),
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, "empty_prompt"),
        ({"prompt": [], "chosen": "a", "rejected": "b"}, "empty_prompt"),
        ({"prompt": "q", "chosen": [], "rejected": "b"}, "empty_completion"),
        ({"prompt": "q", "chosen": "a", "rejected": "a "}, "identical_completions"),
        ({"prompt": "q", "chosen": "q a", "rejected": "q b"}, "completion_repeats_prompt"),
        ({"prompt": 7, "chosen": "a", "rejected": "b"}, "not_text_or_messages"),
        ({"prompt": [system("s")], "chosen": "a", "rejected": "b"}, "no_user_turn"),
        ({"prompt": [user("q"), assistant("x")], "chosen": "a", "rejected": "b"}, "prompt_not_ending_in_user"),
        ({"prompt": [{"role": "human", "content": "q"}], "chosen": "a", "rejected": "b"}, "unknown_role"),
        ({"prompt": [{"role": "user", "content": ["q"]}], "chosen": "a", "rejected": "b"}, "content_not_text"),
        ({"prompt": [{"from": "user", "value": 1}], "chosen": "a", "rejected": "b"}, "content_not_text"),
        ({"prompt": "q", "chosen": [user("q"), assistant("a")], "rejected": "b"}, "completion_not_assistant"),
        (
            {"prompt": "q", "chosen": [user("q"), assistant("a")], "rejected": [user("r"), assistant("b")]},
            "contexts_differ",
        ),
        ({"prompt": "q", "chosen": [user("q")], "rejected": [user("q"), assistant("b")]}, "ends_in_user_turn"),
    ],
)
def test_a_row_that_makes_no_pair_is_counted_under_its_reason(row, reason):
    assert outcome(preference_jsonl, row) == reason
    assert reason in DROP_REASONS


def test_an_adapter_of_ones_own_counts_its_own_reasons():
    def forum_pair(row):
        if row["votes"] < 3:
            raise Drop("too_few_votes")
        return {
            "prompt": as_messages(row["question"], role="user"),
            "chosen": as_messages(row["best"], role="assistant"),
            "rejected": as_messages(row["worst"], role="assistant"),
        }

    rows = [{"question": "q", "best": "a", "worst": "b", "votes": votes, "id": str(votes)} for votes in (2, 3)]
    with Ledger() as ledger:
        pairs = adapt(Dataset.from_list(rows), forum_pair, name="forum", columns=["question", "best", "worst", "votes"])
    assert pairs["id"][:] == ["3"]
    assert ledger.accounts["train"].dropped["too_few_votes"].count == 1


# Properties

texts = st.one_of(st.none(), st.sampled_from(["", " ", "a", "b", "a b", "ü\n\nHuman:", "q"]), st.text(max_size=8))
roles = st.sampled_from(["system", "user", "assistant", "tool"])
messages = st.lists(st.fixed_dictionaries({"role": roles, "content": texts}), max_size=4)
dialogues = st.one_of(
    texts,
    st.lists(st.tuples(st.sampled_from(["\n\nHuman:", "\n\nAssistant:"]), st.sampled_from([" a", " b", "", " "])))
    .map(lambda turns: "".join(marker + text for marker, text in turns)),
)  # fmt: skip
hh_rlhf_rows = st.fixed_dictionaries({"chosen": dialogues, "rejected": dialogues})
preference_rows = st.one_of(
    st.lists(st.fixed_dictionaries({"prompt": texts, "chosen": texts, "rejected": texts}), max_size=6),
    st.lists(st.fixed_dictionaries({"prompt": messages, "chosen": messages, "rejected": messages}), max_size=6),
)
FEATURES = {
    "text": Features({name: Value("string") for name in adapting.PAIR_FEATURES}),
    "messages": Features(adapting.PAIR_FEATURES),
}


def preference_dataset(rows):
    kind = "text" if rows and not any(isinstance(value, list) for row in rows for value in row.values()) else "messages"
    return Dataset.from_list(rows, features=FEATURES[kind]) if rows else Dataset.from_dict(
        {name: [] for name in FEATURES[kind]}, features=FEATURES[kind]
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.lists(hh_rlhf_rows, min_size=1, max_size=8))
def test_any_hh_rlhf_rows_are_kept_or_counted(rows):
    features = Features({side: Value("string") for side in ("chosen", "rejected")})
    with Ledger() as ledger:
        pairs = hh_rlhf(Dataset.from_list(rows, features=features)).to_list()
    account = ledger.total()
    assert len(rows) == account.rows == len(pairs) + sum(drop.count for drop in account.dropped.values())
    assert account.kept == len(pairs)
    assert all(keeps_the_contract(pair) for pair in pairs)
    assert set(account.dropped) <= set(DROP_REASONS)


@settings(max_examples=60, deadline=None)
@given(preference_rows)
def test_any_preference_rows_are_kept_or_counted(rows):
    with Ledger() as ledger:
        pairs = preference_jsonl(preference_dataset(rows)).to_list()
    account = ledger.total()
    assert len(rows) == account.rows == len(pairs) + sum(drop.count for drop in account.dropped.values())
    assert all(keeps_the_contract(pair) for pair in pairs)
    assert set(account.dropped) <= set(DROP_REASONS)


@settings(max_examples=30, deadline=None)
@given(preference_rows)
def test_a_second_pass_changes_nothing(rows):
    pairs = preference_jsonl(preference_dataset(rows))
    assert preference_jsonl(pairs).to_list() == pairs.to_list()


@settings(max_examples=30, deadline=None)
@given(st.lists(hh_rlhf_rows, min_size=1, max_size=8))
def test_the_order_of_the_rows_is_of_no_account(rows):
    features = Features({side: Value("string") for side in ("chosen", "rejected")})
    pairs = hh_rlhf(Dataset.from_list(rows, features=features)).to_list()
    backwards = hh_rlhf(Dataset.from_list(rows[::-1], features=features)).to_list()
    assert backwards == pairs[::-1]


def test_check_pair_passes_a_pair_that_keeps_the_contract():
    check_pair({"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]})


# The ledger


def hh_dataset(count, *, split="train"):
    rows = [
        {"chosen": dialogue(f"q{i}", "a"), "rejected": dialogue(f"q{i}", "b" if i % 4 else "a")} for i in range(count)
    ]
    return Dataset.from_list(rows, split=split)


def test_the_count_is_the_same_from_the_cache_and_from_several_processes(tmp_path, monkeypatch):
    hh_dataset(100).to_json(tmp_path / "rows.jsonl")
    rows = Dataset.from_json(str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path / "cache"))

    def count():
        with Ledger() as ledger:
            hh_rlhf(rows)
        return ledger.total()

    first = count()
    assert first.dropped["identical_completions"].count == 25
    files = set((tmp_path / "cache").rglob("*.arrow"))
    assert count() == first
    assert set((tmp_path / "cache").rglob("*.arrow")) == files  # it did come from the cache
    monkeypatch.setattr(adapting, "_PARALLEL_FROM", 100)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert Dataset.cleanup_cache_files(rows) == 1
    assert count() == first
    assert len(set((tmp_path / "cache").rglob("*.arrow"))) == 3  # the rows and a part by each process


def test_a_changed_dataset_adapter_does_not_read_the_old_cache(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    code = 'def read(row):\n    return dict(prompt=[dict(role="user", content="q")], **{{side: [dict(role="assistant", content="{0}" + row[side])] for side in row}})\n'  # noqa: E501
    (tmp_path / "forum_adapter.py").write_text(code.format("old "))
    module = importlib.import_module("forum_adapter")
    hh_dataset(3).to_json(tmp_path / "rows.jsonl")
    rows = Dataset.from_json(str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path / "cache"))
    assert adapt(rows, module.read, name="f", columns=[])[0]["chosen"][0]["content"].startswith("old ")
    (tmp_path / "forum_adapter.py").write_text(code.format("new "))
    module = importlib.reload(module)
    assert adapt(rows, module.read, name="f", columns=[])[0]["chosen"][0]["content"].startswith("new ")


def test_rows_are_counted_under_their_split():
    with Ledger() as ledger:
        hh_rlhf(hh_dataset(8))
        hh_rlhf(hh_dataset(4, split="test"))
    assert {split: (account.rows, account.kept) for split, account in ledger.accounts.items()} == {
        "train": (8, 6),
        "test": (4, 3),
    }
    assert (ledger.total().rows, ledger.total().kept) == (12, 9)


def test_two_datasets_add_up_in_one_split():
    with Ledger() as ledger:
        pairs = concatenate_datasets([hh_rlhf(hh_dataset(8)), hh_rlhf(hh_dataset(4))])
        ledger.record("later", "train", came=len(pairs), kept=len(pairs))
    account = ledger.total()
    assert (account.rows, account.kept, account.dropped["identical_completions"].count) == (12, 9, 3)
    assert "removed_by_load_pairs" not in account.dropped


def test_rows_that_vanish_between_two_stages_are_counted_too():
    with Ledger() as ledger:
        pairs = hh_rlhf(hh_dataset(8)).select(range(4))
        ledger.record("later", "train", came=len(pairs), kept=len(pairs))
    account = ledger.total()
    assert (account.rows, account.kept, account.dropped["removed_by_load_pairs"].count) == (8, 4, 2)


def test_messages_that_become_pairs_add_up():
    with Ledger() as ledger:
        counts = {"came": 9, "in_pairs": 5, "pairs_made": 3, "kept": 2}
        ledger.record(
            "trees", "train", **counts, dropped={"deleted": [0, 1, 2, 3], "identical_completions": [4]}, new=True
        )
        ledger.record("later", "train", came=2, kept=2)
    account = ledger.total()
    assert (account.rows, account.in_pairs, account.pairs_made, account.kept) == (9, 5, 3, 2)
    other = Ledger()
    other.add(ledger)
    other.add(ledger)
    assert (other.total().rows, other.total().dropped["deleted"].count) == (18, 8)


def test_a_stage_that_loses_rows_is_an_error():
    with pytest.raises(RuntimeError, match="sieve lost rows of train"):
        Ledger().record("sieve", "train", came=5, kept=3, dropped={"odd": [1]})


def test_an_account_that_does_not_add_up_is_an_error():
    ledger = Ledger()
    ledger.record("adapter", "train", came=5, kept=5, new=True)
    ledger.accounts["train"].kept = 4
    with pytest.raises(RuntimeError, match="does not add up"):
        ledger.total()


def test_only_the_innermost_open_ledger_counts():
    with Ledger() as outer:
        with Ledger() as inner:
            hh_rlhf(hh_dataset(4))
        hh_rlhf(hh_dataset(8))
    hh_rlhf(hh_dataset(12))
    assert (inner.total().rows, outer.total().rows) == (4, 8)
