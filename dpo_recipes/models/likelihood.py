"""Measures a tuned model against its start: preference accuracy by log-probs, and answers side by side."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from numpy.typing import NDArray
from peft import PeftModel
from scipy.special import expit
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextStreamer,
    Trainer,
)
from trl import DPOTrainer, RewardTrainer
from trl.trainer.utils import add_fused_lm_head, pad, use_adapter

from dpo_recipes.dataset_adapters import Drop
from dpo_recipes.errors import RecipeError, UnhealthyRunError
from dpo_recipes.estimates import Estimate, wilson
from dpo_recipes.models.rewards import Text, context_length


@dataclass
class PreferenceLogps:
    """Log-probs of the held-out pairs' completions, and their lengths. Each array has shape (pairs,)."""

    chosen: NDArray[np.float64]
    rejected: NDArray[np.float64]
    chosen_tokens: NDArray[np.float64]
    rejected_tokens: NDArray[np.float64]

    def __getitem__(self, pairs: NDArray[np.bool_]) -> "PreferenceLogps":
        """Those of some of the pairs."""
        return PreferenceLogps(*(getattr(self, entry.name)[pairs] for entry in fields(self)))

    def accuracy(self, *, per_token: bool = False) -> Estimate:
        """Share of pairs whose chosen completion has the higher log-prob, a tie counting one half."""
        chosen, rejected = self.chosen, self.rejected
        if per_token:
            chosen, rejected = chosen / self.chosen_tokens, rejected / self.rejected_tokens
        return share_ahead(chosen - rejected)

    def accuracy_against(self, start: "PreferenceLogps") -> Estimate:
        """Share of pairs with the higher implicit reward, beta log(policy / reference), on the chosen completion."""
        return share_ahead((self.chosen - start.chosen) - (self.rejected - start.rejected))


def share_ahead(margins: NDArray[np.float64]) -> Estimate:
    """The share of margins above 0, a tie counting one half."""
    return wilson(float((margins > 0).sum() + (margins == 0).sum() / 2), len(margins))


def sharded(trainer: Trainer) -> bool:
    """Returns whether FSDP or DeepSpeed may have split the model, so that no process holds all of it."""
    return bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)


@contextmanager
def reference_in_memory(trainer: Trainer) -> Iterator[Any]:
    """Yields the reference model that the trainer holds, or None where it holds none.

    With LoRA it is the policy without its LoRA adapter, or with TRL's copy "ref" of it.
    """
    policy = trainer.accelerator.unwrap_model(trainer.model)
    if trainer.ref_model is None and isinstance(policy, PeftModel):
        with use_adapter(policy, "ref" if "ref" in policy.peft_config else None):
            yield trainer.model_wrapped
    else:
        yield trainer.ref_model


@contextmanager
def reference_model(trainer: Trainer) -> Iterator[Any]:
    """Yields the model that the policy started from.

    It is the reference model in memory, or is read from disk again where there is none (`precompute_ref_log_probs`, a
    beta of 0) or one that moves (`sync_ref_model`).
    """
    with reference_in_memory(trainer) as reference:
        if reference is not None and not trainer.args.sync_ref_model:
            yield reference
            return
    policy = trainer.accelerator.unwrap_model(trainer.model)
    start = AutoModelForCausalLM.from_pretrained(policy.config.name_or_path, **(trainer.args.model_init_kwargs or {}))
    add_fused_lm_head(start, temperature=getattr(trainer.args, "temperature", 1.0))
    yield start.to(trainer.accelerator.device, policy.dtype)


