"""Divides a batch of pairs into micro-batches that fit into a number of tokens, and puts their results together again.

The batch is TRL's: rows 0 to n - 1 are the chosen completions with their prompts, rows n to 2n - 1 the rejected ones.
"""

import math
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from trl import DPOTrainer

from dpo_recipes.shared_prefix.packing import COLLATORS, PLAN, RESULTS, lengths_of, plan_pairs

NOT_A_MEAN = {"aot", "aot_unpaired"}
"""Losses that sort the log-ratios of a whole batch. TRL's others are means over pairs, and sft one over tokens."""


def divide(tokens: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of packed pairs, in micro-batches of similar numbers of tokens that fit into the budget.

    The longest pair comes first, and each pair joins the smallest micro-batch. A pair that is longer than the budget
    is a micro-batch of its own.

    Args:
        tokens: p + c + r of each pair.
        budget: Most tokens of a micro-batch.
    """
    longest_first = sorted(range(len(tokens)), key=lambda pair: -tokens[pair])
    alone = [[pair] for pair in longest_first if tokens[pair] > budget]
    others = longest_first[len(alone) :]
    for number in range(math.ceil(sum(tokens[pair] for pair in others) / budget), len(others) + 1):
        parts: list[list[int]] = [[] for _ in range(number)]
        sizes = [0] * number
        for pair in others:
            smallest = sizes.index(min(sizes))
            parts[smallest].append(pair)
            sizes[smallest] += tokens[pair]
        if max(sizes, default=0) <= budget:
            break
    return [*alone, *map(sorted, parts)]


def divide_padded(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of padded pairs, in micro-batches of similar lengths that fit into the budget.

    Args:
        lengths: Tokens of the longer sequence of each pair.
        budget: Most tokens of a micro-batch, padding included: twice the pairs times the longest.
    """
    parts: list[list[int]] = []
    for pair in sorted(range(len(lengths)), key=lambda pair: -lengths[pair]):
        if not parts or 2 * lengths[parts[-1][0]] * (len(parts[-1]) + 1) > budget:
            parts.append([])
        parts[-1].append(pair)
    return parts


def why_whole(trainer: DPOTrainer) -> str | None:
    """Reason why a trainer's batches cannot be divided, or None."""
    losses = NOT_A_MEAN.intersection(trainer.loss_types)
    reasons = {
        # Their weights are gathered in every forward pass, and processes may have different numbers of these.
        "weights that are divided among processes": trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled,
        "a data collator other than TRL's for text": type(trainer.data_collator) not in COLLATORS,
        "the auxiliary loss of a mixture of experts, which a whole batch has": trainer.aux_loss_enabled,
        # They take two forward passes.
        f"dropout and the loss {' '.join(losses)}": losses and not trainer.args.disable_dropout,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


class RandomState:
    """The state of torch's random numbers, on the host and on the current card."""

    def __init__(self) -> None:
        self.host, self.card = torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None

    def restore(self) -> None:
        """Goes back to the state, and gives the memory of freed tensors back to the card."""
        torch.set_rng_state(self.host)
        if self.card is not None:
            torch.cuda.set_rng_state(self.card)
            torch.cuda.empty_cache()


class Division:
    """A padded batch in micro-batches.

    Args:
        batch: The whole batch, with its plan if prompts are shared.
        budget: Most tokens of a micro-batch; None or 0 leaves the batch whole.
        share: As in `plan_pairs`.

    Attributes:
        parts: The pairs of each micro-batch.
        results: Per-token results of the model for the micro-batches that have run, with their rows in the batch.
        gradient: Gradient of the batch's loss by the log-probs, where the loss is no sum over micro-batches.
    """

    def __init__(self, batch: dict[str, Any], budget: int | None, *, share: bool) -> None:
        self.batch, self.budget, self.share = batch, budget, share
        self.results: list[tuple[Tensor, dict[str, Tensor]]] = []
        self.gradient: Tensor | None = None
        self.pairs = len(batch["input_ids"]) // 2
        self.parts = [list(range(self.pairs))]
        if budget:
            self.lengths = lengths_of(batch)
            packed = [p + c + r + (0 if share else p) for p, c, r in self.lengths]
            self.parts = divide(packed, budget) if PLAN in batch else self._padded_parts(budget)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Each micro-batch, cut to its own longest sequence and with a plan of its own."""
        for pairs in self.parts:
            yield self._select(pairs) if self.budget else self.batch

    def _padded_parts(self, budget: int) -> list[list[int]]:
        return divide_padded([p + max(c, r) for p, c, r in self.lengths], budget)

    def sample(self) -> dict[str, Any]:
        """As many of the pairs as fit into the budget with their padding, or the whole batch without a budget."""
        return self._select(max(self._padded_parts(self.budget), key=len)) if self.budget else self.batch

    def _select(self, pairs: list[int]) -> dict[str, Any]:
        rows, ids = self._rows(pairs), self.batch["input_ids"]
        lengths = [self.lengths[pair] for pair in pairs]
        width = max(p + max(c, r) for p, c, r in lengths)
        part: dict[str, Any] = {}
        for name, value in self.batch.items():
            if name == PLAN:
                plan = plan_pairs(lengths, width, share=self.share)
                part |= {name: plan.to(ids.device)} if len(plan["predicting"]) else {}
            else:  # of both completions' tokens, or of pairs: reference log-probs
                part[name] = value[rows, :width] if value.shape == ids.shape else value[rows[: len(pairs)]]
        return part

    def _rows(self, pairs: list[int]) -> Tensor:
        """Rows of the pairs in the whole batch: the chosen ones, then the rejected ones."""
        chosen = torch.tensor(pairs, device=self.batch["input_ids"].device)
        return torch.cat([chosen, chosen + self.pairs])

    def shares(self, pairs: list[int]) -> tuple[float, float]:
        """A micro-batch's shares of the batch: of its pairs, and of the tokens that the sft loss is a mean over."""
        if self.gradient is not None:
            return 1.0, 1.0
        chosen = [c - (p == 0) for p, c, _ in self.lengths]  # nothing predicts the first token of a sequence
        return len(pairs) / self.pairs, sum(chosen[pair] for pair in pairs) / max(1, sum(chosen))

    def run(self, model: Any, *, detach: bool, **inputs: Any) -> Any:
        """Calls the model with the next micro-batch, and keeps its results."""
        output, width = model(**inputs), inputs["labels"].size(1) - 1  # without tokens that PEFT puts before a prompt
        results = {name: x[:, -width:] for name in RESULTS if (x := getattr(output, name, None)) is not None}
        self.logps = results["log_probs"]
        if detach:
            results = {name: x.detach() for name, x in results.items()}
        self.results.append((self._rows(self.parts[len(self.results)]), results))
        return output

    def merged(self) -> SimpleNamespace:
        """The per-token results of the whole batch, as one call of the model would have returned them."""
        shape = (2 * self.pairs, self.batch["input_ids"].size(1) - 1)
        merged = {name: first.new_zeros(shape) for name, first in self.results[0][1].items()}
        for rows, results in self.results:
            for name, x in results.items():
                merged[name][rows, : x.size(1)] = x
        return SimpleNamespace(**merged)

    def replay(self, model: Any = None, **inputs: Any) -> Any:
        """The results of the micro-batches in place of a call with the whole batch. Logits come from the model."""
        return self.merged() if inputs.get("fused_lm_head") else model(**inputs)

    def share_of_gradient(self) -> Tensor:
        """A number whose gradient is the last micro-batch's share of the gradient of the whole batch."""
        rows, _ = self.results[-1]
        assert self.gradient is not None
        return torch.sum(self.logps * self.gradient[rows, : self.logps.size(1)])

    def in_order(self, values: Sequence[Tensor]) -> Tensor:
        """Values of all pairs, given by micro-batch. Shape (..., pairs)."""
        order = torch.tensor([pair for part in self.parts for pair in part])
        return torch.cat([*values], dim=-1)[..., order.argsort().to(values[0].device)]
