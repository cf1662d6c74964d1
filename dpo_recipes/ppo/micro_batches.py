"""Divides the answers of an update into micro-batches that fit into a number of tokens, and puts the results together.

An update's answers come in one batch, as GRPOTrainer and RLOOTrainer buffer it: prompts are padded on the left, answers
on the right. Each micro-batch has its forward and backward pass; loss, gradients and metrics are the whole update's.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import ProcessorMixin

from dpo_recipes.errors import RecipeError
from dpo_recipes.ppo.math import without_padding
from dpo_recipes.trl_patches import unlogged


class Shares(NamedTuple):
    """A micro-batch's shares of an update: of its answers, and of the tokens of its answers."""

    answers: float = 1.0
    tokens: float = 1.0


def take_budget(args: Any) -> int | None:
    """The token budget that `parse_recipe` left in a config, whose batches become whole updates; None without one."""
    budget: Any = getattr(args, "tokens_per_step", None)
    if not budget:
        return None
    if budget == "auto":
        raise RecipeError("tokens_per_step=auto needs prepare_prompts, which finds the number. Give a number.")
    if args.steps_per_generation % args.gradient_accumulation_steps:
        raise RecipeError("tokens_per_step divides whole updates: make a rollout a multiple of an update's answers.")
    args.per_device_train_batch_size *= args.gradient_accumulation_steps
    args.steps_per_generation //= args.gradient_accumulation_steps
    args.gradient_accumulation_steps = 1
    return int(budget)


def refuse_whole(trainer: Any) -> None:
    """Raises RecipeError if the loss of a trainer with a budget is no weighted mean over micro-batches."""
    args = trainer.args
    bonus, by_tokens = getattr(args, "entropy_coef", 0), getattr(args, "loss_type", "") == "bnpo"
    reasons = {
        "weights that are divided among processes": trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled,
        "images": isinstance(trainer.processing_class, ProcessorMixin),
        "the auxiliary loss of a mixture of experts, which a whole batch has": trainer.aux_loss_enabled,
        "top_entropy_quantile, a quantile of the whole batch": getattr(args, "top_entropy_quantile", 1.0) < 1,
        "use_adaptive_entropy, which counts batches": getattr(args, "use_adaptive_entropy", False),
        "entropy_coef, a mean over tokens, with another loss_type than bnpo": bonus and not by_tokens,
    }
    if reason := next((reason for reason, holds in reasons.items() if holds), None):
        raise RecipeError(
            f"tokens_per_step does not go with: {reason}. Give --per_device_train_batch_size instead, the answers that "
            "go through the model at a time."
        )


def divide_answers(lengths: Sequence[tuple[int, int]], budget: int) -> list[list[int]]:
    """Indices of padded answers, in micro-batches of similar numbers of tokens that fit into the budget.

    An answer that is longer than the budget is a micro-batch of its own.

    Args:
        lengths: Tokens of each prompt and of its answer, each padded to the longest of the micro-batch.
        budget: Most tokens of a micro-batch, padding included.
    """
    longest_first = sorted(range(len(lengths)), key=lambda row: -sum(lengths[row]))

    def fill(most: int) -> list[list[int]]:
        parts: list[list[int]] = []
        widths = (0, 0)
        for row in longest_first:
            widths = (max(widths[0], lengths[row][0]), max(widths[1], lengths[row][1]))
            if not parts or (len(parts[-1]) + 1) * sum(widths) > most:
                parts.append([])
                widths = lengths[row]
            parts[-1].append(row)
        return parts

    fewest = len(fill(budget))
    return fill(bisect_left(range(budget), True, key=lambda most: len(fill(most)) <= fewest))


def parts_of(trainer: Any, mask: Tensor, kept: int) -> list[tuple[Tensor, slice]]:
    """Rows and columns of prompts with answers that go through the model at a time, without their common padding.

    Columns on the left are left out where positions are relative to one another (rotary embeddings) alone.

    Args:
        trainer: With `tokens_per_step`; without it a part is `per_device_train_batch_size` whole rows.
        mask: 1 on tokens, 0 on padding. Shape (answers, prompt + completion).
        kept: Columns of the completions.
    """
    rows, width = torch.arange(len(mask), device=mask.device), mask.shape[1]
    if not trainer.tokens_per_step:
        return [(each, slice(0, width)) for each in torch.split(rows, trainer.args.per_device_train_batch_size)]
    prompt, parts = width - kept, []
    relative = all(_has_relative_positions(each.config) for each in trainer.model.modules() if hasattr(each, "config"))
    left = mask[:, :prompt].sum(dim=1).clamp(min=1) if relative else torch.full_like(mask[:, 0], prompt)
    lengths = torch.stack([left, mask[:, prompt:].sum(dim=1).clamp(min=1)], dim=1).tolist()
    for part in divide_answers(lengths, trainer.tokens_per_step):
        before, after = (max(lengths[row][side] for row in part) for side in (0, 1))
        parts.append((rows[part], slice(prompt - before, prompt + after)))
    return parts