def completion_logps(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Per-token log-probs of a batch of TRL's DPO data collator; 0 outside of completions. Shape (2 pairs, tokens - 1).

    Args:
        model: With TRL's fused head.
        batch: Its plan for shared prompts, if it has one, is left out.
    """
    others = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")
    inputs = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor) and name not in others}
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    logps: torch.Tensor = model(**inputs, labels=labels, fused_lm_head=True, use_cache=False).log_probs
    return logps[:, 1 - labels.size(1) :].float()  # prompt tuning puts its own tokens in front


def preference_logps(trainer: DPOTrainer, *, reference: bool = False) -> PreferenceLogps:
    """Log-probs of the evaluation pairs under the policy, or under the reference model it started from.

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
    """The scores of the evaluation pairs' chosen and rejected completions. Each has shape (pairs,).

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
    """What is measured of each evaluation pair, in their order. Shape (measures, pairs)."""
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


def calibration(margins: NDArray[np.float64], *, bins: int = 10) -> dict[str, Any]:
    """How far sigmoid(margin) is the probability that chosen is better (Bradley and Terry 1952).

    Of each pair the side with the higher score is the favourite, with the probability sigmoid(|margin|); it is right
    where it is the chosen one, and half right where the scores are equal.

    Args:
        margins: Score of chosen minus score of rejected. Shape (pairs,).
        bins: Of equal width over the favourite's probability, from 0.5 to 1.

    Returns:
        `log_loss` in nats and `brier` of sigmoid(margin); `expected_calibration_error`, the mean over pairs of how far
        their bin's share of right favourites is from its mean probability (Guo et al. 2017, eq. 3); and `reliability`,
        the bins that have pairs: `low`, `high`, `n`, `said` (mean probability), `right`.
    """
    said, right = expit(np.abs(margins)), np.where(margins == 0, 0.5, margins > 0)
    edges = np.linspace(0.5, 1, bins + 1)
    which = np.clip(np.digitize(said, edges) - 1, 0, bins - 1)
    table = [
        {
            "low": float(edges[each]),
            "high": float(edges[each + 1]),
            "n": int((which == each).sum()),
            "said": float(said[which == each].mean()),
            "right": float(right[which == each].mean()),
        }
        for each in np.unique(which)
    ]
    return {
        "log_loss": float(np.logaddexp(0, -margins).mean()),
        "brier": float(np.square(expit(-margins)).mean()),
        "expected_calibration_error": sum(row["n"] * abs(row["said"] - row["right"]) for row in table) / len(margins),
        "reliability": table,
    }


def generate(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Text], **options: Any
) -> list[dict[str, Any]]:
    """One answer to each prompt, in order; the options are those of `sample_tokens`.

    Returns:
        For each prompt `text` (special tokens removed; what goes on with plain text keeps its white space), `tokens`
        (their number) and `ended` (it gave its end token).
    """
    sampled = sample_tokens(model, tokenizer, prompts, **options)
    return [read_answer(model, tokenizer, *both) for both in zip(prompts, sampled, strict=True)]


def read_answer(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Text,
    sampled: tuple[list[int], list[int]],
) -> dict[str, Any]:
    """What `sample_tokens` gave for a prompt, as `generate` returns an answer."""
    before, tokens = sampled
    kept = tokens[:-1] if tokens and tokens[-1] in stop_tokens(model, tokenizer) else tokens
    if isinstance(prompt, str):  # decoded alone, SentencePiece's first token would lose its space
        whole, begun = tokenizer.batch_decode([before + kept, before], skip_special_tokens=True)
        text = whole[len(begun) :]
    else:
        text = tokenizer.decode(kept, skip_special_tokens=True).strip()
    return {"text": text, "tokens": len(kept), "ended": len(kept) < len(tokens)}


def stop_tokens(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: the tokenizer's EOS token and those of the model's generation settings."""
    more = model.generation_config.eos_token_id
    return [tokenizer.eos_token_id, *(more if isinstance(more, list) else [] if more is None else [more])]


def check_prompt(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, prompt: Text) -> None:
    """Nothing, if the model of that configuration can answer the prompt; else raises Drop with the reason.

    Raises:
        RecipeError: If the prompt is a conversation, and the tokenizer has no chat template.
    """
    if tokenizer.chat_template is None and not isinstance(prompt, str):
        raise RecipeError(
            f"The tokenizer of {tokenizer.name_or_path} has no chat template: it is no model that answers. Name "
            "another."
        )
    try:
        if isinstance(prompt, str):
            ids = tokenizer(prompt, verbose=False)["input_ids"]
        else:
            ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    except (TemplateError, TypeError, ValueError) as error:
        raise Drop("template_refuses") from error
    if len(ids) >= context_length(config):
        raise Drop("no_room")


@torch.no_grad()
def sample_tokens(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Text],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 16,
    streamer: TextStreamer | None = None,
) -> list[tuple[list[int], list[int]]]:
    """The tokens of each prompt and of one answer to it, up to its end token, in order.

    Both are empty where the prompt leaves no room for an answer in the model's context.

    Args:
        model: A causal language model; its mode (train or eval) is left as it was.
        tokenizer: Its tokenizer, for conversations with a chat template. Padding is done on the left here, whatever its
            own side is.
        prompts: Conversations that end in a user turn, or plain text to go on with.
        max_new_tokens: Where an answer is cut, if the model's context does not cut it before.
        temperature: 0 is greedy decoding. Sampling is from the whole distribution (no top-k, no top-p).
        seed: Of the sampling; the same seed, prompts and batch size give the same answers.
        batch_size: Prompts at a time. They are sorted by length, so that little is padded; of those that leave less
            room than `max_new_tokens` only equally long ones go together.
        streamer: Is given each token of the answer to a single prompt.
    """
    stops, context = stop_tokens(model, tokenizer), context_length(model.config)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        repetition_penalty=1.0,  # a model's own default may be another
        eos_token_id=stops,
        pad_token_id=tokenizer.pad_token_id,
        **(dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0) if temperature > 0 else {}),
    )
    is_text = any(isinstance(prompt, str) for prompt in prompts)  # it gets special tokens from the tokenizer
    texts = [
        prompt if is_text else tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        for prompt in prompts
    ]
    encoded = tokenizer(texts, add_special_tokens=is_text, verbose=False)["input_ids"]
    ids = [torch.tensor(row, dtype=torch.long) for row in encoded]
    order = sorted((row for row in range(len(texts)) if len(ids[row]) < context), key=lambda row: len(texts[row]))
    sampled: list[tuple[list[int], list[int]]] = [([], [])] * len(texts)
    was_training = model.training
    model.eval()
    with torch.random.fork_rng():  # the caller's random state is left alone
        torch.manual_seed(seed)
        batches = _alike(order, [len(row) for row in ids], most=batch_size, room=context - max_new_tokens)
        for rows in tqdm(batches, desc="Generating", leave=False, disable=streamer is not None):
            # Not by the tokenizer, which would keep that it pads, and be saved so.
            padded = pad([ids[row] for row in rows], tokenizer.pad_token_id, "left").to(model.device)
            mask = pad([torch.ones_like(ids[row]) for row in rows], 0, "left").to(model.device)
            width = padded.shape[1]
            config.max_new_tokens = min(max_new_tokens, context - width)
            output = model.generate(
                input_ids=padded,
                attention_mask=mask,
                generation_config=config,
                streamer=streamer,
            )
            for row, tokens in zip(rows, output.tolist(), strict=True):
                answer = tokens[width:]
                end = next((at for at, token in enumerate(answer, start=1) if token in stops), None)
                sampled[row] = tokens[width - len(ids[row]) : width], answer[:end]
    model.train(was_training)
    return sampled


