"""The dataset adapters of the published datasets: golden rows, any rows, and the real rows at hand."""

import gzip
import json
import math
import os
from pathlib import Path

import pytest
from datasets import Dataset, Features, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from pair_contract import assistant, keeps_the_contract, outcome, system, user

from dpo_recipes.dataset_adapters import (
    hh_rlhf,
    oasst1,
    preference_jsonl,
    recognise,
    sharegpt_pairs,
    shp,
    ultrafeedback_binarized,
)
from dpo_recipes.dataset_adapters.adapting import DROP_REASONS
from dpo_recipes.dataset_adapters.ledger import Ledger
from dpo_recipes.errors import RecipeError
from dpo_recipes.loading import load_rows, mix_pairs, split_pairs
from dpo_recipes.preflight.account import account_lines
from dpo_recipes.recipe import RecipeArguments

DATA = os.environ.get("DPO_RECIPES_DATA")
needs_data = pytest.mark.skipif(DATA is None, reason="DPO_RECIPES_DATA names no folder of real data")


def adapted(dataset_adapter, rows, **features):
    """The pairs, and how many rows were dropped for each reason; the account adds up."""
    dataset = Dataset.from_list(rows, features=Features(features) if features else None)
    with Ledger() as ledger:
        pairs = dataset_adapter(dataset).to_list()
    account = ledger.total()
    assert account.kept == len(pairs)
    assert all(keeps_the_contract(pair) for pair in pairs)
    assert set(account.dropped) <= set(DROP_REASONS)
    assert max(map(len, DROP_REASONS.values())) < 52
    return pairs, {reason: drop.count for reason, drop in account.dropped.items()}, account


# shp


def post(a, b, *, label, post_id="p1", history="Why is the sky blue?", texts=("Air.", "Paint."), domain="askscience"):
    """A row of the published schema of stanfordnlp/SHP, written by hand: no real row was at hand."""
    return {
        "post_id": post_id,
        "domain": f"{domain}_train",
        "upvote_ratio": 0.9,
        "history": history,
        "c_root_id_A": f"a{a}",
        "c_root_id_B": f"b{b}",
        "created_at_utc_A": 1600000000,
        "created_at_utc_B": 1600000100,
        "score_A": a,
        "score_B": b,
        "human_ref_A": texts[0],
        "human_ref_B": texts[1],
        "labels": label,
        "seconds_difference": 100.0,
        "score_ratio": None if a is None or b is None else max(a, b) / max(1, min(a, b)),
    }


SHP_FEATURES = {
    **dict.fromkeys(
        ("post_id", "domain", "history", "c_root_id_A", "c_root_id_B", "human_ref_A", "human_ref_B"), Value("string")
    ),
    **dict.fromkeys(("upvote_ratio", "seconds_difference", "score_ratio"), Value("float64")),
    **dict.fromkeys(("created_at_utc_A", "created_at_utc_B", "score_A", "score_B", "labels"), Value("int64")),
}


def test_shp_golden_rows():
    rows = [
        post(8, 2, label=1),
        post(3, 12, label=0, post_id="p2", history="Is bread a cake?", domain="askbaking"),
        post(3, 2, label=1),  # ratio 1.5
        post(9, 3, label=0),  # the label says otherwise
        post(4, 0, label=1),
        post(None, 2, label=1),
        post(8, 2, label=1, texts=("Same.", "Same.")),
        post(8, 2, label=1, texts=("[", " ")),
        post(8, 2, label=1, history=None),
    ]
    pairs, dropped, account = adapted(shp, rows, **SHP_FEATURES)
    assert pairs == [
        {
            "prompt": [user("Why is the sky blue?")],
            "chosen": [assistant("Air.")],
            "rejected": [assistant("Paint.")],
            "preference_strength": 2.0,
            "source": "askscience",
        },
        {
            "prompt": [user("Is bread a cake?")],
            "chosen": [assistant("Paint.")],
            "rejected": [assistant("Air.")],
            "preference_strength": 2.0,
            "source": "askbaking",
        },
    ]
    assert dropped == {
        "low_score_ratio": 2,
        "no_rating": 2,
        "missing_value": 1,
        "identical_completions": 1,
        "empty_completion": 1,
    }
    assert account.rows == 9