def _has_relative_positions(config: Any) -> bool:
    """Says if a model computes the same without padding on the left, wherever its tokens are."""
    rope = str(getattr(config, "rope_parameters", None) or "dynamic")
    others = {*(getattr(config, "layer_types", None) or ())} - {"full_attention", "sliding_attention"}
    return not ("dynamic" in rope or "longrope" in rope or others)


def divided_logps(
    trainer: Any,
    compute: Callable[..., Any],
    model: Any,
    ids: Tensor,
    mask: Tensor,
    kept: int,
    *args: Any,
    **given: Any,
) -> Any:
    """Results of TRL's method for log-probs. Without gradients its batch is divided as in training.

    Args:
        trainer: With `tokens_per_step`.
        compute: TRL's own method.
        model: The policy, the reference model, or a function in their place, which is called with the whole batch.
        ids: Prompts with answers. Shape (answers, prompt + completion).
        mask: 1 on tokens, 0 on padding. Shape (answers, prompt + completion).
        kept: Columns of the completions.
        args: Other arguments of the method by position.
        given: Other arguments of the method by name.
    """
    whole = torch.is_grad_enabled() or not isinstance(model, nn.Module) or given.get("compute_entropy")
    if whole or not trainer.tokens_per_step:
        return compute(model, ids, mask, kept, *args, **given)
    logps = torch.zeros(len(ids), kept, device=ids.device)
    for rows, columns in parts_of(trainer, mask, kept):
        after = columns.stop - ids.shape[1] + kept
        part, _, _ = compute(model, ids[rows, columns], mask[rows, columns], after)
        logps = logps.to(part.dtype)
        logps[rows, :after] = part
    return logps, None, None


def divided_loss(
    trainer: Any, model: Any, inputs: dict[str, Any], loss_of: Callable[[Any, dict[str, Any], Shares], Tensor]
) -> Tensor:
    """Loss of an update in micro-batches; all but the last one's gradients are computed here.

    The metrics are logged once, from the results of all micro-batches.

    Args:
        trainer: With `tokens_per_step`.
        model: The policy, perhaps wrapped.
        inputs: The answers of an update.
        loss_of: The loss of answers, given the model, the answers, and their shares of the update.
    """
    inputs = without_padding(inputs)
    completions = inputs["completion_mask"]
    mask, kept = torch.cat([inputs["prompt_mask"], completions], dim=1), completions.shape[1]
    tokens, answers = max(1, int(completions.sum())), len(mask)
    replay, total = _Replay(answers, kept), torch.zeros((), device=mask.device)
    parts = parts_of(trainer, mask, kept)
    for number, (rows, columns) in enumerate(parts, start=1):
        part = _select(inputs, rows, columns, answers)
        shares = Shares(len(rows) / answers, int(part["completion_mask"].sum()) / tokens)
        early = torch.is_grad_enabled() and number < len(parts)
        with unlogged(trainer), trainer.accelerator.no_sync(model) if early else nullcontext():
            loss = loss_of(replay.recorder(model, rows, part["completion_mask"].shape[1]), part, shares)
            if early:
                trainer.accelerator.backward(loss)
                loss = loss.detach()
        total = total + loss
    with torch.no_grad():
        loss_of(replay, inputs, Shares())
    return total


def _select(inputs: dict[str, Any], rows: Tensor, columns: slice, answers: int) -> dict[str, Any]:
    """The rows of an update's tensors, without the columns where all of them are padding."""
    part = {
        name: value[rows] if torch.is_tensor(value) and value.shape[:1] == (answers,) else value
        for name, value in inputs.items()
    }
    part |= {name: part[name][:, columns.start :] for name in ("prompt_ids", "prompt_mask")}
    return without_padding(part)


class _Replay:
    """Per-token results of all micro-batches, in place of a call of the model with the whole update."""

    def __init__(self, answers: int, kept: int) -> None:
        self.answers, self.kept = answers, kept
        self.merged: dict[str, Tensor] = {}

    def recorder(self, model: Any, rows: Tensor, kept: int) -> Callable[..., Any]:
        """The model, as a function that also keeps the results for the completions of these rows."""

        def call(**tokens: Any) -> Any:
            output = model(**tokens)
            for name, before in (("log_probs", 0), ("entropy", 0), ("state_values", 1)):
                if (x := getattr(output, name, None)) is not None:
                    x = x.detach()[:, -kept - before :]
                    if name not in self.merged:
                        self.merged[name] = x.new_zeros(self.answers, self.kept + before)
                    self.merged[name][rows, : kept + before] = x
            return output

        return call

    def __call__(self, **tokens: Any) -> SimpleNamespace:
        """The results for the completions."""
        return SimpleNamespace(**self.merged)
