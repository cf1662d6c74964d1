"""Rows come from files, folders and the hub, or an error says what to do; no prompt is on both sides of a split."""

import csv
import errno
import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st
from trl import ScriptArguments

from dpo_recipes import data_files, loading
from dpo_recipes.dataset_adapters import hh_rlhf, preference_jsonl
from dpo_recipes.dataset_adapters.adapting import ROW
from dpo_recipes.dataset_adapters.ledger import Ledger
from dpo_recipes.errors import RecipeError
from dpo_recipes.loading import load_rows, mix_pairs, split_pairs
from dpo_recipes.recipe import RecipeArguments

DATA = os.environ.get("DPO_RECIPES_DATA")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets-cache"))


def arguments(name, **others):
    return ScriptArguments(dataset_name=str(name), **others)


def rows(count, *, start=0):
    return [{"text": f"row {number}"} for number in range(start, start + count)]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in content).encode()
    path.write_bytes(gzip.compress(lines, mtime=0) if path.suffix == ".gz" else lines)
    return path


def loaded(name, **others):
    return {split: part["text"][:] for split, part in load_rows(arguments(name, **others)).items()}


def refusal(name, **others):
    with pytest.raises(RecipeError) as error:
        load_rows(arguments(name, **others))
    return str(error.value)


# Files and folders


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "json", "csv", "parquet"])
def test_a_file_of_any_kind_is_the_training_split(tmp_path, suffix):
    name = "pairs" if suffix.endswith("gz") else "pairs [1]"  # brackets would be a pattern to datasets
    path = tmp_path / f"{name}.{suffix}"
    if suffix == "csv":
        Dataset.from_list(rows(3)).to_csv(path)
    elif suffix == "parquet":
        Dataset.from_list(rows(3)).to_parquet(path)
    elif suffix == "json":
        path.write_text(json.dumps(rows(3)))
    else:
        write(path, rows(3))
    assert loaded(path) == {"train": ["row 0", "row 1", "row 2"]}


def test_a_folder_is_split_by_the_names_of_its_files(tmp_path):
    write(tmp_path / "train-00000.jsonl", rows(2))
    write(tmp_path / "train-00001.jsonl", rows(2, start=2))
    write(tmp_path / "test.jsonl", rows(1, start=9))
    assert loaded(tmp_path) == {"train": ["row 0", "row 1", "row 2", "row 3"], "test": ["row 9"]}


def test_nested_folders_are_read_together_or_one_by_its_name(tmp_path):
    write(tmp_path / "harmless-base" / "train.jsonl.gz", rows(2))
    write(tmp_path / "helpful-base" / "train.jsonl.gz", rows(1, start=2))
    write(tmp_path / "helpful-base" / "test.jsonl.gz", rows(1, start=9))
    assert loaded(tmp_path) == {"train": ["row 0", "row 1", "row 2"], "test": ["row 9"]}
    assert loaded(tmp_path, dataset_config="helpful-base") == {"train": ["row 2"], "test": ["row 9"]}
    assert "has no subfolder helpful, only ['harmless-base', 'helpful-base']" in refusal(
        tmp_path, dataset_config="helpful"
    )


def test_folders_may_be_named_after_the_splits(tmp_path):
    write(tmp_path / "train" / "a.jsonl", rows(1))
    write(tmp_path / "validation" / "a.jsonl", rows(1, start=9))
    assert loaded(tmp_path) == {"train": ["row 0"], "test": ["row 9"]}


def test_files_without_a_split_in_their_names_are_for_training(tmp_path):
    write(tmp_path / "a.jsonl", rows(1))
    write(tmp_path / "latest.jsonl", rows(1, start=1))
    (tmp_path / ".hidden.jsonl").write_text("{")
    (tmp_path / "dataset_infos.json").write_text("{}")  # what the hub wrote beside the data in its first years
    (tmp_path / "notes.txt").write_text("not data")
    assert loaded(tmp_path) == {"train": ["row 0", "row 1"]}