def test_a_post_gives_at_most_five_pairs_those_of_the_highest_ratios():
    rows = [post(2 * ratio, 2, label=1) for ratio in (2, 3, 4, 5, 6, 7, 8)] + [post(4, 2, label=1, post_id="p2")]
    pairs, dropped, _ = adapted(shp, rows, **SHP_FEATURES)
    assert [round(2 ** pair["preference_strength"]) for pair in pairs] == [4, 5, 6, 7, 8, 2]
    assert dropped == {"post_has_enough": 2}
    with Ledger() as ledger:
        few = shp(Dataset.from_list(rows), least_ratio=6.5, pairs_per_post=1)
    assert [round(2**margin) for margin in few["preference_strength"]] == [8]
    assert {reason: drop.count for reason, drop in ledger.total().dropped.items()} == {
        "low_score_ratio": 6,
        "post_has_enough": 1,
    }


def test_a_post_is_never_in_train_and_test():
    rows = [
        post(4 + extra, 2, label=1, post_id=f"p{number}", history=f"Question {number}?", texts=(f"{number}", "No."))
        for number in range(200)
        for extra in range(4)
    ]
    split = split_pairs({"train": shp(Dataset.from_list(rows))})
    of = {name: {pair["chosen"][0]["content"] for pair in pairs} for name, pairs in split.items()}
    assert of["test"]
    assert len(of["train"] | of["test"]) == 200
    assert not of["train"] & of["test"]


# oasst1


def message(name, parent, role, text, **others):
    """A row of the published schema of OpenAssistant/oasst1, written by hand."""
    row = {
        "message_id": name,
        "parent_id": parent,
        "user_id": "u",
        "created_date": "2023-02-05T14:23:50.983374+00:00",
        "text": text,
        "role": role,
        "lang": "en",
        "review_count": 3,
        "review_result": True,
        "deleted": False,
        "rank": None,
        "synthetic": False,
        "model_name": None,
        "message_tree_id": "q",
        "tree_state": "ready_for_export",
        "emojis": {"name": ["+1"], "count": [1]},
        "labels": {"name": ["spam"], "value": [0.0], "count": [3]},
    }
    return {**row, **others}


def tree():
    return [
        message("q", None, "prompter", "Name a tree."),
        message("a", "q", "assistant", "Oak.", rank=0),
        message("b", "q", "assistant", "A tree.", rank=1),
        message("c", "q", "assistant", "Moss.", rank=2),
        message("d", "q", "assistant", "Elm.", rank=None),
        message("e", "q", "assistant", "Ash.", rank=3, deleted=True),
        message("f", "q", "assistant", "Fir.", rank=4, synthetic=True),
        message("g", "q", "assistant", "Spam.", rank=5, review_result=None),
        message("h", "q", "assistant", "Tanne.", rank=6, lang="de"),
        message("i", "b", "prompter", "Another?"),
        message("j", "i", "assistant", "Elm.", rank=0),
        message("k", "i", "assistant", "Yew.", rank=1),
        message("l", "e", "prompter", "Below a deleted one?"),
        message("m", "l", "assistant", "Yes.", rank=0),
        message("n", "gone", "assistant", "Lost.", rank=0),
        message("o", "a", "prompter", "Thanks"),
        message("p", "o", "assistant", "Same.", rank=0),
        message("q2", "o", "assistant", "Same.", rank=1),
    ]


