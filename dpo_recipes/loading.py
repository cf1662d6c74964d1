"""Loads raw rows from the hub, a file or a folder, and splits pairs so that no prompt is on both sides."""

import codecs
import csv
import errno
import glob
import gzip
import hashlib
import io
import json
import logging
import random
import re
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import pyarrow.parquet
from datasets import Dataset, DatasetDict, Features, Value, concatenate_datasets, load_dataset, load_from_disk
from datasets.config import HF_DATASETS_CACHE as HF_CACHE
from datasets.exceptions import DatasetsError

from dpo_recipes.dataset_adapters import PAIR_FEATURES, map_rows, recognise, rename_columns
from dpo_recipes.dataset_adapters.adapting import ROW, keep_rows, plain_name
from dpo_recipes.dataset_adapters.ledger import HELD_OUT, Ledger, current_ledger
from dpo_recipes.errors import RecipeError

logger = logging.getLogger(__name__)

_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}
_BUILDERS |= {".feather": "arrow", ".ipc": "arrow"}
# pandas would take "None", "NA" and "null" for nulls, and answers that are all numbers for numbers.
_TEXTS = ("prompt", "chosen", "rejected", "system", "instruction", "question", "input")
_CSV = {"keep_default_na": False, "na_values": [""]}
_COLUMNS = (*_TEXTS, "system_prompt", "system_message", "conversations", "messages", "tools", "margin")
_ENCODINGS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
_SAMPLE = 100_000  # characters of a CSV file, which show its separator
_SPLIT_WORDS = {"train": ("train", "training"), "test": ("test",), "validation": ("validation", "valid", "val", "dev")}
_MIXED = ("prompt", "chosen", "rejected", "tools", "chat_template_kwargs", ROW)  # columns that a mixture keeps
_STREAMED = 5000  # rows of each split
_WAY_OUT = "name a local file or folder (--dataset_name pairs.jsonl), or try the quickstart, which needs no dataset"
_PAIRS = """\
{"prompt": "Name a river.", "chosen": "The Elbe.", "rejected": "I would rather not."}
{"prompt": "Name a tree.", "chosen": "The beech.", "rejected": "Trees are plants."}
{"prompt": "Name a bird.", "chosen": "The wren.", "rejected": "A bird is an animal."}"""
_UNREADABLE = (OSError, ValueError, EOFError, LookupError, StopIteration, DatasetsError)  # pyarrow's are ValueErrors
_Split = tuple[Any, Iterator[str]]  # the rows of a split, and their names
_READS_CACHE = {"_memory_mapped_record_batch_reader_from_file", "from_directory"}  # functions of datasets


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
        raise RecipeError(f"No dataset: dataset_name is empty. To go on, {_WAY_OUT}.")
    if len(_parts(script_args.dataset_name)) > 1:
        raise RecipeError(
            f"{script_args.dataset_name} are several datasets, where one is needed. The recipe mixture-lora mixes them."
        )
    name, sample = _name_and_sample(script_args.dataset_name)
    streaming, columns = script_args.dataset_streaming, _column_names(getattr(script_args, "columns", None))
    loaded = _pick_splits(_load(name, script_args.dataset_config, streaming=streaming), script_args, name=name)
    splits: dict[str, Dataset] = {}
    for split, (rows, names) in loaded.items():
        rows = _first_rows(rows, sample or _STREAMED, name=name) if streaming else rows
        if not len(rows):
            raise RecipeError(f"The {split} split of {name} has no rows. To go on, {_WAY_OUT}.")
        if ROW not in rows.column_names:  # a dataset that was loaded here before, and saved, has it
            rows = rows.add_column(ROW, list(islice(names, len(rows))), feature=Value("string"))
        # Dataset adapters count rows under the name of their split.
        counted_as = "test" if _held_out_of(script_args) == 1 else split
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


def _held_out_of(script_args: Any) -> float:
    """Returns the setting `held_out`, which TRL's ScriptArguments lack."""
    return float(getattr(script_args, "held_out", HELD_OUT))


