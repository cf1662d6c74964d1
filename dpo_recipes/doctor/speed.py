"""Times a training step of plain TRL and of shared prompts in turn, with random weights of real sizes."""

import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, PrinterCallback
from trl import DPOConfig, ModelConfig, get_peft_config

from dpo_recipes.doctor.compute import ROWS, character_tokenizer, examples
from dpo_recipes.doctor.report import Finding, Part
from dpo_recipes.doctor.sizes import SIZES
from dpo_recipes.machine import peak_memory
from dpo_recipes.preflight.memory import count_weights, memory_parts
from dpo_recipes.presets import LORA
from dpo_recipes.shared_prefix.trainer import SharedPrefixDPOTrainer

QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
LENGTHS = dict(  # tokens at QUANTILES: 5,459 training pairs of hh-rlhf with Qwen3's tokenizer and chat template
    prompt=(9, 18, 28, 113, 215, 338, 437, 735, 1907),
    chosen=(7, 17, 29, 56, 102, 160, 218, 258, 770),
    rejected=(7, 16, 26, 51, 94, 159, 217, 260, 754),
)
MAX_LENGTH = 1024  # tokens, prompt and completion
SILENT: dict[str, Any] = dict(disable_tqdm=True, save_strategy="no", logging_strategy="no", report_to="none")
TRL, OURS = "plain TRL", "shared prompts"


def draw_lengths(pairs: int, *, seed: int) -> list[tuple[int, int, int]]:
    """Tokens of prompt, chosen and rejected of each pair, drawn independently from the lengths in hh-rlhf."""
    draw = random.Random(seed)
    tables = [LENGTHS[side] for side in ("prompt", "chosen", "rejected")]
    drawn = [[round(np.interp(draw.random(), QUANTILES, table)) for table in tables] for _ in range(pairs)]
    return [(min(p, MAX_LENGTH - max(c, r)), c, r) for p, c, r in drawn]


def required_flops(config: Any, lengths: Sequence[tuple[int, int, int]]) -> float:
    """Least floating-point operations of a DPO step with LoRA; docs/doctor.md explains the formula.

    Args:
        config: The model's config.
        lengths: Tokens of prompt, chosen and rejected of each pair.
    """
    width, layers = config.hidden_size, config.num_hidden_layers
    keys = width // config.num_attention_heads * config.num_key_value_heads
    weights = layers * (2 * width**2 + 2 * width * keys + 3 * width * config.intermediate_size)
    tokens = sum(p + c + r for p, c, r in lengths)
    scored = sum((p + c) ** 2 / 2 + r * (p + r / 2) for p, c, r in lengths)  # queries x keys
    attention = 4 * layers * width * scored
    head = 2 * width * config.vocab_size * sum(c + r for _, c, r in lengths)
    return float(3 * 2 * weights * tokens + 4 * attention + 3 * head)


def matrix_rate(dtype: torch.dtype, device: str) -> float:
    """Floating-point operations per second of a large matrix product, the median of ten products."""
    size = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = [_timed(lambda: a @ b, device) for _ in range(13)][3:]
    return float(2 * size**3 / statistics.median(seconds))


