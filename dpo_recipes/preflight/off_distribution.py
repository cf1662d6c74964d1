"""Whether the model would write the completions that it is to be trained on."""

import random
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import DatasetDict
from tqdm.auto import tqdm
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import add_fused_lm_head

from dpo_recipes.models.likelihood import fused_outputs
from dpo_recipes.models.open import open_model
from dpo_recipes.models.pair_ids import encode_pairs
from dpo_recipes.preflight.tokens import SIDES, render, template_options

# Nats a token by which an answer surprises the model more than its own would at the same places: what it writes has a
# surprise of its entropy on average. An answer of 20 tokens is then e**20 times less likely than one of its own.
FAR = 1.0
_SAMPLE, _BATCH = 256, 8  # pairs


def measure(
    pairs: DatasetDict,
    name_or_path: str,
    tokenizer: Any,
    *,
    revision: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """How likely the reference model finds the completions of a sample of the training pairs.

    At the first update all pairs weigh alike. But to push down what is never written changes little of what is, and
    the margin of such a pair soon grows until its gradient, which goes with sigmoid(-margin), is gone; on the way it
    takes probability from other answers too (Ren and Sutherland 2024, arXiv 2407.10490).

    Args:
        pairs: As `fit` returns them.
        name_or_path: Of the reference model.
        tokenizer: The one that the pairs were measured with.
        revision: Of the model, on the hub.
        seed: Of the sample.

    Returns:
        For `chosen` and `rejected` the quantiles of `logp_per_token` and of `surplus` (surprise over entropy, nats a
        token) and the share `far` from what the model writes; `agrees`, the share of pairs of which it finds the
        chosen completion more likely already; `rows`, those of the rejected completions that are farthest.
    """
    train = pairs["train"]
    rows = random.Random(seed).sample(range(len(train)), min(_SAMPLE, len(train)))
    drawn = [([pair[side] for side in SIDES], template_options(pair)) for pair in train.select(rows)]
    ids = encode_pairs([render(*pair, tokenizer=tokenizer, **options) for pair, options in drawn], tokenizer)
    order = sorted(range(len(ids)), key=lambda place: sum(map(len, ids[place][:3])))  # so that little is padded
    examples = [{f"{side}_ids": getattr(ids[place], side) for side in SIDES} for place in order]
    device = PartialState().device
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model, _ = open_model(name_or_path, revision=revision or "main", dtype=dtype, device_map={"": device})
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    collate = DataCollatorForPreference(pad_token_id=tokenizer.eos_token_id)
    parts = []
    for start in tqdm(range(0, len(examples), _BATCH), desc="log-probs of the reference model"):
        batch = {name: part.to(device) for name, part in collate(examples[start : start + _BATCH]).items()}
        with torch.no_grad():
            output = fused_outputs(model, batch)
        tokens = batch["completion_mask"][:, 1:].sum(dim=1)
        means = torch.stack([output.log_probs.float().sum(dim=1), output.entropy.float().sum(dim=1)]) / tokens
        parts.append(torch.stack(means.chunk(2, dim=1)).cpu())  # (sides, 2, pairs)
    logps, entropies = torch.cat(parts, dim=2).numpy().transpose(1, 0, 2)  # of each (sides, pairs)
    surplus = -logps - entropies
    far = (surplus >= FAR).mean(axis=1).tolist()
    sides = {
        side: {"logp_per_token": _quantiles(logps[n]), "surplus": _quantiles(surplus[n]), "far": far[n]}
        for n, side in enumerate(SIDES[1:])
    }
    agrees = float((logps[0] > logps[1]).mean())
    farthest = [rows[order[place]] for place in np.argsort(-surplus[1])[:5]]
    return {"n": len(rows), "far_from": FAR, "agrees": agrees, "rows": farthest, **sides}


def _quantiles(values: Any) -> dict[str, float]:
    return {f"p{place}": float(np.percentile(values, place)) for place in (5, 50, 95)}