def test_a_saved_dataset_is_read_back(tmp_path):
    Dataset.from_list(rows(2)).save_to_disk(tmp_path / "one")
    DatasetDict(train=Dataset.from_list(rows(2)), test=Dataset.from_list(rows(1))).save_to_disk(tmp_path / "two")
    assert loaded(tmp_path / "one") == {"train": ["row 0", "row 1"]}
    assert loaded(tmp_path / "two") == {"train": ["row 0", "row 1"], "test": ["row 0"]}


def test_a_changed_file_is_read_again(tmp_path):
    path = write(tmp_path / "pairs.jsonl", rows(2))
    assert len(loaded(path)["train"]) == 2
    write(path, rows(3))
    os.utime(path, (1, 1))
    assert len(loaded(path)["train"]) == 3


# Splits and samples


def test_rows_know_their_split_whatever_it_was_called(tmp_path):
    write(tmp_path / "train.jsonl", rows(3))
    write(tmp_path / "dev.jsonl", rows(1))
    assert {split: str(part.split) for split, part in load_rows(arguments(tmp_path)).items()} == {
        "train": "train",
        "test": "test",
    }


def test_the_test_split_goes_before_the_validation_split(tmp_path):
    for number, split in enumerate(["train", "validation", "test"]):
        write(tmp_path / f"{split}.jsonl", rows(1, start=number))
    assert loaded(tmp_path) == {"train": ["row 0"], "test": ["row 2"]}
    assert loaded(tmp_path, dataset_test_split="validation") == {"train": ["row 0"], "test": ["row 1"]}


def test_a_split_that_was_asked_for_and_is_missing_is_refused(tmp_path):
    write(tmp_path / "train.jsonl", rows(1))
    assert "has no split held_out, only ['train']" in refusal(tmp_path, dataset_test_split="held_out")
    assert "has no split sft, only ['train']. Name one with --dataset_train_split" in refusal(
        tmp_path, dataset_train_split="sft"
    )
    assert "are both train" in refusal(tmp_path, dataset_test_split="train")


def test_a_sample_is_drawn_by_seed_in_order_and_accounted_for(tmp_path):
    path = write(tmp_path / "pairs.jsonl", rows(100))
    with Ledger() as ledger:
        taken = loaded(f"{path}:10")["train"]
    assert taken == loaded(f"{path}:10")["train"]
    assert len(taken) == 10
    assert taken == sorted(taken, key=lambda text: int(text.split()[1]))
    assert taken != [row["text"] for row in rows(10)]
    assert (ledger.total().rows, ledger.total().not_sampled, ledger.total().kept) == (90, 90, 0)  # 10 are yet to come


def test_a_sample_leaves_the_test_split_alone(tmp_path):
    write(tmp_path / "train.jsonl", rows(9))
    write(tmp_path / "test.jsonl", rows(9))
    assert {split: len(part) for split, part in loaded(f"{tmp_path}:2").items()} == {"train": 2, "test": 9}


def test_a_sample_larger_than_the_dataset_takes_all_and_says_so(tmp_path, caplog):
    path = write(tmp_path / "pairs.jsonl", rows(3))
    assert len(loaded(f"{path}:50")["train"]) == 3
    assert "has 3 training rows: all are taken, not 50" in caplog.text


def test_a_path_with_a_colon_wins_over_a_sample(tmp_path):
    path = write(tmp_path / "pairs.jsonl:2", rows(3)).rename(tmp_path / "pairs:2")
    write(path.with_name("folder:2") / "a.jsonl", rows(3))
    assert len(loaded(path.with_name("folder:2"))["train"]) == 3


def test_of_a_stream_the_first_rows_are_taken_as_they_come(tmp_path):
    path = write(tmp_path / "data" / "train.jsonl", rows(30))
    write(tmp_path / "data" / "test.jsonl", rows(7))
    streamed = loaded(f"{tmp_path / 'data'}:5", dataset_streaming=True)
    assert [len(streamed[split]) for split in ("train", "test")] == [5, 5]
    assert streamed["train"][:] == loaded(path)["train"][:5]
    assert len(loaded(path, dataset_streaming=True)["train"]) == 30
    path.write_text('{"broken')
    assert "Cannot read" in refusal(path, dataset_streaming=True)


