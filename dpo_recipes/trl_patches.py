"""Private names of TRL, transformers, PEFT, accelerate and datasets that this package replaces or relies on.

A trainer of ours may also override private methods of TRL's trainer and read that trainer's attributes; these names
stand in the trainer. Every other private name is used here and nowhere else. tests/test_trl_patches.py has a canary for
each name of both kinds: the canary fails when a library changes the name, and says what to look at.
"""

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import trl.trainer.utils as trl_utils
from datasets import Dataset
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast, Trainer
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoSelfAttention
from trl import DPOTrainer, GRPOTrainer, RLOOTrainer
from trl.kernels import ChunkedLogProbFunction
from trl.kernels.chunked_logprob import _addmm_fp32 as addmm_fp32

__all__ = ["addmm_fp32"]

# TRL's fused head

_head: ContextVar[Callable[..., Any] | None] = ContextVar("head", default=None)


def _apply_head(*arguments: Any) -> Any:
    return (_head.get() or ChunkedLogProbFunction.apply)(*arguments)


trl_utils._ChunkedLogProbFunction = SimpleNamespace(apply=_apply_head)  # once: `add_fused_lm_head` reads this global


@contextmanager
def head_function(function: Callable[..., Any]) -> Iterator[None]:
    """Lets TRL's fused head compute log-probs with another function, inside the block and in its thread alone.

    Args:
        function: Takes the arguments of `ChunkedLogProbFunction.apply` and returns the same results.
    """
    token = _head.set(function)
    try:
        yield
    finally:
        _head.reset(token)


# LoRA


@contextmanager
def lora_switched_by_flags(model: nn.Module) -> Iterator[None]:
    """Lets `model.disable_adapter`, inside the block, only set the flags of the LoRA layers.

    PEFT's own method also sweeps over `requires_grad`, which a pass without gradients does not read.
    """
    layers = [each for each in model.modules() if isinstance(each, BaseTunerLayer | AuxiliaryTrainingWrapper)]

    @contextmanager
    def disable_adapter() -> Iterator[None]:
        try:
            for layer in layers:
                layer._disable_adapters = True
            yield
        finally:
            for layer in layers:
                layer._disable_adapters = False

    vars(model)["disable_adapter"] = disable_adapter
    try:
        yield
    finally:
        del vars(model)["disable_adapter"]


def keep_input_dtype_under_autocast(layer: BaseTunerLayer) -> None:
    """Skips a LoRA layer's cast of its input under autocast, which would cast the input back for the product."""
    layer._cast_input_dtype = partial(_cast_input_dtype, layer)


def _cast_input_dtype(layer: BaseTunerLayer, x: Tensor | None, dtype: torch.dtype) -> Any:
    if x is not None and torch.is_autocast_enabled(x.device.type):
        return x
    return type(layer)._cast_input_dtype(layer, x, dtype)


# Models of transformers


def attention_name(config: PreTrainedConfig) -> str:
    """Name of the model's attention function: sdpa, eager or another."""
    return str(config._attn_implementation)


def takes_attention_function(model: PreTrainedModel) -> bool:
    """Says if the model's attention goes through transformers' attention interface."""
    return bool(model._supports_attention_backend)


def eager_attention(module: nn.Module) -> Callable[..., Any]:
    """The eager attention function of the file that defines the attention module."""
    function: Callable[..., Any] = sys.modules[type(module).__module__].eager_attention_forward
    return function


def replace_gpt_neo_attention(module: GPTNeoSelfAttention, attention: Callable[..., Any]) -> None:
    """Replaces GPT-Neo's attention, which is outside the attention interface: float32 and unscaled.

    Args:
        module: One layer's attention.
        attention: Takes the original function, the module, query, key, value and mask.
    """
    module._attn = partial(attention, partial(type(module)._attn, module), module)


def has_reentrant_checkpointing(module: nn.Module) -> bool:
    """Says if activation checkpointing is on in a module and runs its layers under autograd a second time."""
    function = getattr(module, "_gradient_checkpointing_func", None)
    reentrant = bool(getattr(function, "keywords", {}).get("use_reentrant", True))
    return reentrant and getattr(module, "gradient_checkpointing", False)


def forward_without_autocast(model: nn.Module) -> Callable[..., Any] | None:
    """The model's forward that accelerate wrapped for mixed precision; None where accelerate left it alone."""
    forward: Callable[..., Any] | None = vars(model).get("_original_forward")
    return forward


def encodes_in_rust(tokenizer: Any) -> bool:
    """Says if the tokenizer's class leaves calls, encoding and chat template to transformers' fast tokenizer."""
    names = ("__call__", "_encode_plus", "apply_chat_template")
    return all(getattr(type(tokenizer), name, None) is getattr(PreTrainedTokenizerFast, name) for name in names)


# Trainers


def method_name(trainer: Trainer) -> str:
    """TRL's name of the trainer's method: DPO, PPO, SFT and so on."""
    return str(trainer._name)


def prepare_inputs(trainer: Trainer, batch: dict[str, Any]) -> dict[str, Any]:
    """The batch on the trainer's device."""
    return dict(trainer._prepare_inputs(batch))


def first_update(trainer: Trainer) -> int:
    """Number of updates that were done before the last call of `train`: 0, or the checkpoint that it resumed from."""
    return int(trainer._initial_global_step)


def skip_epochs(trainer: Trainer) -> None:
    """Lets `train` make no further update."""
    trainer._run_epoch = lambda **_: None


@contextmanager
def unlogged(trainer: DPOTrainer | GRPOTrainer | RLOOTrainer) -> Iterator[None]:
    """Lets a trainer compute a loss, inside the block, without logging and without waiting for other processes."""
    names = {"_metrics", "_total_train_tokens", "_moved"} & vars(trainer).keys()
    kept = {name: vars(trainer)[name] for name in names}
    gathers = dict.fromkeys(("gather", "gather_for_metrics", "reduce"), lambda tensor, *_, **__: tensor)
    trainer._metrics = {mode: defaultdict(list) for mode in trainer._metrics}
    vars(trainer.accelerator).update(gathers)
    try:
        yield
    finally:
        vars(trainer).update(kept)
        for name in gathers:
            del vars(trainer.accelerator)[name]


def tokenize_prompts(trainer: GRPOTrainer, prompts: Any) -> list[list[int]]:
    """Ids of the prompts as GRPOTrainer gives them to the policy."""
    return list(trainer._tokenize_prompts(prompts)[0])


def keep_from_vllm(trainer: GRPOTrainer, name: str) -> None:
    """Leaves weights with this name in their key out of what TRL sends to the vLLM engine."""
    named = trainer.vllm_generation._iter_named_params
    trainer.vllm_generation._iter_named_params = lambda: (each for each in named() if name not in each[0])


# Datasets


def fingerprint(dataset: Dataset) -> str:
    """The dataset's hash by which datasets names its cached results."""
    return str(dataset._fingerprint)