def test_oasst1_golden_rows():
    pairs, dropped, account = adapted(oasst1, tree())
    first = [user("Name a tree.")]
    second = [*first, assistant("A tree."), user("Another?")]
    assert pairs == [
        {
            "prompt": prompt,
            "chosen": [assistant(better)],
            "rejected": [assistant(worse)],
            "preference_strength": margin,
            "id": name,
        }
        for prompt, better, worse, margin, name in [
            (first, "Oak.", "A tree.", 1.0, "a b"),
            (first, "Oak.", "Moss.", 2.0, "a c"),
            (first, "A tree.", "Moss.", 1.0, "b c"),
            (second, "Elm.", "Yew.", 1.0, "j k"),
        ]
    ]
    assert dropped == {
        "not_a_pair_of_replies": 1,
        "deleted": 1,
        "synthetic": 1,
        "not_reviewed": 1,
        "language": 1,
        "thread_is_broken": 3,
        "identical_completions": 1,
    }
    assert (account.rows, account.in_pairs, account.pairs_made, account.kept) == (18, 10, 5, 4)


def test_the_account_of_messages_is_readable():
    with Ledger() as ledger:
        split_pairs({"train": oasst1(Dataset.from_list(tree()))})
    text = "\n".join(" ".join(line.split()) for line in account_lines(ledger, limit=""))
    assert "rows that the pairs are made of -10" in text
    assert "pairs made of them +5" in text
    assert "an earlier message is missing or left out -3" in text


def test_languages_are_chosen_and_replies_of_one_rank_make_no_pair():
    rows = [
        message("q", None, "prompter", "Ein Baum?", lang="de"),
        message("a", "q", "assistant", "Eiche.", rank=0, lang="de"),
        message("b", "q", "assistant", "Moos.", rank=0, lang="de"),
        message("c", "q", "assistant", "Gras.", rank=1, lang="de"),
    ]
    for languages in (["de"], None):
        pairs = oasst1(Dataset.from_list(rows), languages=languages)
        assert sorted(pairs["id"]) == ["a c", "b c"]
    assert adapted(oasst1, rows)[1] == {"language": 4}


def nested(rows):
    """The rows as a line of the export of whole trees."""
    made = {row["message_id"]: {**row, "message_tree_id": None, "replies": []} for row in rows}
    for row in rows:
        if row["parent_id"] in made:
            made[row["parent_id"]]["replies"].append(made[row["message_id"]])
    return {"message_tree_id": "q", "tree_state": "ready_for_export", "prompt": made["q"]}


def test_whole_trees_make_the_same_pairs_as_their_messages(tmp_path):
    rows = [row for row in tree() if row["parent_id"] != "gone"]
    (tmp_path / "trees.jsonl").write_text(json.dumps(nested(rows)) + "\n")
    loaded = load_rows(RecipeArguments(dataset_name=str(tmp_path / "trees.jsonl")))["train"]
    one, other = [sorted(oasst1(each)["id"]) for each in (Dataset.from_list(rows), loaded)]
    assert one == other
    assert recognise(loaded) is oasst1


def test_a_message_that_replies_to_itself_ends_its_thread():
    rows = [*tree()[:3], message("a", "a", "assistant", "Again.", rank=0)]
    assert [pair["id"] for pair in adapted(oasst1, rows)[0]] == ["a b"]


messages = st.lists(
    st.builds(
        message,
        st.sampled_from(["a", "b", "c", "d", None]),
        st.sampled_from([None, None, "a", "b", "c", "d", "e"]),
        st.sampled_from(["prompter", "assistant", "assistant", "robot"]),
        st.sampled_from(["x", "y", " ", None]),
        rank=st.sampled_from([None, 0, 1, 2]),
        lang=st.sampled_from(["en", "en", "de"]),
        deleted=st.sampled_from([False, False, True]),
        synthetic=st.sampled_from([False, False, None, True]),
        review_result=st.sampled_from([True, True, False, None]),
    ),
    min_size=1,
    max_size=9,
)