# Refusals


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("", "dataset_name is empty"),
        ("missing.jsonl", "There is no file or folder missing.jsonl"),
        ("./missing", "There is no file or folder ./missing"),
        ("some/deep/folder", "There is no file or folder some/deep/folder"),
        ("pairs:0", "asks for 0 rows"),
    ],
)
def test_a_name_that_is_nothing_is_refused(name, part):
    assert part in refusal(name)


@pytest.mark.parametrize(
    ("file", "content", "part"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl, line 2"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "a.jsonl, line 2"),
        ("a.jsonl", b"", "it holds no rows"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0), "it holds no rows"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 9, mtime=0)[:-9], "Compressed file ended"),
        ("a.jsonl.gz", b"no gzip", "Not a gzipped file"),
        ("a.json", b"[{]", "Cannot read"),
        ("a.csv", b"", "No columns to parse"),
        ("a.parquet", b"no parquet", "not a parquet file"),
        ("a.txt", b"text", "needs files of one kind, of ['.jsonl', '.json', '.parquet', '.csv',"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, file, content, part):
    (tmp_path / file).write_bytes(content)
    message = refusal(tmp_path / file)
    assert part in message
    assert file in message


def test_a_folder_that_cannot_be_told_apart_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "holds no data" in refusal(tmp_path / "empty")
    write(tmp_path / "mixed" / "train.jsonl", rows(1))
    write(tmp_path / "mixed" / "more.jsonl", rows(1))
    assert "Cannot tell which split ['more.jsonl']" in refusal(tmp_path / "mixed")
    write(tmp_path / "kinds" / "a.jsonl", rows(1))
    (tmp_path / "kinds" / "b.csv").write_text("text\nb\n")
    assert "needs files of one kind" in refusal(tmp_path / "kinds")
    write(tmp_path / "broken" / "state.json", [])
    assert "a saved dataset" in refusal(tmp_path / "broken")
    write(tmp_path / "test-only" / "test.jsonl", rows(1))
    assert "has no split train, only ['test']" in refusal(tmp_path / "test-only")
    DatasetDict(train=Dataset.from_list(rows(1)), test=Dataset.from_list([])).save_to_disk(tmp_path / "no-rows")
    assert "a saved dataset" in refusal(tmp_path / "no-rows")


def test_a_file_has_no_configuration(tmp_path):
    assert "Leave out --dataset_config" in refusal(write(tmp_path / "a.jsonl", rows(1)), dataset_config="default")


def test_columns_are_renamed_in_every_split(tmp_path):
    for split in ("train", "test"):
        write(tmp_path / f"{split}.jsonl", [{"question": "q", "text": split}])
    splits = load_rows(RecipeArguments(dataset_name=str(tmp_path), columns="prompt=question, chosen=text"))
    assert {split: part.remove_columns(ROW)[:] for split, part in splits.items()} == {
        split: {"prompt": ["q"], "chosen": [split]} for split in ("train", "test")
    }


@pytest.mark.parametrize("columns", ["chosen", "chosen=", "=text", "chosen=text,chosen=text", "prompt=nothing"])
def test_columns_that_make_no_sense_are_refused(tmp_path, columns):
    file = write(tmp_path / "a.jsonl", rows(1))
    with pytest.raises(RecipeError, match=f"--columns {columns},? (is not of the form prompt=|which needs a column)"):
        load_rows(RecipeArguments(dataset_name=str(file), columns=columns))


def test_the_hub_offline_is_one_clear_error():
    message = refusal("Anthropic/hh-rlhf", dataset_config="default")
    assert message.startswith("Cannot load Anthropic/hh-rlhf (configuration default) from the hub")
    assert "try the quickstart" in message


