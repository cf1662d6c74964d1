"""Step time, real tokens a second and memory of SharedPrefixDPOTrainer and of plain TRL, on the same pairs.

    python benchmarks/bench_shared_prefix.py [--quick] [--minutes 11] [--profile] [--out docs/results]

All trainers are in one process and take turns on the same batches, in an order that rotates after each round; a ratio
compares two steps on one batch. A step is forward, backward and AdamW on LoRA weights (r=16, all linear layers) of
random-weight Llamas; time does not depend on the values of the weights. Memory is measured in a forked process for each
trainer, before the others are built: the peak of its resident memory (VmHWM, reset before the step) minus the memory
before the step, which includes model and data.

"TRL" is DPOTrainer with its defaults, which recompute activations in the backward pass and, on a CPU, score all
positions of the head. "compact head" switches on what TRL does on CUDA: only completion positions are scored.

The pairs are hh-rlhf's from $DPO_RECIPES_DATA, tokenised by a byte-level BPE of 32,000 that is trained on them; without
that folder, words of the test fixture in lengths drawn like hh-rlhf's, and the results say so.
"""

import argparse
import contextlib
import gzip
import json
import multiprocessing
import os
import platform
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ |= {"CUDA_VISIBLE_DEVICES": ""}

import datasets
import torch
import transformers
import trl
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback
from trl import DPOConfig, DPOTrainer

from dpo_recipes.dataset_adapters import hh_rlhf
from dpo_recipes.shared_prefix import SharedPrefixDPOTrainer
from dpo_recipes.shared_prefix.reference_cache import precompute_ref_logps

FIXTURE = Path(__file__).parent.parent / "tests" / "fixtures" / "hh_rlhf.jsonl"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MAX_LENGTH = 512
SEED = 0
PAIRS = 128
MODELS = {
    "6 x 256, vocabulary 32k": dict(num_hidden_layers=6, hidden_size=256, vocab_size=32_000),
    "8 x 512, vocabulary 50k": dict(num_hidden_layers=8, hidden_size=512, vocab_size=50_000),
}
SMALL, LARGE = MODELS
TRL, COMPACT, OURS, CACHED = "TRL", "TRL, compact head", "ours", "ours, reference cached"
BARE = dict(share_prompts=False, frozen_head=False, lean_reference=False)
VARIANTS: dict[str, dict[str, Any]] = {
    TRL: dict(trl=True, checkpointing=True),
    "TRL, no checkpointing": dict(trl=True),
    COMPACT: dict(trl=True, checkpointing=True, compact=True),
    "TRL, compact head, no checkpointing": dict(trl=True, compact=True),
    "TRL, compact head, no checkpointing, reference cached": dict(trl=True, compact=True, cached=True),
    "packed": dict(BARE),
    "packed, frozen head": BARE | dict(frozen_head=True),
    "packed, lean reference": BARE | dict(lean_reference=True),
    "packed, shared": BARE | dict(share_prompts=True),
    "packed, shared, frozen head": BARE | dict(share_prompts=True, frozen_head=True),
    OURS: {},
    "ours, without shared prompts": dict(share_prompts=False),
    "ours, with checkpointing": dict(checkpointing=True),
    CACHED: dict(cached=True),
}
FEW = (TRL, COMPACT, OURS, CACHED)
WEIGHED = {"batch 8": (TRL, "TRL, no checkpointing", COMPACT, "packed", OURS, "ours, with checkpointing")}
WEIGHED["batch 8, large"] = (TRL, COMPACT, OURS)
SETTINGS = [  # name, model, pairs a batch, which pairs, trainers, rounds, share of the time
    ("batch 8", SMALL, 8, "all", tuple(VARIANTS), 5, 0.34),
    ("batch 8, large", LARGE, 8, "all", FEW, 3, 0.34),
    ("batch 1", SMALL, 1, "all", FEW, 5, 0.04),
    ("batch 4", SMALL, 4, "all", FEW, 5, 0.06),
    ("batch 16", SMALL, 16, "all", FEW, 3, 0.1),
    ("short prompts", SMALL, 8, "short", FEW, 3, 0.05),
    ("long prompts", SMALL, 8, "long", FEW, 3, 0.07),
]


def raw_pairs() -> tuple[Dataset, str]:
    """Conversations, and the name of their source."""
    files = sorted(Path(os.environ.get("DPO_RECIPES_DATA", "nowhere"), "hh-rlhf").glob("*/*.jsonl.gz"))
    if files:
        rows = [json.loads(line) for file in files for line in gzip.decompress(file.read_bytes()).splitlines()]
        return hh_rlhf(Dataset.from_list(rows)), "hh-rlhf, rows of DPO_RECIPES_DATA"
    generator = random.Random(SEED)
    words = FIXTURE.read_text().split()

    def turn(role: str, median: float) -> list[dict[str, str]]:
        count = max(1, round(generator.lognormvariate(0, 0.9) * median))
        return [{"role": role, "content": " ".join(generator.choices(words, k=count))}]

    rows = [
        {"prompt": turn("user", 80), "chosen": turn("assistant", 40), "rejected": turn("assistant", 40)}
        for _ in range(1000)
    ]
    return Dataset.from_list(rows), "words of the test fixture in random lengths (no DPO_RECIPES_DATA)"


