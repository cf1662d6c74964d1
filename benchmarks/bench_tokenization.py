"""Seconds to tokenise pairs: our step and TRL's own, on the same rows, in one run.

    python benchmarks/bench_tokenization.py [--rows 7000] [--repeats 3] [--out docs/results]

The rows are those of hh-rlhf in $DPO_RECIPES_DATA, or without that folder those of the test fixture, repeated with a
number each. The tokenizer is a byte-level BPE of 32,000 trained on them, with ChatML. Both steps get fresh rows in each
repeat and take turns, and their ids are compared. A second call shows the cache. The aim is a third of TRL's time.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
from bench_shared_prefix import hardware, raw_pairs, train_tokenizer
from datasets import Dataset, load_dataset
from trl import DPOTrainer

from dpo_recipes.models.pair_ids import prepare_dataset


def prepared(prepare: Callable[..., Dataset], pairs: Dataset, tokenizer: Any) -> tuple[Dataset, float, float]:
    """The tokenised pairs, the wall-clock seconds, and the seconds of CPU time."""
    args = types.SimpleNamespace(max_length=512, truncation_mode="keep_start", dataset_num_proc=None)
    trainer = types.SimpleNamespace(_tokenizer=tokenizer)
    start, cpu = time.perf_counter(), time.process_time()
    tokenised = prepare(trainer, pairs, tokenizer, args, "train")
    return tokenised, time.perf_counter() - start, time.process_time() - cpu


def main() -> None:
    """Alternates the two, compares their ids and prints the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=7000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs" / "results")
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # as it is where nothing is set
    datasets.disable_progress_bars()
    pairs, source = raw_pairs()
    tokenizer = train_tokenizer(pairs, 32_000)
    times: dict[str, list[float]] = {"TRL": [], "ours": [], "TRL, cores": [], "ours, cores": [], "ours, cached": []}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(options.repeats):
            file = Path(folder, f"{repeat}.jsonl")
            with file.open("w") as stream:
                for number in range(options.rows):
                    pair = pairs[number % len(pairs)]
                    last = {**pair["prompt"][-1], "content": f"{pair['prompt'][-1]['content']} ({repeat} {number})"}
                    stream.write(json.dumps({**pair, "prompt": [*pair["prompt"][:-1], last]}) + "\n")
            rows = load_dataset("json", data_files=str(file), split="train", cache_dir=f"{folder}/cache")
            results = {}
            for name in ("TRL", "ours")[:: -1 if repeat % 2 else 1]:
                step = DPOTrainer._prepare_dataset if name == "TRL" else prepare_dataset
                results[name], seconds, cores = prepared(step, rows, tokenizer)
                times[name].append(seconds)
                times[f"{name}, cores"].append(cores)
            if results["TRL"][:] != results["ours"][:]:
                raise AssertionError("the ids differ")
            times["ours, cached"].append(prepared(prepare_dataset, rows, tokenizer)[1])
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratios = [theirs / ours for theirs, ours in zip(times["TRL"], times["ours"], strict=True)]
    cores = medians["TRL, cores"] / medians["ours, cores"]
    line = (
        f"{options.rows} pairs ({source}) on {hardware()}: TRL {medians['TRL']:.1f} s, ours {medians['ours']:.1f} s, "
        f"from the cache {medians['ours, cached']:.2f} s; {statistics.median(ratios):.1f} times as fast "
        f"({min(ratios):.1f} to {max(ratios):.1f} over {options.repeats} repeats), {cores:.1f} times in seconds of all "
        "cores together. The ids are the same."
    )
    print(line)
    options.out.mkdir(parents=True, exist_ok=True)
    report = {"line": line, "seconds": times, "date": time.strftime("%Y-%m-%d")}
    (options.out / "tokenization.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
