"""Writes a model's answers to the prompts of a dataset: alone, ranked into pairs, or as the rejected side of pairs."""

import hashlib
import itertools
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
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
from dpo_recipes.dataset_adapters.adapting import ROW, require_columns
from dpo_recipes.dataset_adapters.ledger import Ledger
from dpo_recipes.errors import RecipeError
from dpo_recipes.files import check_writable, read_jsonl, write_jsonl
from dpo_recipes.loading import load_rows
from dpo_recipes.models.functions import columns_of, names_function, read_function
from dpo_recipes.models.generation import check_prompt, generate
from dpo_recipes.models.open import open_model
from dpo_recipes.models.rewards import check_reward_model, model_judge, read_reward_config
from dpo_recipes.recipe import RecipeArguments
from dpo_recipes.terminal import say

AT_A_TIME = 8  # batches between two writes
Rows = list[dict[str, Any]]
Marker = Callable[[Sequence[dict[str, Any]], Sequence[str]], NDArray[np.float64]]
"""Scores one answer to each row; NaN for an answer that cannot be judged."""


def sample(
    model: str,
    dataset: RecipeArguments,
    *,
    output: str | None = None,
    pairs: bool,
    num_samples: int,
    judge: str | None = None,
    first_words: tuple[int, int] | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> Path:
    """Samples answers to a dataset's prompts, and returns the path of the JSON Lines file that holds them.

    The file is written whole. Until then the answers are in a .part file beside it, and the same call goes on from
    there.

    Args:
        model: As `open_model` reads it.
        dataset: As `load_rows` reads it; the training rows are taken.
        output: The file; samples.jsonl by default, or pairs.jsonl.
        pairs: Write `{prompt, chosen, rejected}`: the dataset's chosen answer, and the model's own as the rejected one.
            Without it `{prompt, completions, ended}`, a line for each distinct prompt.
        num_samples: Answers to each prompt.
        judge: A reward model, a classifier with two labels as `score` reads it, or FILE.py:FUNCTION. Write a pair of
            every two answers to a prompt that it scores differently, and the difference as their `preference_strength`.
            The function gets a prompt, an answer, and by name each column of the dataset that a further argument names:
            `check(prompt, answer, reference)`. It returns a number, True or False; None for an answer that it cannot
            judge, which is left out and counted.
        first_words: Least and most words of a prompt. The prompts are plain text to go on with: the first words of the
            dataset's prompts, their number drawn by a hash of the text.
        trust_remote_code: As in `open_model`.
        options: For `sample_tokens`: temperature, max_new_tokens, seed, batch_size.

    Raises:
        RecipeError: If the file exists, flags contradict one another, or the rows have no prompt.
    """
    target = Path(output or ("pairs.jsonl" if pairs or judge else "samples.jsonl"))
    if target.exists():
        raise RecipeError(f"{target} exists already. Name another file with --output.")
    _refuse_contradiction(options["temperature"], num_samples, pairs=pairs, judge=judge, first_words=first_words)
    check_writable(target.parent)
    check = read_function(judge, columns=True) if judge and names_function(judge) else None
    columns = columns_of(check) if check else []
    asked = read_prompts(dataset, pairs=pairs, first_words=first_words, columns=columns)
    if judge and not check:
        prompts = [row["prompt"] for row in asked]
        room = dict(max_completion_length=options["max_new_tokens"], labels=(1, 2))
        check_reward_model(*read_reward_config(judge), prompts, **room)
    loaded, tokenizer = open_model(model, trust_remote_code=trust_remote_code)
    asked = _keep(asked, lambda row: check_prompt(loaded.config, tokenizer, row["prompt"]), "prompts")
    settings = options | {"num_samples": num_samples}
    ask = partial(answer, loaded, tokenizer, **settings)
    step = max(1, AT_A_TIME * options["batch_size"] // num_samples)  # prompts between two writes
    with in_steps(ask, asked, target, step=step, model=model, settings=settings) as lines:
        if pairs:
            made = _own_rejected(lines)
        elif judge:
            made = ranked(lines, partial(_checked, check, columns) if check else judge)
        else:
            made = lines
        write_jsonl(target, made, listed=False)  # the user's, in a run's folder too
    cut = sum(not ended for line in lines for ended in line["ended"])
    say(f"{len(asked)} prompts, {len(asked) * num_samples} answers, {cut} of them cut short")
    say(f"{'Pairs' if pairs or judge else 'Answers':<14}{target}", always=True)
    return target


def _refuse_contradiction(temperature: float, num_samples: int, *, pairs: bool, judge: Any, first_words: Any) -> None:
    """Raises RecipeError for flags that contradict one another."""
    if temperature == 0 and num_samples > 1:
        raise RecipeError("At temperature 0 all answers to a prompt are the same: leave out --num_samples.")
    if pairs and (judge or first_words):
        raise RecipeError(
            "--pairs keeps the dataset's prompts and chosen answers: leave out --judge and --first_words."
        )
    if judge and num_samples < 2:
        raise RecipeError("--judge ranks the answers to a prompt, which needs two or more: --num_samples 4.")


def read_prompts(
    script_args: RecipeArguments, *, pairs: bool, first_words: tuple[int, int] | None, columns: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Reads the `prompt` of every row, and for pairs its `chosen` answer; without pairs each prompt comes once.

    Rows keep these columns of the dataset, and `reference`, by which others may mark the answers.
    """
    rows = load_rows(script_args)["train"]
    alone = not pairs and "prompt" in rows.column_names and not {"chosen", "rejected"} & set(rows.column_names)
    dataset_adapter = plain_text if first_words else preference_jsonl if alone else recognise(rows)
    with Ledger() as ledger:
        kept = dataset_adapter(prompts_alone(rows) if alone else rows)
    _account(len(kept), "rows", {reason: drop.count for reason, drop in ledger.total().dropped.items()})
    found: list[dict[str, Any]] = kept.select_columns(["prompt", "chosen"] if pairs else ["prompt"]).to_list()
    if columns:
        require_columns(rows, columns, name="The judge")
    if more := [name for name in rows.column_names if name in ("reference", *columns)]:
        others = dict(zip(rows[ROW], rows.select_columns(more), strict=True))
        found = [{**others[name], **row} for name, row in zip(kept[ROW], found, strict=True)]
    if first_words:
        for row in found:
            row["prompt"] = " ".join(row["prompt"].split()[: random.Random(row["prompt"]).randint(*first_words)])
    return found if pairs else list({json.dumps(row["prompt"]): row for row in found}.values())


def answer(model: Any, tokenizer: Any, rows: Rows, *, num_samples: int, **options: Any) -> Rows:
    """Texts of `num_samples` answers to each row's prompt, and whether each of them ended."""
    repeated = [row["prompt"] for row in rows for _ in range(num_samples)]
    answers = iter(generate(model, tokenizer, repeated, **options))
    groups = [list(itertools.islice(answers, num_samples)) for _ in rows]
    return [
        {"completions": [each["text"] for each in group], "ended": [each["ended"] for each in group]}
        for group in groups
    ]


@contextmanager
def in_steps(
    answer: Callable[..., Rows], asked: Rows, target: Path, *, step: int, model: str, settings: dict[str, Any]
) -> Iterator[Rows]:
    """Yields the rows of `asked`, each with its answers; the caller writes them to `target`.

    Until then the answers are in a .part file beside it, and the same call goes on from there.

    Args:
        answer: Takes the rows of a step and a `seed`.
        asked: Rows that JSON can hold.
        target: The file.
        step: Rows between two writes.
        model: As `open_model` reads it.
        settings: All else that the answers depend on, with `seed`.
    """
    weights = sorted((file.name, file.stat().st_mtime_ns) for file in Path(model).glob("*.safetensors"))
    request = json.dumps([model, weights, settings, asked])
    part = target.with_name(f"{target.name}.{hashlib.sha256(request.encode()).hexdigest()[:8]}.part")
    done = read_jsonl(part)
    done = done[: len(done) // step * step]  # a step that was cut short is sampled again
    write_jsonl(part, done, listed=False)
    for start in trange(len(done), len(asked), step, desc=f"{step} prompts at a time"):
        # A seed for each step: an interrupted run and one in one go write the same.
        done += answer(asked[start : start + step], seed=settings["seed"] + start)
        with part.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in done[start:])
    yield [{**row, **answered} for row, answered in zip(asked, done, strict=True)]
    part.unlink()


def _own_rejected(lines: Rows) -> list[Any]:
    """Makes a pair of each different answer of a line; answers that make no pair are counted and named."""
    own = [
        {"prompt": line["prompt"], "chosen": line["chosen"], "rejected": [{"role": "assistant", "content": text}]}
        for line in lines
        for text in dict.fromkeys(line["completions"])
    ]
    return _keep(own, check_pair, "pairs", same_answer_again=_repeated(lines))


def _checked(
    check: Callable[..., Any], columns: Sequence[str], lines: Sequence[dict[str, Any]], texts: Sequence[str]
) -> NDArray[np.float64]:
    """Scores of an answer to each line by a function of the user's; NaN where it gives none."""
    given = (
        check(line["prompt"], text, **{name: line[name] for name in columns})
        for line, text in zip(lines, texts, strict=True)
    )
    return np.array([*given], dtype=float)


def ranked(lines: Rows, judge: str | Marker, *, best_against_worst: bool = False) -> list[Any]:
    """Makes pairs of a line's answers that the judge scores differently; other pairs are counted.

    Args:
        lines: A prompt and its `completions` each.
        judge: As in `sample`, or a function that scores an answer to each line, NaN where it gives no score.
        best_against_worst: Make one pair of each line, of its best and its worst answer; by default of every two.
    """
    asked, texts = zip(*((line, text) for line in lines for text in dict.fromkeys(line["completions"])), strict=True)
    given = judge(asked, texts) if callable(judge) else model_judge(judge)([line["prompt"] for line in asked], texts)
    scores, unknown = iter(given.tolist()), int(np.isnan(given).sum())
    pairs = []
    for line in lines:
        scored = [(next(scores), text) for text in dict.fromkeys(line["completions"])]
        best_first = sorted((both for both in scored if not math.isnan(both[0])), key=lambda both: -both[0])
        ends = zip(best_first[:1], best_first[-1:], strict=True)  # of a single answer twice the same, which is no pair
        for (high, chosen), (low, rejected) in ends if best_against_worst else itertools.combinations(best_first, 2):
            pair = {"prompt": line["prompt"], "chosen": chosen, "rejected": rejected}
            pairs.append(pair | {"preference_strength": high - low})
    return _keep(pairs, _check_ranked, "pairs", same_answer_again=_repeated(lines), not_judged=unknown)


def _repeated(lines: Rows) -> int:
    """Number of answers that say the same as another one to their prompt."""
    return sum(len(line["completions"]) - len({*line["completions"]}) for line in lines)


def _check_ranked(pair: dict[str, Any]) -> None:
    prompt = as_messages(pair["prompt"], role="user")
    chosen, rejected = (as_messages(pair[side], role="assistant") for side in ("chosen", "rejected"))
    check_pair({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    if pair["preference_strength"] == 0:
        raise Drop("not_rated_higher")


def _keep(rows: Sequence[Any], check: Callable[[Any], None], what: str, **dropped: int) -> list[Any]:
    """Rows for which `check` raises no Drop. Prints how many are not, with the numbers `dropped` before, by reason."""
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
    left_out = [f"  {DROP_REASONS.get(reason, reason):<54} -{count}" for reason, count in dropped.items() if count]
    say("\n".join([f"{kept} {what}{', and left out:' if left_out else ''}", *left_out]))
    if not kept:
        raise RecipeError(f"No {what} are left. The lines above name the reasons.")