def train_tokenizer(pairs: Dataset, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with a given number of tokens at most."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<pad>", "<|im_start|>", "<|im_end|>"]
    texts = (turn["content"] for pair in pairs for turn in (*pair["prompt"], *pair["chosen"], *pair["rejected"]))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="<|im_end|>", chat_template=CHATML
    )


def build_model(settings: dict[str, Any]) -> LlamaForCausalLM:
    """A Llama with random weights, the same at each call."""
    torch.manual_seed(SEED)
    heads = settings["hidden_size"] // 64
    config = LlamaConfig(
        **settings,
        intermediate_size=settings["hidden_size"] * 8 // 3 // 64 * 64,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


class Stepper:
    """A trainer that takes one training step at a time, on pairs passed to it."""

    def __init__(self, variant: str, model: str, pairs: Dataset, tokenizer: Any, **changes: int) -> None:
        settings = dict(VARIANTS[variant])
        self.compact = settings.pop("compact", False)
        self.cached = settings.pop("cached", False)
        checkpointing = settings.pop("checkpointing", False)
        plain = settings.pop("trl", False)
        if plain:  # reference log-probs come from our cache there too, so that they are computed once
            base = type("Plain", (DPOTrainer,), {"_precompute_ref_logps": precompute_ref_logps})
        else:
            base = type("Variant", (SharedPrefixDPOTrainer,), settings)
        changes = dict(per_device_train_batch_size=1) | changes
        given = {name: changes.pop(name) for name in ("tokens_per_step",) if name in changes}
        args = DPOConfig(
            output_dir=str(datasets.config.HF_DATASETS_CACHE / "run"),
            max_length=MAX_LENGTH,
            max_steps=1,
            **changes,
            precompute_ref_log_probs=self.cached,
            precompute_ref_batch_size=8,
            activation_checkpointing=checkpointing,
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            seed=SEED,
        )
        with self.head():
            self.trainer = base(
                model=build_model(MODELS[model]),
                args=args,
                train_dataset=pairs,
                processing_class=tokenizer,
                peft_config=LoraConfig(r=16, target_modules="all-linear", lora_dropout=0.0),
                **({} if plain else {"shared_prefix": "true"}),
                **given,
            )
            self.trainer.remove_callback(PrinterCallback)
            self.trainer.train()  # one pair: makes the optimizer, and compares the first batch with plain TRL's
        self.pairs = self.trainer.train_dataset

    def head(self) -> Any:
        """Lets TRL score only completion positions, as on CUDA, while the context is open."""
        return (
            mock.patch("trl.trainer.utils._use_triton", return_value=True) if self.compact else contextlib.nullcontext()
        )

    def step(self, rows: list[int]) -> float:
        """Seconds of one step without the collator's work, which a data loader does at the same time."""
        batch = self.trainer.data_collator([self.pairs[row] for row in rows])
        start = time.perf_counter()
        with self.head():
            self.trainer.training_step(self.trainer.model, batch)
        self.trainer.optimizer.step()
        self.trainer.optimizer.zero_grad()
        return time.perf_counter() - start


def step_memory(variant: str, model: str, pairs: Dataset, tokenizer: Any, rows: list[int]) -> float:
    """MiB by which a step's resident memory rises, in a process of its own with these rows only."""

    def measure(queue: Any) -> None:
        stepper = Stepper(variant, model, pairs.select(rows), tokenizer)
        before = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        stepper.step(list(range(len(rows))))
        queue.put(_resident("VmHWM") - before)

    context = multiprocessing.get_context("fork")  # this process has not computed yet, so that no thread is lost
    queue = context.SimpleQueue()
    process = context.Process(target=measure, args=(queue,))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{variant}: the process that measures memory ended with {process.exitcode}")
    return float(queue.get())


def _resident(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}: memory is measured on Linux only")


def lengths_of(pairs: Dataset, tokenizer: Any) -> list[tuple[int, int, int]]:
    """Prompt, chosen and rejected tokens of each pair, as DPOTrainer truncates them."""

    def count(prompt: Any, chosen: Any, rejected: Any) -> tuple[int, int, int]:
        alone = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        sides = [tokenizer.apply_chat_template(prompt + side, return_dict=False) for side in (chosen, rejected)]
        first, second = (min(len(side), MAX_LENGTH) - len(alone) for side in sides)
        return len(alone), first, second

    return [count(pair["prompt"], pair["chosen"], pair["rejected"]) for pair in pairs]


def draw(lengths: list[tuple[int, int, int]], which: str, pairs: int, rounds: int) -> list[list[int]]:
    """A batch of rows for each round: of all pairs, or of the third with the shortest or longest prompts."""
    order = sorted(range(len(lengths)), key=lambda row: lengths[row][0])
    third = len(order) // 3
    pool = {"all": order, "short": order[:third], "long": order[-third:]}[which]
    generator = random.Random(f"{SEED} {which} {pairs}")
    return [generator.sample(pool, min(pairs, len(pool))) for _ in range(rounds)]


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def measure(
    steppers: Callable[[str], Stepper], variants: tuple[str, ...], batches: list[list[int]], lengths: Any, limit: float
) -> dict[str, Any]:
    """Each trainer's step on each batch, in turn, until batches or seconds are used up, two rounds at least."""
    built = {variant: steppers(variant) for variant in reversed(variants)}  # ours first: it fills the cache
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    tokens: list[int] = []
    padded: list[int] = []
    start = time.perf_counter()
    for index, rows in enumerate(batches):
        if index >= 2 and time.perf_counter() - start > limit * (index / (index + 1)):
            break
        tokens.append(sum(sum(lengths[row]) for row in rows))
        padded.append(2 * len(rows) * max(p + max(c, r) for p, c, r in (lengths[row] for row in rows)))
        for variant in list(variants)[:: -1 if index % 2 else 1]:
            seconds[variant].append(built[variant].step(rows))
    results = {}
    for variant in variants:
        low, middle, high = quartiles(seconds[variant])
        entry = {"seconds": seconds[variant], "median_s": middle, "quartiles_s": [low, high]}
        rates = [count / time for count, time in zip(tokens, seconds[variant], strict=True)]
        entry["real_tokens_per_s"] = statistics.median(rates)
        for name in (TRL, COMPACT):
            ratios = [theirs / ours for theirs, ours in zip(seconds[name], seconds[variant], strict=True)]
            entry[f"times_as_fast_as {name}"] = dict(zip(("low", "median", "high"), quartiles(ratios), strict=True))
        results[variant] = entry
    return {"rounds": len(tokens), "real_tokens": tokens, "padded_tokens": padded, "trainers": results}


def verdicts(report: dict[str, Any]) -> list[tuple[str, float, float, bool]]:
    """The aims for batch 8 as rows: quantity, measured value, aim, and a flag that it is met."""
    lines = []
    for setting in ("batch 8", "batch 8, large"):
        if setting not in report["settings"]:
            continue
        held = report["settings"][setting]
        for variant, name, aim in ((OURS, TRL, 5.0), (OURS, COMPACT, 3.0), (CACHED, COMPACT, 5.0)):
            value = held["trainers"][variant][f"times_as_fast_as {name}"]["median"]
            lines.append((f"{setting}: {variant}, times as fast as {name}", value, aim, value >= aim))
        memory = {variant: held["trainers"][variant].get("step_memory_mib") for variant in (TRL, OURS)}
        if all(memory.values()):
            share = memory[OURS] / memory[TRL]
            lines.append((f"{setting}: step memory, share of TRL's", share, 1 / 3, share <= 1 / 3))
    return lines


def as_markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    out = ["# Shared prefix compared with plain TRL", "", f"    {report['command']}", ""]
    out += [
        f"{report['date']}; {report['hardware']}; {report['versions']}; {report['threads']} threads; float32, LoRA, "
    ]
    out[-1] += (
        f"max_length {MAX_LENGTH}, seed {SEED}. Pairs: {report['pairs']}. Times are medians with quartiles; ratios "
    )
    out[-1] += "are medians over the rounds, each of one batch."
    for name, held in report["settings"].items():
        padding = statistics.median(p / t for p, t in zip(held["padded_tokens"], held["real_tokens"], strict=True))
        out += ["", f"## {name}: {held['model']}, {held['pairs']} pairs, {held['rounds']} rounds", ""]
        out += [f"Padded tokens are {padding:.1f} times the sum of prompt, chosen and rejected.", ""]
        out += ["| trainer | seconds a step | real tokens/s | x TRL | x TRL, compact head | step memory, MiB |"]
        out += ["| --- | --- | --- | --- | --- | --- |"]
        for variant, entry in held["trainers"].items():
            low, high = entry["quartiles_s"]
            ratios = [entry[f"times_as_fast_as {base}"] for base in (TRL, COMPACT)]
            cells = [f"{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})" for ratio in ratios]
            memory = f"{entry['step_memory_mib']:,.0f}" if "step_memory_mib" in entry else ""
            time_cell = f"{entry['median_s']:.2f} ({low:.2f}-{high:.2f})"
            out += [f"| {variant} | {time_cell} | {entry['real_tokens_per_s']:,.0f} | {' | '.join(cells)} | {memory} |"]
    out += ["", "## Aims", "", "| what | measured | aim | |", "| --- | --- | --- | --- |"]
    for what, value, aim, met in report["aims"]:
        out += [f"| {what} | {value:.2f} | {aim:.2f} | {'met' if met else 'missed'} |"]
    return "\n".join([*out, ""])


def profile(stepper: Stepper, rows: list[int]) -> str:
    """Time of one step by operator."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profiler:
        stepper.step(rows)
    averages = profiler.key_averages(group_by_input_shape=False)
    return str(averages.table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=60))


def hardware() -> str:
    """The processor's name and the number of cores."""
    names = [line.split(": ")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


@contextlib.contextmanager
def scratch() -> Iterator[None]:
    """A new cache for datasets and reference log-probs that is removed at the end."""
    with tempfile.TemporaryDirectory() as folder, mock.patch("datasets.config.HF_DATASETS_CACHE", Path(folder)):
        yield


def main() -> None:
    """Memory first, then times; prints the tables and writes them with all numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny models, two rounds: shows that it works")
    parser.add_argument("--minutes", type=float, default=11.0, help="rounds stop when their share of it is used up")
    parser.add_argument("--profile", action="store_true", help="also print where the time of a step of ours goes")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs" / "results")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    if options.quick:
        tiny = dict(num_hidden_layers=1, hidden_size=64, vocab_size=2_000)
        MODELS.update({SMALL: tiny, LARGE: {**tiny, "hidden_size": 128}})
        SETTINGS[:] = [(*each[:5], 2, each[6]) for each in SETTINGS if each[0] in ("batch 8", "batch 4")]
    started = time.perf_counter()
    with scratch():
        report = run(options, started)
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / ("shared_prefix_quick" if options.quick else "shared_prefix")
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    stem.with_suffix(".md").write_text(as_markdown(report))
    print(as_markdown(report))
    print(f"Wrote {stem}.json and .md after {time.perf_counter() - started:.0f} s.")


def run(options: argparse.Namespace, started: float) -> dict[str, Any]:
    """All numbers of the report."""
    pairs, source = raw_pairs()
    tokenizer = train_tokenizer(pairs, MODELS[SMALL]["vocab_size"])
    pairs = pairs.select(random.Random(SEED).sample(range(len(pairs)), min(PAIRS, len(pairs))))
    lengths = lengths_of(pairs, tokenizer)
    usable = [row for row, (p, c, r) in enumerate(lengths) if p < MAX_LENGTH and min(c, r) > 0]
    pairs, lengths = pairs.select(usable), [lengths[row] for row in usable]
    report: dict[str, Any] = {
        "command": f"python {' '.join(sys.argv)}",
        "quick": options.quick,
        "models": MODELS,
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "versions": f"trl {trl.__version__}, transformers {transformers.__version__}, torch {torch.__version__}",
        "pairs": f"{source}; {len(pairs)} pairs of at most {MAX_LENGTH} tokens",
        "settings": {},
    }
    memory: dict[tuple[str, str], float] = {}
    for name, model, size, which, _, rounds, _ in SETTINGS:
        for variant in WEIGHED.get(name, ()):
            rows = draw(lengths, which, size, rounds)[0]
            memory[name, variant] = step_memory(variant, model, pairs, tokenizer, rows)
            print(f"{name}: {variant}: {memory[name, variant]:,.0f} MiB", flush=True)
    left = options.minutes * 60 - (time.perf_counter() - started)
    built: dict[tuple[str, str], Stepper] = {}

    for name, model, size, which, variants, rounds, share in SETTINGS:

        def stepper(variant: str, model: str = model) -> Stepper:
            if (variant, model) not in built:
                built[variant, model] = Stepper(variant, model, pairs, tokenizer)
            return built[variant, model]

        held = measure(stepper, variants, draw(lengths, which, size, rounds), lengths, left * share)
        for variant in variants:
            if (name, variant) in memory:
                held["trainers"][variant]["step_memory_mib"] = memory[name, variant]
        report["settings"][name] = {"model": model, "pairs": size, "which": which, **held}
        ours = held["trainers"][OURS]
        print(f"{name}: ours {ours['median_s']:.2f} s, {held['rounds']} rounds", flush=True)
    report["aims"] = verdicts(report)
    if options.profile:
        rows = draw(lengths, "all", 8, 1)[0]
        report["profile"] = profile(built[OURS, SMALL], rows)
        print(report["profile"])
    report["seconds"] = time.perf_counter() - started
    return report


if __name__ == "__main__":
    main()