def _timed(work: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


class Stepper:
    """Takes single DPO steps with LoRA on a random model, as plain TRL does or with shared prompts."""

    def __init__(
        self, name: str, dtype: torch.dtype, folder: str, *, use_cpu: bool, checkpointing: bool = True
    ) -> None:
        self.device = "cpu" if use_cpu else "cuda"
        self.libraries = psutil.Process().memory_info().rss  # bytes of the process before the model is built
        self.config = AutoConfig.for_model(**SIZES[name], pad_token_id=0, eos_token_id=1, bos_token_id=None)
        torch.manual_seed(0)
        with torch.device(self.device):
            model = AutoModelForCausalLM.from_config(self.config, dtype=dtype, attn_implementation="sdpa")
        args = DPOConfig(
            output_dir=folder,
            max_steps=1,
            per_device_train_batch_size=1,
            max_length=MAX_LENGTH,
            activation_checkpointing=checkpointing,
            bf16=dtype == torch.bfloat16,
            fp16=dtype == torch.float16,
            use_cpu=use_cpu,
            dataloader_pin_memory=not use_cpu,
            **SILENT,
        )
        self.trainer = SharedPrefixDPOTrainer(
            model=model,
            args=args,
            train_dataset=Dataset.from_list(ROWS),
            processing_class=character_tokenizer(),
            peft_config=get_peft_config(ModelConfig(**LORA)),
            shared_prefix="true",
        )
        self.trainer.remove_callback(PrinterCallback)
        self.trainer.train()  # one update: makes the optimizer, and compares the first batch with plain TRL's
        self.settings = args.to_dict() | LORA | {"dtype": str(dtype).removeprefix("torch.")}

    def step(self, lengths: Sequence[tuple[int, int, int]], *, shared: bool, seed: int = 0) -> tuple[float, float]:
        """Seconds and peak memory in bytes of one step: forward, backward and AdamW, with the reference model."""
        trainer = self.trainer
        trainer.sharing = shared  # False: plain TRL's batch and methods
        batch = trainer.data_collator(examples(lengths, seed=seed))

        def work() -> None:
            trainer.training_step(trainer.model, batch)
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()

        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            return _timed(work, self.device), float(torch.cuda.max_memory_allocated())
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak that peak_memory reads
        return _timed(work, self.device), peak_memory() - self.libraries

    def estimate(self, lengths: Sequence[tuple[int, int, int]]) -> float:
        """Bytes of memory that the preflight estimates for plain TRL's step."""
        longest = max(p + max(c, r) for p, c, r in lengths)
        settings = self.settings | {"per_device_train_batch_size": len(lengths), "max_length": longest}
        weights = count_weights(self.config, settings)
        return sum(memory_parts(self.config, weights, settings, task="preference").values())


def check_speed(
    names: Sequence[str],
    pairs: Sequence[int],
    dtype: torch.dtype,
    *,
    use_cpu: bool,
    rounds: int,
    checkpointing: bool,
    say: Callable[[str], None],
) -> Part:
    """Times plain TRL and shared prompts in turn on the same batches.

    Args:
        names: Keys of SIZES.
        pairs: Numbers of pairs in a step.
        dtype: The profile's dtype.
        use_cpu: Compute on the CPU even if there is a card.
        rounds: Batches to time, after one more that warms up.
        checkpointing: The profile's activation checkpointing.
        say: Shows progress.
    """
    device = "cpu" if use_cpu else "cuda"
    say("matrix rate")
    rate = matrix_rate(dtype, device)
    kept, precision = "with" if checkpointing else "without", str(dtype).removeprefix("torch.")
    part = Part(
        f"How fast ({device}, {precision}, LoRA r={LORA['lora_r']}, {kept} activation checkpointing)",
        ["model", "pairs", "trainer", "ms", "tokens", "tokens/s", "of rate", "memory, MiB", "estimate, MiB"],
    )
    part.note = (
        f"Matrix rate of this machine: {rate / 1e12:.3g} TFLOP/s. Times and tokens are medians of {rounds} batches; "
        "tokens are p + c + r of each pair. The preflight estimates the memory of plain TRL."
    )
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            say(f"{name}: building")
            try:
                stepper = Stepper(name, dtype, folder, use_cpu=use_cpu, checkpointing=checkpointing)
                for count in pairs:
                    say(f"{name}: {count} pairs")
                    part.rows += _timed_rows(name, stepper, count, rounds, rate)
                del stepper
            except Exception as error:  # out of memory, or any error that a kernel raises
                what = f"{name} cannot be timed: {type(error).__name__}: {str(error).splitlines()[0]}"
                part.findings.append(Finding(what, "If the model does not fit, name a smaller one with --model."))
        if not use_cpu:
            torch.cuda.empty_cache()
    return part


def _timed_rows(name: str, stepper: Stepper, pairs: int, rounds: int, rate: float) -> list[list[str]]:
    batches = [draw_lengths(pairs, seed=seed) for seed in range(rounds + 1)]
    taken: dict[str, list[tuple[float, float]]] = {TRL: [], OURS: []}
    failed: set[str] = set()
    for index, lengths in enumerate(batches):
        for kind in (TRL, OURS)[:: -1 if index % 2 else 1]:
            if kind not in failed:
                try:
                    taken[kind].append(stepper.step(lengths, shared=kind == OURS, seed=index))
                except torch.OutOfMemoryError:
                    failed.add(kind)
                    stepper.trainer.optimizer.zero_grad()
                    torch.cuda.empty_cache()
    rows = []
    for kind, steps in taken.items():
        if kind in failed:
            rows.append([name, str(pairs), kind, "out of memory", *[""] * 5])
            continue
        seconds = [spent for spent, _ in steps[1:]]
        tokens = [sum(map(sum, lengths)) for lengths in batches[1:]]
        flops = [required_flops(stepper.config, lengths) for lengths in batches[1:]]
        cells = [
            f"{statistics.median(seconds) * 1e3:,.0f}",
            f"{statistics.median(tokens):,.0f}",
            f"{statistics.median(t / s for t, s in zip(tokens, seconds, strict=True)):,.0f}",
            f"{statistics.median(f / s for f, s in zip(flops, seconds, strict=True)) / rate:.1%}",
            f"{max(peak for _, peak in steps[1:]) / 2**20:,.0f}",
            f"{max(map(stepper.estimate, batches[1:])) / 2**20:,.0f}" if kind == TRL else "",
        ]
        rows.append([name, str(pairs), kind, *cells])
    return rows