def _pick_splits(splits: Mapping[str, _Split], script_args: Any, *, name: str) -> dict[str, _Split]:
    train, test, share = script_args.dataset_train_split, script_args.dataset_test_split, _held_out_of(script_args)
    if test not in splits and test != "test":
        raise RecipeError(
            f"{name} has no split {test}, only {sorted(splits)}. Name one with --dataset_test_split, or leave "
            f"it out and {share:.0%} of the prompts are held out."
        )
    if share == 1 and (named := [split for split in (test, *_SPLIT_WORDS["validation"], train) if split in splits]):
        return {"train": splits[named[0]]}
    if train not in splits:
        to_test = f" To test a run on it: dpo-recipes evaluate RUN --dataset_name {name}." if "test" in splits else ""
        raise RecipeError(
            f"{name} has no split {train}, only {sorted(splits)}. Name one with --dataset_train_split.{to_test}"
        )
    if test == train != "test":
        raise RecipeError(f"--dataset_test_split and --dataset_train_split are both {test}. Name two splits.")
    candidates = [split for split in (test, *_SPLIT_WORDS["validation"]) if split in splits and split != train]
    return {"train": splits[train]} | ({"test": splits[candidates[0]]} if candidates else {})


def _first_rows(rows: Any, most: int, *, name: str) -> Dataset:
    with _refusing(lambda: f"Cannot read {name}", "Mend it or name another."):
        return Dataset.from_list(list(rows.take(most)))


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


def _load(name: str, config: str | None, *, streaming: bool) -> Mapping[str, _Split]:
    """Returns the splits of a folder, a file or a hub dataset under the names that they have there."""
    path = Path(name).expanduser()
    if path.is_dir():
        return _load_folder(path, config, streaming=streaming)
    if path.is_file():
        if config:
            raise RecipeError(f"{name} is one file and has no configuration {config}. Leave out --dataset_config.")
        return {"train": _load_files([path], streaming=streaming)}
    if _suffix(path) in _BUILDERS or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise RecipeError(
            f"There is no file or folder {name} (looked in {Path.cwd()}). Name yours with --dataset_name. The recipe "
            f"preference-lora reads pairs of your own from a file of one pair a line:\n{_PAIRS}"
        )
    return _numbered(name, _load_from_hub(name, config, streaming=streaming))


def _numbered(name: str, splits: Mapping[str, Any]) -> dict[str, _Split]:
    """Returns the splits with the numbers of their rows, from 1."""
    return {split: (rows, (f"{name}, {split} row {n}" for n in count(1))) for split, rows in splits.items()}


def _load_folder(folder: Path, config: str | None, *, streaming: bool) -> Mapping[str, _Split]:
    if config:
        if not (folder / config).is_dir():
            parts = sorted(part.name for part in folder.iterdir() if part.is_dir())
            raise RecipeError(f"{folder} has no subfolder {config}, only {parts}. Name one with --dataset_config.")
        folder /= config
    if not (folder / "dataset_dict.json").is_file() and not (folder / "state.json").is_file():
        return {split: _load_files(files, streaming=streaming) for split, files in _files_by_split(folder).items()}
    with _refusing(lambda: f"Cannot read {folder}, a saved dataset", "Save it again."):
        saved = load_from_disk(str(folder))
    return _numbered(str(folder), {"train": saved} if isinstance(saved, Dataset) else saved)


def _files_by_split(folder: Path) -> dict[str, list[Path]]:
    """Returns the data files below a folder, by the split that the name of the file or of the nearest folder holds."""
    by_split: dict[str | None, list[Path]] = defaultdict(list)
    for file in sorted(folder.rglob("*")):
        parts = file.relative_to(folder).parts
        hidden = any(part.startswith(".") for part in parts) or file.name.startswith("dataset_info")
        if file.is_file() and _suffix(file) in _BUILDERS and not hidden:
            by_split[next(filter(None, map(_split_of, reversed(parts))), None)].append(file)
    if not by_split:
        raise RecipeError(f"{folder} holds no data: no {', '.join(_BUILDERS)} (.gz) file and no saved dataset.")
    if None in by_split and len(by_split) > 1:
        raise RecipeError(
            f"Cannot tell which split {[file.name for file in by_split[None]]} in {folder} belong to: the other files "
            "have train, test or validation in their names. Rename them, move them away, or name a single file."
        )
    return {split or "train": files for split, files in by_split.items()}


