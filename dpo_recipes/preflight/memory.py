"""What a run would do: `--dry_run true` prints it and starts nothing."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

import torch
from datasets import DatasetDict
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from trl import DPOConfig, ModelConfig, RewardConfig, get_peft_config

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 2}
FOUR_BIT = 0.52  # bytes a weight: 4 bits and the quantised scales
TILE = (4096, 32768)  # tokens, vocabulary: what trl 1.16 holds of the logits at a time
CPU_TILES = 9  # float32 ones, in the backward pass of trl/kernels/chunked_logprob.py; a GPU's kernel works in place
START_FOLDER = "DPO_RECIPES_DRY_RUN"
"""Environment variable: where to leave the tokenizer and configuration that the next stage's dry run needs."""


def plan_lines(script_args: Any, training_args: Any, tokenizer: Any, pairs: DatasetDict) -> list[str]:
    """Settings that differ from TRL's defaults, updates, and rough estimates of memory and disk.

    No weight is loaded: the model is built from its configuration on the meta device.
    """
    settings = script_args.settings
    name = settings.get("model_name_or_path") or tokenizer.name_or_path
    config = AutoConfig.from_pretrained(name, revision=settings.get("model_revision") or "main")
    if folder := os.environ.get(START_FOLDER):
        if task_of(training_args) == "reward":  # what the trained stage would leave
            config.architectures, config.num_labels = ["AutoModelForSequenceClassification"], 1
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    task = task_of(training_args)
    weights = count_weights(config, settings, task=task)
    batch, steps = training_args.per_device_train_batch_size, training_args.gradient_accumulation_steps
    updates = count_updates(script_args, training_args, len(pairs["train"]))
    memory = memory_parts(config, weights, settings, task=task)
    if task == "online":
        memory |= online_parts(config, weights, settings | {"world_size": training_args.world_size})
    kept = training_args.save_total_limit or max(1, math.ceil(updates / max(1, training_args.save_steps)))
    checkpoint, result = 12 * weights["trained"], 4 * weights["trained"]
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
        f"  updates      {updates:,}" + (" for each answer of a pair that is trained on" if task == "answer" else ""),
        f"  memory       about {size_text(sum(memory.values()))} a device, beside the libraries: "
        + ", ".join(f"{part} {size_text(size)}" for part, size in memory.items()),
        f"  disk         about {size_text(checkpoint * (kept + 1) + result)}: up to {kept} + 1 checkpoints of "
        f"{size_text(checkpoint)}, the result {size_text(result)}",
        'Nothing was started (dry_run). The estimates are rough: recipes/README.md, "Before a long run".',
    ]


def task_of(training_args: Any) -> str:
    """What a row is: a `preference` between two answers, the same for a `reward` model, an `answer`, or `online`."""
    if hasattr(training_args, "generation_batch_size"):  # GRPOConfig, PPOConfig, RLOOConfig
        return "online"
    kinds = {DPOConfig: "preference", RewardConfig: "reward"}
    return next((task for kind, task in kinds.items() if isinstance(training_args, kind)), "answer")


def count_updates(script_args: Any, training_args: Any, pairs: int) -> int:
    """The optimizer steps of a run on so many pairs, or prompts."""
    if training_args.max_steps > 0:
        return int(training_args.max_steps)
    epoch: int = math.ceil(pairs / script_args.pairs_per_update)
    if task_of(training_args) == "online":  # rollouts are whole, and learned from several times
        prompts = training_args.generation_batch_size // training_args.num_generations
        answers = pairs // prompts * training_args.generation_batch_size * training_args.num_iterations
        epoch = answers // script_args.pairs_per_update
    return math.ceil(epoch * float(training_args.num_train_epochs))


def changed_settings(script_args: Any, training_args: Any) -> list[tuple[str, Any]]:
    """The settings that differ from what TRL would take on its own; those that only follow from others left out."""
    machine = {"use_cpu": False, "bf16": True, "fp16": False}  # the defaults of what must hold for this machine
    plain = type(training_args)(output_dir="-", **{key: getattr(training_args, key) for key in machine})
    defaults = asdict(type(script_args)()) | asdict(ModelConfig()) | plain.to_dict() | machine
    defaults = json.loads(json.dumps(defaults, default=str))
    follow = ("dry_run", "do_eval", "gradient_accumulation_steps", "gradient_checkpointing", "model_init_kwargs")
    settings = script_args.settings
    return [(key, settings[key]) for key in settings if key not in follow and settings[key] != defaults.get(key)]


