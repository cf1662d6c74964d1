"""Rows of bench.py about data and start-up: dataset adapters, tokenising, `dpo-recipes inspect`, imports.

The texts are those of $DPO_RECIPES_DATA/hh-rlhf, or without that folder those of the test fixture. They are repeated,
each with a suffix, so that no two are equal.
"""

import argparse
import gzip
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from bench import OURS, Part, compare, in_turn, rounds_of
from bench_shared_prefix import raw_pairs, train_tokenizer
from datasets import Dataset, load_dataset
from transformers import AutoTokenizer, LlamaConfig
from trl import DPOTrainer

from dpo_recipes import dataset_adapters
from dpo_recipes.dataset_adapters import hh_rlhf
from dpo_recipes.dataset_adapters.ledger import Ledger
from dpo_recipes.models.pair_ids import prepare_dataset

ROOT = Path(__file__).parent.parent
FIXTURE = ROOT / "tests" / "fixtures" / "hh_rlhf.jsonl"
ADAPTERS = ("hh_rlhf", "preference_jsonl", "ultrafeedback_binarized", "sharegpt_pairs", "shp", "oasst1")
WORKERS = min(8, os.cpu_count() or 1)
BARE = "import datasets; from trl import DPOConfig, DPOTrainer, ModelConfig, TrlParser, get_peft_config"
LIST = "from dpo_recipes.cli import main; main(['list'])"
RECIPE = f"import runpy; runpy.run_path({str(ROOT / 'recipes' / 'hh_rlhf_lora.py')!r})"

datasets.disable_progress_bars()


def seconds(function: Callable[[], Any]) -> float:
    """Seconds that the function takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def rows_of(options: argparse.Namespace, usual: int) -> int:
    """The number of rows."""
    return options.rows or (50 if options.quick else usual)


def source_rows() -> list[dict[str, str]]:
    """The real rows, or the rows of the fixture."""
    files = sorted(Path(os.environ.get("DPO_RECIPES_DATA", "nowhere"), "hh-rlhf").glob("*/*.jsonl.gz"))
    texts = [gzip.decompress(file.read_bytes()) for file in files] or [FIXTURE.read_bytes()]
    return [json.loads(line) for text in texts for line in text.splitlines()]


def repeated(rows: list[dict[str, str]], count: int) -> Iterator[dict[str, Any]]:
    """Repeats the rows up to a count, each with the number of its repetition at the end."""
    for number in range(count):
        row = rows[number % len(rows)]
        yield {side: text and f"{text} ({number // len(rows)})" for side, text in row.items()}


def schema_rows(name: str, rows: list[dict[str, str]], count: int) -> Iterator[dict[str, Any]]:
    """A given number of rows with the columns that the dataset adapter reads: 8 a post (SHP), 3 replies (oasst1)."""
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
        states = {"deleted": False, "synthetic": False, "review_result": True}
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
                **{"message_tree_id": str(tree), "lang": "en", "text": good},
                **{"role": "assistant" if place else "prompter", "rank": place - 1 if place else None},
            },
        }[name]


def adapting(options: argparse.Namespace) -> Part:
    """The first pass of each dataset adapter, compared with a map of the same rows that changes nothing."""
    source, count, rounds, rows = source_rows(), rows_of(options, 20_000), rounds_of(options, 3), []

    def made(name: str, cache: str) -> Dataset:
        # Not as gen_kwargs: datasets takes a list in those for shards and runs the generator once for each row.
        return Dataset.from_generator(lambda: schema_rows(name, source, count), cache_dir=cache)

    for name in ADAPTERS:
        with tempfile.TemporaryDirectory() as cache, Ledger():
            fresh, adapter = (
                [made(name, f"{cache}/{index}") for index in range(rounds)],
                getattr(dataset_adapters, name),
            )
            ways = {
                OURS: lambda index, fresh=fresh, adapter=adapter: seconds(lambda: adapter(fresh[index])),
                "map": lambda index, fresh=fresh: seconds(
                    lambda: fresh[index].map(lambda batch: batch, batched=True, num_proc=WORKERS)
                ),
            }
            rows += compare(f"adapting, {name}", in_turn(ways, rounds), {"map": "map without a change"})
    return Part(rows, f"{count:,} rows of each schema, texts of {len(source):,} rows; first pass, {WORKERS} processes.")


def tokenising(options: argparse.Namespace) -> Part:
    """Tokenising pairs for DPO, compared with TRL's own step; the ids are compared as well."""
    pairs, source = raw_pairs()
    tokenizer, count, rounds = train_tokenizer(pairs, 32_000), rows_of(options, 3_000), rounds_of(options, 3)
    args = types.SimpleNamespace(max_length=512, truncation_mode="keep_start", dataset_num_proc=None)
    trainer = types.SimpleNamespace(_tokenizer=tokenizer)
    ids: dict[tuple[str, int], Any] = {}

    def tokenise(index: int, name: str, step: Any) -> float:
        start = time.perf_counter()
        ids[name, index] = step(trainer, fresh[index], tokenizer, args, "train")
        return time.perf_counter() - start

    with tempfile.TemporaryDirectory() as folder:
        fresh = []
        for index in range(rounds):
            file = Path(folder, f"{index}.jsonl")
            with file.open("w") as stream:
                for number in range(count):
                    pair = pairs[number % len(pairs)]
                    last = {**pair["prompt"][-1], "content": f"{pair['prompt'][-1]['content']} ({index} {number})"}
                    stream.write(json.dumps({**pair, "prompt": [*pair["prompt"][:-1], last]}) + "\n")
            fresh.append(load_dataset("json", data_files=str(file), split="train", cache_dir=f"{folder}/cache"))
        steps = {OURS: prepare_dataset, "TRL": DPOTrainer._prepare_dataset}
        results = in_turn({name: partial(tokenise, name=name, step=step) for name, step in steps.items()}, rounds)
        again = [tokenise(index, OURS, prepare_dataset) for index in range(rounds)]
        if any(ids[OURS, index][:] != ids["TRL", index][:] for index in range(rounds)):
            raise AssertionError("the ids differ")
    rows = compare("tokenising", results, {"TRL": "TRL"})
    rows += compare("tokenising again", results | {OURS: again}, {"TRL": "TRL, the first time"})
    return Part(rows, f"{count:,} pairs, a byte-level BPE of 32,000, ChatML; {source}. The ids are the same.")


