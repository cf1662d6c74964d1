"""Loads raw rows, draws samples of them, mixes datasets, and splits pairs so that no prompt is on both sides."""

import hashlib
import json
import logging
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Features, Value, concatenate_datasets

from dpo_recipes.data_files import SPLIT_WORDS, TEXTS, WAY_OUT, Split, open_dataset, refusing
from dpo_recipes.dataset_adapters import PAIR_FEATURES, map_rows, recognise, rename_columns
from dpo_recipes.dataset_adapters.adapting import ROW, keep_rows, plain_name
from dpo_recipes.dataset_adapters.ledger import HELD_OUT, Ledger, current_ledger
from dpo_recipes.errors import RecipeError

logger = logging.getLogger(__name__)

_COLUMNS = (*TEXTS, "system_prompt", "system_message", "conversations", "messages", "tools", "margin")
_MIXED = ("prompt", "chosen", "rejected", "tools", "chat_template_kwargs", ROW)  # columns that a mixture keeps
_STREAMED = 5000  # rows of each split


def load_rows(script_args: Any) -> DatasetDict:
    """Returns raw rows as `train` and, if the dataset has one, `test`.

    `dataset_name` is a hub name, a file (.jsonl, .json, .csv, also with .gz, .parquet or .arrow), a folder of such
    files told apart by their names, or a folder written by `save_to_disk`. `NAME:50000` draws 50,000 training rows, by
    seed 0, in their order; a path with a colon that exists wins. `dataset_config` is the configuration of a hub dataset
    or a subfolder. `dataset_test_split` left at "test" falls back to the validation split, else there is no `test`.
    `dataset_streaming` takes the first rows of each split, 5,000 or as many as `NAME:N` says: enough to look at.
    `columns` ("prompt=instruction,chosen=good") renames columns. Of the columns that dataset adapters read, case and
    blanks around the name do not count. A column `margin` that `columns` does not name becomes
    `preference_strength`: RewardTrainer would take it into its loss. Messages of one tree are drawn together. The
    column ROW holds the file and line of each row.

    A `held_out` of 1 is for data that is named for evaluation: its test split, or all rows of a dataset without one, is
    returned as `train`, and `split_pairs` holds it out.

    Raises:
        RecipeError: If the rows cannot be had, or a split is missing that was asked for.
    """
    if not script_args.dataset_name:
        raise RecipeError(f"No dataset: dataset_name is empty. To go on, {WAY_OUT}.")
    if len(_parts(script_args.dataset_name)) > 1:
        raise RecipeError(
            f"{script_args.dataset_name} are several datasets, where one is needed. The recipe mixture-lora mixes them."
        )
    name, sample = _name_and_sample(script_args.dataset_name)
    # TRL's ScriptArguments have neither columns nor held_out.
    columns, held_out = _column_names(getattr(script_args, "columns", None)), getattr(script_args, "held_out", HELD_OUT)
    streaming = script_args.dataset_streaming
    found = open_dataset(name, script_args.dataset_config, streaming=streaming)
    splits: dict[str, Dataset] = {}
    for split, (rows, names) in _pick_splits(found, script_args, share=held_out, name=name).items():
        if streaming:
            with refusing(lambda: f"Cannot read {name}", "Mend it or name another."):
                rows = Dataset.from_list(list(rows.take(sample or _STREAMED)))
        if not len(rows):
            raise RecipeError(f"The {split} split of {name} has no rows. To go on, {WAY_OUT}.")
        if ROW not in rows.column_names:  # a dataset that was loaded here before, and saved, has it
            rows = rows.add_column(ROW, list(islice(names, len(rows))), feature=Value("string"))
        # Dataset adapters count rows under the name of their split.
        counted_as = "test" if held_out == 1 else split
        splits[split] = concatenate_datasets([_renamed(rows, columns)], split=counted_as)
    if sample is not None and not streaming:
        splits["train"] = _draw(splits["train"], sample, name=name)
    return DatasetDict(splits)


def mix_pairs(script_args: Any, dataset_adapters: Mapping[str, Callable[[Dataset], Dataset]]) -> DatasetDict:
    """Returns `train` and `test` pairs of several datasets, `NAME:20000+OTHER:10000`; no prompt is on both sides.

    Each dataset is loaded, adapted and split by itself. `source` holds its name; preference_strength, margin and id are
    not kept.

    Args:
        script_args: As `load_rows` reads them.
        dataset_adapters: By the name of a dataset; `recognise` finds the dataset adapter of other datasets.

    Raises:
        RecipeError: If a dataset cannot be had, or no dataset adapter is known for its columns.
    """
    mixed: dict[str, list[Dataset]] = {"train": [], "test": []}
    for part in _parts(script_args.dataset_name or ""):
        name, _ = _name_and_sample(part)
        # A ledger of its own: a stage counts on what the stage before it kept of the same dataset.
        with Ledger(current_ledger().held_out) as ledger:
            splits = load_rows(replace(script_args, dataset_name=part))
            dataset_adapter = dataset_adapters.get(name) or recognise(splits["train"])
            pairs = split_pairs({split: dataset_adapter(rows) for split, rows in splits.items()})
        current_ledger().add(ledger)
        for split, kept in pairs.items():
            kept = kept.select_columns([column for column in kept.column_names if column in _MIXED])
            mixed[split].append(kept.add_column("source", [name] * len(kept), feature=Value("string")))
    return split_pairs({split: concatenate_datasets(_alike(parts), split=split) for split, parts in mixed.items()})