def _split_of(name: str) -> str | None:
    words = re.findall(r"[a-z]+", name.lower())
    return next((split for split, names in _SPLIT_WORDS.items() if set(words) & set(names)), None)


def _load_files(files: list[Path], *, streaming: bool) -> _Split:
    builders = {_BUILDERS.get(_suffix(file)) for file in files}
    builder = builders.pop()
    if builders or builder is None:
        raise RecipeError(
            f"Cannot read {[file.name for file in files]}: needs files of one kind, of {list(_BUILDERS)}."
        )
    paths = [glob.escape(str(file.resolve())) for file in files]
    counted = (f"{files[0] if len(files) == 1 else files[0].parent}, row {n}" for n in count(1))
    with _refusing(lambda: f"Cannot read {_culprit(files)}", "Mend it or name another."):
        options = _csv_options(files) if builder == "csv" else {}
        rows = load_dataset(builder, data_files=paths, split="train", streaming=streaming, **options)
        names = (f"{file}, {place}" for file in files for place in _places(file, options))
        if streaming:
            return rows, names if {*map(_suffix, files)} <= {".csv", ".jsonl"} else counted
        rows.data.validate(full=True)  # datasets lets invalid UTF-8 pass, to fail at some later access
        known = list(names)
    return rows, iter(known) if len(known) == len(rows) else counted  # a file that is one list has other lines


def _csv_options(files: list[Path]) -> dict[str, Any]:
    """Returns pandas' arguments for CSV files: their encoding and separator, and the columns that stay text."""
    csv.field_size_limit(2**31 - 1)  # characters of a cell; by default 131,072
    looks, texts = set(), set[str]()
    for file in files:
        with _open(file) as lines:
            start = lines.readline()
        encoding = next((name for mark, name in _ENCODINGS.items() if start.startswith(mark)), "utf-8")
        if encoding == "utf-8":
            _refuse_other_encodings(file)
        with _open(file, encoding) as text:
            sample, is_cut = text.read(_SAMPLE), bool(text.read(1))
        separator, header = _separator_and_header(sample, is_cut=is_cut)
        looks.add((encoding, separator))
        texts |= {name for name in header if plain_name(name) in _TEXTS}
    if len(looks) > 1:
        raise RecipeError(
            f"{[file.name for file in files]} differ in encoding or separator: {sorted(looks)}. Save all of them alike."
        )
    return {**_CSV, "encoding": encoding, "sep": separator, "converters": dict.fromkeys(sorted(texts), str)}


def _separator_and_header(sample: str, *, is_cut: bool) -> tuple[str, list[str]]:
    """Returns the separator that divides all records alike, into the most columns, and the first record."""

    def records(separator: str) -> list[list[str]]:
        found = [record for record in csv.reader(io.StringIO(sample, newline=""), delimiter=separator) if record]
        return found[:-1] if is_cut and len(found) > 1 else found or [[]]

    def fit(separator: str) -> tuple[bool, int]:
        widths = [*map(len, records(separator))]
        return widths[0] > 1 and len({*widths}) == 1, widths[0]

    separator = max(",;\t|", key=fit)  # the first of equals
    return separator, records(separator)[0]


