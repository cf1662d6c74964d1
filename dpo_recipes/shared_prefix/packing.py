"""One row of tokens in place of a padded batch: its plan, the hooks that lead there and back, its attention."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoSelfAttention
from trl.trainer.dpo_trainer import DataCollatorForPreference

from dpo_recipes.trl_patches import (
    attention_name,
    eager_attention,
    keep_input_dtype_under_autocast,
    replace_gpt_neo_attention,
)

PLAN = "shared_prefix_plan"
"""Name of the plan in a batch."""
RESULTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask")
"""Names of a model's per-token results in TRL's layout: (2 pairs, width - 1)."""
_COLUMNS = ("sources", "positions", "predicting", "cells", "keys")


class Plan(dict[str, Any]):
    """A batch's plan, made by `plan_pairs`. The plan travels in TRL's batch, and its tensors move to the device."""

    def to(self, *args: Any, **kwargs: Any) -> "Plan":
        """The plan with its tensors on another device, as a batch's own tensors are moved."""
        moved = {key: value.to(*args, **kwargs) if isinstance(value, Tensor) else value for key, value in self.items()}
        return Plan(moved)

    def belongs_to(self, batch: dict[str, Any]) -> bool:
        """Says if the batch still holds the rows that the data collator made the plan for."""
        return "checksum" not in self or bool(self["checksum"] == _checksum(batch))


def _checksum(batch: dict[str, Any]) -> int:
    """A number that another token, another order of rows or another completion mask changes."""
    ids, completions = batch["input_ids"].reshape(-1), batch["completion_mask"].reshape(-1)
    places = torch.arange(1, len(ids) + 1, device=ids.device)
    return int(((ids + 1) * places * (1 + 2 * completions)).sum())


