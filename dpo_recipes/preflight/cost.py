"""What training on the pairs will cost: updates, tokens, padding, memory, and whether that fits the device."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import psutil
import torch
from datasets import Dataset
from transformers import AutoConfig

from dpo_recipes.preflight.findings import Finding, judge
from dpo_recipes.preflight.memory import count_updates, count_weights, memory_parts, size_text, task_of


def estimate_cost(
    pairs: Dataset,
    script_args: Any,
    training_args: Any,
    settings: Mapping[str, Any],
    card: tuple[str, int] | None = None,
) -> dict[str, Any]:
    """The part "cost" of preflight.json.

    Args:
        pairs: Training pairs, as `fit` returns them.
        script_args: Of the recipe.
        training_args: Of the recipe.
        settings: All settings in force; the model's configuration is read.
        card: Name and bytes of what the run is to fit; None: this machine.
    """
    task = task_of(training_args)
    preference = task in ("preference", "reward")  # else one answer a row
    prompt, chosen, rejected = (np.array(pairs[f"{side}_tokens"][:]) for side in ("prompt", "chosen", "rejected"))
    longest = prompt + (np.maximum(chosen, rejected) if preference else chosen)
    real = 2 * prompt + chosen + rejected if preference else longest
    batch = training_args.per_device_train_batch_size
    order = np.random.default_rng(training_args.seed).permutation(len(pairs))
    batches = np.split(longest[order], range(batch, len(pairs), batch))
    padded = sum(len(rows) * int(rows.max()) for rows in batches) * (2 if preference else 1)
    config = AutoConfig.from_pretrained(
        settings["model_name_or_path"], revision=settings.get("model_revision") or "main"
    )
    at_most = {**settings, "max_length": int(longest.max()), "per_device_train_batch_size": min(batch, len(pairs))}
    memory = memory_parts(config, count_weights(config, settings, task=task), at_most, task=task)
    total = sum(memory.values())
    name, size = card or this_machine(training_args)
    return {
        "pairs_per_epoch": len(pairs),
        "updates": count_updates(script_args, training_args, len(pairs)),
        "batch": batch,
        "real_tokens": int(real.sum()),
        "padded_tokens": padded,
        "padding_share": 1 - float(real.sum()) / padded,
        # The second copy of each prompt; without it and without padding, if time goes with the number of tokens:
        "prefix_share": float(prompt.sum() / real.sum()) if task == "preference" else 0.0,
        "shared_prefix_speedup": padded / float((prompt + chosen + rejected).sum()) if task == "preference" else 1.0,
        "memory": memory,
        "memory_total": total,
        "fits": {"name": name, "bytes": size, "fits": total <= size},
    }


def this_machine(training_args: Any) -> tuple[str, int]:
    """What the run would stand on, and its bytes: the smallest card, or the main memory."""
    cards = 0 if training_args.use_cpu else torch.cuda.device_count()
    if cards:
        return "this machine's card", min(torch.cuda.get_device_properties(card).total_memory for card in range(cards))
    return "this machine", psutil.virtual_memory().total


def cost_findings(cost: Mapping[str, Any], thresholds: Mapping[str, float]) -> list[Finding]:
    """Whether the run may be too large for the device."""
    need, fits = cost["memory_total"], cost["fits"]
    words = {"needs": size_text(need), "device": fits["name"], "has": size_text(fits["bytes"])}
    return judge("memory", need, fits["bytes"], thresholds, **words)


def cost_lines(cost: Mapping[str, Any]) -> list[str]:
    """The cost for the screen."""
    parts = ", ".join(f"{part} {size_text(size)}" for part, size in cost["memory"].items())
    lines = [
        f"updates   {cost['updates']:,}, of {cost['pairs_per_epoch']:,} pairs an epoch",
        f"tokens    {cost['real_tokens']:,} an epoch, {cost['padded_tokens']:,} with padding "
        f"({cost['padding_share']:.0%} of them) in batches of {cost['batch']}",
    ]
    if cost["prefix_share"]:
        lines.append(
            f"prefix    {cost['prefix_share']:.0%} of the tokens are second copies of prompts; shared and without "
            f"padding the tokens are {cost['shared_prefix_speedup']:.1f} times fewer"
        )
    fits = cost["fits"]
    return [
        *lines,
        f"memory    about {size_text(cost['memory_total'])} for the longest batch, of {size_text(fits['bytes'])} "
        f"({fits['name']}): {parts}",
    ]
