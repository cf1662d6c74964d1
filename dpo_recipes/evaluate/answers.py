"""Answers and log-probs of several models under equal conditions: prompts, token limit, sampling, seed and judge."""

import hashlib
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from peft import PeftModel
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dpo_recipes.dataset_adapters import Drop
from dpo_recipes.errors import RecipeError
from dpo_recipes.files import read_json, write_json
from dpo_recipes.models.generation import check_prompt, read_answer, sample_tokens
from dpo_recipes.models.likelihood import answer_logps
from dpo_recipes.models.open import open_model, put_adapter, read_adapter
from dpo_recipes.models.pair_ids import PairIds, encode_pairs
from dpo_recipes.models.rewards import Text
from dpo_recipes.preflight.tokens import render_row
from dpo_recipes.terminal import say

BATCH = 16  # answers, or completions of pairs, at a time
Scorer = Callable[[Sequence[Text], Sequence[str]], NDArray[np.float64]]


@dataclass(frozen=True)
class Entry:
    """A model that is compared: a run's, or the reference model itself."""

    name: str  # of its records
    model: str  # folder, or Hub name
    seed: int  # of the sampling: the seed of its training
    made_by: str  # a hash of the training


def draw_prompts(test: Dataset, *, start: str, most: int) -> list[Text]:
    """At most `most` different prompts of the test pairs, in an order drawn by seed 0.

    Prompts that leave no room for an answer of the model `start`, or that its chat template refuses, are left out.

    Raises:
        RecipeError: If fewer than two prompts are left.
    """
    config, tokenizer = AutoConfig.from_pretrained(start), AutoTokenizer.from_pretrained(start)
    order = random.Random(0).sample(range(len(test)), len(test))
    kept: list[Text] = []
    for prompt in {str(prompt): prompt for prompt in test.select(order)["prompt"]}.values():
        if len(kept) == most:
            break
        with suppress(Drop):
            check_prompt(config, tokenizer, prompt)
            kept.append(prompt)
    if len(kept) < 2:
        raise RecipeError(f"{start} can answer {len(kept)} of the held-out prompts, needs two: give more rows.")
    return kept


def answer_all(
    entries: Sequence[Entry],
    start: str,
    *,
    prompts: Sequence[Text],
    pairs: Dataset,
    sampling: Mapping[str, Any],
    folder: Path,
    trust_remote_code: bool = False,
) -> dict[str, dict[str, Any]]:
    """Answers of each model to the prompts, and its log-probs of the held-out pairs.

    The reference model is loaded once, and each LoRA adapter is put on it in turn. The results of each model are kept
    in `folder`, so that the same call goes on after the last of them.

    Args:
        entries: Models; an entry whose `model` is `start` is the reference model itself.
        start: The reference model, which all others were trained from.
        prompts: Prompts that `draw_prompts` returned.
        pairs: Held-out pairs.
        sampling: `temperature` and `max_new_tokens`, the same for all models.
        folder: Keeps each model's answers.
        trust_remote_code: Whether code that comes with a model may run.

    Returns:
        By name, `answers` (as `generate` returns them, with `policy` and `start`, their log-probs in nats under the
        model that sampled them and under the reference model, and `scored`, the number of tokens in these log-probs)
        and `chosen` and `rejected`, log-probs of the pairs' completions, with `chosen_tokens` and `rejected_tokens`.
    """
    asked = hashlib.sha256(json.dumps([start, prompts, pairs[:], sampling]).encode()).hexdigest()
    keys = {entry.name: f"{asked[:16]}-{entry.seed}-{entry.made_by}" for entry in entries}
    found = {entry.name: read_json(folder / f"{entry.name}.json") for entry in entries}
    missing = [entry for entry in entries if found[entry.name].get("key") != keys[entry.name]]
    if not missing:
        return found
    # The reference model has the dtype and the 4 bits that the first LoRA adapter was trained on.
    trained = next(filter(read_adapter, (entry.model for entry in entries)), start)
    base, tokenizer = open_model(trained, base=start, trust_remote_code=trust_remote_code)
    base = base.unload() if isinstance(base, PeftModel) else base
    ids = _pair_ids(pairs, tokenizer)
    measured: dict[str, Any] = dict(temperature=sampling["temperature"], batch_size=BATCH)
    for number, entry in enumerate(missing, start=1):
        say(f"Answers of {entry.name}, {number} of {len(missing)}.")
        with _opened(entry.model, base, start, trust_remote_code=trust_remote_code) as model:
            of_pairs = _pair_logps(model, ids, name=entry.model)
            sampled = sample_tokens(model, tokenizer, prompts, **sampling, seed=entry.seed, batch_size=BATCH)
            policy = answer_logps(model, sampled, **measured)
        of_start = policy if entry.model == start else answer_logps(base, sampled, **measured)
        answers = [
            read_answer(base, tokenizer, prompt, both) | {"policy": own, "start": other, "scored": len(both[1])}
            for prompt, both, own, other in zip(prompts, sampled, policy.tolist(), of_start.tolist(), strict=True)
        ]
        found[entry.name] = {"key": keys[entry.name], "answers": answers, **of_pairs}
        write_json(folder / f"{entry.name}.json", found[entry.name])
    return found


