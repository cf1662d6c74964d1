"""The plan of a run: `--dry_run true` prints it and starts nothing."""

import json
import math
import os
from dataclasses import asdict
from typing import Any

from datasets import DatasetDict
from trl import ModelConfig

from dpo_recipes.preflight.cost import count_updates, micro_batch_text, task_of
from dpo_recipes.preflight.memory import count_weights, load_config, memory_parts, row_lengths, size_text, sizes_text

START_FOLDER = "DPO_RECIPES_DRY_RUN"
"""Environment variable: where to leave the tokenizer and configuration that the next stage's dry run needs."""


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
    defaults = asdict(type(script_args)()) | asdict(ModelConfig()) | plain.to_dict() | machine
    defaults = json.loads(json.dumps(defaults, default=str))
    follow = ["do_eval", "gradient_accumulation_steps", "gradient_checkpointing", "model_init_kwargs"]
    follow += ["dry_run", "request"]
    settings = script_args.settings
    return [(key, settings[key]) for key in settings if key not in follow and settings[key] != defaults.get(key)]