@pytest.mark.slow
def test_a_refused_connection_is_one_clear_error_within_a_minute(tmp_path):
    program = """
from trl import ScriptArguments
from dpo_recipes.errors import RecipeError
from dpo_recipes.loading import load_rows
try:
    load_rows(ScriptArguments(dataset_name="Anthropic/hh-rlhf"))
except RecipeError as error:
    print(error)
"""
    nowhere = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **nowhere},
        capture_output=True,
        text=True,
        timeout=90,
        check=True,
    )
    assert done.stdout.startswith("Cannot load Anthropic/hh-rlhf from the hub")


def test_a_hub_dataset_that_keeps_its_parts_in_folders_is_read_by_folder(tmp_path, monkeypatch):
    # A local folder is to load_dataset what a hub dataset of plain files is.
    write(tmp_path / "helpful-base" / "train.jsonl", rows(1))
    write(tmp_path / "harmless-base" / "train.jsonl", rows(1, start=1))
    load_dataset = datasets.load_dataset

    def at_the_hub(name, *rest, **more):
        return load_dataset(str(tmp_path), *rest, **more)

    monkeypatch.setattr(data_files, "load_dataset", at_the_hub)
    assert loaded("Anthropic/hh-rlhf", dataset_config="helpful-base") == {"train": ["row 0"]}
    assert "(configuration nope)" in refusal("Anthropic/hh-rlhf", dataset_config="nope")


def test_a_full_disk_is_not_taken_for_an_unreadable_file(tmp_path, monkeypatch):
    def full(*_, **__):
        raise datasets.exceptions.DatasetGenerationError from OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(data_files, "load_dataset", full)
    with pytest.raises(OSError, match="No space left"):
        load_rows(arguments(write(tmp_path / "a.jsonl", rows(1))))


# Splitting


def pairs_of(prompts):
    turn = [{"role": "assistant", "content": "a"}]
    made = [
        {"prompt": [{"role": "user", "content": text}], "chosen": turn, "rejected": turn, "id": str(number)}
        for number, text in enumerate(prompts)
    ]
    return Dataset.from_list(made)


def prompts_of(pairs):
    return [prompt if isinstance(prompt, str) else prompt[-1]["content"] for prompt in pairs["prompt"]]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(max_size=3), min_size=1, max_size=60))
def test_no_prompt_is_on_both_sides_and_no_pair_is_lost(prompts):
    pairs = pairs_of(prompts)
    with Ledger() as ledger:
        split = split_pairs({"train": pairs})
    train, test = set(prompts_of(split["train"])), set(prompts_of(split["test"]))
    assert not train & test
    assert train
    assert bool(test) == (len(set(prompts)) > 1)
    assert sorted([*split["train"]["id"], *split["test"]["id"]], key=int) == list(pairs["id"])
    assert ledger.total().kept == ledger.total().rows == len(prompts)
    assert ledger.accounts["train"].moved == -len(split["test"])


def test_about_five_percent_are_held_out_the_same_whatever_is_added_or_reordered():
    prompts = [f"question {number}" for number in range(2000)]
    held_out = set(prompts_of(split_pairs({"train": pairs_of(prompts)})["test"]))
    assert 60 <= len(held_out) <= 140
    assert set(prompts_of(split_pairs({"train": pairs_of(prompts[::-1])})["test"])) == held_out
    more = prompts + [f"new question {number}" for number in range(500)]
    assert held_out <= set(prompts_of(split_pairs({"train": pairs_of(more)})["test"]))
    # Known numbers: the split is the same on every machine and in every version.
    assert sorted(held_out)[:3] == ["question 1018", "question 1036", "question 1061"]


def test_training_pairs_whose_prompt_is_a_test_prompt_are_dropped_and_counted():
    with Ledger() as ledger:
        split = split_pairs({"train": pairs_of(["a", "b", "a", "c"]), "test": pairs_of(["a", "d"])})
    assert prompts_of(split["train"]) == ["b", "c"]
    assert prompts_of(split["test"]) == ["a", "d"]
    assert ledger.accounts["train"].dropped["prompt_in_test"].count == 2
    assert ledger.accounts["train"].dropped["prompt_in_test"].first == ["row 1", "row 3"]
    assert ledger.total().rows == ledger.total().kept + 2