def as_trl(row: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Tokenises a pair as DPOTrainer's map does."""
    prompt, chosen, rejected = row["prompt"], row["prompt"] + row["chosen"], row["prompt"] + row["rejected"]
    first = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    both = [tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"] for turns in (chosen, rejected)]
    return {"prompt_ids": first, "chosen_ids": both[0][len(first) :], "rejected_ids": both[1][len(first) :]}


def plain_map(file: Path, model: Path, folder: Path) -> None:
    """Adapts rows and tokenises them, and looks at nothing."""
    pairs = hh_rlhf(Dataset.from_json(str(file), cache_dir=str(folder)))
    tokenizer = AutoTokenizer.from_pretrained(model)
    pairs.map(as_trl, fn_kwargs={"tokenizer": tokenizer}, num_proc=WORKERS)


def run(command: list[str], folder: Path) -> float:
    """Seconds of a command, in an empty folder with an empty cache."""
    folder.mkdir()
    environment = os.environ | {"HF_DATASETS_CACHE": str(folder), "PYTHONPATH": str(ROOT)}
    start = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode and "Data account" not in done.stdout:  # an inspection that finds faults ends with 1
        raise RuntimeError(done.stdout + done.stderr)
    return time.perf_counter() - start


def inspecting(options: argparse.Namespace) -> Part:
    """`dpo-recipes inspect`, compared with adapting and tokenising the same rows, as TRL does it."""
    source, count = source_rows(), rows_of(options, 20_000)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file, model = folder / "rows.jsonl", folder / "model"
        tokenizer = train_tokenizer(raw_pairs()[0], 32_000)
        tokenizer.save_pretrained(model)
        shape = dict(hidden_size=256, intermediate_size=688, num_hidden_layers=4)
        LlamaConfig(vocab_size=len(tokenizer), **shape).save_pretrained(model)
        rows = list(repeated(source, count))
        random.Random(0).shuffle(rows)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        flags = ["--model_name_or_path", str(model), "--max_length", "1024"]
        commands = {
            OURS: [sys.executable, "-m", "dpo_recipes.cli", "inspect", str(file), *flags],
            "map": [sys.executable, __file__, str(file), str(model), "."],
        }
        ways = {name: lambda index, name=name: run(commands[name], folder / f"{name}-{index}") for name in commands}
        results = in_turn(ways, rounds_of(options, 2))
    return Part(
        compare("inspecting", results, {"map": "adapting and tokenising alone"}),
        f"{count:,} rows in the schema of hh-rlhf, no two equal; both are timed as processes, from the imports on. The "
        f"other process tokenises as DPOTrainer does and looks at nothing. {WORKERS} workers each.",
    )


def start_up(options: argparse.Namespace) -> Part:
    """CPU time of the imports of a recipe, and of `dpo-recipes list`, compared with those that TRL needs."""

    def spent(_: int, code: str) -> float:
        timed = f"import sys, time\n{code}\nsys.stderr.write(chr(10) + str(time.process_time()))"
        done = subprocess.run([sys.executable, "-c", timed], capture_output=True, text=True, check=True)
        return float(done.stderr.splitlines()[-1])

    codes = {OURS: RECIPE, "list": LIST, "bare": BARE}
    results = in_turn({name: partial(spent, code=code) for name, code in codes.items()}, rounds_of(options, 5))
    rows = compare("start-up of a recipe", results, {"bare": "imports of bare TRL"})
    rows += compare("dpo-recipes list", results | {OURS: results["list"]}, {"bare": "imports of bare TRL"})
    return Part(
        rows,
        "CPU time of the imports of hh_rlhf_lora.py, of the command, and of the imports of a script with TRL alone.",
    )


if __name__ == "__main__":
    plain_map(*map(Path, sys.argv[1:]))