def split_pairs(pairs: Mapping[str, Dataset], held_out: float | None = None) -> DatasetDict:
    """Returns `train` and `test` pairs that share no prompt.

    With a test split of its own, training pairs whose prompt is in it are dropped and counted. Without one, the share
    `held_out` of the prompts, and at least one, are held out: by a hash of the prompt alone, so that a prompt stays on
    its side whatever is added, reordered or drawn, and a larger share holds out those of a smaller one too.

    Args:
        pairs: By split.
        held_out: Between 0 and 1; None: the setting of the run, or 0.05 outside of a run.

    Raises:
        RecipeError: If there is no `train`, or a split of another name than `train` and `test`.
    """
    if not {"train"} <= set(pairs) <= {"train", "test"}:
        raise RecipeError(f"split_pairs needs the splits train and, if there is one, test, got {sorted(pairs)}.")
    train, ledger = pairs["train"], current_ledger()
    share = ledger.held_out if held_out is None else held_out
    if share == 1:
        test = pairs.get("test", train)
        ledger.record("split_pairs", "test", came=len(test), kept=len(test))
        return DatasetDict(train=train.select([]), test=test)
    if "test" in pairs:
        return drop_prompts_in_test(DatasetDict(pairs), stage="split_pairs")
    hashes = prompt_hashes(train)
    tested = _held_out(set(hashes), share)
    in_test = [row for row, key in enumerate(hashes) if key in tested]
    in_train = [row for row, key in enumerate(hashes) if key not in tested]
    ledger.record("split_pairs", "train", came=len(train), kept=len(in_train), moved=-len(in_test))
    ledger.record("split_pairs", "test", came=0, kept=len(in_test), moved=len(in_test))
    return DatasetDict(train=train.select(in_train), test=train.select(in_test))


def drop_prompts_in_test(pairs: DatasetDict, *, stage: str) -> DatasetDict:
    """Returns the splits without the training pairs whose prompt is also a test prompt; these pairs are counted."""
    test_hashes = set(prompt_hashes(pairs["test"]))
    reasons = ["prompt_in_test" if key in test_hashes else None for key in prompt_hashes(pairs["train"])]
    train = keep_rows(pairs["train"], reasons, stage=stage, split="train")
    current_ledger().record(stage, "test", came=len(pairs["test"]), kept=len(pairs["test"]))
    return DatasetDict(train=train, test=pairs["test"])


def keep_part(train: Dataset, part: str | None) -> Dataset:
    """Returns the training pairs of one part; the others are counted.

    The part depends on a hash of the prompt's last turn, which stays when a prompt is shortened to any length.

    Args:
        train: Pairs.
        part: `learn`, two thirds; `judge`, the others; None: all.
    """
    if part is None:
        return train
    texts = [prompt if isinstance(prompt, str) else prompt[-1]["content"] for prompt in train["prompt"]]
    is_judge = [hashlib.sha256(text.encode()).digest()[0] % 3 == 0 for text in texts]
    reasons = [None if judge == (part == "judge") else "other_part" for judge in is_judge]
    return keep_rows(train, reasons, stage="part", split="train")


def digest(pairs: Dataset) -> str:
    """Returns a hash of the different prompts of some pairs, in any order."""
    return hashlib.sha256("".join(sorted(set(prompt_hashes(pairs)))).encode()).hexdigest()[:16]


def prompt_hashes(pairs: Dataset) -> list[str]:
    """Returns one hash a pair, equal where the prompts are, on every machine and in every version of Python."""
    features = Features({"prompt_hash": Value("string")})
    hashed = map_rows(pairs.select_columns("prompt"), _hash_prompts, features=features, desc="hashing prompts")
    return list(hashed["prompt_hash"][:])


# Helpers of load_rows, in the order of their use


def _parts(name: str) -> list[str]:
    """Returns the datasets of a mixture; a path with a plus that exists is one dataset."""
    return [name] if Path(name).expanduser().exists() else name.split("+")


def _name_and_sample(name: str) -> tuple[str, int | None]:
    match = re.fullmatch(r"(.+):(\d+)", name)
    if match is None or Path(name).expanduser().exists():
        return name, None
    if int(match[2]) < 1:
        raise RecipeError(f"{name} asks for {match[2]} rows. Ask for one or more: {match[1]}:50000.")
    return match[1], int(match[2])