def test_plain_text_prompts_are_split_as_well():
    pairs = Dataset.from_list([{"prompt": f"p{n}", "chosen": "a", "rejected": "b"} for n in range(40)])
    split = split_pairs({"train": pairs})
    assert not set(split["train"]["prompt"]) & set(split["test"]["prompt"])


@pytest.mark.parametrize("splits", [{}, {"test"}, {"train", "validation"}])
def test_other_splits_are_refused(splits):
    with pytest.raises(RecipeError, match="split_pairs needs the splits train"):
        split_pairs(dict.fromkeys(splits, pairs_of(["a"])))


@pytest.mark.skipif(DATA is None, reason="DPO_RECIPES_DATA names no folder of real data")
def test_real_hh_rlhf_rows_are_split_without_a_shared_prompt():
    with Ledger() as ledger:
        raw = load_rows(arguments(Path(DATA or "", "hh-rlhf")))
        pairs = split_pairs({split: hh_rlhf(part) for split, part in raw.items()})
    assert {split: account.rows for split, account in ledger.accounts.items()} == {"train": 5499, "test": 1308}
    assert {split: account.kept for split, account in ledger.accounts.items()} == {
        split: len(part) for split, part in pairs.items()
    }
    assert not set(loading.prompt_hashes(pairs["train"])) & set(loading.prompt_hashes(pairs["test"]))


@pytest.mark.parametrize("damage", [b"", b"cut", b"garbage" * 100], ids=["empty", "cut", "garbage"])
def test_a_damaged_cache_is_blamed_and_the_data_is_not(damage, tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 5)
    [kept] = datasets.load_dataset("json", data_files=[str(file)], split="train").cache_files
    Path(kept["filename"]).write_bytes(damage)
    with pytest.raises(RecipeError, match=r"The cache of datasets is damaged .*Remove the folder"):
        load_rows(RecipeArguments(dataset_name=str(file)))
    shutil.rmtree(Path(kept["filename"]).parent)
    assert len(load_rows(RecipeArguments(dataset_name=str(file)))["train"]) == 5


def test_a_damaged_saved_dataset_is_not_blamed_on_the_cache(tmp_path):
    Dataset.from_list(rows(3)).save_to_disk(tmp_path / "saved")
    [file] = (tmp_path / "saved").glob("*.arrow")
    file.write_bytes(b"cut")
    assert "saved, a saved dataset: " in refusal(tmp_path / "saved")


# Names of rows


def load(name, **others):
    return load_rows(RecipeArguments(dataset_name=str(name), **others))


def pair_rows(count, *, bad=()):
    """Rows of pairs; those whose number is in `bad` say the same twice."""
    same = {"chosen": "Yes.", "rejected": "Yes."}
    return [
        {"prompt": f"Is {n} odd?", "chosen": "Yes.", "rejected": "No."} | (same if n in bad else {})
        for n in range(count)
    ]


def named(pairs):
    """The number in each pair's prompt, with the name of its row."""
    return {
        int(prompt[-1]["content"].split()[1]): name for prompt, name in zip(pairs["prompt"], pairs[ROW], strict=True)
    }


def test_a_blank_line_of_a_jsonl_file_is_counted(tmp_path):
    lines = [json.dumps(row) for row in pair_rows(4)]
    (tmp_path / "pairs.jsonl").write_text("\n".join([lines[0], "", "  ", *lines[1:], ""]))
    pairs = preference_jsonl(load(tmp_path / "pairs.jsonl")["train"])
    assert named(pairs) == {n: f"{tmp_path}/pairs.jsonl, line {line}" for n, line in enumerate((1, 4, 5, 6))}


