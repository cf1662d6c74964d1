"""Each column and each field of a message is used, refused or named in the account."""

import json

import pandas as pd
import pyarrow as pa
import pytest
from datasets import Dataset

from dpo_recipes.dataset_adapters import (
    adapting,
    hh_rlhf,
    number,
    plain_text,
    preference_jsonl,
    recognise,
    rename_columns,
    sharegpt_pairs,
    shp,
    ultrafeedback_binarized,
)
from dpo_recipes.dataset_adapters.ledger import Ledger
from dpo_recipes.errors import RecipeError
from dpo_recipes.loading import load_rows, mix_pairs
from dpo_recipes.preflight.account import reader_lines
from dpo_recipes.recipe import RecipeArguments

ROW = {"prompt": "Name a tree.", "chosen": "An oak.", "rejected": "A stone."}
OTHER = {"prompt": "Name a fish.", "chosen": "A carp.", "rejected": "A wheel."}
TOOLS = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"type": "function", "function": {"name": "find", "arguments": {"what": "oak"}}}


def turn(role, content, **fields):
    return {"role": role, "content": content, **fields}


def adapted(dataset_adapter, rows):
    """The pairs, the drops by reason and the columns that are named as unread."""
    with Ledger() as ledger:
        pairs = dataset_adapter(
            rows if isinstance(rows, Dataset) else Dataset.from_list(rows, on_mixed_types="use_json")
        )
    dropped = {reason: drop.count for reason, drop in ledger.total().dropped.items()}
    return pairs.to_list(), dropped, ledger.unread


# Columns


@pytest.mark.parametrize("column", ["system", "system_prompt", "system_message"])
def test_a_system_column_becomes_a_system_turn(column):
    pairs, _, unread = adapted(preference_jsonl, [{**ROW, column: "Be brief."}, {**ROW, column: None}])
    assert [pair["prompt"][0]["role"] for pair in pairs] == ["system", "user"]
    assert pairs[0]["prompt"][0]["content"] == "Be brief."
    assert not unread


@pytest.mark.parametrize(
    ("dataset_adapter", "row"),
    [
        (
            sharegpt_pairs,
            {
                "conversations": [{"from": "human", "value": "Name a tree."}],
                "chosen": {"from": "gpt", "value": "An oak."},
                "rejected": {"from": "gpt", "value": "A stone."},
            },
        ),
        (hh_rlhf, {side: f"\n\nHuman: Name a tree.\n\nAssistant: {ROW[side]}" for side in ("chosen", "rejected")}),
        (
            preference_jsonl,
            {side: [turn("user", "Name a tree."), turn("assistant", ROW[side])] for side in ("chosen", "rejected")},
        ),
    ],
    ids=["sharegpt", "hh", "conversations"],
)
def test_a_system_column_is_read_with_every_layout(dataset_adapter, row):
    [pair], _, unread = adapted(dataset_adapter, [{**row, "system": "Be brief."}])
    assert pair["prompt"] == [turn("system", "Be brief."), turn("user", "Name a tree.")]
    assert not unread


def test_two_system_prompts_are_one_if_equal_and_refused_if_not():
    prompt = [turn("system", "Be brief."), turn("user", "Name a tree.")]
    rows = [{**ROW, "prompt": prompt, "system": text} for text in ("Be brief. ", "Be long.")]
    pairs, dropped, _ = adapted(preference_jsonl, rows)
    assert [pair["prompt"] for pair in pairs] == [prompt]
    assert dropped == {"system_differs": 1}


def test_the_input_of_alpaca_rows_is_put_below_the_instruction():
    rows = [{**ROW, "input": more} for more in ("Of Europe.", "", None, "tree")]
    rows = rename_columns(Dataset.from_list(rows).rename_column("prompt", "instruction"), prompt="instruction")
    pairs, _, unread = adapted(preference_jsonl, rows)
    assert [pair["prompt"][0]["content"] for pair in pairs] == ["Name a tree.\n\nOf Europe.", *["Name a tree."] * 3]
    assert not unread


