"""Answers in the files of AlpacaEval and MT-Bench: what a direct call generates, and what their own readers take."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_recipes.cli import main
from dpo_recipes.models.generation import generate
from dpo_recipes.sample import benchmarks
from dpo_recipes.sample.benchmarks import TEMPERATURES

INSTRUCTIONS = ["Name a tea.", "Long. " * 400, "Name a bird."]  # the second fills the model's context
QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Write.", "Write it again."]},
    {"question_id": 111, "category": "math", "turns": ["1 + 1?", "And 1 more?"], "reference": ["2", "3"]},
    {"question_id": 121, "category": "coding", "turns": ["Print 1.", "Print 2."]},
    {"question_id": 7, "category": "knowledge", "turns": ["Why?"]},
]
FLAGS = ("--max_new_tokens", "6")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty folder with the questions of both benchmarks, as they publish them."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {"instruction": text, "output": "By another.", "generator": "text_davinci_003", "dataset": "helpful_base"}
        for text in INSTRUCTIONS
    ]
    Path("alpaca_eval.json").write_text(json.dumps(rows, indent=2))
    Path("question.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    return tmp_path


@pytest.fixture(scope="module")
def say(tiny_model):
    """What the tiny model answers to a conversation, given as the texts of its turns."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)

    def answers(*talks, **options):
        roles = ["user", "assistant", "user"]
        prompts = [[{"role": r, "content": text} for r, text in zip(roles, talk, strict=False)] for talk in talks]
        return [each["text"] for each in generate(model, tokenizer, prompts, max_new_tokens=6, **options)]

    return answers


def answer(model, benchmark, *flags):
    questions = {"alpaca_eval": "alpaca_eval.json", "mt_bench": "question.jsonl"}[benchmark]
    words = ["answer", str(model), "--benchmark", benchmark, "--dataset_name", questions, "--name", "tiny"]
    return main([*words, *FLAGS, *flags])


def lines():
    return [json.loads(line) for line in Path("outputs/mt_bench/model_answer/tiny.jsonl").read_text().splitlines()]


def test_alpaca_eval_has_an_answer_to_every_instruction_in_order(tiny_model, say, capsys):
    assert answer(tiny_model, "alpaca_eval", "--temperature", "0") == 0
    first, last = say([INSTRUCTIONS[0]], [INSTRUCTIONS[2]])
    assert json.loads(Path("outputs/alpaca_eval/tiny/model_outputs.json").read_text()) == [
        {"dataset": "helpful_base", "instruction": text, "output": output, "generator": "tiny"}
        for text, output in zip(INSTRUCTIONS, [first, "", last], strict=True)
    ]
    assert "3 questions, 3 answers, 3 of them cut short, 1 empty" in capsys.readouterr().out
    assert not list(Path("outputs").rglob("*.part"))
    assert answer(tiny_model, "alpaca_eval", "--temperature", "0") == 2
    assert "model_outputs.json exists already" in capsys.readouterr().err


def test_the_second_turn_of_mt_bench_is_asked_after_the_first_was_answered(tiny_model, say):
    assert answer(tiny_model, "mt_bench") == 0
    by_question = {line["question_id"]: line for line in lines()}
    assert list(by_question) == [question["question_id"] for question in QUESTIONS]
    assert len({line["answer_id"] for line in lines()}) == len(QUESTIONS)
    assert {line["model_id"] for line in lines()} == {"tiny"}
    turns = {number: line["choices"][0]["turns"] for number, line in by_question.items()}
    for number, first, second in ((111, "1 + 1?", "And 1 more?"), (121, "Print 1.", "Print 2.")):
        [said] = say([first])
        assert turns[number] == [said, *say([first, said, second])]
    assert [len(said) for said in turns.values()] == [2, 2, 2, 1]


def test_the_category_decides_the_temperature_unless_one_is_given(tiny_model, say):
    assert answer(tiny_model, "mt_bench", "--seed", "3") == 0
    sampled = [line["choices"][0]["turns"][0] for line in lines()]
    together = say(["Write."], ["Why?"], temperature=0.7, seed=3)  # both are of 0.7, the second as of no category
    assert [sampled[0], sampled[3]] == together != say(["Write."], ["Why?"])
    Path("outputs/mt_bench/model_answer/tiny.jsonl").unlink()
    assert answer(tiny_model, "mt_bench", "--temperature", "0") == 0
    assert [line["choices"][0]["turns"][0] for line in lines()] == say(["Write."], ["1 + 1?"], ["Print 1."], ["Why?"])