def test_rows_of_a_csv_file_are_numbered_as_in_a_spreadsheet(tmp_path):
    (tmp_path / "pairs.csv").write_text(
        'prompt,chosen,rejected\n"Is 0 odd?\nI wonder.",Yes.,No.\n\nIs 1 odd?,Yes.,No.\nIs 2 odd?,Yes.,No.\n'
    )
    with Ledger():
        rows = load(tmp_path / "pairs.csv")["train"]
    assert [name.rpartition(", ")[2] for name in rows[ROW]] == ["row 2", "row 4", "row 5"]


@pytest.mark.parametrize("kind", ["parquet", "json", "saved"])
def test_rows_without_lines_are_numbered_from_1(tmp_path, kind):
    path, rows = tmp_path / f"pairs.{kind}", Dataset.from_list(pair_rows(3))
    if kind == "json":
        path.write_text(json.dumps(pair_rows(3), indent=1))
    else:
        rows.to_parquet(path) if kind == "parquet" else rows.save_to_disk(path)
    found = load(path)["train"][ROW][:]
    assert found == [f"{path}, {'train ' if kind == 'saved' else ''}row {n}" for n in (1, 2, 3)]


def test_each_file_of_a_folder_has_its_own_lines(tmp_path):
    write(tmp_path / "train-0.jsonl", pair_rows(2))
    write(tmp_path / "train-1.jsonl.gz", pair_rows(2))
    write(tmp_path / "test.jsonl", pair_rows(1))
    found = load(tmp_path)
    assert found["train"][ROW][:] == [
        f"{tmp_path}/{file}, line {line}" for file in ("train-0.jsonl", "train-1.jsonl.gz") for line in (1, 2)
    ]
    assert found["test"][ROW][:] == [f"{tmp_path}/test.jsonl, line 1"]


def test_a_pair_keeps_the_line_of_its_row_through_samples_shuffles_splits_and_filters(tmp_path):
    file = write(tmp_path / "pairs.jsonl", pair_rows(300, bad=range(0, 300, 7)))
    with Ledger() as ledger:
        rows = load(f"{file}:200")["train"].shuffle(seed=3)
        pairs = split_pairs({"train": preference_jsonl(rows.filter(lambda row: "5" not in row["prompt"]))})
    for part in pairs.values():
        assert named(part)
        assert all(name == f"{file}, line {n + 1}" for n, name in named(part).items())
    [dropped] = ledger.accounts["train"].dropped.values()
    assert all((int(name.rpartition("line ")[2]) - 1) % 7 == 0 for name in dropped.first)


def test_a_mixture_names_the_rows_of_both_files(tmp_path):
    files = [write(tmp_path / name, pair_rows(9, bad=[bad])) for name, bad in (("a.jsonl", 4), ("b.jsonl", 6))]
    with Ledger() as ledger:
        pairs = mix_pairs(RecipeArguments(dataset_name="+".join(map(str, files))), {})
    assert {name.rpartition(",")[0] for part in pairs.values() for name in part[ROW]} == {*map(str, files)}
    assert ledger.accounts["train"].dropped["identical_completions"].first == [
        f"{files[0]}, line 5",
        f"{files[1]}, line 7",
    ]


def test_a_column_that_was_named_before_is_kept(tmp_path):
    file = write(tmp_path / "pairs.jsonl", pair_rows(3))
    load(file).save_to_disk(tmp_path / "saved")
    assert load(tmp_path / "saved")["train"][ROW][:] == [f"{file}, line {n}" for n in (1, 2, 3)]


def test_of_a_stream_the_lines_are_those_of_the_file(tmp_path):
    file = write(tmp_path / "pairs.jsonl", pair_rows(5))
    assert load(f"{file}:2", dataset_streaming=True)["train"][ROW][:] == [f"{file}, line 1", f"{file}, line 2"]


# Tables of text


CSV_ROWS = [
    {"prompt": "Which; one, or\tthe | other?", "chosen": "This; and, that | those.", "rejected": 'Say "no"; no, no.'},
    {"prompt": "Größe, ~né?\nTell me.", "chosen": "42", "rejected": "None"},
    {"prompt": "And; then; what?", "chosen": "NA", "rejected": "a; b; c; d"},
]