@contextmanager
def _opened(
    name: str, base: PreTrainedModel, start: str, *, trust_remote_code: bool
) -> Iterator[PreTrainedModel | PeftModel]:
    """The reference model `base` itself if the name is `start`, with a LoRA adapter in this block, or a full model."""
    if name == start:
        yield base
    elif read_adapter(name):
        tuned = put_adapter(base, name)
        yield tuned
        tuned.unload()
    else:
        yield open_model(name, trust_remote_code=trust_remote_code)[0]


def _pair_ids(pairs: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[PairIds]:
    rendered = [render_row(row, tokenizer) for row in pairs]
    return encode_pairs(rendered, tokenizer, is_chat=not isinstance(pairs[0]["prompt"], str))


def _pair_logps(model: PreTrainedModel | PeftModel, ids: Sequence[PairIds], *, name: str) -> dict[str, list[Any]]:
    """Summed log-probs and numbers of tokens of the chosen and rejected completions.

    Raises:
        RecipeError: If some log-probs are NaN.
    """
    sides = {"chosen": [pair.chosen for pair in ids], "rejected": [pair.rejected for pair in ids]}
    prompts = [pair.prompt for pair in ids]
    found = {
        side: answer_logps(model, list(zip(prompts, rows, strict=True)), batch_size=BATCH).tolist()
        for side, rows in sides.items()
    }
    if broken := sum(map(math.isnan, found["chosen"] + found["rejected"])):
        raise RecipeError(
            f"{name} gives NaN for {broken} of {2 * len(ids)} held-out completions: its training has broken it, or its "
            "dtype overflows."
        )
    return found | {f"{side}_tokens": [len(row) for row in rows] for side, rows in sides.items()}


def exact_judge(judge: Callable[[Text, str], float]) -> Scorer:
    """The judge of a recipe file, which scores one answer, as a scorer of many."""
    return lambda prompts, texts: np.array([float(judge(*both)) for both in zip(prompts, texts, strict=True)])


def score_answers(
    found: Mapping[str, Mapping[str, Any]], prompts: Sequence[Text], *, judge: Scorer, rewards: Mapping[str, Scorer]
) -> dict[str, dict[str, list[float]]]:
    """Scores of each model's answers by its name: `judge` of all, `reward_model` of the models in `rewards`.

    Args:
        found: As `answer_all` returns it.
        prompts: The prompts of the answers.
        judge: Scores the answers of all models.
        rewards: By name, the reward model that PPO optimised with the same seed.
    """
    scores: dict[str, dict[str, list[float]]] = {name: {} for name in found}
    asked = [("judge", judge, list(found))]
    for scorer in set(rewards.values()):
        asked.append(("reward_model", scorer, [name for name in found if rewards.get(name) is scorer]))
    for key, scorer, names in asked:
        texts = [answer["text"] for name in names for answer in found[name]["answers"]]
        given = np.split(scorer([*prompts] * len(names), texts), len(names))  # in one call: a model is loaded once
        for name, of_name in zip(names, given, strict=True):
            scores[name][key] = of_name.tolist()
    return scores