def count_weights(config: Any, settings: Mapping[str, Any], *, task: str = "answer") -> dict[str, int]:
    """Numbers of weights: `trained`, `frozen`, and `quantised` among the frozen."""
    loader = AutoModelForSequenceClassification if task == "reward" else AutoModelForCausalLM
    with torch.device("meta"):
        model = loader.from_config(config)
        in_layers = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, torch.nn.Linear))
        head = model.score if task == "reward" else model.get_output_embeddings()
        in_layers -= head.weight.numel()
        known = {entry.name for entry in fields(ModelConfig) if entry.init}
        chosen = {key: value for key, value in settings.items() if key in known}
        if peft_config := get_peft_config(ModelConfig(**chosen)):
            model = get_peft_model(model, peft_config)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    frozen = sum(weight.numel() for weight in model.parameters()) - trained
    return {"trained": trained, "frozen": frozen, "quantised": in_layers if settings.get("load_in_4bit") else 0}


def memory_parts(
    config: Any, weights: Mapping[str, int], settings: Mapping[str, Any], *, task: str
) -> dict[str, float]:
    """Bytes on one device, nothing sharded; the formula is in docs/memory.md.

    Args:
        config: Of the model.
        weights: As `count_weights` gives them.
        settings: All settings in force.
        task: As `task_of` names it. A pair is two sequences; a reference is held where DPO, or an online trainer whose
            beta is above 0, trains all weights.
    """
    stored = BYTES.get(str(settings.get("dtype")), 4)
    compute = 2 if settings.get("bf16") or settings.get("fp16") else 4
    optimizer = 2 if "8bit" in str(settings.get("optim")) else 8
    length = _longest(settings)
    tokens = settings["per_device_train_batch_size"] * (2 if task in ("preference", "reward") else 1) * length
    text = config.get_text_config()
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    layer = tokens * (8 * text.hidden_size + 4 * inner) * compute  # what one layer keeps for its backward pass
    at_rest = tokens * text.hidden_size * compute * text.num_hidden_layers
    checkpointing = settings.get("activation_checkpointing") or settings.get("gradient_checkpointing")
    tile = min(tokens, TILE[0]) * min(text.vocab_size, TILE[1])
    plain = weights["frozen"] - weights["quantised"]
    has_reference = task == "preference" or (task == "online" and settings.get("beta"))
    reference = stored * weights["trained"] if has_reference and not weights["frozen"] else 0
    parts = {
        "frozen weights": stored * plain + FOUR_BIT * weights["quantised"] + reference,
        "trained weights": 4.0 * weights["trained"],
        "gradients": 4.0 * weights["trained"],
        "optimizer": float(optimizer * weights["trained"]),
        "activations": float(at_rest + layer if checkpointing else layer * text.num_hidden_layers),
        "logits": float(tile * (4 * CPU_TILES if settings.get("use_cpu") else compute)) if task != "reward" else 0.0,
    }
    return {part: size for part, size in parts.items() if size}


def _longest(settings: Mapping[str, Any]) -> int:
    """Tokens of the longest sequence."""
    if "max_prompt_length" in settings:
        prompt = settings.get("max_pair_length") or settings["max_prompt_length"]
        return int(prompt + settings["max_completion_length"])
    return settings.get("max_length") or 1024


def online_parts(config: Any, weights: Mapping[str, int], settings: Mapping[str, Any]) -> dict[str, float]:
    """Bytes on one device of what sampling and scoring take beside the policy's training.

    They are PPO's critic, which is trained as the policy is; the reward model, held whole; and the keys and values of
    all answers of a rollout, sampled at once.
    """
    stored = BYTES.get(str(settings.get("dtype")), 4)
    parts = {}
    if "vf_coef" in settings:
        parts["critic"] = sum(memory_parts(config, weights, settings, task="reward").values())
    if name := settings.get("reward_model_name_or_path"):
        judge = AutoConfig.from_pretrained(name, revision=settings.get("model_revision") or "main")
        parts["reward model"] = float(stored * sum(count_weights(judge, {}, task="reward").values()))
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    answers = settings["generation_batch_size"] / settings["world_size"]
    parts["keys and values"] = answers * _longest(settings) * text.num_hidden_layers * 2 * heads * width * stored
    return parts


def size_text(size: float) -> str:
    """Bytes as MB or GB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