@pytest.mark.slow
@settings(max_examples=80, deadline=None)
@given(messages)
def test_any_messages_are_in_pairs_or_counted(rows):
    features = {
        **Dataset.from_list(tree()).features,
        "rank": Value("int32"),
        "model_name": Value("string"),
    }
    pairs, dropped, account = adapted(oasst1, rows, **features)
    assert account.rows == len(rows)
    of_pairs = account.pairs_made - len(pairs)
    assert account.in_pairs == len(rows) - (sum(dropped.values()) - of_pairs)


# ultrafeedback_binarized


def whole(*texts):
    return [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, texts, strict=False)]


def ultrafeedback_rows(schema):
    """Rows of a published schema, written by hand: three of different ratings, of which one is the wrong way round."""
    ratings = [(9.0, 5.5), (4.0, 4.0), (3.0, 5.0)]
    if schema == "argilla":
        return [
            {
                "source": "evol_instruct",
                "instruction": "Name a tree.",
                "chosen_response": "Oak.",
                "rejected_response": "Moss.",
                "chosen_avg_rating": chosen,
                "rejected_avg_rating": rejected,
                "chosen_model": "m",
            }
            for chosen, rejected in ratings
        ]
    texts = {"chosen": whole("Name a tree.", "Oak."), "rejected": whole("Name a tree.", "Moss.")}
    if schema == "argilla-cleaned":
        others = {"source": "evol_instruct", "prompt": "Name a tree.", "chosen-model": "m", "rejected-model": "n"}
        return [
            {**others, **texts, "chosen-rating": chosen, "rejected-rating": rejected} for chosen, rejected in ratings
        ]
    others = {"prompt": "Name a tree.", "prompt_id": "0", "messages": texts["chosen"]} if schema == "h4" else {}
    return [{**others, **texts, "score_chosen": chosen, "score_rejected": rejected} for chosen, rejected in ratings]


@pytest.mark.parametrize("schema", ["argilla", "argilla-cleaned", "h4", "trl-lib"])
def test_ultrafeedback_golden_rows_of_every_schema(schema):
    rows = ultrafeedback_rows(schema)
    pairs, dropped, _ = adapted(ultrafeedback_binarized, rows)
    source = {"source": "evol_instruct"} if schema.startswith("argilla") else {}
    texts = {"prompt": [user("Name a tree.")], "chosen": [assistant("Oak.")], "rejected": [assistant("Moss.")]}
    assert pairs == [{**texts, **source, "preference_strength": 3.5}]
    assert dropped == {"not_rated_higher": 2}
    assert recognise(Dataset.from_list(rows)) is ultrafeedback_binarized


def test_ultrafeedback_without_ratings_is_refused():
    with pytest.raises(RecipeError, match="needs the columns chosen, rejected, score_chosen and score_rejected, got"):
        ultrafeedback_binarized(Dataset.from_list([{"chosen": "a", "rejected": "b"}]))


# sharegpt_pairs


def test_sharegpt_golden_rows():
    def said(who, text):
        return {"from": who, "value": text}

    turns = [said("system", "Be brief."), said("human", "Hi"), said("gpt", "Hello."), said("human", "A tree?")]
    row = {"conversations": turns, "chosen": said("gpt", "Oak."), "rejected": said("gpt", "Moss.")}
    pairs, dropped, _ = adapted(
        sharegpt_pairs,
        [
            row,
            {**row, "conversations": turns[:-1]},
            {**row, "conversations": [said("robot", "Hi")]},
            {**row, "chosen": None},
            {**row, "chosen": said("gpt", None)},
            {**row, "conversations": []},
        ],
    )
    assert pairs == [
        {
            "prompt": [system("Be brief."), user("Hi"), assistant("Hello."), user("A tree?")],
            "chosen": [assistant("Oak.")],
            "rejected": [assistant("Moss.")],
        }
    ]
    assert dropped == {
        "prompt_not_ending_in_user": 1,
        "unknown_role": 1,
        "missing_value": 1,
        "content_not_text": 1,
        "empty_prompt": 1,
    }
    lists = {side: [said("gpt", side)] for side in ("chosen", "rejected")}
    assert outcome(sharegpt_pairs, {"conversations": turns, **lists})["chosen"] == [assistant("chosen")]


