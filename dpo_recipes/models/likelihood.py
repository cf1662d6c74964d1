"""Asks models for the log-probs of completions: accuracy on pairs, KL of sampled answers."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, Trainer
from trl import DPOTrainer, RewardTrainer
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head, use_adapter

from dpo_recipes.errors import UnhealthyRunError
from dpo_recipes.estimates import Estimate, wilson
from dpo_recipes.models.generation import Sampled, pad_left, sample_tokens
from dpo_recipes.models.open import evaluating, identify, load_full
from dpo_recipes.models.rewards import Text


def answer_logps(
    model: Any, sequences: Sequence[Sampled], *, temperature: float = 1.0, batch_size: int = 1
) -> NDArray[np.float64]:
    """Log-probs in nats of completions after their prompts, as sampled at a temperature. Shape (completions,).

    Args:
        model: A causal language model; its mode (train or eval) stays as it was.
        sequences: Token ids of prompts and completions.
        temperature: 0 counts as 1: greedy decoding has no log-probs.
        batch_size: Completions at a time, sorted by length, so that little is padded. Their logits are in memory.
    """
    order = sorted(range(len(sequences)), key=lambda row: sum(map(len, sequences[row])))
    found = np.zeros(len(order))
    with evaluating(model):
        for start in tqdm(range(0, len(order), batch_size), desc="Log-probs", leave=False):
            places = order[start : start + batch_size]
            rows = [sequences[place] for place in places]
            ids, mask = pad_left([prompt + completion for prompt, completion in rows], 0, model.device)
            labels, _ = pad_left([completion for _, completion in rows], -100, model.device)  # (rows, longest)
            longest = labels.size(1)
            padding = dict(attention_mask=mask, position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0))
            padding = {} if mask.all() else padding  # not every model takes position_ids
            output = model(input_ids=ids, use_cache=False, logits_to_keep=longest + 1, **padding)
            logits = output.logits[:, -longest - 1 : -1].float() / (temperature or 1.0)  # each predicts the next token
            losses = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
            found[places] = -losses.double().sum(dim=1).cpu().numpy()
    return found


def fused_logps(model: Any, sequences: Sequence[Sampled]) -> NDArray[np.float64]:
    """Log-probs of completions in nats, at the temperature of TRL's fused head. Shape (completions,).

    That head makes its logits in float32 from 16-bit hidden states too, so that the difference of two models is no
    rounding; and it keeps none of them.
    """
    found = []
    with evaluating(model):
        for prompt, completion in sequences:  # one at a time: nothing is padded
            ids = torch.tensor([prompt + completion], device=model.device)
            labels = torch.tensor([[-100] * len(prompt) + completion], device=model.device)
            output = model(input_ids=ids, labels=labels, fused_lm_head=True, use_cache=False)
            found.append(output.log_probs.double().sum())
    return torch.stack(found).cpu().numpy()


def completion_logps(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Per-token log-probs of a batch of TRL's DPO data collator; 0 outside of completions. Shape (2 pairs, tokens - 1).

    Args:
        model: A model with TRL's fused head.
        batch: Its plan for shared prompts, if it has one, is left out.
    """
    logps: torch.Tensor = fused_outputs(model, batch).log_probs
    return logps[:, 1 - batch["input_ids"].size(1) :].float()  # prompt tuning puts its own tokens in front


def fused_outputs(model: Any, batch: dict[str, Any]) -> FusedCausalLMOutput:
    """Per-token fields of TRL's fused head for a batch of TRL's DPO data collator; 0 outside of completions."""
    others = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")
    inputs = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor) and name not in others}
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    return model(**inputs, labels=labels, fused_lm_head=True, use_cache=False)


@dataclass
class PreferenceLogps:
    """Log-probs of the held-out pairs' completions, and their lengths. Each array has shape (pairs,)."""

    chosen: NDArray[np.float64]
    rejected: NDArray[np.float64]
    chosen_tokens: NDArray[np.float64]
    rejected_tokens: NDArray[np.float64]

    def __getitem__(self, pairs: NDArray[np.bool_]) -> "PreferenceLogps":
        """Log-probs and lengths of some of the pairs."""
        return PreferenceLogps(*(getattr(self, entry.name)[pairs] for entry in fields(self)))

    def accuracy(self, *, per_token: bool = False) -> Estimate:
        """Share of pairs whose chosen completion has the higher log-prob, a tie counting one half."""
        tokens = (self.chosen_tokens, self.rejected_tokens) if per_token else (1, 1)
        return share_ahead(self.chosen / tokens[0] - self.rejected / tokens[1])

    def accuracy_against(self, reference: "PreferenceLogps") -> Estimate:
        """Share of pairs with the higher implicit reward, beta log(policy / reference), on the chosen completion."""
        return share_ahead((self.chosen - reference.chosen) - (self.rejected - reference.rejected))


def share_ahead(margins: NDArray[np.float64]) -> Estimate:
    """Share of margins above 0, a tie counting one half."""
    return wilson(float((margins > 0).sum() + (margins == 0).sum() / 2), len(margins))