def test_pairs_of_sharegpt_are_taken_unchanged():
    row = {"conversations": "Name a tree.", "chosen": "Name a tree. An oak.", "rejected": "Name a tree. A stone."}
    [pair], dropped, unread = adapted(sharegpt_pairs, [row | {"input": "In a park."}])
    assert not dropped
    assert {side: pair[side][0]["content"] for side in ("prompt", "chosen", "rejected")} == {
        "prompt": row["conversations"],
        "chosen": row["chosen"],
        "rejected": row["rejected"],
    }
    assert unread == {"input": {"rows": 1, "of": 1}}


@pytest.mark.parametrize("column", ["question", "instruction", "query"])
def test_rows_without_a_prompt_are_refused_with_the_likely_column(column):
    rows = Dataset.from_list([{column: "Name a tree.", "system": "s", "chosen": "An oak.", "rejected": "A stone."}])
    with pytest.raises(RecipeError, match=f"--columns prompt={column};"):
        recognise(rows)(rows)


def test_columns_of_text_that_no_token_shows_are_named_once_with_their_share():
    rows = [{**ROW, "votes": 3, "hint": "Green.", "note": "", "tags": ["a"]}, {**ROW, "hint": " ", "tags": None}]
    _, _, unread = adapted(preference_jsonl, rows)
    assert unread == {"hint": {"rows": 1, "of": 2}, "tags": {"rows": 1, "of": 2}}
    with Ledger() as ledger:
        preference_jsonl(rename_columns(Dataset.from_list([{**ROW, "question": "Q?"}]), prompt="question"))
    said = "\n".join(reader_lines(ledger))
    assert said.startswith("Read by preference_jsonl (other layouts: recipes/README.md,")
    assert said.endswith("Columns in no token: unused_prompt (100% of rows).")


def test_columns_that_can_hold_no_text_are_not_looked_at(monkeypatch):
    looked_at, cells = [], adapting._cells
    monkeypatch.setattr(adapting, "_cells", lambda rows, column: looked_at.append(column) or cells(rows, column))
    more = {"embedding": [0.5, 0.25], "votes": 3, "about": {"tags": ["short"], "size": 2}}
    _, _, unread = adapted(preference_jsonl, [ROW | more])
    assert unread == {"about": {"rows": 1, "of": 1}}
    assert not {"embedding", "votes"} & {*looked_at}


def test_plain_text_names_the_system_prompt_that_it_has_no_place_for():
    [pair], _, unread = adapted(plain_text, [{**ROW, "system": "Be brief."}])
    assert pair == ROW
    assert unread == {"system": {"rows": 1, "of": 1}}


@pytest.mark.parametrize(
    "rows",
    [
        [{**ROW, "images": ["a.png"]}, {**ROW, "images": []}],
        [{**ROW, "image": "a.png"}],
        [{**ROW, "video": {"path": "a.mp4"}}],
    ],
)
def test_images_are_refused_with_their_column(rows):
    with pytest.raises(RecipeError, match=f"column {list(rows[0])[-1]} holds images, sound or videos in 1 of"):
        preference_jsonl(Dataset.from_list(rows))


def test_an_empty_column_of_images_is_no_obstacle_and_an_image_in_a_message_is_counted():
    parts = [{"type": "text", "text": "Name a "}, {"type": "text", "text": "tree."}]
    rows = [{**ROW, "images": []}, {**ROW, "prompt": [turn("user", parts)]}]
    rows.append({**ROW, "prompt": [turn("user", [{"type": "image", "text": None}, parts[0]])]})
    pairs, dropped, _ = adapted(preference_jsonl, rows)
    assert [pair["prompt"][0]["content"] for pair in pairs] == ["Name a tree.", "Name a tree."]
    assert dropped == {"holds_media": 1}


# Messages


@pytest.mark.parametrize("write", [json.dumps, str], ids=["json", "python"])
@pytest.mark.parametrize("sides", [["prompt"], ["chosen", "rejected"], ["prompt", "chosen", "rejected"]])
def test_text_that_is_messages_is_read_as_messages(write, sides):
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    row = {**ROW, **{side: write([turn(roles[side], ROW[side])]) for side in sides}}
    [pair], _, _ = adapted(preference_jsonl, [row])
    assert pair == {side: [turn(roles[side], ROW[side])] for side in roles}


