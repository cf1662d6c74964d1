"""The answers that voters compare: those that runs left, or answers of both models that are generated now."""

import hashlib
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo_recipes.errors import RecipeError
from dpo_recipes.files import read_json, read_jsonl, write_json
from dpo_recipes.terminal import say
from dpo_recipes.vote.log import SIDES

Answers = list[dict[str, Any]]


def load_answers(
    run: str, against: str | None, file: Path, *, data: Mapping[str, Any], prompts: int, **options: Any
) -> None:
    """Writes prompts with both models' answers into the file, for `read_pairs`.

    Args:
        run: The run's folder.
        against: A run or model to compare with; None is the initial model.
        file: Keeps the answers, so that votes given later are about the same ones.
        data: Fields of `RecipeArguments` that name prompts; empty takes the run's.
        prompts: Most prompts.
        options: temperature (None takes the run's own), max_new_tokens, seed and trust_remote_code.

    Raises:
        RecipeError: If there are neither answers nor prompts.
    """
    own = [row for row in read_jsonl(Path(run) / "samples.jsonl") if {"prompt", *SIDES} <= row.keys()]
    if found := [] if data else _of_runs(own, against, options["temperature"]):
        held = {"source": "samples.jsonl", "answers": found[:prompts]}
    else:
        held = _generate(run, against, _prompts(run, own, data, prompts), file, **options)
    write_json(file, held)


def read_pairs(file: Path) -> tuple[Answers, int]:
    """The pairs of answers that differ, and the number of prompts with equal answers.

    Each pair has `prompt`, the texts `before` and `after`, and a hash of these three under `pair`.
    """
    answers = read_json(file).get("answers", [])
    different = [row for row in answers if row["before"] != row["after"]]
    pairs = {_hash([row["prompt"], row["before"], row["after"]]): row for row in different}
    return [{"pair": key, **row} for key, row in pairs.items()], len(answers) - len(different)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _of_runs(own: Answers, against: str | None, temperature: float | None) -> Answers:
    """Answers that the runs left at one temperature, by default the first of the run's; empty if they left none."""
    if temperature is None and own:
        temperature = own[0].get("temperature")
    rows = [row for row in own if row.get("temperature") == temperature]
    if against:
        theirs = read_jsonl(Path(against) / "samples.jsonl")
        same = [row for row in theirs if "after" in row and row.get("temperature") == temperature]
        known = {json.dumps(row["prompt"]): row["after"] for row in same}
        rows = [row | {"before": known[key]} for row in rows if (key := json.dumps(row["prompt"])) in known]
    return [{"prompt": row["prompt"], **{side: row[side]["text"] for side in SIDES}} for row in rows]


def _prompts(run: str, own: Answers, data: Mapping[str, Any], most: int) -> list[Any]:
    """Different prompts: of the dataset, in an order drawn by seed 0, or those that the run was asked."""
    if data:
        from dpo_recipes.recipe import RecipeArguments
        from dpo_recipes.sample.sampling import read_prompts

        rows = read_prompts(RecipeArguments(**data), pairs=False, first_words=None)
        return [row["prompt"] for row in random.Random(0).sample(rows, min(most, len(rows)))]
    if not own:
        raise RecipeError(
            f"{run} holds no samples.jsonl with answers of both models. Name prompts for them to answer, "
            "--dataset_name D."
        )
    return list({json.dumps(row["prompt"]): row["prompt"] for row in own}.values())[:most]


def _generate(
    run: str, against: str | None, prompts: list[Any], file: Path, *, trust_remote_code: bool = False, **options: Any
) -> dict[str, Any]:
    """Answers of both models to the prompts that both can answer, or those in the file if nothing has changed."""
    from dpo_recipes.models.generation import check_prompt, generate  # imports torch
    from dpo_recipes.models.open import find_start, open_model
    from dpo_recipes.runs.model_card import weights_hash

    models = dict(zip(SIDES, (against or find_start(run), run), strict=True))
    temperature = options.pop("temperature")
    options |= {"temperature": 1.0 if temperature is None else temperature}
    source = _hash([models, [weights_hash(model) for model in models.values()], prompts, options])
    if (held := read_json(file)).get("source") == source:
        return held
    rows = [{"prompt": prompt} for prompt in prompts]
    for side, model in models.items():
        say(f"Answers of {model} to {len(rows)} prompts.")
        loaded, tokenizer = open_model(model, trust_remote_code=trust_remote_code)
        rows = [row for row in rows if _can_answer(check_prompt, loaded.config, tokenizer, row["prompt"])]
        made = generate(loaded, tokenizer, [row["prompt"] for row in rows], **options)
        rows = [row | {side: answer["text"]} for row, answer in zip(rows, made, strict=True)]
    if left := len(prompts) - len(rows):
        say(f"{left} prompts are left out, because they fill a model's context or its chat template refuses them.")
    return {"source": source, "answers": rows}


def _can_answer(check: Any, *arguments: Any) -> bool:
    from dpo_recipes.dataset_adapters import Drop

    try:
        check(*arguments)
    except Drop:
        return False
    return True