# Properties

texts = st.sampled_from([None, "", " ", "a", "b", "[removed]"])
scores = st.sampled_from([None, -3, 0, 1, 2, 3, 8])


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.builds(
            lambda a, b, label, post_id, history, one, two: {
                **post(a, b, label=label, post_id=post_id, history=history, texts=(one, two)),
            },
            *(scores, scores, st.sampled_from([0, 1, None, 7]), texts, texts, texts, texts),
        ),
        min_size=1,
        max_size=12,
    )
)
def test_any_shp_rows_are_kept_or_counted(rows):
    pairs, dropped, account = adapted(shp, rows, **SHP_FEATURES)
    assert len(rows) == account.rows == len(pairs) + sum(dropped.values())
    assert all(pair["preference_strength"] >= 1 for pair in pairs)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(texts, texts, texts, *[st.sampled_from([None, 1.0, 2.0, math.nan])] * 2), min_size=1))
def test_any_ultrafeedback_rows_are_kept_or_counted(rows):
    names = ("instruction", "chosen_response", "rejected_response", "chosen_avg_rating", "rejected_avg_rating")
    kinds = [Value("string")] * 3 + [Value("float64")] * 2
    rows = [dict(zip(names, row, strict=True)) for row in rows]
    pairs, dropped, account = adapted(ultrafeedback_binarized, rows, **dict(zip(names, kinds, strict=True)))
    assert len(rows) == account.rows == len(pairs) + sum(dropped.values())
    assert all(pair["preference_strength"] > 0 for pair in pairs)


# Recognising and mixing


