"""The room in which all are judged alike: the same prompts, token limit, sampling and seed, one judge."""

import hashlib
import json
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from peft import PeftModel
from transformers import AutoConfig, AutoTokenizer

from dpo_recipes.dataset_adapters import Drop
from dpo_recipes.errors import RecipeError
from dpo_recipes.files import read_json, write_json
from dpo_recipes.models.generation import check_prompt, read_answer, sample_tokens
from dpo_recipes.models.likelihood import answer_logps
from dpo_recipes.models.open import open_model, put_adapter, read_adapter
from dpo_recipes.models.pair_ids import encode_pairs
from dpo_recipes.models.rewards import Text
from dpo_recipes.preflight.tokens import render, template_options
from dpo_recipes.statistics import repetition
from dpo_recipes.terminal import say

SIDES = ("chosen", "rejected")
BATCH = 16  # answers, or completions of pairs, at a time
Scorer = Callable[[Sequence[Text], Sequence[str]], NDArray[np.float64]]


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled, from every model alike."""

    temperature: float
    max_new_tokens: int


@dataclass(frozen=True)
class Entry:
    """A model that is compared: a run's, or the start itself."""

    name: str  # of its records
    model: str  # folder, or hub name
    seed: int  # of the sampling: that of its training
    made_by: str  # a hash of the training


def answer_all(
    entries: Sequence[Entry],
    start: str,
    *,
    prompts: Sequence[Text],
    pairs: Dataset,
    sampling: Sampling,
    folder: Path,
    trust_remote_code: bool = False,
) -> dict[str, dict[str, Any]]:
    """Each model's answers to the prompts, and its log-probs of the held-out pairs.

    The start is loaded once, and each LoRA adapter put on it in turn. What a model gave is kept in `folder`: the same
    call goes on after the last one that is there.

    Args:
        entries: Models; those whose `model` is `start` are the start itself.
        start: What all of them were trained from.
        prompts: That `check_prompt` lets through.
        pairs: Held-out pairs.
        sampling: The same for all.
        folder: Where each model's answers are kept.
        trust_remote_code: Whether code that comes with a model may run.

    Returns:
        By name, `answers` (as `generate` returns them, with `policy` and `start`, their log-probs in nats under the
        model that sampled them and under the start, and `scored`, the tokens that these are of) and `chosen` and
        `rejected`, log-probs of the pairs' completions, with `chosen_tokens` and `rejected_tokens`.
    """
    asked = hashlib.sha256(json.dumps([start, prompts, pairs[:], asdict(sampling)]).encode()).hexdigest()
    keys = {entry.name: f"{asked[:16]}-{entry.seed}-{entry.made_by}" for entry in entries}
    found = {entry.name: read_json(folder / f"{entry.name}.json") for entry in entries}
    missing = [entry for entry in entries if found[entry.name].get("key") != keys[entry.name]]
    if not missing:
        return found
    trained = next((entry.model for entry in entries if read_adapter(entry.model)), None)
    # As it was trained on: its dtype, its 4 bits.
    base, tokenizer = open_model(trained or start, base=start, trust_remote_code=trust_remote_code)
    base = base.unload() if isinstance(base, PeftModel) else base
    texts = [
        render(row["prompt"], *(row[side] for side in SIDES), tokenizer=tokenizer, **template_options(row))
        for row in pairs
    ]
    ids = encode_pairs(texts, tokenizer, is_chat=not isinstance(pairs[0]["prompt"], str))
    lengths = {f"{side}_tokens": [len(getattr(row, side)) for row in ids] for side in SIDES}
    for number, entry in enumerate(missing, start=1):
        say(f"Answers of {entry.name}, {number} of {len(missing)}.")
        if entry.model == start:
            model = base
        elif read_adapter(entry.model):
            model = put_adapter(base, entry.model)
        else:
            model = open_model(entry.model, trust_remote_code=trust_remote_code)[0]
        completions = {side: [(row.prompt, getattr(row, side)) for row in ids] for side in SIDES}
        sides = {side: answer_logps(model, both, batch_size=BATCH).tolist() for side, both in completions.items()}
        if broken := sum(map(math.isnan, sides["chosen"] + sides["rejected"])):
            raise RecipeError(
                f"{entry.model} gives NaN for {broken} of {2 * len(ids)} held-out completions: its training has broken "
                "it, or its dtype overflows."
            )
        options = asdict(sampling) | {"seed": entry.seed, "batch_size": BATCH}
        sampled = sample_tokens(model, tokenizer, prompts, **options)
        measured: dict[str, Any] = dict(temperature=sampling.temperature, batch_size=BATCH)
        policy = answer_logps(model, sampled, **measured)
        base = model.unload() if isinstance(model, PeftModel) else base
        begun = policy if model is base else answer_logps(base, sampled, **measured)
        answers = [
            read_answer(base, tokenizer, prompt, both) | {"policy": own, "start": other, "scored": len(both[1])}
            for prompt, both, own, other in zip(prompts, sampled, policy.tolist(), begun.tolist(), strict=True)
        ]
        found[entry.name] = {"key": keys[entry.name], "answers": answers, **sides, **lengths}
        write_json(folder / f"{entry.name}.json", found[entry.name])
    return found


