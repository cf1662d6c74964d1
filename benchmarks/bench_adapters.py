"""Seconds and memory to adapt 161,000 rows with hh_rlhf, beside an identity map of the same rows in the same run.

    python benchmarks/bench_adapters.py [--rows 161000] [--repeats 3]

The rows are those of $DPO_RECIPES_DATA/hh-rlhf, or of the test fixture without it, repeated with a suffix each, so that
no two are the same. The targets are for 161,000 rows on 2 cores: first under 15 s and 2 GiB, from the cache under 3 s.
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
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset

from dpo_recipes.dataset_adapters import hh_rlhf
from dpo_recipes.ledger import Ledger

FIXTURE = Path(__file__).parent.parent / "tests" / "fixtures" / "hh_rlhf.jsonl"
TARGETS = {"hh_rlhf, first": 15.0, "hh_rlhf, from the cache": 3.0}  # seconds
TARGET_MEMORY = 2048  # MiB


def source_rows() -> list[dict[str, str]]:
    """The real rows, or those of the fixture."""
    files = sorted(Path(os.environ.get("DPO_RECIPES_DATA", "nowhere"), "hh-rlhf").glob("*/*.jsonl.gz"))
    texts = [gzip.decompress(file.read_bytes()) for file in files] or [FIXTURE.read_bytes()]
    return [json.loads(line) for text in texts for line in text.splitlines()]


def repeated(rows: list[dict[str, str]], count: int) -> Iterator[dict[str, Any]]:
    """That many rows, each with the number of its round at the end."""
    for number in range(count):
        row = rows[number % len(rows)]
        yield {side: text and f"{text} ({number // len(rows)})" for side, text in row.items()}


def seconds(function: Callable[[], Any]) -> float:
    """How long the function takes."""
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


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=161_000)
    parser.add_argument("--repeats", type=int, default=3)
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
    workers = min(8, os.cpu_count() or 1)
    own, worker = (resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    peak = own + workers * worker
    print(f"\npeak memory at most {peak:.0f} MiB ({own:.0f} + {workers} x {worker:.0f}), target < {TARGET_MEMORY} MiB")


if __name__ == "__main__":
    main()
