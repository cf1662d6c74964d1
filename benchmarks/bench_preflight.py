"""Seconds and memory of `dpo-recipes inspect` and of a plain `datasets.map` that tokenises as DPOTrainer does.

    python benchmarks/bench_preflight.py [--rows 161000] [--repeats 1]

The rows are those of $DPO_RECIPES_DATA/hh-rlhf, or without that folder those of the test fixture. They are repeated,
each with the number of its round, so that no two are equal, in an order drawn with seed 0. The tokenizer is a
byte-level BPE of 32,000 tokens, trained on the rows, with ChatML as its template. The map starts from pairs in memory;
the inspection does all its work, from the JSON file to the page. The targets are for 161,000 rows on 2 cores: under
90 s and 3 GiB, which is the memory of all processes at one time with shared pages counted once.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import psutil
from bench_adapters import repeated, source_rows
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from dpo_recipes.dataset_adapters import hh_rlhf

TARGETS = {"seconds": 90.0, "MiB": 3072.0}
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MODE = "--map"


def make_model(folder: Path, rows: list[dict[str, str]]) -> None:
    """A folder with a tokenizer trained on the rows and a small model's configuration; no weights."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=32_000,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((row[side] for row in rows for side in ("chosen", "rejected") if row[side]), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    LlamaConfig(vocab_size=len(tokenizer), hidden_size=256, intermediate_size=688, num_hidden_layers=4).save_pretrained(
        folder
    )


def as_trl(row: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Tokenises a pair as DPOTrainer's map does."""
    prompt, chosen, rejected = row["prompt"], row["prompt"] + row["chosen"], row["prompt"] + row["rejected"]
    first = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    both = [tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"] for turns in (chosen, rejected)]
    return {"prompt_ids": first, "chosen_ids": both[0][len(first) :], "rejected_ids": both[1][len(first) :]}


def plain_map(file: Path, model: Path, folder: Path) -> None:
    """Prints the seconds of the map, in a process of its own."""
    datasets.disable_progress_bars()
    pairs = hh_rlhf(Dataset.from_json(str(file), cache_dir=str(folder / "cache")))
    tokenizer = AutoTokenizer.from_pretrained(model)
    start = time.perf_counter()
    pairs.map(as_trl, fn_kwargs={"tokenizer": tokenizer}, num_proc=min(8, os.cpu_count() or 1))
    print(f"{time.perf_counter() - start:.3f}")


def measure(command: list[str], folder: Path) -> tuple[float, float, str]:
    """Seconds of the command, the largest MiB that its processes held at one time, and the lines that it printed."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_DATASETS_CACHE": str(folder / "cache")}
    start, peak = time.perf_counter(), 0.0
    with (folder / "out.txt").open("w") as out:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=subprocess.STDOUT)
        while process.poll() is None:
            peak = max(peak, proportional_memory(psutil.Process(process.pid)))
            time.sleep(0.5)
    text = (folder / "out.txt").read_text()
    if process.returncode:
        raise RuntimeError(text)
    return time.perf_counter() - start, peak, text


def proportional_memory(process: psutil.Process) -> float:
    """MiB of a process and its children, shared pages divided among them."""
    total = 0
    try:
        for part in [process, *process.children(recursive=True)]:
            total += part.memory_full_info().pss
    except psutil.Error:  # one has just ended
        return 0.0
    return total / 2**20


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=161_000)
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()
    source = source_rows()
    results: dict[str, list[tuple[float, float]]] = {"plain map": [], "inspect": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model", source)
        rows = list(repeated(source, args.rows))
        random.Random(0).shuffle(rows)
        file = folder / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        del rows
        inspect = ["inspect", str(file), "--model_name_or_path", str(folder / "model"), "--max_length", "1024"]
        for repeat in range(args.repeats):
            for what in results:
                part = folder / f"{what} {repeat}"
                part.mkdir()
                if what == "inspect":
                    seconds, peak, text = measure([sys.executable, "-m", "dpo_recipes.cli", *inspect], part)
                else:
                    command = [sys.executable, __file__, MODE, str(file), str(folder / "model"), str(part)]
                    _, peak, text = measure(command, part)
                    seconds = float(text.split()[-1])
                results[what].append((seconds, peak))
        print(text[text.index("Data account") :])
    print(f"{args.rows:,} rows from {len(source):,}; {os.cpu_count()} cores; median of {args.repeats}\n")
    print("| | seconds | MiB at most |\n| --- | --- | --- |")
    for what, runs in results.items():
        seconds, peak = (statistics.median(column) for column in zip(*runs, strict=True))
        print(f"| {what} | {seconds:.1f} | {peak:.0f} |")
    print(f"| target of inspect | {TARGETS['seconds']:.0f} | {TARGETS['MiB']:.0f} |")


if __name__ == "__main__":
    if sys.argv[1:2] == [MODE]:
        plain_map(*map(Path, sys.argv[2:]))
    else:
        main()
