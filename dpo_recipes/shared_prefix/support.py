"""What may share prompts: whatever was shown to give plain TRL's results, and nothing else."""

from collections.abc import Sequence
from inspect import signature

from peft import PeftModel
from torch._dynamo import OptimizedModule
from torch.nn import Dropout, Module
from transformers import PreTrainedModel
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from dpo_recipes.shared_prefix.packing import SharedPrefixCollator, is_installed

TESTED = ["gemma2", "gemma3_text", "gpt2", "gpt_neo", "gpt_neox", "llama", "mistral", "phi3", "qwen2", "qwen3"]
"""Architectures (`config.model_type`) that have passed the equivalence matrix of docs/shared_prefix.md."""

SHOWN = {"cpu": {"float64", "float32", "bfloat16"}, "cuda": {"float32", "bfloat16"}}
"""By device the dtypes of a run that were compared with plain TRL: docs/shared_prefix.md has both tables."""

COLLATORS = (DataCollatorForPreference, SharedPrefixCollator)

LAYER_TYPES = {"full_attention", "sliding_attention"}
"""Other layers carry a state from token to token, which a packed row would carry into the next sequence."""


def changeable(model: Module) -> list[Module]:
    """The modules whose state decides whether a model may share prompts: those with dropout or checkpointing."""
    marks = ("attention_dropout", "gradient_checkpointing")
    return [each for each in model.modules() if isinstance(each, Dropout) or any(hasattr(each, mark) for mark in marks)]


def why_not(
    trainer: DPOTrainer,
    model: PreTrainedModel | PeftModel,
    *,
    modules: Sequence[Module],
    tested_only: bool = True,
) -> str | None:
    """Why a model must run as plain TRL, or None where it may share prompts.

    Args:
        trainer: A built DPOTrainer.
        model: Its policy or its reference model.
        modules: What `changeable` found in the model.
        tested_only: False asks only what is known to go wrong, not what has been tested.
    """
    compiled = any(isinstance(each, OptimizedModule) for each in (trainer.model, trainer.ref_model))
    args, base = trainer.args, model.get_base_model() if isinstance(model, PeftModel) else model
    config, attention = base.config, base.config._attn_implementation
    adapters = getattr(model, "peft_config", {}).values()
    layers = {*(getattr(config, "layer_types", None) or LAYER_TYPES)}
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    processes = trainer.accelerator.distributed_type.value  # DeepSpeed, FSDP, parallelism within a sequence
    experts = ("output_router_logits", "num_experts", "num_local_experts", "n_routed_experts")
    rates = [each.p if isinstance(each, Dropout) else getattr(each, "attention_dropout", 0) for each in modules]
    reentrant = args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant")
    reentrant = reentrant or any(map(_is_reentrant, modules))
    noise = args.neftune_noise_alpha or getattr(base.get_input_embeddings(), "neftune_noise_alpha", None)
    dtype = {"no": str(base.dtype).removeprefix("torch."), "bf16": "bfloat16", "fp16": "float16"}.get(
        trainer.accelerator.mixed_precision, "other"
    )
    shown = dtype in SHOWN.get(base.device.type, ())
    interface = base._supports_attention_backend or config.model_type == "gpt_neo"
    changed = is_installed(model) and attention == "eager" and config.model_type != "gpt_neo"
    positions = not getattr(config, "alibi", False) and "position_ids" in signature(base.base_model.forward).parameters
    other_bits = getattr(base, "is_quantized", False) and not getattr(base, "is_loaded_in_4bit", False)
    reasons = {
        "vision and other parts beside the language model": trainer._is_vlm or config.get_text_config() is not config,
        "truncation_mode=keep_end, which cuts a pair's prompt in two ways": args.truncation_mode != "keep_start",
        "a data collator other than TRL's": type(trainer.data_collator)
        not in (DataCollatorForPreference, SharedPrefixCollator),
        f"processes of the type {processes}, not tested": processes not in ("NO", "MULTI_CPU", "MULTI_GPU"),
        "batches that the main process dispatches": args.accelerator_config.dispatch_batches,
        "torch.compile and Liger kernels, not tested": args.torch_compile or args.use_liger_kernel or compiled,
        "noise on embeddings (NEFTune)": noise,
        "reentrant activation checkpointing": reentrant,
        "dropout": any(isinstance(rate, float) and rate > 0 for rate in rates),
        "PEFT other than LoRA": any(each.peft_type != "LORA" or each.alora_invocation_tokens for each in adapters),
        "quantization other than 4 bits of bitsandbytes": other_bits,
        "a mixture of experts": any(hasattr(config, name) for name in experts),
        f"layers of type {', '.join(sorted(layers - LAYER_TYPES))}": layers - LAYER_TYPES,
        "attention in both directions": getattr(config, "use_bidirectional_attention", False),
        f"attn_implementation={attention}": changed or attention not in ("sdpa", "eager", "shared_eager"),
        "positions that are not given by position_ids": not positions,
        "attention outside of transformers' interface": not interface,
        f"pad_to_multiple_of with rope_type={rope}": args.pad_to_multiple_of and rope in ("dynamic", "longrope"),
        f"the architecture {config.model_type}, not tested": tested_only and config.model_type not in TESTED,
        f"{dtype} on the device {base.device.type}, not tested": tested_only and not shown,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _is_reentrant(module: Module) -> bool:
    """Says if activation checkpointing is on in a module, and runs its layers under autograd a second time."""
    if not getattr(module, "gradient_checkpointing", False):
        return False
    function = getattr(module, "_gradient_checkpointing_func", None)
    return bool(getattr(function, "keywords", {}).get("use_reentrant", True))
