"""PPO's mathematics: pure functions of tensors with one row an answer and one column a token."""

from typing import Any

import torch
from torch import Tensor


def token_rewards(scores: Tensor, log_ratio: Tensor, mask: Tensor, *, beta: float) -> Tensor:
    """Reward of each token: -beta times its log-ratio, and at an answer's last token the score, too.

    Args:
        scores: Score of each answer. Shape (batch,).
        log_ratio: log p - log p_reference of each token, 0 where the mask is. Shape (batch, tokens).
        mask: 1 on completion tokens, 0 on padding. Shape (batch, tokens).
        beta: Weight of the KL penalty.
    """
    rewards = (-beta * log_ratio).to(scores.dtype)
    last = (mask.sum(dim=1).long() - 1).clamp(min=0)
    rewards[torch.arange(len(last), device=last.device), last] += scores
    return rewards


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and returns (Schulman et al. 2016, eq. 16), 0 where the mask is 0.

    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lam A_{t+1};  return_t = A_t + V_t.
    Masked tokens are no steps: the state after an answer's last token has the value 0.

    Args:
        rewards: Per-token reward, KL penalty included. Shape (batch, tokens).
        values: Value of the state before each token. Shape (batch, tokens).
        mask: 1 on completion tokens, 0 on padding. Shape (batch, tokens).
        gamma: Discount.
        lam: Decay of the weights of later temporal differences.

    Raises:
        ValueError: If the three shapes differ.
    """
    if not rewards.shape == values.shape == mask.shape:
        raise ValueError(f"Shapes differ: {[*rewards.shape]}, {[*values.shape]}, {[*mask.shape]}.")
    advantages = torch.zeros_like(rewards)
    advantage = next_value = rewards.new_zeros(len(rewards))  # (batch,)
    for t in reversed(range(rewards.shape[1])):
        here = mask[:, t] > 0
        difference = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(here, difference + gamma * lam * advantage, advantage)
        next_value = torch.where(here, values[:, t], next_value)
        advantages[:, t] = advantage
    return advantages * mask, (advantages + values) * mask


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float) -> Tensor:
    """Value loss: 0.5 mean over tokens of max((V - R)^2, (V_clipped - R)^2), as in the code of PPO's authors.

    V_clipped = V_old + clamp(V - V_old, -clip, clip).

    Args:
        values: Values by the critic that is trained. Shape (batch, tokens).
        old_values: Values by the critic of the rollout. Shape (batch, tokens).
        returns: Targets of the values. Shape (batch, tokens).
        mask: 1 on completion tokens. Shape (batch, tokens).
        clip: Largest distance from the old value that counts.
    """
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    error = torch.maximum((values - returns).square(), (clipped - returns).square())
    return 0.5 * (error * mask).sum() / mask.sum().clamp(min=1)


def without_padding(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch of a rollout without its last columns where all of its answers have ended.

    Prompts keep their padding on the left: models that count it (GPT-2) would see other positions without it.

    Args:
        batch: As GRPOTrainer buffers it: completions and their per-token tensors are padded on the right.
    """
    width = batch["completion_mask"].shape[1]
    used = max(1, int(batch["completion_mask"].sum(dim=1).max()))  # one column even if no answer counts
    per_token = {
        name: part[:, :used]
        for name, part in batch.items()
        if torch.is_tensor(part) and part.shape[1:] == (width,) and not name.startswith("prompt_")
    }
    return batch | per_token