def test_a_call_that_was_stopped_goes_on(tiny_model, monkeypatch):
    calls = []

    def counted(*given, **options):
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(*given, **options)

    monkeypatch.setattr(benchmarks, "generate", counted)
    assert answer(tiny_model, "mt_bench", "--batch_size", "1") == 130
    assert not Path("outputs/mt_bench/model_answer/tiny.jsonl").exists()
    assert answer(tiny_model, "mt_bench", "--batch_size", "1") == 0
    assert len(calls) == 3 + 7 - 2  # the first question's two turns are not asked again
    assert [line["question_id"] for line in lines()] == [81, 111, 121, 7]


@pytest.mark.parametrize(
    ("benchmark", "rows", "message"),
    [
        ("alpaca_eval", [{"prompt": "Why?"}], "alpaca_eval needs the columns instruction, got ['prompt']"),
        ("alpaca_eval", [{"instruction": ""}], "rows.jsonl, line 1 asks [''], where text is needed"),
        ("mt_bench", [{"question_id": 1, "category": "math"}], "Name yours with --columns turns=..."),
        ("mt_bench", [{"question_id": 1, "category": "math", "turns": "Why?"}], "asks 'Why?', where text"),
    ],
)
def test_questions_of_another_kind_are_refused_before_a_model_is_loaded(benchmark, rows, message, capsys):
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert answer("no model is loaded", benchmark, "--dataset_name", "rows.jsonl") == 2
    assert message in capsys.readouterr().err


def test_all_categories_of_mt_bench_have_a_temperature_of_their_own():
    """Of the published questions, some of which are elsewhere."""
    if not (folder := os.environ.get("DPO_RECIPES_DATA")):
        pytest.skip("DPO_RECIPES_DATA names no folder of real data")
    import gzip

    with gzip.open(Path(folder) / "mt-bench/mt_bench_question.jsonl.gz", "rt") as file:
        assert {json.loads(line)["category"] for line in file} == set(TEMPERATURES)


def in_another_process(code):
    """Runs code that imports what warns, and returns what it prints as JSON."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not find_spec("alpaca_eval"), reason="alpaca_eval is not installed")
def test_alpaca_eval_itself_reads_and_pairs_the_answers(tiny_model):
    """By a judge of its own that needs no network: it says the same of every pair, shown in either order."""
    assert answer(tiny_model, "alpaca_eval") == 0
    Path("judge").mkdir()
    Path("judge/prompt.txt").write_text("{instruction} {output_1} {output_2}")
    ranks = [{"model": "model_1", "rank": 1}, {"model": "model_2", "rank": 2}]
    judge = {"prompt_template": "judge/prompt.txt", "fn_completions": "test_completions"}
    judge |= {"completions_kwargs": {"value": str(ranks)}, "fn_completion_parser": "ranking_parser"}
    Path("judge/configs.yaml").write_text(json.dumps({"judge": judge}))
    code = """
import json, os, alpaca_eval
board, judged = alpaca_eval.evaluate(
    "outputs/alpaca_eval/tiny/model_outputs.json", reference_outputs="alpaca_eval.json",
    annotators_config=os.path.abspath("judge"), fn_metric="get_winrate", sort_by="win_rate", output_path=None,
    precomputed_leaderboard=None, is_return_instead_of_print=True, caching_path=None,
)
print(json.dumps([list(board.index), judged]))
"""
    names, judged = in_another_process(code)
    assert names == ["tiny"]
    written = json.loads(Path("outputs/alpaca_eval/tiny/model_outputs.json").read_text())
    seen = {row["instruction"]: (row["output_1"], row["output_2"], row["dataset"]) for row in judged}
    assert seen == {row["instruction"]: ("By another.", row["output"], "helpful_base") for row in written}
    assert {row["preference"] for row in judged} <= {1, 2}


@pytest.mark.skipif(not (find_spec("fastchat") and find_spec("anthropic")), reason="fschat is not installed")
def test_fastchat_itself_reads_the_answers(tiny_model):
    assert answer(tiny_model, "mt_bench") == 0
    code = """
import json
from fastchat.llm_judge.common import Judge, check_data, load_model_answers, load_questions, temperature_config
questions, answers = load_questions("question.jsonl", None, None), load_model_answers("outputs/mt_bench/model_answer")
check_data(questions, answers, {}, ["tiny"], {"default": Judge("gpt-4", {}, multi_turn=True)})
print(json.dumps([answers, temperature_config]))
"""
    answers, temperatures = in_another_process(code)
    assert answers == {"tiny": {str(line["question_id"]): line for line in lines()}}
    assert TEMPERATURES.items() <= temperatures.items()