def lengths_of(batch: dict[str, Any]) -> list[tuple[int, int, int]]:
    """Tokens of prompt, chosen and rejected of each pair of a padded batch."""
    tokens, completions = (batch[name].sum(dim=1) for name in ("attention_mask", "completion_mask"))
    prompts = (tokens - completions)[: len(tokens) // 2]
    return list(torch.stack([prompts, *completions.chunk(2)], dim=1).tolist())


def plan_pairs(lengths: Sequence[tuple[int, int, int]], width: int, *, share: bool = True) -> Plan:
    """Plan of a batch: how it becomes one row of tokens, and how the results go back.

    One pair of p = 3 prompt tokens, c = 2 of chosen and r = 2 of rejected, in a padded batch of width 6:

        TRL's padded batch      cells 0..5:  P0 P1 P2 C0 C1 .
                                cells 6..11: P0 P1 P2 R0 R1 .
        packed row, 7 tokens    place:        0  1  2  3  4  5  6
                                token:       P0 P1 P2 C0 C1 R0 R1
                                source:       0  1  2  3  4  9 10   cell of TRL's batch
                                position:     0  1  2  3  4  3  4   R0 follows P2, as C0 does
        predicts                              .  . C0 C1  . R1  .   and P2 predicts R0, too
        attention, 1st segment  queries P0 P1 P2 C0 C1, keys P0 P1 P2 C0 C1
                   2nd segment  queries R0 R1,          keys P0 P1 P2 R0 R1

    Args:
        lengths: p, c and r of each pair, after truncation.
        width: Tokens of a row of TRL's padded batch.
        share: False packs each completion with a prompt of its own, to measure what sharing is worth.

    Returns:
        The row has T tokens; N times, a token predicts one of a completion; the segments attend to K keys in all.

        - `sources` (T,): cell of each token in TRL's padded batch, flattened
        - `positions` (T,): position of each token in its sequence
        - `predicting` (N,): tokens that predict one of a completion; a prompt's last one predicts two
        - `cells` (N,): cells of their results in TRL's (2 pairs, width - 1), flattened
        - `shape`: (2 pairs, width - 1)
        - `keys` (K,): tokens that each segment attends to, one segment after the other
        - `ends` (2, segments + 1): ends of the segments' queries, and of their keys
        - `lengths`: p, c, r as attention takes them, on the host, so that no step waits for the device
        - `masks`: attention masks, filled by the first layer and read by all
    """
    segments, start = [], 0
    for pair, (p, c, r) in enumerate(lengths):
        segments.append(_segment(pair, p, c, prompt=start, start=start, width=width))
        first, start = start, start + p + c
        prompt = first if share else start
        segments.append(_segment(len(lengths) + pair, p, r, prompt=prompt, start=start, width=width))
        start += r if share else p + r
    columns = zip(_COLUMNS, zip(*segments, strict=True), strict=True)
    plan = Plan({name: torch.from_numpy(np.concatenate(parts)) for name, parts in columns})
    counts = [(0, 0), *((len(sources), len(keys)) for sources, *_, keys in segments)]  # queries and keys
    plan["ends"] = torch.tensor(counts).cumsum(dim=0).int().T.contiguous()
    packed = lengths if share else [entry for p, c, r in lengths for entry in ((p, c, 0), (p, r, 0))]
    plan |= {"shape": (2 * len(lengths), width - 1), "lengths": packed, "masks": {}}
    return plan


def _segment(row: int, p: int, n: int, *, prompt: int, start: int, width: int) -> tuple[np.ndarray, ...]:
    """Plan of one completion, as arrays in the order of _COLUMNS.

    Args:
        row: Row of TRL's padded batch.
        p: Tokens of the prompt.
        n: Tokens of the completion.
        prompt: Place of the prompt in the packed row. If it is `start`, the prompt is part of the segment.
        start: Place of the segment.
        width: Tokens of a row of TRL's padded batch.
    """
    given = 0 if prompt == start else p  # prompt tokens that an earlier segment holds
    positions = np.arange(given, p + n)
    places = start + positions - given
    first = max(p, 1)  # nothing predicts the first token of a sequence
    predicted = np.arange(first, p + n)  # positions of completion tokens
    before = np.where(predicted > p, start + predicted - 1 - given, prompt + p - 1)
    keys = np.concatenate([prompt + np.arange(given), places])
    return row * width + positions, positions, before, row * (width - 1) + predicted - 1, keys


@dataclass
class SharedPrefixCollator(DataCollatorForPreference):
    """TRL's data collator, which also puts the batch's plan into the batch."""

    share: bool = True

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's padded batch with a plan, unless truncation left no token of a completion in it."""
        batch: dict[str, Any] = super().torch_call(examples)
        plan = plan_pairs(lengths_of(batch), batch["input_ids"].size(1), share=self.share)
        plan["checksum"] = _checksum(batch)
        return {**batch, PLAN: plan} if len(plan["predicting"]) else batch


COLLATORS = (DataCollatorForPreference, SharedPrefixCollator)
"""Data collators of text, whose batches can be shared and divided."""


def install(model: PreTrainedModel | PeftModel) -> None:
    """Teaches a model to run batches that have a plan; all else stays as it was, generation included.

    The attention function stays for good, because activation checkpointing calls it again in the backward. `sdpa` keeps
    its name, as continuous batching asks for it; without a plan it is transformers' own function.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    for module in base.modules():
        if isinstance(module, GPTNeoSelfAttention):
            replace_gpt_neo_attention(module, _gpt_neo_attention)
        if isinstance(module, BaseTunerLayer):
            keep_input_dtype_under_autocast(module)
    AttentionInterface.register("sdpa", _sdpa)
    if attention_name(base.config) == "eager" and base.config.model_type != "gpt_neo":
        base.set_attn_implementation("shared_eager")
    if not is_installed(base):  # a second trainer may come with the same model
        base.register_forward_pre_hook(_pack, with_kwargs=True)
        base.register_forward_hook(_unpack, with_kwargs=True)
        base.base_model.register_forward_hook(_keep_predicting, with_kwargs=True)
        base.has_shared_prefix = True


def is_installed(base: PreTrainedModel) -> bool:
    """Says if `install` has been called with the model, or with a LoRA adapter on it."""
    return "has_shared_prefix" in vars(base)


def _pack(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Hook before the model: a padded batch that has a plan becomes one row."""
    plan = kwargs.pop(PLAN, None)
    if plan is not None and kwargs.get("fused_lm_head"):
        ids, labels = kwargs.pop("input_ids"), kwargs.pop("labels")
        mask: Any = torch.zeros(1, 1, 1, 1, device=ids.device)  # transformers hands a mask of four dimensions through
        mask.plan = plan
        kwargs |= {"attention_mask": mask, "position_ids": plan["positions"][None]}
        kwargs["input_ids"] = ids.reshape(-1)[plan["sources"]][None]
        kwargs["shift_labels"] = labels[:, 1:].reshape(-1)[plan["cells"]][None]
    return args, kwargs


def _keep_predicting(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """Hook after the backbone: only hidden states that predict a token of a completion go on to the head."""
    if plan := getattr(kwargs.get("attention_mask"), "plan", None):
        output.last_hidden_state = output.last_hidden_state.index_select(1, plan["predicting"])
    return output


def _unpack(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """Hook after the model: per-token results return to TRL's (2 pairs, width - 1)."""
    if plan := getattr(kwargs.get("attention_mask"), "plan", None):
        rows, width = plan["shape"]
        for name in RESULTS:
            if (x := getattr(output, name)) is not None:
                setattr(output, name, x.new_zeros(rows * width).index_copy(0, plan["cells"], x[0]).view(rows, width))
    return output


def _attention(
    plain: Callable[..., Any] | None, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **given: Any
) -> Any:
    """An attention function for transformers: packed where the mask carries a plan, else `plain` or the model's own."""
    if (plan := getattr(mask, "plan", None)) is None:
        return (plain or eager_attention(module))(module, query, key, value, mask, **given)
    scale = given.get("scaling") or query.size(-1) ** -0.5
    window, softcap = given.get("sliding_window"), given.get("softcap")
    output = attend(query, key, value, plan, scale=scale, window=window, softcap=softcap)
    return output.transpose(1, 2).contiguous(), None  # (1, T, heads, size)


AttentionInterface.register("shared_eager", partial(_attention, None))
AttentionMaskInterface.register("shared_eager", eager_mask)
_sdpa = partial(_attention, sdpa_attention_forward)


def _gpt_neo_attention(
    plain: Callable[..., Any], module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any = None
) -> Any:
    """GPT-Neo's attention, in float32 and unscaled: packed where the mask carries a plan, else `plain`."""
    if (plan := getattr(mask, "plan", None)) is None:
        return plain(query, key, value, mask)
    window = module.config.window_size if module.attention_type == "local" else None
    q, k, v = (x.to(torch.float32) for x in (query, key, value))
    return attend(q, k, v, plan, scale=1.0, window=window, softcap=None).to(value.dtype), None


def attend(
    query: Tensor, key: Tensor, value: Tensor, plan: Plan, *, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """Attention of a packed row: prompt and chosen causally, rejected over its prompt and itself.

    Args:
        query: Shape (1, heads, T, size).
        key: Shape (1, key heads, T, size).
        value: Shape (1, key heads, T, size).
        plan: The batch's plan.
        scale: Factor of the scores.
        window: Number of tokens that a token sees, itself included; None for all before it.
        softcap: Cap of the scores, or None.
    """
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and softcap is None:
        return attend_varlen(query, key, value, plan, scale=scale, window=window)
    grouped = query.size(1) // key.size(1)
    # Split, not sliced: the backward of a split is one concatenation, that of each slice a row of zeros.
    queries = torch.split(query, [n for p, c, r in plan["lengths"] for n in (p + c, r)], dim=2)
    keys, values = (torch.split(x, [n for each in plan["lengths"] for n in each], dim=2) for x in (key, value))
    sdpa = partial(F.scaled_dot_product_attention, scale=scale, enable_gqa=grouped > 1)
    outputs = []
    for segment, q in enumerate(queries):
        prompt, own = 3 * (segment // 2), 3 * (segment // 2) + 1 + segment % 2
        k, v = (torch.cat([x[prompt], x[own]], dim=2) for x in (keys, values))
        n, m = q.size(2), k.size(2)
        if softcap is not None:
            k, v = (repeat_kv(x, grouped) for x in (k, v))
            scores = softcap * torch.tanh(q @ k.transpose(2, 3) * scale / softcap) + _mask(q, m, plan, window)
            outputs.append(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v)
        elif n == m and m <= (window or m):
            outputs.append(sdpa(q, k, v, is_causal=True))
        elif n:
            outputs.append(sdpa(q, k, v, attn_mask=_mask(q, m, plan, window)))
    return torch.cat(outputs, dim=2)


def _mask(query: Tensor, keys: int, plan: Plan, window: int | None) -> Any:
    """0 where the queries, the last of `keys` tokens, may look, and -inf elsewhere. Shape (queries, keys)."""
    name = (query.size(2), keys, window, query.dtype)
    if name not in plan["masks"]:
        tokens = torch.arange(keys, device=query.device)
        back = tokens[keys - query.size(2) :, None] - tokens
        hidden = (back < 0) | (back >= (window or keys))
        plan["masks"][name] = torch.zeros_like(back, dtype=query.dtype).masked_fill_(hidden, float("-inf"))
    return plan["masks"][name]


def attend_varlen(query: Tensor, key: Tensor, value: Tensor, plan: Plan, *, scale: float, window: int | None) -> Tensor:
    """Result of `attend` by one call of FlashAttention, which aligns its causal mask with the end of a segment's keys.

    torch 2.11 has no argument `enable_gqa`, and takes grouped queries without it.
    """
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, heads, size)
    k, v = (x.index_select(0, plan["keys"]) for x in (k, v))
    segments = [segment for p, c, r in plan["lengths"] for segment in ((p + c, p + c), (r, p + r))]
    longest, before = map(max, zip(*segments, strict=True)), -1 if window is None else window - 1
    grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}
    output: Any = varlen_attn(q, k, v, *plan["ends"], *longest, scale=scale, window_size=(before, 0), **grouped)
    return torch.transpose(output, 0, 1)[None]