def _column_names(columns: str | None) -> dict[str, str]:
    """Parses `--columns prompt=instruction,chosen=good`: the dataset's name for each of ours."""
    names = [entry.partition("=")[::2] for entry in (columns or "").split(",") if entry]
    if not all(ours and theirs for ours, theirs in names) or len(dict(names)) < len(names):
        raise RecipeError(f"--columns {columns} is not of the form prompt=instruction,chosen=good,rejected=bad.")
    return {ours.strip(): theirs.strip() for ours, theirs in names}


def _pick_splits(splits: Mapping[str, Split], script_args: Any, *, share: float, name: str) -> dict[str, Split]:
    train, test = script_args.dataset_train_split, script_args.dataset_test_split
    if test not in splits and test != "test":
        raise RecipeError(
            f"{name} has no split {test}, only {sorted(splits)}. Name one with --dataset_test_split, or leave "
            f"it out and {share:.0%} of the prompts are held out."
        )
    if share == 1 and (named := [split for split in (test, *SPLIT_WORDS["validation"], train) if split in splits]):
        return {"train": splits[named[0]]}
    if train not in splits:
        to_test = f" To test a run on it: dpo-recipes evaluate RUN --dataset_name {name}." if "test" in splits else ""
        raise RecipeError(
            f"{name} has no split {train}, only {sorted(splits)}. Name one with --dataset_train_split.{to_test}"
        )
    if test == train != "test":
        raise RecipeError(f"--dataset_test_split and --dataset_train_split are both {test}. Name two splits.")
    candidates = [split for split in (test, *SPLIT_WORDS["validation"]) if split in splits and split != train]
    return {"train": splits[train]} | ({"test": splits[candidates[0]]} if candidates else {})


def _renamed(rows: Dataset, columns: Mapping[str, str]) -> Dataset:
    """Renames columns as `--columns` says, and those that differ in case or blanks from a column that is read.

    A margin that `--columns` does not name becomes preference_strength.
    """
    rows = rename_columns(rows, **columns)
    alike = {*map(plain_name, rows.column_names)}.difference(rows.column_names)
    rows = rename_columns(rows, **{name: name for name in _COLUMNS if name in alike})
    if "margin" not in rows.column_names or "margin" in columns:
        return rows
    current_ledger().note_unread("margin (a loss reads it with --columns margin=margin)", len(rows), len(rows))
    return rename_columns(rows, preference_strength="margin")


def _draw(rows: Dataset, size: int, *, name: str) -> Dataset:
    if size >= len(rows):
        logger.warning("%s has %d training rows: all are taken, not %d.", name, len(rows), size)
        return rows
    if "message_tree_id" in rows.column_names:  # a message without its thread is of no use
        trees = [hashlib.sha256(str(tree).encode()).digest() for tree in rows["message_tree_id"][:]]
        drawn = sorted(sorted(range(len(rows)), key=trees.__getitem__)[:size])
    else:
        drawn = sorted(random.Random(0).sample(range(len(rows)), size))
    left_out = len(rows) - size
    current_ledger().record("load_rows", str(rows.split), came=left_out, kept=0, not_sampled=left_out, new=True)
    return rows.select(drawn)


# Helpers of mix_pairs and split_pairs


def _alike(parts: list[Dataset]) -> list[Dataset]:
    """Returns the parts with the columns of all parts, each of its richest type; a column that was missing is null."""
    kinds = [item for part in parts for item in part.features.items()]
    rich = {column: kind for column, kind in kinds if kind != PAIR_FEATURES.get(column)}  # messages with tool calls too
    features = Features({**dict(kinds), **rich})
    if all(part.features == features for part in parts):
        return parts
    return [map_rows(part, _fill, features=features, desc="mixing", columns=[*features]) for part in parts]


def _fill(batch: dict[str, list[Any]], *, columns: list[str]) -> dict[str, list[Any]]:
    empty: dict[str, Any] = {"chat_template_kwargs": {}}
    return {column: batch.get(column, [empty.get(column)] * len(batch["prompt"])) for column in columns}


def _held_out(hashes: set[str], share: float) -> set[str]:
    """Returns the hashes below this share of their range: at least one, but never all."""
    limit = f"{int(share * 2**64):016x}"
    ranked = sorted(hashes)
    below = max(1, sum(key[:16] < limit for key in ranked))
    return set(ranked[: min(below, len(ranked) - 1)])


def _hash_prompts(batch: dict[str, list[Any]]) -> dict[str, list[str]]:
    texts = (json.dumps(prompt, sort_keys=True) for prompt in batch["prompt"])
    return {"prompt_hash": [hashlib.sha256(text.encode()).hexdigest() for text in texts]}
