"""Opens a dataset where it is kept: a file, a folder, a folder of `save_to_disk`, or the hub."""

import codecs
import csv
import errno
import glob
import gzip
import io
import json
import re
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count, islice
from pathlib import Path
from typing import Any

import pyarrow.parquet
from datasets import Dataset, load_dataset, load_from_disk
from datasets.config import HF_DATASETS_CACHE as HF_CACHE
from datasets.exceptions import DatasetsError

from dpo_recipes.dataset_adapters.adapting import plain_name
from dpo_recipes.errors import RecipeError

Split = tuple[Any, Iterator[str]]  # the rows of a split, and their names
SPLIT_WORDS = {"train": ("train", "training"), "test": ("test",), "validation": ("validation", "valid", "val", "dev")}
WAY_OUT = "name a local file or folder (--dataset_name pairs.jsonl), or try the quickstart, which needs no dataset"
_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}
_BUILDERS |= {".feather": "arrow", ".ipc": "arrow"}
TEXTS = ("prompt", "chosen", "rejected", "system", "instruction", "question", "input")  # columns that stay text
# pandas would take "None", "NA" and "null" for nulls, and answers that are all numbers for numbers.
_CSV = {"keep_default_na": False, "na_values": [""]}
_ENCODINGS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
_SAMPLE = 100_000  # characters of a CSV file, which show its separator
_PAIRS = """\
{"prompt": "Name a river.", "chosen": "The Elbe.", "rejected": "I would rather not."}
{"prompt": "Name a tree.", "chosen": "The beech.", "rejected": "Trees are plants."}
{"prompt": "Name a bird.", "chosen": "The wren.", "rejected": "A bird is an animal."}"""
_UNREADABLE = (OSError, ValueError, EOFError, LookupError, StopIteration, DatasetsError)  # pyarrow's are ValueErrors
_READS_CACHE = {"_memory_mapped_record_batch_reader_from_file", "from_directory"}  # functions of datasets


def open_dataset(name: str, config: str | None, *, streaming: bool) -> Mapping[str, Split]:
    """Returns the splits of a folder, a file or a hub dataset under the names that they have there.

    Args:
        name: Path of a file or folder, or a name on the hub.
        config: A subfolder, or a configuration of a hub dataset.
        streaming: Yield rows one at a time; nothing is written to the cache.

    Raises:
        RecipeError: If there is no such data, or it cannot be read.
    """
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


def _numbered(name: str, splits: Mapping[str, Any]) -> dict[str, Split]:
    """Returns the splits with the numbers of their rows, from 1."""
    return {split: (rows, (f"{name}, {split} row {n}" for n in count(1))) for split, rows in splits.items()}


def _load_folder(folder: Path, config: str | None, *, streaming: bool) -> Mapping[str, Split]:
    if config:
        if not (folder / config).is_dir():
            parts = sorted(part.name for part in folder.iterdir() if part.is_dir())
            raise RecipeError(f"{folder} has no subfolder {config}, only {parts}. Name one with --dataset_config.")
        folder /= config
    if not (folder / "dataset_dict.json").is_file() and not (folder / "state.json").is_file():
        return {split: _load_files(files, streaming=streaming) for split, files in _files_by_split(folder).items()}
    with refusing(lambda: f"Cannot read {folder}, a saved dataset", "Save it again."):
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
    return next((split for split, names in SPLIT_WORDS.items() if set(words) & set(names)), None)


def _load_files(files: list[Path], *, streaming: bool) -> Split:
    builders = {_BUILDERS.get(_suffix(file)) for file in files}
    builder = builders.pop()
    if builders or builder is None:
        raise RecipeError(
            f"Cannot read {[file.name for file in files]}: needs files of one kind, of {list(_BUILDERS)}."
        )
    paths = [glob.escape(str(file.resolve())) for file in files]
    counted = (f"{files[0] if len(files) == 1 else files[0].parent}, row {n}" for n in count(1))
    with refusing(lambda: f"Cannot read {_culprit(files)}", "Mend it or name another."):
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
            separator, header = _separator_and_header(text.read(_SAMPLE))
        looks.add((encoding, separator))
        texts |= {name for name in header if plain_name(name) in TEXTS}
    if len(looks) > 1:
        raise RecipeError(
            f"{[file.name for file in files]} differ in encoding or separator: {sorted(looks)}. Save all of them alike."
        )
    return {**_CSV, "encoding": encoding, "sep": separator, "converters": dict.fromkeys(sorted(texts), str)}


def _separator_and_header(sample: str) -> tuple[str, list[str]]:
    """Returns the separator that divides all records alike, into the most columns, and the first record."""
    is_cut = len(sample) == _SAMPLE

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
    with refusing(lambda: what, f"Check the name and the connection, or {WAY_OUT}."):
        try:
            return dict(load_dataset(name, config, streaming=streaming))
        except ValueError as error:
            if config is None or "BuilderConfig" not in str(error):
                raise
            # hh-rlhf keeps its parts in folders
            return dict(load_dataset(name, data_dir=config, streaming=streaming))


@contextmanager
def refusing(what: Callable[[], str], remedy: str) -> Iterator[None]:
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
