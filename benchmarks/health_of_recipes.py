"""Checks that the health rules report nothing on healthy runs: every recipe, shortened, on real rows, several seeds.

The recipes run unchanged, one after the other in this process, with the profile cpu. The quickstart's recipes have
their own model and data. The others start from a small real model with a plain chat template, after a short SFT on
dialogues, because a model that never saw such text is off-distribution. oasst1 gets messages of oasst2, of which every
fourth tree is held out. SHP's schema is filled with rated pairs of UltraFeedback, because no rows of SHP are available.
The sentiment task continues stories, and a list of words decides which continuation is the brighter one.

Usage: python benchmarks/health_of_recipes.py DATA MODEL [--seeds 0,1,2] [--out docs/results/health.md]

DATA holds hh-rlhf, oasst2-sample, ultrafeedback-binarized-sample and tinystories-sample; MODEL is stories260k, a
Llama of 260,000 weights and 512 positions (karpathy/llama2.c). Runs go to the current folder; a run that is already
there is not repeated.
"""

import argparse
import gzip
import json
import os
import re
import runpy
import shutil
import sys
from pathlib import Path
from shlex import split
from typing import Any

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import torch
import trl
from transformers import AutoTokenizer

from dpo_recipes.cli import main as dpo_recipes
from dpo_recipes.files import write_jsonl
from dpo_recipes.health.rules import HEALTH_FILE
from dpo_recipes.machine import hardware

RECIPES = Path(__file__).parent.parent / "recipes"
BRIGHT = re.compile(
    r"\b(happ|smil|laugh|lov|fun|good|great|proud|friend|play|excit|thank|kind|beautiful)", re.IGNORECASE
)

SHORT = split(
    "--pairs_per_update 8 --per_device_train_batch_size 8 --eval_pairs 32 --logging_steps 4 --max_steps 24 "
    "--eval_steps 12 --save_strategy no --learning_rate 3e-4"
)
SHORTEST, LONGEST = 192, 512  # tokens of a pair
LONG = ("oasst1", "ultrafeedback", "shp", "pharma")  # of whose pairs few are shorter
FIRST = [*SHORT, *split("--max_steps 60 --eval_steps 30 --learning_rate 1e-3")]
PAIRS = [*SHORT, "--max_length", SHORTEST]
ONLINE = [
    *SHORT,
    *split("--eval_pairs 16 --max_prompt_length 128 --max_completion_length 32 --generation_batch_size 16"),
    *split("--num_iterations 2"),
]
BEGINNINGS = split("--first_words 4 10 --num_samples 4 --max_new_tokens 40 --batch_size 64 --columns prompt=text")
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ 'Bot: ' + m['content'] + eos_token }}"
    "{% endgeneration %}{% else %}{{ m['role'].capitalize() + ': ' + m['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Bot:' }}{% endif %}"
)


def train(recipe: str, folder: Path, flags: list[Any]) -> dict[str, Any]:
    """Contents of the run's health.json; trains the run unless it is finished."""
    if not (folder / "done.json").exists():
        sys.argv = [str(RECIPES / f"{recipe}.py"), "--config", str(RECIPES / "profiles" / "cpu.yaml")]
        sys.argv += [*map(str, flags), "--output_dir", str(folder), "--overwrite", "true"]
        runpy.run_path(sys.argv[0], run_name="__main__")
    return json.loads((folder / HEALTH_FILE).read_text())