def write_csv(path, rows, *, header=("prompt", "chosen", "rejected"), encoding="utf-8", **how):
    with path.open("w", encoding=encoding, newline="") as file:
        csv.writer(file, **how).writerows([header, *(row.values() for row in rows)])
    return path


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_separators_and_encodings_of_a_csv_file_are_recognised(tmp_path, separator, encoding, quoting):
    how = {"delimiter": separator, "encoding": encoding, "quoting": quoting}
    rows = load(write_csv(tmp_path / "pairs.csv", CSV_ROWS, **how))["train"]
    assert rows.remove_columns(ROW).to_list() == CSV_ROWS


def test_a_large_csv_file_is_recognised_by_its_beginning(tmp_path):
    texts = [row | {"prompt": f"{n}. {row['prompt']} {'; '.join('abc' * 20)}"} for n in range(400) for row in CSV_ROWS]
    texts.append(dict.fromkeys(("prompt", "chosen", "rejected"), "long " * 40_000))
    rows = load(write_csv(tmp_path / "pairs.csv", texts))["train"]
    assert rows.remove_columns(ROW).to_list() == texts
    assert rows[ROW][-1] == f"{tmp_path}/pairs.csv, row 1202"


@pytest.mark.parametrize(("encoding", "said"), [("cp1252", "as cp1252"), ("utf-16-le", "as utf-16-le")])
def test_a_csv_file_in_another_encoding_is_refused_with_the_line_and_the_remedy(tmp_path, encoding, said):
    file = write_csv(tmp_path / "pairs.csv", CSV_ROWS, encoding=encoding)
    message = refusal(file)
    assert f"{file}, line {3 if encoding == 'cp1252' else 1}, is not UTF-8; {said} it reads" in message
    assert ("Größe" if encoding == "cp1252" else "prompt,chosen") in message
    assert f"iconv -f {encoding} -t utf-8 {file}" in message


def test_csv_files_that_differ_in_separator_are_refused(tmp_path):
    write_csv(tmp_path / "a.csv", CSV_ROWS)
    write_csv(tmp_path / "b.csv", CSV_ROWS, delimiter=";")
    assert "['a.csv', 'b.csv'] differ in encoding or separator" in refusal(tmp_path)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_columns_may_differ_in_case_and_blanks(tmp_path, kind):
    header = ("Prompt", " chosen ", "REJECTED")
    rows = [dict(zip(header, row.values(), strict=True)) for row in CSV_ROWS]
    path = tmp_path / f"pairs.{kind}"
    if kind == "csv":
        write_csv(path, CSV_ROWS, header=header)
    elif kind == "jsonl":
        write(path, rows)
    else:
        Dataset.from_list(rows).to_parquet(path)
    found = load(path)["train"]
    assert found.remove_columns(ROW).to_list() == CSV_ROWS
    assert load(path, columns="prompt=prompt,chosen=Rejected")["train"]["chosen"][:] == [
        row["rejected"] for row in CSV_ROWS
    ]


def test_columns_that_differ_in_case_from_one_that_is_there_stay(tmp_path):
    file = write(tmp_path / "a.jsonl", [{"prompt": "a", "Prompt": "b", "chosen": "c", "rejected": "d"}])
    assert load(file)["train"].column_names == ["prompt", "Prompt", "chosen", "rejected", ROW]


def test_a_column_that_is_misspelt_is_named_in_the_error(tmp_path):
    file = write(tmp_path / "a.jsonl", [{"prompt": "a", "chosen": "c", "rejcted": "d"}])
    with pytest.raises(
        RecipeError, match=r"got \['prompt', 'chosen', 'rejcted'\]. Name yours with --columns rejected=rejcted"
    ):
        preference_jsonl(load(file)["train"])


# The held-out share


