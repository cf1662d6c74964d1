"""Writes a model's answers to the prompts of a dataset: to be ranked, or as the rejected side of pairs."""

import hashlib
import itertools
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm, trange

from dpo_recipes.dataset_adapters import (
    DROP_REASONS,
    Drop,
    as_messages,
    check_pair,
    plain_text,
    preference_jsonl,
    prompts_alone,
    recognise,
)
from dpo_recipes.dataset_adapters.ledger import Ledger
from dpo_recipes.errors import RecipeError
from dpo_recipes.files import check_writable, read_jsonl, write_jsonl
from dpo_recipes.loading import load_rows
from dpo_recipes.models.generation import check_prompt, generate
from dpo_recipes.models.open import open_model
from dpo_recipes.models.rewards import check_reward_model, model_judge, read_reward_config
from dpo_recipes.recipe import RecipeArguments
from dpo_recipes.terminal import say

AT_A_TIME = 8  # batches between two writes
Rows = list[dict[str, Any]]


def sample(
    model: str,
    dataset: RecipeArguments,
    *,
    output: str | None,
    pairs: bool,
    num_samples: int,
    judge: str | None = None,
    first_words: tuple[int, int] | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> Path:
    """The path of a JSON Lines file, written whole; until then a .part lies beside it: the same call goes on with it.

    Args:
        model: As `open_model` reads it.
        dataset: As `load_rows` reads it; the training rows are taken.
        output: The file; samples.jsonl by default, or pairs.jsonl.
        pairs: Write `{prompt, chosen, rejected}`: the dataset's chosen answer, and the model's own as the rejected one.
            Without it `{prompt, completions, ended}`, a line for each distinct prompt.
        num_samples: Answers to each prompt.
        judge: A reward model, or a classifier with two labels as `score` reads it. Write a pair of every two answers to
            a prompt that it scores differently, and the difference as their `preference_strength`.
        first_words: Least and most. The prompts are plain text to go on with: the first words of the dataset's, their
            number drawn by a hash of the text.
        trust_remote_code: As in `open_model`.
        options: Those of `sample_tokens`: temperature, max_new_tokens, seed, batch_size.

    Raises:
        RecipeError: If the file exists, the call makes no sense, or the rows have no prompt.
    """
    target = Path(output or ("pairs.jsonl" if pairs or judge else "samples.jsonl"))
    if target.exists():
        raise RecipeError(f"{target} exists already. Name another file with --output.")
    if options["temperature"] == 0 and num_samples > 1:
        raise RecipeError("At temperature 0 all answers to a prompt are the same: leave out --num_samples.")
    if pairs and (judge or first_words):
        raise RecipeError(
            "--pairs keeps the dataset's prompts and chosen answers: leave out --judge and --first_words."
        )
    if judge and num_samples < 2:
        raise RecipeError("--judge ranks the answers to a prompt, which needs two or more: --num_samples 4.")
    check_writable(target.parent)
    asked = _read_prompts(dataset, pairs=pairs, first_words=first_words)
    if judge:
        prompts = [row["prompt"] for row in asked]
        room = dict(max_completion_length=options["max_new_tokens"], labels=(1, 2))
        check_reward_model(*read_reward_config(judge), prompts, **room)
    loaded, tokenizer = open_model(model, trust_remote_code=trust_remote_code)
    asked = _keep(asked, lambda row: check_prompt(loaded.config, tokenizer, row["prompt"]), "prompts")
    step = max(1, AT_A_TIME * options["batch_size"] // num_samples)  # prompts between two writes

    def answer(rows: Rows, seed: int) -> Rows:
        repeated = [row["prompt"] for row in rows for _ in range(num_samples)]
        answers = generate(loaded, tokenizer, repeated, **options | {"seed": seed})
        groups = [answers[first : first + num_samples] for first in range(0, len(answers), num_samples)]
        return [
            {"completions": [each["text"] for each in group], "ended": [each["ended"] for each in group]}
            for group in groups
        ]

    settings = options | {"num_samples": num_samples}
    with in_steps(answer, asked, target, step=step, model=model, settings=settings) as done:
        lines = [{**row, **answered} for row, answered in zip(asked, done, strict=True)]
        made = _own_rejected(lines) if pairs else _ranked(lines, judge) if judge else lines
        write_jsonl(target, made, listed=False)  # the user's, in a run's folder too
    cut = sum(not ended for line in lines for ended in line["ended"])
    say(f"{len(asked)} prompts, {len(asked) * num_samples} answers, {cut} of them cut short")
    say(f"{'Pairs' if pairs or judge else 'Answers':<14}{target}")
    return target


@contextmanager
def in_steps(
    answer: Callable[[Rows, int], Rows], asked: Rows, target: Path, *, step: int, model: str, settings: dict[str, Any]
) -> Iterator[Rows]:
    """The answers to all that is asked, of which `target` is to be written inside.

    Until then a .part file lies beside it, from which the same call goes on.

    Args:
        answer: Takes the rows of a step and a seed.
        asked: Rows that JSON can hold.
        target: The file.
        step: Rows between two writes.
        model: As `open_model` reads it.
        settings: What else the answers depend on, `seed` among it.
    """
    weights = sorted((file.name, file.stat().st_mtime_ns) for file in Path(model).glob("*.safetensors"))
    request = json.dumps([model, weights, settings, asked])
    part = target.with_name(f"{target.name}.{hashlib.sha256(request.encode()).hexdigest()[:8]}.part")
    done = read_jsonl(part)
    done = done[: len(done) // step * step]  # a step that was cut short is sampled again
    write_jsonl(part, done, listed=False)
    for start in trange(len(done), len(asked), step, desc=f"{step} prompts at a time"):
        # A seed for each step: an interrupted run and one in one go write the same.
        done += answer(asked[start : start + step], settings["seed"] + start)
        with part.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in done[start:])
    yield done
    part.unlink()


def _read_prompts(
    script_args: RecipeArguments, *, pairs: bool, first_words: tuple[int, int] | None
) -> list[dict[str, Any]]:
    """`prompt`, and `chosen` for pairs, of every row; without pairs each prompt once."""
    rows = load_rows(script_args)["train"]
    alone = not pairs and "prompt" in rows.column_names and not {"chosen", "rejected"} & set(rows.column_names)
    dataset_adapter = plain_text if first_words else preference_jsonl if alone else recognise(rows)
    with Ledger() as ledger:
        kept = dataset_adapter(prompts_alone(rows) if alone else rows)
    _account(len(kept), "rows", {reason: drop.count for reason, drop in ledger.total().dropped.items()})
    found: list[dict[str, Any]] = kept.select_columns(["prompt", "chosen"] if pairs else ["prompt"]).to_list()
    if first_words:
        for row in found:
            row["prompt"] = " ".join(row["prompt"].split()[: random.Random(row["prompt"]).randint(*first_words)])
    return found if pairs else list({json.dumps(row): row for row in found}.values())


def _own_rejected(lines: Sequence[dict[str, Any]]) -> list[Any]:
    """A pair for each different answer of a line; those that make no pair are counted and named."""
    own = [
        {**{side: line[side] for side in ("prompt", "chosen")}, "rejected": as_messages(text, role="assistant")}
        for line in lines
        for text in dict.fromkeys(line["completions"])
    ]
    repeated = sum(len(line["completions"]) for line in lines) - len(own)
    return _keep(own, check_pair, "pairs", same_answer_again=repeated)


def _ranked(lines: Sequence[dict[str, Any]], judge: str) -> list[Any]:
    """A pair of every two answers of a line that the judge scores differently; the others are counted and named."""
    own = [(line["prompt"], text) for line in lines for text in dict.fromkeys(line["completions"])]
    repeated = sum(len(line["completions"]) for line in lines) - len(own)
    scores = model_judge(judge)([prompt for prompt, _ in own], [text for _, text in own]).tolist()
    ranked = []
    for prompt, group in itertools.groupby(zip(own, scores, strict=True), key=lambda scored: scored[0][0]):
        best_first = sorted(group, key=lambda scored: -scored[1])
        for ((_, chosen), high), ((_, rejected), low) in itertools.combinations(best_first, 2):
            pair = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
            ranked.append(pair | {"preference_strength": high - low})
    return _keep(ranked, _check_ranked, "pairs", same_answer_again=repeated)


def _check_ranked(pair: dict[str, Any]) -> None:
    prompt = as_messages(pair["prompt"], role="user")
    chosen, rejected = (as_messages(pair[side], role="assistant") for side in ("chosen", "rejected"))
    check_pair({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    if pair["preference_strength"] == 0:
        raise Drop("not_rated_higher")


def _keep(rows: Sequence[Any], check: Callable[[Any], None], what: str, **dropped: int) -> list[Any]:
    """The rows for which `check` raises no Drop; the others, and those `dropped` before, are counted and named."""
    kept, reasons = [], Counter(dropped)
    for row in tqdm(rows, desc=f"checking {what}", leave=False):
        try:
            check(row)
            kept.append(row)
        except Drop as reason:
            reasons[str(reason)] += 1
    _account(len(kept), what, reasons)
    return kept


def _account(kept: int, what: str, dropped: Mapping[str, int]) -> None:
    meant = DROP_REASONS | {"same_answer_again": "the same answer to the same prompt again"}
    left_out = [f"  {meant.get(reason, reason):<54} -{count}" for reason, count in dropped.items() if count]
    say("\n".join([f"{kept} {what}{', and left out:' if left_out else ''}", *left_out]))
    if not kept:
        raise RecipeError(f"No {what} are left. Above stands why.")
