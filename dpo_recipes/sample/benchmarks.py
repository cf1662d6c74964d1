"""Writes answers as benchmarks read them: AlpacaEval's model_outputs.json, MT-Bench's file of a model's answers."""

import time
import uuid
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset

from dpo_recipes.dataset_adapters.adapting import require_columns, row_names
from dpo_recipes.errors import RecipeError
from dpo_recipes.files import check_writable, write_json, write_jsonl
from dpo_recipes.loading import load_rows
from dpo_recipes.models.generation import generate, require_chat_template
from dpo_recipes.models.open import open_model
from dpo_recipes.recipe import RecipeArguments
from dpo_recipes.sample.sampling import Rows, in_steps
from dpo_recipes.terminal import say

COLUMNS = {"alpaca_eval": ["instruction"], "mt_bench": ["question_id", "category", "turns"]}
# FastChat's: temperature_config in fastchat/llm_judge/common.py, and 0.7 for any other category (gen_model_answer.py).
# AlpacaEval leaves it to the model; 0.7 is what most models_configs of its leaderboard have.
TEMPERATURES = {
    **{"writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0},
    **{"stem": 0.1, "humanities": 0.1},
}
OTHERWISE = 0.7


def answer(
    model: str,
    dataset: RecipeArguments,
    *,
    benchmark: str,
    name: str | None = None,
    output_dir: str | None = None,
    temperature: float | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> Path:
    """Answers a benchmark's questions, and returns the path of the file that holds the answers.

    The file is written whole. Until then the answers are in a .part file beside it, and the same call goes on from
    there. Every row has an answer, since both benchmarks compare row by row: if a prompt leaves no room for one the
    answer is empty, and counted.

    Args:
        model: As `open_model` reads it.
        dataset: As `load_rows` reads it: AlpacaEval's rows of `instruction`, or MT-Bench's question.jsonl.
        benchmark: A key of COLUMNS.
        name: Of the model in the benchmark; by default that of its folder.
        output_dir: Laid out as the benchmark's own: NAME/model_outputs.json, model_answer/NAME.jsonl.
        temperature: Of all answers; by default that of the question's category.
        trust_remote_code: As in `open_model`.
        options: For `sample_tokens`: max_new_tokens, seed and batch_size.

    Raises:
        RecipeError: If the file exists, or the rows are not the benchmark's.
    """
    name = name or Path(model).resolve().name
    folder = Path(output_dir or f"outputs/{benchmark}")
    is_alpaca = benchmark == "alpaca_eval"
    target = folder / (f"{name}/model_outputs.json" if is_alpaca else f"model_answer/{name}.jsonl")
    if target.exists():
        raise RecipeError(f"{target} exists already. Name the model otherwise with --name, or use --output_dir.")
    check_writable(target.parent)
    rows = load_rows(dataset)["train"]
    asked = _read_questions(rows, benchmark, temperature)
    loaded, tokenizer = open_model(model, trust_remote_code=trust_remote_code)
    require_chat_template(tokenizer)
    step = partial(_converse, loaded, tokenizer, **options)
    with in_steps(step, asked, target, step=options["batch_size"], model=model, settings=options) as lines:
        both = list(zip(rows, (line["turns"] for line in lines), strict=True))
        if is_alpaca:
            write_json(target, [_alpaca_eval(row, turns[0], generator=name) for row, turns in both])
        else:
            write_jsonl(target, [_fastchat(row["question_id"], turns, model_id=name) for row, turns in both])
    ended = [end for line in lines for end in line["ended"]]
    empty = sum(not turn for line in lines for turn in line["turns"])
    say(f"{len(rows)} questions, {len(ended)} answers, {ended.count(False)} of them cut short, {empty} empty")
    say(f"Answers       {target}", always=True)
    return target


def _read_questions(rows: Dataset, benchmark: str, temperature: float | None) -> Rows:
    """Reads the turns of each question and the temperature of its answers."""
    require_columns(rows, COLUMNS[benchmark], name=benchmark)
    asked = []
    for name, row in zip(row_names(rows), rows, strict=True):
        turns = [row["instruction"]] if benchmark == "alpaca_eval" else row["turns"]
        if not (isinstance(turns, list) and turns and all(isinstance(turn, str) and turn for turn in turns)):
            raise RecipeError(f"{name} asks {turns!r}, where text is needed.")
        by_category = TEMPERATURES.get(row.get("category", ""), OTHERWISE)
        asked.append({"turns": turns, "temperature": by_category if temperature is None else temperature})
    return asked


def _alpaca_eval(row: dict[str, Any], output: str, *, generator: str) -> dict[str, Any]:
    kept: dict[str, Any] = {key: row[key] for key in ("dataset", "datasplit", "instruction") if key in row}
    return {**kept, "output": output, "generator": generator}


def _fastchat(question_id: Any, turns: list[str], *, model_id: str) -> dict[str, Any]:
    own = {"question_id": question_id, "answer_id": uuid.uuid4().hex, "model_id": model_id}
    return {**own, "choices": [{"index": 0, "turns": turns}], "tstamp": time.time()}


def _converse(model: Any, tokenizer: Any, questions: Rows, **options: Any) -> Rows:
    """Answers each question turn by turn; returns the texts as `turns`, and whether each text `ended`.

    Questions of one temperature are answered together.
    """
    talks: list[list[dict[str, str]]] = [[] for _ in questions]
    ended: list[list[bool]] = [[] for _ in questions]
    for turn in range(max(len(question["turns"]) for question in questions)):
        rows_at: dict[float, list[int]] = {}
        for row, question in enumerate(questions):
            if len(question["turns"]) > turn:
                talks[row].append({"role": "user", "content": question["turns"][turn]})
                rows_at.setdefault(question["temperature"], []).append(row)
        for temperature, rows in rows_at.items():
            said = generate(model, tokenizer, [talks[row] for row in rows], temperature=temperature, **options)
            for row, answered in zip(rows, said, strict=True):
                talks[row].append({"role": "assistant", "content": answered["text"]})
                ended[row].append(answered["ended"])
    answers = [[message["content"] for message in talk[1::2]] for talk in talks]
    return [{"turns": turns, "ended": ends} for turns, ends in zip(answers, ended, strict=True)]