def as_chat(model: Path, target: Path) -> Path:
    """A copy of the model with a chat template."""
    shutil.copytree(model, target, dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(target)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(target)
    return target


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON lines file, compressed or not."""
    data = path.read_bytes()
    return [json.loads(line) for line in (gzip.decompress(data) if path.suffix == ".gz" else data).splitlines()]


def as_shp(pairs: Path, target: Path) -> Path:
    """Rated pairs of UltraFeedback in the schema of SHP."""
    for part in ("train", "test"):
        rows = []
        for number, row in enumerate(read_lines(pairs / f"{part}.jsonl.gz")):
            better, worse = (row[side][-1]["content"] for side in ("chosen", "rejected"))
            first = number % 2  # the better one is A
            answers = {"human_ref_A": better if first else worse, "human_ref_B": worse if first else better}
            scores = {"score_A": 20 if first else 5, "score_B": 5 if first else 20, "labels": first}
            post = {"post_id": f"p{number}", "domain": f"askscience_{part}", "history": row["chosen"][0]["content"]}
            rows.append(post | answers | scores)
        write_jsonl(target / f"{part}.jsonl", rows)
    return target


def hold_out_trees(messages: Path, target: Path) -> Path:
    """The messages, with every fourth tree in a test split."""
    rows = read_lines(messages)
    trees = list(dict.fromkeys(row["message_tree_id"] for row in rows))
    held_out = set(trees[::4])
    write_jsonl(target / "train.jsonl", (row for row in rows if row["message_tree_id"] not in held_out))
    write_jsonl(target / "test.jsonl", (row for row in rows if row["message_tree_id"] in held_out))
    return target


def bright_pairs(model: Path, stories: Path, target: Path) -> Path:
    """Pairs of continuations of the beginnings of stories, ranked by their number of bright words."""
    if not target.exists():
        sampled = target.with_suffix(".samples.jsonl")
        if dpo_recipes(["sample", str(model), "--dataset_name", str(stories), *BEGINNINGS, "--output", str(sampled)]):
            raise SystemExit("No continuations of stories.")
        pairs = []
        for row in read_lines(sampled):
            ranked = sorted(row["completions"], key=lambda text: len(BRIGHT.findall(text)))
            worst, best = ranked[0], ranked[-1]
            if len(BRIGHT.findall(best)) > len(BRIGHT.findall(worst)):
                pairs.append({"prompt": row["prompt"], "chosen": best, "rejected": worst})
        write_jsonl(target, pairs)
    return target


def plan(data: Path, model: Path, first: Path) -> dict[str, list[Any]]:
    """Makes the initial models and data in `first`, and returns the flags of each recipe."""
    hh, ultrafeedback = data / "hh-rlhf", data / "ultrafeedback-binarized-sample"
    rows: dict[str, list[Any]] = {
        "hh_rlhf": ["--dataset_name", hh, "--dataset_config", "helpful-base"],
        "oasst1": ["--dataset_name", hold_out_trees(data / "oasst2-sample" / "messages.jsonl.gz", first / "oasst")],
        "ultrafeedback": ["--dataset_name", ultrafeedback],
        "shp": ["--dataset_name", as_shp(ultrafeedback, first / "shp")],
        "pharma": ["--dataset_name", RECIPES / "data" / "pharma"],
    }
    rows["mixture"] = ["--dataset_name", f"{rows['shp'][1]}:300+{ultrafeedback}:300+{rows['pharma'][1]}"]
    chat = as_chat(model, first / "chat")
    train(
        "hh_rlhf_sft", first / "sft", [*FIRST, "--max_length", SHORTEST, *rows["hh_rlhf"], "--model_name_or_path", chat]
    )
    flags = {}
    for name in sorted(path.stem for path in RECIPES.glob("*.py")):
        kind = name.rpartition("_")[2]
        if name.startswith(("quickstart", "imdb")):
            continue
        data_of = next(key for key in rows if name.startswith(key))
        start = chat if kind == "sft" else first / "sft"
        flags[name] = [*rows[data_of], "--model_name_or_path", start]
        if kind in ("ppo", "rloo"):
            flags[name] += [*ONLINE, "--reward_model_name_or_path", first / "hh_rlhf_reward"]
        else:
            flags[name] += [*PAIRS, *(["--max_length", LONGEST] if data_of in LONG else [])]
    train("hh_rlhf_reward", first / "hh_rlhf_reward", [*flags["hh_rlhf_reward"], "--max_steps", 80])

    stories = ["--dataset_name", data / "tinystories-sample"]
    begun = [*FIRST, *stories, "--columns", "prompt=text", "--model_name_or_path", model]
    train("imdb_sentiment_sft", first / "stories", begun)
    pairs = bright_pairs(first / "stories", stories[1], first / "stories.jsonl")
    ranked = ["--dataset_name", pairs, "--model_name_or_path", first / "stories"]
    flags["imdb_sentiment_sft"] = [*SHORT, *begun[len(FIRST) :]]
    flags["imdb_sentiment_lora"] = flags["imdb_sentiment_reward"] = [*PAIRS, *ranked]
    train("imdb_sentiment_reward", first / "stories_reward", [*PAIRS, *ranked])
    flags["imdb_sentiment_ppo"] = [*ONLINE, *ranked, "--reward_model_name_or_path", first / "stories_reward"]

    train("quickstart_sft", first / "quickstart", [])
    start = ["--model_name_or_path", first / "quickstart"]
    train("quickstart_reward", first / "quickstart_reward", start)
    judged = [*start, "--reward_model_name_or_path", first / "quickstart_reward"]
    flags |= {"quickstart_sft": [], "quickstart": start, "quickstart_reward": start}
    flags |= {"quickstart_ppo": judged, "quickstart_rloo": judged}
    for name in ("quickstart_sft", "quickstart", "quickstart_reward", "quickstart_ppo", "quickstart_rloo"):
        steps = 24 if name in ("quickstart_ppo", "quickstart_rloo") else 48
        flags[name] = [*flags[name], "--max_steps", steps, "--eval_steps", steps // 2, "--save_strategy", "no"]
    return flags


def as_markdown(found: dict[str, list[dict[str, Any]]], seeds: list[int]) -> str:
    """The findings as a page."""
    lines = [
        "# Healthy runs of every recipe",
        "",
        f"Made by `benchmarks/health_of_recipes.py`, which says what each recipe is given; seeds {seeds}; TRL",
        f"{trl.__version__}; {hardware(torch.device('cpu'))}. Each rule of docs/health.md that applies was",
        "watching. In runs as short as these `no_signal` and `overfitting` (400 pairs) and the two rules of a critic",
        "(8 and 10 rollouts) do not speak yet: tests/end_to_end/test_quickstart.py trains DPO with three seeds, PPO,",
        "RLOO and a reward model in full.",
        "",
        "| recipe | rules that watched | updates | probes | findings |",
        "|---|---|---|---|---|",
    ]
    for recipe, runs in found.items():
        broken = [
            f"seed {seed}, update {finding['step']}, {finding['rule']}: {finding['sign']}"
            for seed, run in zip(seeds, runs, strict=True)
            for finding in run["findings"]
        ]
        counts = [
            ", ".join(dict.fromkeys(str(value(run)) for run in runs))
            for value in (lambda run: len(run["rules"]), lambda run: run["updates"], lambda run: len(run["probes"]))
        ]
        lines.append(f"| {recipe} | {' | '.join(counts)} | {'; '.join(broken) or 'none'} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Trains, reads the findings, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs" / "results" / "health.md")
    options = parser.parse_args()
    seeds = [int(seed) for seed in options.seeds.split(",")]
    first = Path("first")
    first.mkdir(exist_ok=True)
    flags = plan(options.data.resolve(), options.model.resolve(), first)
    missing = {path.stem for path in RECIPES.glob("*.py")} - set(flags)
    if missing:
        raise SystemExit(f"No flags for {missing}.")
    found: dict[str, list[dict[str, Any]]] = {recipe: [] for recipe in sorted(flags)}
    for seed in seeds:
        for recipe, runs in found.items():
            runs.append(train(recipe, Path(f"seed{seed}") / recipe, [*flags[recipe], "--seed", seed]))
            print(
                f"HEALTH {recipe} seed {seed}:", [each["rule"] for each in runs[-1]["findings"]] or "none", flush=True
            )
    options.out.write_text(as_markdown(found, seeds))


if __name__ == "__main__":
    main()
