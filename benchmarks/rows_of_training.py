"""Rows of bench.py about training: a step and its memory, an update of 64 pairs, PPO, guards and health rules."""

import argparse
import random
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import trl
from bench import Part, compare, in_turn, rounds_of
from bench_shared_prefix import (
    COMPACT,
    LARGE,
    MAX_LENGTH,
    MODELS,
    OURS,
    PAIRS,
    SEED,
    SMALL,
    TRL,
    Stepper,
    draw,
    lengths_of,
    raw_pairs,
    scratch,
    step_memory,
    train_tokenizer,
)
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, ProgressCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer, ModelConfig, get_peft_config

from dpo_recipes import playground
from dpo_recipes.health import HealthCallback
from dpo_recipes.health.guards import add_guards
from dpo_recipes.ppo import PPOConfig, PPOTrainer
from dpo_recipes.presets import LORA
from dpo_recipes.runs.callbacks import ProgressLines

UNSHARED, NO_CHECKPOINTING = "ours, without shared prompts", "TRL, compact head, no checkpointing"
BASELINES = {
    COMPACT: "TRL, only completions scored",
    NO_CHECKPOINTING: "the same, no checkpointing",
    UNSHARED: "packed without sharing",
    TRL: "TRL as it is on a CPU",
}
TINY = dict(num_hidden_layers=1, hidden_size=64, vocab_size=2_000)
UPDATE = 64  # pairs, or answers of PPO
TOKENS = 4096  # of a micro-batch
BUDGET = f"update of 64 pairs, {TOKENS:,} tokens a step"

transformers.logging.set_verbosity_error()
datasets.disable_progress_bars()


def material(options: argparse.Namespace) -> tuple[Dataset, Any, list[tuple[int, int, int]], str]:
    """Pairs, their tokenizer, their lengths in tokens, and their source."""
    if options.quick:
        MODELS.update({SMALL: TINY, LARGE: {**TINY, "hidden_size": 128}})
    pairs, source = raw_pairs()
    tokenizer = train_tokenizer(pairs, MODELS[SMALL]["vocab_size"])
    pairs = pairs.select(random.Random(SEED).sample(range(len(pairs)), min(PAIRS, len(pairs))))
    lengths = lengths_of(pairs, tokenizer)
    usable = [row for row, (p, c, r) in enumerate(lengths) if p < MAX_LENGTH and min(c, r) > 0]
    return pairs.select(usable), tokenizer, [lengths[row] for row in usable], source


def step(options: argparse.Namespace) -> Part:
    """One step on 8 pairs, the reference model in it, of two models."""
    with scratch():
        pairs, tokenizer, lengths, source = material(options)
        batches = draw(lengths, "all", 8, rounds_of(options, 3))
        rows = []
        for model in (SMALL, LARGE):
            # TRL as it is takes a minute for one step of the large model.
            baselines = {name: shown for name, shown in BASELINES.items() if model == SMALL or name != TRL}
            built = {name: Stepper(name, model, pairs, tokenizer) for name in (OURS, *baselines)}
            ways = {
                name: lambda index, stepper=stepper: stepper.step(batches[index]) for name, stepper in built.items()
            }
            rows += compare(f"step, {model.partition(',')[0]}", in_turn(ways, len(batches)), baselines)
    return Part(
        rows,
        "forward, backward and AdamW of LoRA weights (r=16, all linear layers) on 8 pairs, the reference model in the "
        f"step, float32, at most {MAX_LENGTH} tokens; random-weight Llamas of layers x width, vocabulary 32,000 and "
        f"50,000; {source}. TRL recomputes activations by default. 'Only completions scored' is the compact head that "
        "TRL has on CUDA; on a CPU it scores all positions. 'Packed without sharing' is ours with each completion "
        "behind a copy of its prompt.",
    )


def memory(options: argparse.Namespace) -> Part:
    """Memory of one step, each in a process of its own."""
    with scratch():
        pairs, tokenizer, lengths, _ = material(options)
        batches = draw(lengths, "all", 8, rounds_of(options, 1))
        ways = {
            # A tiny model may need no new page.
            name: lambda index, name=name: max(0.01, step_memory(name, SMALL, pairs, tokenizer, batches[index]))
            for name in (OURS, *BASELINES)
        }
        rows = compare("memory of a step", in_turn(ways, len(batches)), BASELINES, "MiB")
    return Part(rows, "the smaller model of the step; peak of the resident memory less the memory before the step.")


class Clock(TrainerCallback):
    """Keeps the seconds from the first batch of a training to the end of its last update."""

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts with the first epoch."""
        if state.global_step == 0:
            self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Reads the clock."""
        self.seconds = time.perf_counter() - self.start


def timed(trainer: Any, inside: Callable[[], Any] = nullcontext) -> Callable[[int], float]:
    """A function that trains again, in a context, and returns the seconds of that training."""
    clock = Clock()
    trainer.add_callback(clock)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)

    def train(_: int) -> float:
        with inside():
            trainer.train()
        return clock.seconds

    return train


