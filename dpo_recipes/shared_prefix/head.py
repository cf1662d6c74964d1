"""Log-probs of a head that is not trained, with two matrix products in place of three."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from trl.kernels import ChunkedLogProbFunction

from dpo_recipes.trl_patches import addmm_fp32

TILE_BYTES = 1 << 26
"""Bytes of a tile of logits: enough for a matrix product at full speed, little enough for memory."""


def log_probs(*arguments: Any, allow_frozen: bool, log_probs_alone: bool) -> Any:
    """Results of TRL's ChunkedLogProbFunction, by FrozenHeadLogProb where that is equal and faster.

    Args:
        arguments: Arguments of `ChunkedLogProbFunction.apply`.
        allow_frozen: False leaves all heads to TRL.
        log_probs_alone: Return log-probs and no other result.
    """
    hidden, weight, bias, targets, temperature, chunk, softcap, scale, outputs = arguments
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    frozen = allow_frozen and not trained and (temperature, softcap, scale) == (1, None, 1)
    frozen = frozen and not hidden.is_cuda  # there TRL's Triton kernel is faster
    function = FrozenHeadLogProb if frozen else ChunkedLogProbFunction
    outputs = ("log_probs",) if log_probs_alone else outputs
    return function.apply(hidden, weight, bias, targets, temperature, chunk, softcap, scale, outputs)


class FrozenHeadLogProb(torch.autograd.Function):
    """TRL's ChunkedLogProbFunction for a head that is not trained, scaled or capped: same arguments, same results.

    The gradient of log p(target) by the hidden state is (onehot - p) W, times the gradient from above. So the forward
    computes (onehot - p) W while it holds the tile of logits. Entropy has no gradient here; DPO asks for none.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *settings: Any
    ) -> tuple[Tensor | None, ...]:
        """Per-token results, each of shape (N,), of hidden states (N, H) under a head (V, H)."""
        dtype, device = hidden.dtype, hidden.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        gradient = torch.zeros_like(hidden, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        rows, outputs, tiles = max(64, TILE_BYTES // (4 * len(weight))), settings[-1], []
        for start in range(0, max(1, len(targets)), rows):
            tile = slice(start, start + rows)
            target = targets[tile, None]
            z = F.linear(hidden[tile].to(dtype), weight, bias).float()
            top, best = z.max(dim=1, keepdim=True)
            e = torch.sub(z, top).exp_()
            total = e.sum(dim=1)
            log_z = top[:, 0] + total.log()
            tiles.append([z.gather(1, target)[:, 0] - log_z])
            if outputs != ("log_probs",):  # TRL asks for log-probs alone, or for everything that it logs
                weighting = "log_sum_sq_probs" in outputs
                spread: Any = torch.linalg.vecdot(e, e).log() - 2 * total.log() if weighting else None
                tiles[-1] += [log_z - torch.linalg.vecdot(e, z) / total, spread, z.mean(dim=1), (best == target)[:, 0]]
            if gradient is not None:
                e.div_(-total[:, None]).scatter_add_(1, target, torch.ones_like(top))  # onehot - p
                addmm_fp32(gradient[tile], e.to(dtype), weight)
        ctx.save_for_backward(gradient)
        results = [None if parts[0] is None else torch.cat(parts) for parts in zip(*tiles, strict=True)]
        ctx.mark_non_differentiable(*(x for x in results[1:] if x is not None))
        return (*results, *[None] * (5 - len(results)))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        """Gradient by the hidden states: the product of the forward, weighted by the gradient from above."""
        return ctx.saved_tensors[0] * gradients[0][:, None], *[None] * 8