def test_a_larger_share_holds_out_the_prompts_of_a_smaller_one_too():
    pairs = pairs_of([f"question {number}" for number in range(2000)])
    parts = [set(prompts_of(split_pairs({"train": pairs}, share)["test"])) for share in (None, 0.05, 0.2, 0.999)]
    assert parts[0] == parts[1] < parts[2] < parts[3]
    assert 340 <= len(parts[2]) <= 460
    assert 1900 <= len(parts[3]) < 2000


def test_the_setting_reaches_a_recipe_that_splits_with_one_argument():
    pairs = pairs_of([f"question {number}" for number in range(400)])
    with Ledger(0.3):
        assert 90 <= len(split_pairs({"train": pairs})["test"]) <= 150


def test_the_setting_reaches_the_parts_of_a_mixture(tmp_path):
    files = [
        write(tmp_path / f"{name}.jsonl", [row | {"prompt": f"{name} {row['prompt']}"} for row in pair_rows(200)])
        for name in "ab"
    ]
    with Ledger(0.3):
        pairs = mix_pairs(RecipeArguments(dataset_name="+".join(map(str, files)), held_out=0.3), {})
    assert all(40 <= pairs["test"]["source"][:].count(str(file)) <= 80 for file in files)


# Data named for evaluation


def held_out(name):
    args = RecipeArguments(dataset_name=str(name), held_out=1.0)
    with Ledger(1.0) as ledger:
        pairs = split_pairs({split: preference_jsonl(rows) for split, rows in load_rows(args).items()})
    return pairs, ledger


def test_every_row_of_a_mixture_named_for_evaluation_is_held_out(tmp_path):
    files = [write(tmp_path / f"{name}.jsonl", pair_rows(5)) for name in "ab"]
    with Ledger(1.0):
        pairs = mix_pairs(RecipeArguments(dataset_name="+".join(map(str, files)), held_out=1.0), {})
    assert (len(pairs["train"]), len(pairs["test"])) == (0, 10)


def test_every_row_of_a_file_named_for_evaluation_is_held_out(tmp_path):
    pairs, ledger = held_out(write(tmp_path / "pairs.jsonl", pair_rows(40, bad=[3])))
    assert (len(pairs["train"]), len(pairs["test"])) == (0, 39)
    assert list(ledger.accounts) == ["test"]
    assert (ledger.accounts["test"].rows, ledger.accounts["test"].kept) == (40, 39)
    assert ledger.accounts["test"].dropped["identical_completions"].first == [f"{tmp_path}/pairs.jsonl, line 4"]


@pytest.mark.parametrize("kind", ["files", "saved"])
def test_a_folder_with_test_alone_is_for_evaluation_only(tmp_path, kind):
    if kind == "files":
        write(tmp_path / "test.jsonl", pair_rows(5))
    else:
        DatasetDict(test=Dataset.from_list(pair_rows(5))).save_to_disk(tmp_path)
    assert len(held_out(tmp_path)[0]["test"]) == 5
    message = refusal(tmp_path)
    assert "has no split train, only ['test']" in message
    assert f"dpo-recipes evaluate RUN --dataset_name {tmp_path}" in message


def test_of_data_with_splits_the_test_split_is_for_evaluation(tmp_path):
    write(tmp_path / "train.jsonl", pair_rows(9))
    write(tmp_path / "dev.jsonl", pair_rows(4))
    assert len(held_out(tmp_path)[0]["test"]) == 4
    write(tmp_path / "test.jsonl", pair_rows(3))
    assert len(held_out(tmp_path)[0]["test"]) == 3
    args = RecipeArguments(dataset_name=str(tmp_path), held_out=1.0, dataset_test_split="validation")
    assert len(load_rows(args)["train"]) == 4


def test_a_sample_of_a_file_named_for_evaluation_is_counted_as_test(tmp_path):
    pairs, ledger = held_out(f"{write(tmp_path / 'pairs.jsonl', pair_rows(40))}:10")
    assert len(pairs["test"]) == 10
    assert (ledger.accounts["test"].rows, ledger.accounts["test"].not_sampled) == (40, 30)