def _alike(order: Sequence[int], lengths: Sequence[int], *, most: int, room: int) -> list[list[int]]:
    """The rows in batches; where one is longer than `room`, all are as long: it would cut a shorter one's answer."""
    batches: list[list[int]] = []
    for row in order:
        last = [lengths[other] for other in batches[-1]] if batches else []
        differ = max([lengths[row], *last]) > room and {lengths[row]} != {*last}
        if not last or len(last) == most or differ:
            batches.append([])
        batches[-1].append(row)
    return batches


@torch.no_grad()
def sampled_kl(trainer: Trainer, prompts: Sequence[Text], *, max_new_tokens: int) -> dict[str, Any]:
    """KL(policy || reference) of the answers, estimated by one that the policy samples to each prompt.

    The temperature is 1, or the one that an online trainer samples at, whose log-probs are those of that temperature.

    An answer counts with the sum over its tokens, the end token included, of log p_policy - log p_reference (Schulman
    2020, k1: unbiased). Where answers are cut it is the divergence of their first `max_new_tokens` tokens. Runs on one
    process, on a model that is not sharded.

    Returns:
        `nats` (the mean over prompts), `standard_error` (None for one prompt), `n` prompts, `tokens` sampled.
    """
    policy, tokenizer = trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class
    temperature = getattr(trainer.args, "temperature", 1.0)  # DPOConfig has none
    options = dict(max_new_tokens=max_new_tokens, temperature=temperature, seed=trainer.args.seed)
    sampled = [both for both in sample_tokens(policy, tokenizer, prompts, **options) if both[1]]
    ratios = answer_logps(policy, sampled)
    with reference_model(trainer) as reference:
        ratios -= answer_logps(trainer.accelerator.unwrap_model(reference), sampled)
    error = float(ratios.std(ddof=1) / len(ratios) ** 0.5) if len(ratios) > 1 else None
    tokens = sum(len(answer) for _, answer in sampled)
    return {"nats": float(ratios.mean()), "standard_error": error, "n": len(ratios), "tokens": tokens}


@torch.no_grad()
def answer_logps(model: Any, sampled: Sequence[tuple[list[int], list[int]]]) -> NDArray[np.float64]:
    """Log-prob of each answer after its prompt. Shape (answers,)."""
    logps = []
    was_training = model.training
    model.eval()
    for prompt, answer in sampled:  # one at a time: nothing is padded
        ids = torch.tensor([prompt + answer], device=model.device)
        labels = torch.tensor([[-100] * len(prompt) + answer], device=model.device)
        logps.append(model(input_ids=ids, labels=labels, fused_lm_head=True, use_cache=False).log_probs.double().sum())
    model.train(was_training)
    return torch.stack(logps).cpu().numpy()
