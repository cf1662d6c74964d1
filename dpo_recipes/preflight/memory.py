"""Rough estimates of the memory that training takes, from a model's configuration and the settings."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, HfArgumentParser
from trl import ModelConfig, get_peft_config

from dpo_recipes.flags import says_no

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 2}
FOUR_BIT = 0.52  # bytes a weight: 4 bits and the quantised scales
TILE = (4096, 32768)  # tokens, vocabulary: what trl 1.16 holds of the logits at a time
NORMS_OF_HEADS = {"qwen3", "gemma3_text"}  # architectures that normalise queries and keys
CPU_TILES = 9  # float32 tiles in the backward pass of trl/kernels/chunked_logprob.py; a GPU's kernel works in place


def load_config(name: str, settings: Mapping[str, Any]) -> Any:
    """The configuration of a model, of the revision and with the trust in its code that the settings name."""
    revision, trust = settings.get("model_revision") or "main", bool(settings.get("trust_remote_code"))
    return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust)


def count_weights(config: Any, settings: Mapping[str, Any], *, task: str = "answer") -> dict[str, int]:
    """Numbers of weights: `trained`, `frozen`, and `quantised` among the frozen. No weight is loaded."""
    loader = AutoModelForSequenceClassification if task == "reward" else AutoModelForCausalLM
    [model_args] = HfArgumentParser(ModelConfig).parse_dict(dict(settings), allow_extra_keys=True)
    with torch.device("meta"):
        model = loader.from_config(config)
        in_layers = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, torch.nn.Linear))
        in_layers -= (model.score if task == "reward" else model.get_output_embeddings()).weight.numel()
        if peft_config := get_peft_config(model_args):
            model = get_peft_model(model, peft_config)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    frozen = sum(weight.numel() for weight in model.parameters()) - trained
    return {"trained": trained, "frozen": frozen, "quantised": in_layers if settings.get("load_in_4bit") else 0}


def memory_parts(
    config: Any, weights: Mapping[str, int], settings: Mapping[str, Any], *, task: str
) -> dict[str, float]:
    """Bytes on one device, nothing sharded; the formula is in docs/memory.md.

    Args:
        config: The configuration of the model.
        weights: As `count_weights` returns them.
        settings: All settings in force; for `online` also `world_size`. `longest_pair` is the tokens of the longest
            pair as it goes through the model; by default twice `max_length`.
        task: As `task_of` names it. A pair is two sequences; a reference model is held where DPO, or an online trainer
            whose beta is above 0, trains all weights.
    """
    stored = BYTES.get(str(settings.get("dtype")), 4)
    compute = 2 if settings.get("bf16") or settings.get("fp16") else 4
    optimizer = 2 if "8bit" in str(settings.get("optim")) else 8
    shared = _shares_prompts(settings, task)
    tokens = most_tokens(settings, task)
    text = config.get_text_config()
    layer = tokens * _kept_by_a_layer(text, weights, settings, compute=compute, shared=shared)
    at_rest = tokens * text.hidden_size * compute
    checkpointing = settings.get("activation_checkpointing") or settings.get("gradient_checkpointing")
    tile = min(tokens, TILE[0]) * min(text.vocab_size, TILE[1])
    has_reference = task == "preference" or (task == "online" and settings.get("beta"))
    reference = weights["trained"] if has_reference and not weights["frozen"] else 0
    layers = text.num_hidden_layers
    parts = {
        "frozen weights": stored * (weights["frozen"] - weights["quantised"] + reference)
        + FOUR_BIT * weights["quantised"],
        "trained weights": 4.0 * weights["trained"],
        "gradients": 4.0 * weights["trained"],
        "optimizer": float(optimizer * weights["trained"]),
        "activations": float(3 * at_rest + (layers * at_rest + layer if checkpointing else layers * layer)),
        "logits": float(tile * (4 * CPU_TILES if settings.get("use_cpu") else compute)) if task != "reward" else 0.0,
    }
    if task == "online":
        parts |= _online_parts(config, weights, settings, stored=stored)
    return {part: size for part, size in parts.items() if size}


def row_lengths(rows: Dataset, settings: Mapping[str, Any], task: str) -> dict[str, int]:
    """Tokens of the longest sequence and of the longest pair, as it goes through the model; empty for prompts."""
    if task not in ("preference", "reward") or "chosen_tokens" not in rows.column_names:
        return {}
    prompt, chosen, rejected = (np.array(rows[f"{side}_tokens"][:]) for side in ("prompt", "chosen", "rejected"))
    longest = int((prompt + np.maximum(chosen, rejected)).max())
    packed = int((prompt + chosen + rejected).max())
    return {"max_length": longest, "longest_pair": packed if _shares_prompts(settings, task) else 2 * longest}


def _shares_prompts(settings: Mapping[str, Any], task: str) -> bool:
    """Says if a run with these settings shares prompts, unless its model or device was not tested."""
    return task == "preference" and not says_no(settings.get("shared_prefix", "auto")) and not settings.get("fp16")


def most_tokens(settings: Mapping[str, Any], task: str) -> int:
    """Most tokens that go through the model at a time."""
    longest = _longest(settings)
    row = settings.get("longest_pair") or 2 * longest if task in ("preference", "reward") else longest
    tokens = int(settings["per_device_train_batch_size"] * row)
    if not settings.get("tokens_per_step"):
        return tokens
    # A row over the budget is a micro-batch of its own.
    return int(min(tokens * settings.get("gradient_accumulation_steps", 1), max(settings["tokens_per_step"], row)))


def _kept_by_a_layer(
    text: Any, weights: Mapping[str, int], settings: Mapping[str, Any], *, compute: int, shared: bool
) -> float:
    """Bytes that a layer keeps of each token for its backward pass.

    Norms compute in float32. Frozen norms keep their input, trained ones its normalised values, too. Without shared
    prompts keys and values are repeated for each query head, and each token has a row of the mask; with them a prompt's
    are kept for either completion, here of as many tokens as both completions.
    """
    width, inner = text.hidden_size, getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    queries, keys = _attention_widths(text)
    norms = (4 if text.model_type.startswith("gemma") and text.model_type != "gemma" else 2) * width
    norms += queries + keys if text.model_type in NORMS_OF_HEADS else 0
    attention = 3 * queries + 3 * keys if shared else 4 * queries + _longest(settings)  # the output is kept twice
    middle = (6 if "gelu_new" in str(getattr(text, "activation_function", "")) else 4) * inner
    numbers = 2 * width + attention + middle
    numbers += 7 * settings.get("lora_r", 16) if weights["frozen"] else 0
    return float(compute * numbers + 4 * norms * (1 if weights["frozen"] else 2))


def _attention_widths(text: Any) -> tuple[int, int]:
    """Numbers in a token's queries of all heads, and in its keys or its values."""
    heads = text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    return heads * size, (getattr(text, "num_key_value_heads", None) or heads) * size