def test_whole_conversations_as_json_text_need_no_prompt():
    row = {
        side: json.dumps([{"from": "human", "value": "Name a tree."}, {"from": "gpt", "value": ROW[side]}])
        for side in ("chosen", "rejected")
    }
    rows = Dataset.from_list([row])
    [pair], _, _ = adapted(recognise(rows), rows)
    assert pair["prompt"] == [turn("user", "Name a tree.")]
    assert pair["chosen"] == [turn("assistant", "An oak.")]


@pytest.mark.parametrize(
    "text",
    [
        "[{'role': 'user', 'content': 'Hi'}\n {'role': 'assistant', 'content': 'Ho'}]",
        '[{"role": "user", "conte]',
        '[{"role": "assistant", "content": "cut sho',
        "{'from': 'gpt', 'value': 'cut",
    ],
)
def test_messages_that_cannot_be_parsed_are_refused(text):
    assert adapted(preference_jsonl, [{**ROW, "chosen": text}])[1] == {"messages_unreadable": 1}


@pytest.mark.parametrize(
    "text",
    ['{"answer": 42}', "[1, 2]", "[link] and {braces}", '{"role": "user"} is one.', '{"role": "admin"}', "[{not json"],
)
def test_answers_that_only_look_like_json_stay_text(text):
    [pair], _, _ = adapted(preference_jsonl, [{**ROW, "chosen": text}])
    assert pair["chosen"] == [turn("assistant", text)]


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)], ids=["list", "json"])
def test_tools_and_tool_calls_are_kept_for_the_chat_template(tools):
    prompt = [turn("user", "Find it."), turn("assistant", None, tool_calls=[CALL]), turn("tool", "Found.")]
    chosen = [turn("assistant", "Here.", reasoning_content="It is found.")]
    rows = [{"tools": tools, "prompt": prompt, "chosen": chosen, "rejected": [turn("assistant", "Where?")]}]
    rows += [{**ROW, "tools": None}]
    pairs, dropped, unread = adapted(preference_jsonl, Dataset.from_list(rows[:1]))
    assert (pairs[0]["prompt"], pairs[0]["chosen"]) == (prompt, chosen)
    assert json.loads(pairs[0]["tools"]) == TOOLS
    assert not dropped
    assert not unread


def test_answers_that_differ_in_a_tool_call_alone_are_a_pair():
    sides = {
        name: {**CALL, "function": {"name": "find", "arguments": {"what": name}}} for name in ("chosen", "rejected")
    }
    row = {"prompt": "Find it."} | {name: [turn("assistant", "", tool_calls=[call])] for name, call in sides.items()}
    [pair], dropped, _ = adapted(preference_jsonl, [row])
    assert not dropped
    assert pair["rejected"][0]["tool_calls"] == [sides["rejected"]]


# Files


def arrow(frame, path):
    table = pa.Table.from_pandas(frame, preserve_index=False)
    views = [
        pa.field(field.name, pa.string_view()) if pa.types.is_large_string(field.type) else field
        for field in table.schema
    ]
    table = table.cast(pa.schema(views))
    with pa.ipc.new_file(path, table.schema) as file:
        file.write_table(table)


def categories(frame, path):
    frame.astype("category").to_parquet(path)