@pytest.mark.parametrize(
    ("row", "dataset_adapter"),
    [
        (post(4, 2, label=1), shp),
        (tree()[0], oasst1),
        ({"conversations": [], "chosen": {}, "rejected": {}}, sharegpt_pairs),
        ({"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "b"}, hh_rlhf),
        ({"chosen": "a", "rejected": "b"}, preference_jsonl),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, preference_jsonl),
        ({"chosen": whole("q", "a"), "rejected": whole("q", "b")}, preference_jsonl),
    ],
)
def test_a_dataset_is_recognised_by_its_columns(row, dataset_adapter):
    assert recognise(Dataset.from_list([row])) is dataset_adapter


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_mixture_keeps_the_source_draws_the_numbers_and_shares_no_prompt(tmp_path):
    plain = [{"prompt": f"Question {n}?", "chosen": "Yes.", "rejected": "No."} for n in range(200)]
    posts = [post(4, 2, label=1, post_id=str(n), history=f"Question {n}?") for n in range(100, 300)]
    one, other = write(tmp_path / "one.jsonl", plain), write(tmp_path / "other.jsonl", posts)
    with Ledger() as ledger:
        mixed = mix_pairs(RecipeArguments(dataset_name=f"{one}:150+{other}"), {str(one): preference_jsonl})
    account = ledger.total()
    sources = [*mixed["train"]["source"], *mixed["test"]["source"]]
    assert {source: sources.count(source) for source in set(sources)}[str(one)] <= 150
    assert set(mixed["test"]["source"]) == {str(one), str(other)}
    assert (account.rows, account.not_sampled, account.kept) == (400, 50, len(sources))
    prompts = [{pair["prompt"][0]["content"] for pair in pairs} for pairs in mixed.values()]
    assert not prompts[0] & prompts[1]
    assert account.kept + sum(drop.count for drop in account.dropped.values()) == 350
    assert set(account.dropped) <= {"prompt_in_test"}


def test_a_mixture_of_unknown_columns_is_refused(tmp_path):
    good = write(tmp_path / "good.jsonl", [{"prompt": f"{n}", "chosen": "a", "rejected": "b"} for n in range(9)])
    odd = write(tmp_path / "odd.jsonl", [{"text": "a"}])
    with pytest.raises(RecipeError, match=r"--columns prompt=\.\.\.,chosen=\.\.\.,rejected="):
        mix_pairs(RecipeArguments(dataset_name=f"{good}+{odd}"), {})
    with pytest.raises(RecipeError, match="are several datasets, where one is needed"):
        load_rows(RecipeArguments(dataset_name=f"{good}+{odd}"))


def test_messages_of_a_tree_are_drawn_together(tmp_path):
    rows = [{**row, "message_tree_id": str(number)} for number in range(10) for row in tree()]
    file = write(tmp_path / "messages.jsonl", rows)
    drawn = load_rows(RecipeArguments(dataset_name=f"{file}:54"))["train"]
    trees = drawn["message_tree_id"][:]
    assert len(trees) == 54
    assert len(set(trees)) == 3
    assert trees == sorted(trees)


# The real rows at hand


def real_rows(name):
    return [json.loads(line) for line in gzip.decompress(Path(DATA or "", name).read_bytes()).splitlines()]


@needs_data
def test_every_real_oasst_message_is_in_a_pair_or_counted():
    rows = real_rows("oasst2-sample/messages.jsonl.gz")
    by_id = {row["message_id"]: row for row in rows}
    pairs, dropped, account = adapted(oasst1, rows)
    assert account.rows == len(rows) == account.in_pairs + sum(dropped.values()) == 1187
    assert len(pairs) == account.pairs_made == 200
    for pair in pairs:
        better, worse = (by_id[name] for name in pair["id"].split())
        assert better["parent_id"] == worse["parent_id"]
        assert pair["preference_strength"] == worse["rank"] - better["rank"] > 0
        assert pair["prompt"][-1]["content"] == by_id[better["parent_id"]]["text"]
    trees = load_rows(RecipeArguments(dataset_name=str(Path(DATA or "", "oasst2-sample", "trees.jsonl.gz"))))["train"]
    with Ledger() as ledger:
        assert sorted(oasst1(trees)["id"]) == sorted(pair["id"] for pair in pairs)
    assert {reason: drop.count for reason, drop in ledger.total().dropped.items()} == dropped
    assert len(oasst1(Dataset.from_list(rows), languages=None)) == 358


@needs_data
@pytest.mark.parametrize(
    ("folder", "dataset_adapter", "kept"),
    [
        ("ultrafeedback-binarized-sample", ultrafeedback_binarized, 836),
        ("dpo-en-demo", sharegpt_pairs, 256),
    ],
)
def test_every_real_row_is_kept_or_counted(folder, dataset_adapter, kept):
    rows = [row for file in sorted(Path(DATA or "", folder).glob("*.gz")) for row in real_rows(f"{folder}/{file.name}")]
    pairs, dropped, account = adapted(dataset_adapter, rows)
    assert account.rows == len(rows) == len(pairs) + sum(dropped.values())
    assert len(pairs) == kept
    if folder.startswith("ultrafeedback"):
        assert dropped["not_rated_higher"] == 111
        assert all(pair["chosen"][0]["content"].strip() for pair in pairs)


@needs_data
def test_real_stack_exchange_rows_by_renaming_their_columns():
    columns = "prompt=question,chosen=response_j,rejected=response_k"
    args = RecipeArguments(dataset_name=str(Path(DATA or "", "stack-exchange-paired-tiny")), columns=columns)
    pairs = preference_jsonl(load_rows(args)["train"])
    rows = real_rows("stack-exchange-paired-tiny/sample.jsonl.gz")
    assert [pair["chosen"][0]["content"] for pair in pairs] == [row["response_j"] for row in rows]
