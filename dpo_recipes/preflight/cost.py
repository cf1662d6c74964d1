"""Estimates what training on the pairs will cost: updates, tokens, padding, memory, and whether the device has room."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from datasets import Dataset
from trl import DPOConfig, RewardConfig

from dpo_recipes.preflight.decide import this_machine
from dpo_recipes.preflight.findings import Finding, judge
from dpo_recipes.preflight.memory import count_weights, load_config, memory_parts, row_lengths, size_text, sizes_text
from dpo_recipes.shared_prefix.micro_batches import divide, divide_padded


def estimate_cost(
    pairs: Dataset, script_args: Any, training_args: Any, card: tuple[str, int] | None = None
) -> dict[str, Any]:
    """The part "cost" of preflight.json.

    Args:
        pairs: Training pairs, as `fit` returns them.
        script_args: RecipeArguments of the recipe. Its settings name the model, whose configuration is read.
        training_args: TRL config of the recipe.
        card: Name and bytes of the device that the run is to fit; None: this machine.
    """
    settings, task = script_args.settings, task_of(training_args)
    two_answers = task in ("preference", "reward")
    prompt, chosen, rejected = (np.array(pairs[f"{side}_tokens"][:]) for side in ("prompt", "chosen", "rejected"))
    longest = prompt + (np.maximum(chosen, rejected) if two_answers else chosen)
    real = int((2 * prompt + chosen + rejected if two_answers else longest).sum())
    budget, batch = settings.get("tokens_per_step"), training_args.per_device_train_batch_size
    batch *= training_args.gradient_accumulation_steps if budget else 1  # the pairs that the trainer divides
    order = np.random.default_rng(training_args.seed).permutation(len(pairs))
    batches = np.split(longest[order], range(batch, len(pairs), batch))
    if budget:
        batches = [rows[part] for rows in batches for part in divide_padded(rows.tolist(), budget)]
    padded = sum(len(rows) * int(rows.max()) for rows in batches) * (2 if two_answers else 1)
    config = load_config(settings["model_name_or_path"], settings)
    at_most = {**settings, "max_length": int(longest.max()), **row_lengths(pairs, settings, task)}
    at_most["per_device_train_batch_size"] = min(training_args.per_device_train_batch_size, len(pairs))
    memory = memory_parts(config, count_weights(config, settings, task=task), at_most, task=task)
    total = sum(memory.values())
    name, size = card or this_machine(training_args)
    return {
        "pairs_per_epoch": len(pairs),
        "updates": count_updates(script_args, training_args, len(pairs)),
        "batch": round(len(pairs) / len(batches)) if budget else batch,
        "real_tokens": real,
        "padded_tokens": padded,
        "padding_share": 1 - real / padded,
        # The share of second copies of prompts; the speed-up without them and without padding, if time is proportional
        # to the number of tokens:
        "prefix_share": float(prompt.sum()) / real if task == "preference" else 0.0,
        "shared_prefix_speedup": padded / float((prompt + chosen + rejected).sum()) if task == "preference" else 1.0,
        "memory": memory,
        "memory_total": total,
        "fits": {"name": name, "bytes": size, "fits": total <= size},
    }


def task_of(training_args: Any) -> str:
    """The kind of a row: two answers (`preference`, or `reward` for a reward model), one `answer`, or `online`."""
    if hasattr(training_args, "generation_batch_size"):  # GRPOConfig, PPOConfig, RLOOConfig
        return "online"
    kinds = {DPOConfig: "preference", RewardConfig: "reward"}
    return next((task for kind, task in kinds.items() if isinstance(training_args, kind)), "answer")


def count_updates(script_args: Any, training_args: Any, pairs: int) -> int:
    """The optimizer steps of a run on this number of pairs, or prompts, in all of its rounds."""
    rounds = getattr(training_args, "num_rounds", 1)  # RoundsConfig, which counts updates and epochs of one round
    if training_args.max_steps > 0:
        return int(training_args.max_steps * rounds)
    if rounds > 1:
        pairs = (training_args.num_prompts or pairs) // rounds
    epoch: int = math.ceil(pairs / script_args.pairs_per_update)
    if task_of(training_args) == "online":  # rollouts are whole, and learned from several times
        prompts = training_args.generation_batch_size // training_args.num_generations
        answers = pairs // prompts * training_args.generation_batch_size * training_args.num_iterations
        epoch = answers // script_args.pairs_per_update
    return math.ceil(epoch * float(training_args.num_train_epochs)) * rounds


def micro_batch_text(pairs: Dataset, training_args: Any, budget: int) -> str:
    """Pairs and tokens of a micro-batch with this budget, on average over the pairs in the order of their rows."""
    tokens = np.array([pairs[f"{side}_tokens"][:] for side in ("prompt", "chosen", "rejected")]).sum(axis=0)
    batch = training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps
    batches = np.split(tokens, range(batch, len(tokens), batch))
    count = sum(len(divide(rows.tolist(), budget)) for rows in batches)
    return (
        f"{len(tokens) / count:.1f} pairs of {tokens.sum() / count:,.0f} tokens on average, of {budget:,} that it may "
        "hold; the padded tokens count where prompts are not shared"
    )


def cost_findings(cost: Mapping[str, Any], thresholds: Mapping[str, float]) -> list[Finding]:
    """The finding that the run may be too large for the device, if its memory is above the threshold."""
    need, fits = cost["memory_total"], cost["fits"]
    words = {"needs": size_text(need), "device": fits["name"], "has": size_text(fits["bytes"])}
    return judge("memory", need, fits["bytes"], thresholds, **words)


def cost_lines(cost: Mapping[str, Any]) -> list[str]:
    """The cost for the screen."""
    fits = cost["fits"]
    lines = [
        f"updates   {cost['updates']:,}, of {cost['pairs_per_epoch']:,} pairs an epoch",
        f"tokens    {cost['real_tokens']:,} an epoch, {cost['padded_tokens']:,} with padding "
        f"({cost['padding_share']:.0%} of them) in batches of {cost['batch']}",
        f"prefix    {cost['prefix_share']:.0%} of the tokens are second copies of prompts; shared and without "
        f"padding the tokens are {cost['shared_prefix_speedup']:.1f} times fewer",
        f"memory    about {size_text(cost['memory_total'])} for the longest batch, of {size_text(fits['bytes'])} "
        f"({fits['name']}): {sizes_text(cost['memory'])}",
    ]
    return lines if cost["prefix_share"] else [*lines[:2], lines[3]]