def exact_judge(judge: Callable[[Text, str], float]) -> Scorer:
    """The judge that a recipe file names, over many answers."""
    return lambda prompts, texts: np.array([float(judge(*both)) for both in zip(prompts, texts, strict=True)])


def keep_answerable(start: str, prompts: Iterable[Text], most: int) -> list[Text]:
    """The first `most` prompts that leave room for an answer and that the chat template takes."""
    config, tokenizer = AutoConfig.from_pretrained(start), AutoTokenizer.from_pretrained(start)
    kept: list[Text] = []
    for prompt in prompts:
        if len(kept) == most:
            break
        with suppress(Drop):
            check_prompt(config, tokenizer, prompt)
            kept.append(prompt)
    return kept


def draw_prompts(test: Dataset, *, start: str, most: int) -> list[Any]:
    """The different prompts of the test pairs, in an order drawn by seed 0, those that the start can answer."""
    order = random.Random(0).sample(range(len(test)), len(test))
    return keep_answerable(start, {str(prompt): prompt for prompt in test.select(order)["prompt"]}.values(), most)


def records(
    found: Mapping[str, Mapping[str, Any]],
    *,
    prompts: Sequence[Text],
    judge: Scorer | None,
    rewards: Mapping[str, Scorer],
) -> dict[str, list[dict[str, Any]]]:
    """By name, a record for each prompt: the answer, and every number that the results are made of.

    Args:
        found: As `answer_all` returns it.
        prompts: The same.
        judge: Scores all answers; None: nobody does.
        rewards: By name, the reward model that PPO optimised with the same seed, where there is one.
    """

    def scores(scorer: Scorer, names: Sequence[str]) -> dict[str, list[float]]:
        """All at once: a model is loaded once."""
        texts = [answer["text"] for name in names for answer in found[name]["answers"]]
        given = np.split(scorer([*prompts] * len(names), texts), len(names))
        return {name: of_name.tolist() for name, of_name in zip(names, given, strict=True)}

    none: Sequence[float | None] = [None] * len(prompts)
    judged = scores(judge, list(found)) if judge else dict.fromkeys(found, none)
    rewarded = dict.fromkeys(found, none)
    for scorer in set(rewards.values()):
        rewarded |= scores(scorer, [name for name in found if rewards.get(name) is scorer])
    kept: dict[str, list[dict[str, Any]]] = {}
    for name, of_name in found.items():
        rows = zip(of_name["answers"], judged[name], rewarded[name], strict=True)
        kept[name] = [
            {"prompt": number, **answer, "judge": good, "reward_model": reward}
            | {"kl": answer["policy"] - answer["start"], "repetition": repetition(answer["text"])}
            for number, (answer, good, reward) in enumerate(rows)
        ]
    return kept
