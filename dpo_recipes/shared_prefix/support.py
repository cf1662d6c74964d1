"""Conditions for sharing prompts: models and settings that were shown to give plain TRL's results, and no others."""

from collections.abc import Sequence
from inspect import signature
from typing import Any

from accelerate.utils import is_compiled_module
from peft import PeftModel
from torch.nn import Dropout, Module
from transformers import PreTrainedModel, ProcessorMixin
from trl import DPOTrainer

from dpo_recipes.shared_prefix.packing import COLLATORS, is_installed
from dpo_recipes.trl_patches import attention_name, has_reentrant_checkpointing, takes_attention_function

TESTED = ["gemma2", "gemma3_text", "gpt2", "gpt_neo", "gpt_neox", "llama", "mistral", "phi3", "qwen2", "qwen3"]
"""Architectures (`config.model_type`) that have passed the equivalence matrix of docs/shared_prefix.md."""

SHOWN = {"cpu": {"float64", "float32", "bfloat16"}, "cuda": {"float32", "bfloat16"}}
"""By device, the dtypes of a run that were compared with plain TRL: docs/shared_prefix.md has both tables."""

PROCESSES = {"NO", "MULTI_CPU", "MULTI_GPU", "DEEPSPEED", "FSDP"}
"""Kinds of processes (`DistributedType`) under which results were compared with plain TRL's: docs/scale.md."""

LAYER_TYPES = {"full_attention", "sliding_attention"}
"""Other layers carry a state from token to token, which a packed row would carry into the next sequence."""


def why_not(
    trainer: DPOTrainer, model: PreTrainedModel | PeftModel, *, modules: Sequence[Module], tested_only: bool
) -> str | None:
    """Reason why a model must run as plain TRL, or None where it may share prompts.

    Args:
        trainer: A built DPOTrainer.
        model: Its policy or its reference model.
        modules: The model's modules that `changeable` returns.
        tested_only: False ignores that an architecture or a dtype has not been tested.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    reasons = _in_settings(trainer, base) | _in_modules(trainer, modules) | _in_model(trainer, model, base)
    reasons |= _untested(trainer, base) if tested_only else {}
    return next((reason for reason, holds in reasons.items() if holds), None)


def changeable(model: Module) -> list[Module]:
    """Modules that a user may change after the trainer was built: those with dropout or activation checkpointing."""
    marks = ("attention_dropout", "gradient_checkpointing")
    return [each for each in model.modules() if isinstance(each, Dropout) or any(hasattr(each, mark) for mark in marks)]


def _in_settings(trainer: DPOTrainer, base: PreTrainedModel) -> dict[str, Any]:
    args, processes = trainer.args, trainer.accelerator.distributed_type.value  # DeepSpeed, FSDP, context parallelism
    vision = isinstance(trainer.processing_class, ProcessorMixin)
    compiled = any(map(is_compiled_module, (trainer.model, trainer.ref_model)))
    noise = args.neftune_noise_alpha or getattr(base.get_input_embeddings(), "neftune_noise_alpha", None)
    return {
        "vision and other parts next to the language model": vision or base.config.get_text_config() is not base.config,
        "truncation_mode=keep_end, which cuts a pair's prompt in two ways": args.truncation_mode != "keep_start",
        "a data collator other than TRL's": type(trainer.data_collator) not in COLLATORS,
        f"processes of the type {processes}, not tested": processes not in PROCESSES,
        "batches that the main process dispatches": args.accelerator_config.dispatch_batches,
        "torch.compile and Liger kernels, not tested": args.torch_compile or args.use_liger_kernel or compiled,
        "noise on embeddings (NEFTune)": noise,
    }


def _in_modules(trainer: DPOTrainer, modules: Sequence[Module]) -> dict[str, Any]:
    args = trainer.args
    reentrant = args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant")
    rates = [each.p if isinstance(each, Dropout) else getattr(each, "attention_dropout", 0) for each in modules]
    return {
        "reentrant activation checkpointing": reentrant or any(map(has_reentrant_checkpointing, modules)),
        "dropout": any(isinstance(rate, float) and rate > 0 for rate in rates),
    }


def _in_model(trainer: DPOTrainer, model: Module, base: PreTrainedModel) -> dict[str, Any]:
    config, attention = base.config, attention_name(base.config)
    adapters = getattr(model, "peft_config", {}).values()
    other_bits = getattr(base, "is_quantized", False) and not getattr(base, "is_loaded_in_4bit", False)
    experts = ("output_router_logits", "num_experts", "num_local_experts", "n_routed_experts")
    other_layers = {*(getattr(config, "layer_types", None) or LAYER_TYPES)} - LAYER_TYPES
    is_gpt_neo = config.model_type == "gpt_neo"
    changed = is_installed(base) and attention == "eager" and not is_gpt_neo
    positions = not getattr(config, "alibi", False) and "position_ids" in signature(base.base_model.forward).parameters
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    uneven = trainer.args.pad_to_multiple_of and rope in ("dynamic", "longrope")
    return {
        "PEFT other than LoRA": any(each.peft_type != "LORA" or each.alora_invocation_tokens for each in adapters),
        "quantization other than 4 bits of bitsandbytes": other_bits,
        "a mixture of experts": any(hasattr(config, name) for name in experts),
        f"layers of type {', '.join(sorted(other_layers))}": other_layers,
        "attention in both directions": getattr(config, "use_bidirectional_attention", False),
        f"attn_implementation={attention}": changed or attention not in ("sdpa", "eager", "shared_eager"),
        "positions that are not given by position_ids": not positions,
        "attention outside of transformers' interface": not (takes_attention_function(base) or is_gpt_neo),
        f"pad_to_multiple_of with rope_type={rope}": uneven,
    }


def _untested(trainer: DPOTrainer, base: PreTrainedModel) -> dict[str, Any]:
    precision, device = trainer.accelerator.mixed_precision, base.device.type
    dtypes = {"no": str(base.dtype).removeprefix("torch."), "bf16": "bfloat16", "fp16": "float16"}
    dtype, fsdp = dtypes.get(precision, "other"), trainer.is_fsdp_enabled
    return {
        "FSDP in 16 bits, which rounds a packed row otherwise than plain TRL": fsdp and precision != "no",
        f"the architecture {base.config.model_type}, not tested": base.config.model_type not in TESTED,
        f"{dtype} on the device {device}, not tested": dtype not in SHOWN.get(device, ()),
    }