WRITERS = {
    "jsonl": lambda frame, path: frame.to_json(path, orient="records", lines=True),
    "csv": lambda frame, path: frame.to_csv(path, index=False),
    "parquet": lambda frame, path: frame.to_parquet(path, index=False),
    "arrow": arrow,
    "cat.parquet": categories,
}
LAYOUTS = {
    "pairs": [ROW, OTHER, {**ROW, "prompt": "None?", "chosen": "None", "rejected": "NA"}],
    "dialogues": [
        {side: f"\n\nHuman: {row['prompt']}\n\nAssistant: {row[side]}" for side in ("chosen", "rejected")}
        for row in (ROW, OTHER)
    ],
    "json": [
        {side: json.dumps([turn("assistant", row[side])]) for side in ("chosen", "rejected")} | {"prompt": "q"}
        for row in (ROW, OTHER)
    ],
    "rated": [
        {**ROW, "score_chosen": "4/5", "score_rejected": "2/5"},
        {**OTHER, "score_chosen": "N/A", "score_rejected": "2/5"},
    ],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_file_format_gives_the_same_pairs_and_account(layout, tmp_path):
    found = []
    for ending, write in WRITERS.items():
        file = tmp_path / f"rows.{ending}"
        write(pd.DataFrame(LAYOUTS[layout]), file)
        rows = load_rows(RecipeArguments(dataset_name=str(file)))["train"].remove_columns("_row")
        found.append((recognise(rows).__name__, *adapted(recognise(rows), rows)))
    assert found[0][1]
    assert all(each == found[0] for each in found), found


def test_words_for_nothing_in_a_csv_file_are_text(tmp_path):
    words = ["None", "NA", "N/A", "null", "nan", "NULL", "42"]
    pd.DataFrame([{**ROW, "chosen": word} for word in words]).to_csv(tmp_path / "rows.csv", index=False)
    rows = load_rows(RecipeArguments(dataset_name=str(tmp_path / "rows.csv")))["train"]
    pairs, dropped, _ = adapted(preference_jsonl, rows)
    assert [pair["chosen"][0]["content"] for pair in pairs] == words
    assert not dropped


def test_a_mixture_keeps_the_tool_calls_of_one_part(tmp_path):
    calls = {**OTHER, "tools": json.dumps(TOOLS), "chosen": [turn("assistant", None, tool_calls=[CALL])]}
    files = []
    for name, row in (("plain", ROW), ("calls", calls)):
        files.append(tmp_path / f"{name}.jsonl")
        lines = [{**row, "prompt": f"{row['prompt']} {number}"} for number in range(3)]
        files[-1].write_text("".join(json.dumps(line) + "\n" for line in lines))
    pairs = mix_pairs(RecipeArguments(dataset_name="+".join(map(str, files))), {})
    rows = [*pairs["train"], *pairs["test"]]
    assert sorted({(row["chosen"][0].get("tool_calls") is not None, row["tools"] is not None) for row in rows}) == [
        (False, False),
        (True, True),
    ]


# Numbers


@pytest.mark.parametrize(
    ("cell", "meant"),
    [
        ("10", 10),
        (" 4.5 ", 4.5),
        (3, 3),
        ("4/5", 0.8),
        ("N/A", None),
        (None, None),
        ("nan", None),
        ("", None),
        ("5/0", None),
    ],
)
def test_a_number_is_read_from_text(cell, meant):
    assert number(cell) == meant


def test_ratings_as_text_are_compared_as_numbers():
    ratings = [("10", "2"), ("2", "10"), ("N/A", "1"), ("4/5", "3"), ("4/5", "7/10")]
    rows = [{**ROW, "score_chosen": chosen, "score_rejected": rejected} for chosen, rejected in ratings]
    pairs, dropped, _ = adapted(ultrafeedback_binarized, rows)
    assert [round(pair["preference_strength"], 2) for pair in pairs] == [8, 0.1]
    assert dropped == {"not_rated_higher": 1, "no_rating": 2}


def test_scores_of_posts_may_be_text():
    row = {"post_id": "p", "domain": "d", "history": "Why?", "human_ref_A": "Air.", "human_ref_B": "No."}
    [pair], _, _ = adapted(shp, [{**row, "labels": "1", "score_A": "8", "score_B": "2"}])
    assert (pair["chosen"][0]["content"], pair["preference_strength"]) == ("Air.", 2.0)


def load(file, rows, columns=None):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_rows(RecipeArguments(dataset_name=str(file), columns=columns))["train"]


def test_a_margin_enters_the_loss_only_where_it_is_asked_for(tmp_path):
    rows = [{**ROW, "margin": 1.5, "gap": "2"}, {**OTHER, "margin": None, "gap": "3"}]
    with Ledger() as ledger:
        pairs = preference_jsonl(load(tmp_path / "rows.jsonl", rows))
    assert "margin" not in pairs.column_names
    assert pairs["preference_strength"][:] == [1.5, None]
    assert any("--columns margin=margin" in column for column in ledger.unread)
    asked = preference_jsonl(load(tmp_path / "rows.jsonl", rows, columns="margin=gap"))
    assert asked["margin"][:] == [2.0, 3.0]
    with pytest.raises(RecipeError, match="column margin holds no number in 1 of 2 pairs"):
        preference_jsonl(load(tmp_path / "rows.jsonl", rows, columns="margin=margin"))
