"""Seconds and memory of the dataset adapters: hh_rlhf and an identity map of the same rows, then each in turn.

    python benchmarks/bench_adapters.py [--rows 161000] [--repeats 3] [--each 100000]

The second table has `--each` rows for each dataset adapter, in a process of its own. These rows have the published
columns and the texts of hh-rlhf, with 8 rows a post (SHP) and 3 ranked replies a prompt (oasst1).

The texts are those of $DPO_RECIPES_DATA/hh-rlhf, or without that folder those of the test fixture. They are repeated,
each with a suffix, so that no two are equal. The targets are for 161,000 rows on 2 cores: the first pass under 15 s and
2 GiB, a pass from the cache under 3 s.
"""

import argparse
import gzip
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset

from dpo_recipes import dataset_adapters
from dpo_recipes.dataset_adapters import hh_rlhf
from dpo_recipes.dataset_adapters.ledger import Ledger

FIXTURE = Path(__file__).parent.parent / "tests" / "fixtures" / "hh_rlhf.jsonl"
TARGETS = {"hh_rlhf, first": 15.0, "hh_rlhf, from the cache": 3.0}  # seconds
TARGET_MEMORY = 2048  # MiB
EACH = ("hh_rlhf", "preference_jsonl", "ultrafeedback_binarized", "sharegpt_pairs", "shp", "oasst1")


def source_rows() -> list[dict[str, str]]:
    """The real rows, or the rows of the fixture."""
    files = sorted(Path(os.environ.get("DPO_RECIPES_DATA", "nowhere"), "hh-rlhf").glob("*/*.jsonl.gz"))
    texts = [gzip.decompress(file.read_bytes()) for file in files] or [FIXTURE.read_bytes()]
    return [json.loads(line) for text in texts for line in text.splitlines()]


def repeated(rows: list[dict[str, str]], count: int) -> Iterator[dict[str, Any]]:
    """Repeats the rows up to a count, each with the number of its round at the end."""
    for number in range(count):
        row = rows[number % len(rows)]
        yield {side: text and f"{text} ({number // len(rows)})" for side, text in row.items()}


def seconds(function: Callable[[], Any]) -> float:
    """Seconds that the function takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(rows: list[dict[str, str]], count: int) -> dict[str, float]:
    """Seconds of each pass, in a cache of its own."""
    with tempfile.TemporaryDirectory() as cache:
        # Not as gen_kwargs: datasets takes a list in those for shards and would run the generator once for each row.
        made = Dataset.from_generator(lambda: repeated(rows, count), cache_dir=cache)
        assert len(made) == count
        workers = min(8, os.cpu_count() or 1)
        timings = {"identity map": seconds(lambda: made.map(lambda batch: batch, batched=True, num_proc=workers))}
        with Ledger() as ledger:
            timings["hh_rlhf, first"] = seconds(lambda: hh_rlhf(made))
        assert ledger.total().rows == count
        timings["hh_rlhf, from the cache"] = seconds(lambda: hh_rlhf(made))
    return timings


def schema_rows(name: str, rows: list[dict[str, str]], count: int) -> Iterator[dict[str, Any]]:
    """A given number of rows with the columns that the dataset adapter reads."""
    usable = [row for row in rows if row["chosen"] and row["rejected"]]
    for number, row in enumerate(repeated(usable, count)):
        if name == "hh_rlhf":
            yield row
            continue
        question, _, good = row["chosen"].rpartition("\n\nAssistant:")
        bad = row["rejected"].rpartition("\n\nAssistant:")[2]
        said = [{"from": "human", "value": question}, {"from": "gpt", "value": good}, {"from": "gpt", "value": bad}]
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": good}]
        tree, place = divmod(number, 4)
        states = {
            "lang": "en",
            "deleted": False,
            "synthetic": False,
            "review_result": True,
            "message_tree_id": str(tree),
        }
        yield {
            "preference_jsonl": {"prompt": turns[:1], "chosen": turns[1:], "rejected": [{**turns[1], "content": bad}]},
            "ultrafeedback_binarized": {
                **{"prompt": question, "chosen": turns, "rejected": [turns[0], {**turns[1], "content": bad}]},
                **{"score_chosen": 8.0, "score_rejected": 6.0},
            },
            "sharegpt_pairs": {"conversations": said[:1], "chosen": said[1], "rejected": said[2]},
            "shp": {
                **{"post_id": str(number // 8), "domain": "askscience_train", "history": question, "labels": 1},
                **{"human_ref_A": good, "human_ref_B": bad, "score_A": 10 + number % 40, "score_B": 8},
            },
            "oasst1": {
                **{"message_id": f"{tree} {place}", "parent_id": f"{tree} 0" if place else None, **states},
                **{"role": "assistant" if place else "prompter", "rank": place - 1 if place else None, "text": good},
            },
        }[name]


def measure_one(name: str, count: int) -> tuple[float, int, float]:
    """Seconds of the first pass, the pairs it made, and the peak of this process and its workers in MiB."""
    datasets.disable_progress_bars()
    rows = source_rows()
    with tempfile.TemporaryDirectory() as cache, Ledger() as ledger:
        made = Dataset.from_generator(lambda: schema_rows(name, rows, count), cache_dir=cache)
        took = seconds(lambda: getattr(dataset_adapters, name)(made))
    return took, ledger.total().kept, peak_memory()


def peak_memory() -> float:
    """Peak memory of this process plus that of its largest worker times their number, in MiB: an upper bound."""
    own, worker = (resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own + min(8, os.cpu_count() or 1) * worker


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=161_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--each", type=int, default=100_000)
    args = parser.parse_args()
    datasets.disable_progress_bars()
    rows = source_rows()
    runs = [measure(rows, args.rows) for _ in range(args.repeats)]
    print(f"{args.rows:,} rows from {len(rows):,}; {os.cpu_count()} cores; median of {args.repeats}\n")
    print("| pass | seconds | of the identity map | target |\n| --- | --- | --- | --- |")
    identity = statistics.median(run["identity map"] for run in runs)
    for name in runs[0]:
        median = statistics.median(run[name] for run in runs)
        target = f"< {TARGETS[name]:.0f} s" if name in TARGETS else ""
        print(f"| {name} | {median:.2f} | {median / identity:.2f} x | {target} |")
    print(f"\npeak memory at most {peak_memory():.0f} MiB, target < {TARGET_MEMORY} MiB")

    print(f"\n| {args.each:,} rows of | seconds | pairs | peak memory, MiB |\n| --- | --- | --- | --- |")
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as processes:
        for name in EACH:
            took, kept, peak = processes.submit(measure_one, name, args.each).result()
            print(f"| {name} | {took:.2f} | {kept:,} | {peak:.0f} |")


if __name__ == "__main__":
    main()
