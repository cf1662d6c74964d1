"""Measures how likely the reference model finds the completions of the pairs."""

import random
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import DatasetDict
from tqdm.auto import tqdm
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import add_fused_lm_head

from dpo_recipes.dataset_adapters.adapting import row_names
from dpo_recipes.models.likelihood import fused_outputs
from dpo_recipes.models.open import open_model
from dpo_recipes.models.pair_ids import encode_pairs
from dpo_recipes.preflight.tokens import SIDES, render_row

# Nats a token. An answer is far if its tokens surprise the model by this much more than the model's own tokens would at
# the same places, whose mean surprise is the entropy. Such an answer of 20 tokens is e**20 times less likely.
FAR = 1.0
_SAMPLE, _BATCH = 256, 8  # pairs


def measure(
    pairs: DatasetDict, name_or_path: str, tokenizer: Any, *, revision: str | None = None, seed: int = 0
) -> dict[str, Any]:
    """Measures how likely the reference model finds the completions of a sample of the training pairs.

    A rejected completion that the model would never write teaches little: making it less likely hardly changes the
    model's answers. The margin of its pair soon grows until the gradient, which is proportional to sigmoid(-margin),
    vanishes. Until then the pair also takes probability from other answers (Ren and Sutherland 2024, arXiv 2407.10490).

    Args:
        pairs: As `fit` returns them.
        name_or_path: Folder or Hub name of the reference model.
        tokenizer: The one that the pairs were measured with.
        revision: Revision of the model on the Hub.
        seed: Draws the sample.

    Returns:
        For `chosen` and `rejected` the quantiles of `logp_per_token` and of `surplus` (surprise minus entropy, nats a
        token) and the share of completions that are `far`; `agrees`, the share of pairs whose chosen completion the
        model already finds more likely; `rows`, the rows of the rejected completions that are farthest.
    """
    train = pairs["train"]
    rows = random.Random(seed).sample(range(len(train)), min(_SAMPLE, len(train)))
    ids = encode_pairs([render_row(pair, tokenizer) for pair in train.select(rows)], tokenizer)
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
    sides = {
        side: {"logp_per_token": _quantiles(own), "surplus": _quantiles(over), "far": float((over >= FAR).mean())}
        for side, own, over in zip(SIDES[1:], logps, surplus, strict=True)
    }
    agrees = float((logps[0] > logps[1]).mean())
    names = row_names(train)
    farthest = [names[rows[order[place]]] for place in np.argsort(-surplus[1])[:5]]
    return {"n": len(rows), "far_from": FAR, "agrees": agrees, "rows": farthest, **sides}


def _quantiles(values: Any) -> dict[str, float]:
    return {f"p{place}": float(np.percentile(values, place)) for place in (5, 50, 95)}
