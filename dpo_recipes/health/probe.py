"""Reads a trainer: the facts that the rules need, and a few answers of its policy."""

from collections.abc import Sequence
from functools import cache, partial
from statistics import fmean, pstdev
from typing import Any

from datasets import Dataset, DatasetDict
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, Trainer
from trl import DPOTrainer
from trl.data_utils import is_conversational

from dpo_recipes.health.rules import REPEATED, Facts
from dpo_recipes.models.generation import sample_tokens, stop_tokens
from dpo_recipes.models.likelihood import fused_logps, reference_model
from dpo_recipes.ppo.trainer import PPOTrainer
from dpo_recipes.preflight.signals import find_signals

_PROBED = 4  # held-out prompts


def read_facts(trainer: Trainer) -> Facts:
    """Facts about a built trainer's data, settings and loss."""
    args, rows, held_out = trainer.args, trainer.train_dataset, trainer.eval_dataset
    given: dict[str, Any] = {}
    if isinstance(trainer, DPOTrainer):
        plain = trainer.loss_types == ["sigmoid"] and not args.label_smoothing
        given = dict(beta=trainer.beta, starts_at_ln2=plain and args.disable_dropout)
        if isinstance(rows, Dataset) and "chosen_ids" in rows.column_names:  # images have none
            chosen, rejected = ([*map(len, _some(rows)[f"{side}_ids"])] for side in ("chosen", "rejected"))
            given |= {"chosen_tokens": fmean(chosen), "rejected_tokens": fmean(rejected)}
            given["rejected_spread"] = pstdev(rejected)
    if isinstance(trainer, PPOTrainer):
        given = dict(kl_of_answers=True, critic_warmup=args.critic_warmup_steps)

    return Facts(
        pairs_per_update=args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
        max_steps=trainer.state.max_steps,
        eval_pairs=len(held_out) if isinstance(held_out, Dataset) else 0,
        scaled=args.fp16,
        baselines=cache(partial(_baselines, rows)),
        **given,
    )


def _some(rows: Dataset) -> Dataset:
    """At most a thousand rows, evenly spread because data may be sorted."""
    return rows.select(range(0, len(rows), len(rows) // 1000 + 1))


def _baselines(rows: Any) -> dict[str, float]:
    """Accuracy on the pairs of rules that do not read the answers; empty if the rows are a stream or hold images."""
    columns = ["prompt", "chosen", "rejected"]
    if not isinstance(rows, Dataset) or not set(columns) <= set(rows.column_names):
        return {}
    part = _some(rows.select_columns(columns))
    if not all(isinstance(text, str) for column in columns for value in part[column] for text in _contents(value)):
        return {}
    found = find_signals(DatasetDict(train=part, test=part))["baselines"]
    found.pop("bag_of_words", None)  # the one that reads the answers
    return {name: max(rule["accuracy"], 1 - rule["accuracy"]) for name, rule in found.items()}


def _contents(text: Any) -> list[Any]:
    return [message["content"] for message in text] if isinstance(text, list) else [text]


def draw_prompts(trainer: Trainer) -> list[Any]:
    """A few held-out prompts, evenly spread; an empty list if the rows are a stream or no conversations."""
    rows = trainer.eval_dataset
    rows = next(iter(rows.values())) if isinstance(rows, dict) else rows
    if not (isinstance(rows, Dataset) and isinstance(trainer.processing_class, PreTrainedTokenizerBase)):
        return []
    drawn = rows.select(range(0, len(rows), max(1, len(rows) // _PROBED))[:_PROBED])
    return [row["prompt"] for row in drawn if is_conversational({"prompt": row.get("prompt")})]


def probe(trainer: Trainer, prompts: Sequence[Any], *, max_new_tokens: int) -> dict[str, float]:
    """Measures the policy's greedy answers; weights and random state stay as they are.

    Returns:
        `probe/answer_tokens` (the end token aside), `probe/ended` (share with an end token), `probe/repeated` (share of
        runs of four tokens that occurred earlier in the answer) and, where DPO's reference model is in memory,
        `probe/log_ratio` (log p_policy - log p_reference of the answers, nats a token).
    """
    policy, tokenizer = trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class
    stops = stop_tokens(policy, tokenizer)
    answered = sample_tokens(policy, tokenizer, prompts, max_new_tokens=max_new_tokens)
    if not (sampled := [both for both in answered if both[1]]):  # a prompt may leave no room
        return {}
    answers = [answer for _, answer in sampled]
    ended = [answer[-1] in stops for answer in answers]
    found = {
        "probe/answer_tokens": fmean(len(answer) - end for answer, end in zip(answers, ended, strict=True)),
        "probe/ended": fmean(ended),
        "probe/repeated": fmean(map(repeated, answers)),
    }
    if isinstance(trainer, DPOTrainer) and (
        isinstance(policy, PeftModel) or (trainer.ref_model is not None and not trainer.args.sync_ref_model)
    ):
        nats = fused_logps(policy, sampled).sum()
        with reference_model(trainer) as reference:
            nats -= fused_logps(trainer.accelerator.unwrap_model(reference), sampled).sum()
        found["probe/log_ratio"] = float(nats) / sum(map(len, answers))
    return found


def repeated(answer: Sequence[int]) -> float:
    """Share of an answer's runs of four tokens that occurred earlier in it."""
    runs = [tuple(answer[start : start + REPEATED]) for start in range(len(answer) - REPEATED + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0