def preference_logps(trainer: DPOTrainer, *, reference: bool = False) -> PreferenceLogps:
    """Log-probs of the evaluation pairs under the policy, or under the reference model.

    Runs on all processes; each gets the result for all pairs.
    """

    def logps_and_tokens(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        logps = completion_logps(model, batch).sum(dim=1)
        tokens = batch["completion_mask"][:, 1:].sum(dim=1)
        return torch.stack([*logps.chunk(2), *tokens.float().chunk(2)], dim=1)  # (pairs, 4)

    name = "Log-probs before" if reference else "Log-probs after"
    with reference_model(trainer) if reference else nullcontext(trainer.model_wrapped) as model:
        return PreferenceLogps(*_over_held_out_pairs(trainer, model, logps_and_tokens, name))


def pair_scores(trainer: RewardTrainer) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Scores of the evaluation pairs' chosen and rejected completions. Each has shape (pairs,).

    Runs on all processes; each gets the result for all pairs.
    """

    def scores(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        return torch.stack(model(**inputs, use_cache=False).logits.float().squeeze(-1).chunk(2), dim=1)  # (pairs, 2)

    chosen, rejected = _over_held_out_pairs(trainer, trainer.model_wrapped, scores, "Scores")
    return chosen, rejected


def _over_held_out_pairs(
    trainer: Trainer, model: Any, measured: Callable[[Any, dict[str, torch.Tensor]], torch.Tensor], name: str
) -> NDArray[np.float64]:
    """Measures each evaluation pair, in order. Shape (measures, pairs)."""
    # All of the pairs, whatever the trainer's own loader is told to do.
    pairs = DataLoader(
        trainer.eval_dataset, batch_size=trainer.args.per_device_eval_batch_size, collate_fn=trainer.data_collator
    )
    loader = trainer.accelerator.prepare(pairs)
    rows = []
    model.eval()
    with torch.no_grad(), trainer.accelerator.autocast():
        for batch in tqdm(loader, desc=name, disable=not trainer.is_world_process_zero()):
            rows.append(trainer.accelerator.gather_for_metrics(measured(model, batch)).cpu())
    stacked: NDArray[np.float64] = torch.cat(rows).double().numpy().T
    if np.isnan(stacked).any(axis=0).all():
        raise UnhealthyRunError(f"{name}: NaN for every held-out pair. The model is broken, or its dtype overflows.")
    return stacked


@torch.no_grad()
def sampled_kl(trainer: Trainer, prompts: Sequence[Text], *, max_new_tokens: int) -> dict[str, Any]:
    """KL(policy || reference) of answers, estimated from one answer of the policy to each prompt.

    An answer counts with the sum over its tokens, the end token included, of log p_policy - log p_reference (Schulman
    2020, k1: unbiased). If answers are cut it is the divergence of their first `max_new_tokens` tokens. Sampling and
    log-probs are at temperature 1, or at that of an online trainer. Runs on one process, on a model that is not
    sharded.

    Returns:
        `nats` (the mean over prompts), `standard_error` (None for one prompt), `n` prompts, `tokens` sampled.
    """
    policy, tokenizer = trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class
    online = not isinstance(trainer, DPOTrainer)  # whose head has no temperature, also where it samples in rounds
    temperature = getattr(trainer.args, "temperature", 1.0) if online else 1.0
    options = dict(max_new_tokens=max_new_tokens, temperature=temperature, seed=trainer.args.seed)
    sampled = [both for both in sample_tokens(policy, tokenizer, prompts, **options) if both[1]]
    ratios = fused_logps(policy, sampled)
    with reference_model(trainer) as reference:
        ratios -= fused_logps(trainer.accelerator.unwrap_model(reference), sampled)
    error = float(ratios.std(ddof=1) / len(ratios) ** 0.5) if len(ratios) > 1 else None
    tokens = sum(len(answer) for _, answer in sampled)
    return {"nats": float(ratios.mean()), "standard_error": error, "n": len(ratios), "tokens": tokens}


@contextmanager
def reference_model(trainer: Trainer) -> Iterator[Any]:
    """Yields the initial model of the policy.

    It is the reference model in memory. If there is none (`precompute_ref_log_probs`, a beta of 0) or it moves
    (`sync_ref_model`), the initial model is read from disk again.
    """
    with reference_in_memory(trainer) as reference:
        if reference is not None and not trainer.args.sync_ref_model:
            yield reference
            return
    policy = trainer.accelerator.unwrap_model(trainer.model)
    # By default TRL's loader spreads a model over all cards, which `to` cannot undo.
    options = {"device_map": None, **(trainer.args.model_init_kwargs or {})}
    initial = load_full(identify(policy.config.name_or_path, **options), AutoModelForCausalLM, **options)
    add_fused_lm_head(initial, temperature=getattr(trainer.args, "temperature", 1.0))
    yield initial.to(trainer.accelerator.device, policy.dtype)


@contextmanager
def reference_in_memory(trainer: Trainer) -> Iterator[Any]:
    """Yields the reference model that the trainer holds, or None if it holds none.

    With LoRA it is the policy without its LoRA adapter, or with TRL's copy "ref" of it.
    """
    policy = trainer.accelerator.unwrap_model(trainer.model)
    if trainer.ref_model is None and isinstance(policy, PeftModel):
        with use_adapter(policy, "ref" if "ref" in policy.peft_config else None):
            yield trainer.model_wrapped
    else:
        yield trainer.ref_model


def sharded(trainer: Trainer) -> bool:
    """Returns whether FSDP or DeepSpeed may have split the model, so that no process holds all of it."""
    return bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)