def update(options: argparse.Namespace) -> Part:
    """An update of 64 pairs: in batches of 8 pairs, and in micro-batches of a number of tokens."""
    batches = dict(per_device_train_batch_size=8, gradient_accumulation_steps=UPDATE // 8)
    cases = {name: (name, batches) for name in (OURS, UNSHARED, NO_CHECKPOINTING)}
    cases[BUDGET] = (OURS, dict(per_device_train_batch_size=UPDATE, tokens_per_step=TOKENS))
    with scratch():
        pairs, tokenizer, _, source = material(options)
        ways = {}
        for case, (variant, settings) in cases.items():
            stepper = Stepper(variant, SMALL, pairs, tokenizer, **settings)
            ways[case] = timed(stepper.trainer, stepper.head)
        results = in_turn(ways, rounds_of(options, 2))
    shown = {UNSHARED: BASELINES[UNSHARED], NO_CHECKPOINTING: BASELINES[COMPACT]}
    rows = compare("update of 64 pairs", results, shown)
    rows += compare(
        BUDGET,
        results | {OURS: results[BUDGET], "batches": results[OURS]},
        shown | {"batches": "batches of 8 pairs"},
    )
    return Part(
        rows,
        f"8 batches of 8 pairs or a token budget, the smaller model of the step, TRL without checkpointing; {source}.",
    )


def ppo(options: argparse.Namespace) -> Part:
    """PPO's rollout and its updates, compared with those of TRL's RLOO and GRPO, which have no critic."""
    answers = 16 if options.quick else UPDATE
    prompts = Dataset.from_list([{"prompt": prompt} for prompt in playground.evaluation_prompts()])
    rest: dict[str, Any] = dict(
        per_device_train_batch_size=16,
        steps_per_generation=answers // 16,
        num_iterations=4,
        max_steps=4 * answers // 16,
        max_completion_length=8 if options.quick else playground.MAX_NEW_TOKENS,
        learning_rate=1e-9,  # the policy stays: all sample answers of the same lengths
        beta=0.05,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    kinds = {
        OURS: (PPOTrainer, PPOConfig, 1),
        "RLOO": (trl.RLOOTrainer, trl.RLOOConfig, 4),
        "GRPO": (trl.GRPOTrainer, trl.GRPOConfig, 4),
    }
    with tempfile.TemporaryDirectory() as folder:
        start = playground.build_model(Path(folder, "model"))
        ways = {}
        for name, (trainer, config, generations) in kinds.items():
            ways[name] = timed(
                trainer(
                    model=AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32),
                    reward_funcs=lambda completions, **_: [float(len(str(each)) % 2) for each in completions],
                    args=config(output_dir=folder, num_generations=generations, **rest),
                    train_dataset=prompts,
                    processing_class=AutoTokenizer.from_pretrained(start),
                    peft_config=get_peft_config(ModelConfig(**LORA)),
                )
            )
        results = in_turn(ways, rounds_of(options, 3))
    rows = compare(f"PPO, {answers} answers", results, {"RLOO": "RLOO of TRL", "GRPO": "GRPO of TRL"})
    return Part(
        rows,
        f"one rollout of {answers} answers and 4 epochs over it in updates of 16, the playground's model before its "
        f"SFT, LoRA, answers of at most {rest['max_completion_length']} tokens. RLOO and GRPO have no critic to train; "
        "TRL removed its PPO (docs/results/ppo.md compares with it).",
    )


def guards(options: argparse.Namespace) -> Part:
    """A training with a recipe's guards, progress lines and health rules, and one without them."""
    updates = 2 if options.quick else 20
    with tempfile.TemporaryDirectory() as folder:
        model = playground.build_model(Path(folder, "model"))
        ways = {}
        for name in (OURS, TRL):
            trainer = DPOTrainer(
                model=str(model),
                args=DPOConfig(
                    output_dir=folder,
                    max_steps=updates,
                    per_device_train_batch_size=8,
                    logging_steps=5,
                    save_strategy="no",
                    use_cpu=True,
                    bf16=False,
                    activation_checkpointing=False,
                    dataloader_pin_memory=False,
                    report_to="none",
                ),
                train_dataset=playground.load_pairs("playground", train_pairs=400)["train"],
                peft_config=get_peft_config(ModelConfig(**LORA)),
            )
            ways[name] = timed(trainer)
            if name == OURS:
                add_guards(trainer)
                trainer.add_callback(ProgressLines())
                trainer.add_callback(HealthCallback(trainer))
        results = in_turn(ways, rounds_of(options, 5))
    return Part(
        compare("training with guards", results, {TRL: "bare DPOTrainer"}),
        f"{updates} updates of 8 pairs of the playground; guards, progress lines and health rules without their probe. "
        "The aim is an overhead below 2 %, that is 0.98 x.",
    )
