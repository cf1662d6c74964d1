"""Estimates what a run will cost, for `inspect` and for the plan of a dry run: updates, tokens, memory, disk."""

import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict
from trl import DPOConfig, ModelConfig, RewardConfig

from dpo_recipes.preflight.decide import this_machine
from dpo_recipes.preflight.findings import Finding, judge
from dpo_recipes.preflight.memory import count_weights, load_config, memory_parts, row_lengths, size_text, sizes_text
from dpo_recipes.settings import effective_settings
from dpo_recipes.shared_prefix.micro_batches import divide, divide_padded

START_FOLDER = "DPO_RECIPES_DRY_RUN"
"""Environment variable: where to leave the tokenizer and configuration that the next stage's dry run needs."""


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


def plan_lines(script_args: Any, training_args: Any, tokenizer: Any, pairs: DatasetDict) -> list[str]:
    """Settings that differ from TRL's defaults, updates, and rough estimates of memory and disk.

    No weight is loaded: the model is built from its configuration on the meta device.

    Args:
        script_args: RecipeArguments of the recipe.
        training_args: TRL config of the recipe.
        tokenizer: Of the initial model.
        pairs: As `fit` returns them, with the number of tokens of each side.
    """
    settings, task = script_args.settings, task_of(training_args)
    name = settings.get("model_name_or_path") or tokenizer.name_or_path
    config = load_config(name, settings)
    if folder := os.environ.get(START_FOLDER):
        _leave_start(folder, config, tokenizer, task=task)
    weights = count_weights(config, settings, task=task)
    lengths = row_lengths(pairs["train"], settings, task)
    memory = memory_parts(config, weights, settings | lengths | {"world_size": training_args.world_size}, task=task)
    batch, steps = training_args.per_device_train_batch_size, training_args.gradient_accumulation_steps
    updates = count_updates(script_args, training_args, len(pairs["train"]))
    kept = training_args.save_total_limit or max(1, math.ceil(updates / max(1, training_args.save_steps)))
    checkpoint, result = 12 * weights["trained"], 4 * weights["trained"]
    if (budget := settings.get("tokens_per_step")) and task == "preference":
        batch, steps = batch * steps, 1
    budget = budget if "chosen_tokens" in pairs["train"].column_names else None  # a round's pairs are not known yet
    unit = "answers" if task == "online" else "pairs"
    return [
        "",
        "Settings that differ from TRL's defaults",
        *(f"  {key:<28} {value}" for key, value in changed_settings(script_args, training_args)),
        "",
        "Plan",
        f"  model        {name}: {weights['frozen'] + weights['trained']:,} weights, {weights['trained']:,} trained",
        f"  update       {script_args.pairs_per_update} {unit} = {batch} a device x {training_args.world_size} "
        f"process(es) x {steps} accumulated",
        *([f"  micro-batch  {micro_batch_text(pairs['train'], training_args, budget)}"] if budget else []),
        f"  updates      {updates:,}" + (" for each answer of a pair that is trained on" if task == "answer" else ""),
        f"  memory       about {size_text(sum(memory.values()))} a device, without the libraries: {sizes_text(memory)}",
        f"  disk         about {size_text(checkpoint * (kept + 1) + result)}: up to {kept} + 1 checkpoints of "
        f"{size_text(checkpoint)}, the result {size_text(result)}",
        'Nothing was started (dry_run). The estimates are rough: recipes/README.md, "Before a long run".',
    ]


def _leave_start(folder: str, config: Any, tokenizer: Any, *, task: str) -> None:
    """Saves the configuration and tokenizer that the trained stage would leave."""
    if task == "reward":
        config.architectures, config.num_labels = ["AutoModelForSequenceClassification"], 1
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def changed_settings(script_args: Any, training_args: Any) -> list[tuple[str, Any]]:
    """The settings that differ from TRL's defaults, without those that follow from other settings."""
    machine = {"use_cpu": False, "bf16": True, "fp16": False}  # other values may be needed to build a config here
    plain = type(training_args)(output_dir="-", **{key: getattr(training_args, key) for key in machine})
    defaults = effective_settings([type(script_args)(), ModelConfig(), plain]) | machine
    follow = ["do_eval", "gradient_accumulation_steps", "gradient_checkpointing", "model_init_kwargs"]
    follow += ["dry_run", "request"]
    settings = script_args.settings
    return [(key, settings[key]) for key in settings if key not in follow and settings[key] != defaults.get(key)]
