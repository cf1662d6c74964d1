"""PPO's updates divided by tokens, compared with batches of a number of answers, on the quickstart's model.

    python benchmarks/bench_ppo_budget.py --start outputs/quickstart_sft [--rounds 8]

Rollouts of 64 answers to the quickstart's prompts, from which updates of 32 learn, as in recipes/quickstart_ppo.py: two
batches of 16 answers without the columns where all have ended, against micro-batches of at most 1,024, 2,048 or 4,096
tokens. In a round each of them learns from the same rollout once, in an order that rotates. Times are CPU seconds of
one thread, without generation; tokens include padding. `few long` gives one prompt in eight a length three times as
large, as real dialogues have. Seed 0.
"""

import argparse
import os
import random
import statistics
import tempfile
import time
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}

import torch
from datasets import Dataset
from ppo_worker import train_prompts
from transformers import AutoTokenizer
from trl import ModelConfig, get_peft_config

from dpo_recipes import playground
from dpo_recipes.ppo import PPOConfig, PPOTrainer
from dpo_recipes.presets import LORA

ROLLOUT, UPDATE, BATCH = 64, 32, 16  # answers
BUDGETS = [None, 1024, 2048, 4096]


def length(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward that any prompt's answers have: their number of tokens."""
    return [float(len(ids)) for ids in completion_ids]


def build(start: str, folder: str, budget: int | None) -> PPOTrainer:
    """A trainer in batches of BATCH answers, or with a budget of tokens."""
    args = PPOConfig(
        output_dir=folder,
        generation_batch_size=ROLLOUT,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=UPDATE // BATCH,
        max_completion_length=playground.MAX_NEW_TOKENS,
        num_iterations=1,
        learning_rate=0.0,
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        report_to="none",
    )
    args.tokens_per_step = budget
    tokenizer = AutoTokenizer.from_pretrained(start)
    lora = get_peft_config(ModelConfig(**LORA))
    torch.manual_seed(0)
    return PPOTrainer(start, length, args, train_dataset=train_prompts(), processing_class=tokenizer, peft_config=lora)


def rollout(trainer: PPOTrainer, prompts: Dataset, *, few_long: bool, seed: int) -> dict[str, Any]:
    """Answers to prompts that are drawn by seed; with `few_long` one prompt in eight follows two earlier turns."""
    rows = random.Random(seed).sample(prompts["prompt"], ROLLOUT + 2)
    asked = [{"prompt": rows[i] * 3 if few_long and i % 8 == 0 else rows[i]} for i in range(ROLLOUT)]
    trainer.model.train()
    return trainer._generate_and_score_completions(asked)


def learn(trainer: PPOTrainer, batch: dict[str, Any]) -> tuple[float, int]:
    """CPU seconds and tokens of the updates that learn from a rollout."""
    tokens: list[int] = []
    count = lambda module, args, given: tokens.append(given["input_ids"].numel())  # noqa: E731
    hook = trainer.model.register_forward_pre_hook(count, with_kwargs=True)
    size = trainer.args.per_device_train_batch_size
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    began = time.process_time()
    for rows in torch.arange(ROLLOUT).split(size):
        part = {name: x[rows] if torch.is_tensor(x) and x.dim() else x for name, x in batch.items()}
        trainer.accelerator.backward(trainer.compute_loss(trainer.model, part))
    seconds = time.process_time() - began
    trainer.model.zero_grad()
    hook.remove()
    return seconds, sum(tokens)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", default="outputs/quickstart_sft")
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    prompts = train_prompts()
    print("| prompts | micro-batches | tokens of 64 answers | CPU seconds | of the first row's, by round |")
    print("| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        trainers = {budget: build(options.start, folder, budget) for budget in BUDGETS}
        for few_long in (False, True):
            taken: dict[int | None, list[tuple[float, int]]] = {budget: [] for budget in BUDGETS}
            for number in range(options.rounds + 1):
                batch = rollout(trainers[None], prompts, few_long=few_long, seed=number)
                turn = number % len(BUDGETS)
                for budget in BUDGETS[turn:] + BUDGETS[:turn]:
                    taken[budget].append(learn(trainers[budget], batch))
            for budget, results in taken.items():
                seconds, tokens = zip(*results[1:], strict=True)  # the first round warms up
                base = [s for s, _ in taken[None][1:]]
                ratios = [s / b for s, b in zip(seconds, base, strict=True)]
                name = f"{budget:,} tokens" if budget else f"{BATCH} answers"
                print(
                    f"| {'few long' if few_long else 'quickstart'} | {name} | {statistics.median(tokens):,.0f} | "
                    f"{statistics.median(seconds):.2f} | {statistics.median(ratios):.2f} ({min(ratios):.2f}-"
                    f"{max(ratios):.2f}) |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
