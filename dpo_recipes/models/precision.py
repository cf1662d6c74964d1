"""Converts the weights of a model while it computes, one module at a time, so that no second copy is needed."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn

from dpo_recipes.trl_patches import forward_without_autocast


@contextmanager
def weights_as(model: nn.Module, convert: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Converts the floating-point weights of each module for its forward pass, and restores them after it."""
    held: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}

    def enter(module: nn.Module, _: Any) -> None:
        weights = [weight for weight in module.parameters(recurse=False) if weight.is_floating_point()]
        held[module] = [(weight, weight.data) for weight in weights]
        for weight in weights:
            weight.data = convert(weight.data)

    def leave(module: nn.Module, *_: Any) -> None:
        for weight, data in held.pop(module):
            weight.data = data

    with ExitStack() as hooks:
        for module in model.modules():
            hooks.enter_context(module.register_forward_pre_hook(enter))
            hooks.enter_context(module.register_forward_hook(leave, always_call=True))
        yield


@contextmanager
def in_float32(model: Any) -> Iterator[None]:
    """Lets a language model with TRL's fused head compute in float32, whatever dtype its weights and autocast have.

    Args:
        model: The model that accelerate prepared, unwrapped. 4-bit weights are multiplied in float32.
    """
    head = (model.get_base_model() if hasattr(model, "get_base_model") else model).get_output_embeddings()
    with ExitStack() as restored:

        def put(owner: Any, name: str, value: Any) -> None:
            restored.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)

        if plain := forward_without_autocast(model):
            put(model, "forward", plain)
        for module in model.modules():
            if isinstance(module, Linear4bit):
                put(module, "compute_dtype", torch.float32)
        for weight in head.parameters():  # the fused head reads them without a call
            put(weight, "data", weight.data.float())
        with weights_as(model, Tensor.float), torch.autocast(head.weight.device.type, enabled=False):
            yield