def _refuse_other_encodings(file: Path) -> None:
    """Raises RecipeError, with the line, unless a file without a byte order mark is UTF-8."""
    with _open(file) as lines:
        for number, line in enumerate(lines, start=1):
            other = "utf-16-le" if number == 1 and b"\0" in line else None
            try:
                line.decode()
            except UnicodeDecodeError as error:
                other, line = other or "cp1252", line[max(0, error.start - 30) :]
            if other:
                read = line[:60].decode(other, "replace").strip()
                raise RecipeError(
                    f"{file}, line {number}, is not UTF-8; as {other} it reads {read!r}. If that is right, convert the "
                    f"file (iconv -f {other} -t utf-8 {file} > utf8.csv), or save it as UTF-8 in the spreadsheet."
                )


def _places(file: Path, options: Mapping[str, Any]) -> Iterator[str]:
    """Yields the place of each row of a file: a line as editors count it, of a CSV file a row as spreadsheets do."""
    builder = _BUILDERS[_suffix(file)]
    if builder == "csv":
        with _open(file, options["encoding"]) as text:
            records = enumerate(csv.reader(text, delimiter=options["sep"]), start=1)
            not_blank = (n for n, record in records if len(record) > 1 or "".join(record).strip())
            yield from (f"row {n}" for n in islice(not_blank, 1, None))  # the first is the header
    elif builder == "json":
        with _open(file) as lines:
            yield from (f"line {n}" for n, line in enumerate(lines, start=1) if line.strip())
    elif file.suffix == ".parquet":
        yield from (f"row {n + 1}" for n in range(pyarrow.parquet.read_metadata(file).num_rows))


def _open(file: Path, encoding: str | None = None) -> Any:
    """Opens a file, compressed or not: for bytes, or for text of an encoding with its line ends as they are."""
    how: dict[str, Any] = {"mode": "rt", "encoding": encoding, "newline": ""} if encoding else {"mode": "rb"}
    return gzip.open(file, **how) if file.suffix == ".gz" else file.open(**how)


def _suffix(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def _culprit(files: list[Path]) -> str:
    """Returns the first line of a JSON Lines file that cannot be read, or the files' names."""
    for file in files:
        if _suffix(file) != ".jsonl":
            continue
        number = 1
        try:
            with _open(file) as lines:
                for number, line in enumerate(lines, start=1):  # noqa: B007 (named when a line fails)
                    if line.strip():
                        json.loads(line)
        except (ValueError, EOFError, OSError):  # not JSON, not UTF-8, cut short
            return f"{file}, line {number}"
    return str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"


def _load_from_hub(name: str, config: str | None, *, streaming: bool) -> Mapping[str, Any]:
    which = f"{name} (configuration {config})" if config else name
    what = f"Cannot load {which} from the hub, and there is no such file here"
    with _refusing(lambda: what, f"Check the name and the connection, or {_WAY_OUT}."):
        try:
            return dict(load_dataset(name, config, streaming=streaming))
        except ValueError as error:
            if config is None or "BuilderConfig" not in str(error):
                raise
            # hh-rlhf keeps its parts in folders
            return dict(load_dataset(name, data_dir=config, streaming=streaming))


@contextmanager
def _refusing(what: Callable[[], str], remedy: str) -> Iterator[None]:
    """Raises RecipeError for data that cannot be read, with a message of `what` failed, the cause and the remedy.

    A full disk stays an OSError, and a damaged cache of datasets is told apart from damaged data.
    """
    try:
        yield
    except _UNREADABLE as error:
        cause = error.__cause__ or error  # datasets wraps what went wrong in "An error occurred while generating ..."
        for full in (error, cause):
            if isinstance(full, OSError) and full.errno in (errno.ENOSPC, errno.EDQUOT):
                raise full from full.__cause__
        why = (str(cause).strip() or type(cause).__name__).splitlines()[0].rstrip(".")
        functions = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
        if functions & _READS_CACHE and "load_from_disk" not in functions:
            raise RecipeError(
                f"The cache of datasets is damaged ({why}); the data is not. Remove the folder {HF_CACHE}, which is "
                "made again from the data."
            ) from error
        why = "it holds no rows" if isinstance(error, StopIteration) else why
        raise RecipeError(f"{what()}: {why}. {remedy}") from error


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