def _online_parts(
    config: Any, weights: Mapping[str, int], settings: Mapping[str, Any], *, stored: int
) -> dict[str, float]:
    """Bytes on one device that sampling and scoring take in addition to the policy's training.

    PPO's critic is trained as the policy is. The reward model is held whole. The keys and values are those of all
    answers of a rollout, sampled at once.
    """
    parts = {}
    if "vf_coef" in settings:
        own = {**settings, "longest_pair": _longest(settings)}  # one sequence a row
        parts["critic"] = sum(memory_parts(config, weights, own, task="reward").values())
    if name := settings.get("reward_model_name_or_path"):
        reward_model = count_weights(load_config(name, settings), {}, task="reward")
        parts["reward model"] = float(stored * sum(reward_model.values()))
    text = config.get_text_config()
    kept = text.num_hidden_layers * 2 * _attention_widths(text)[1] * stored  # of each token
    parts["keys and values"] = settings["generation_batch_size"] / settings["world_size"] * _longest(settings) * kept
    return parts


def _longest(settings: Mapping[str, Any]) -> int:
    """Tokens of the longest sequence."""
    if "max_prompt_length" in settings:
        prompt = settings.get("max_pair_length") or settings["max_prompt_length"]
        return int(prompt + settings["max_completion_length"])
    return settings.get("max_length") or 1024


def size_text(size: float) -> str:
    """Bytes as MB or GB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def sizes_text(parts: Mapping[str, float]) -> str:
    """The parts with their sizes, separated by commas."""
    return ", ".join(f"{part} {size_text(size)}" for part, size in parts.items())
