"""Answers of a model to the prompts of a dataset, and the pairs that are made of them."""

import json
import re
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_recipes.cli import main
from dpo_recipes.dataset_adapters import recognise
from dpo_recipes.errors import RecipeError
from dpo_recipes.loading import load_rows
from dpo_recipes.models.generation import generate
from dpo_recipes.recipe import RecipeArguments
from dpo_recipes.sample import sampling

QUESTIONS = [f"Question {number}{'?' * number}" for number in range(6)]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sample(model, *, output=None, pairs=False, num_samples=1, columns=None, dataset_name, **options):
    options = dict(temperature=1.0, max_new_tokens=256, seed=0, batch_size=16) | options
    dataset = RecipeArguments(dataset_name=dataset_name, columns=columns)
    return sampling.sample(model, dataset, output=output, pairs=pairs, num_samples=num_samples, **options)


def write(name, rows):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def read(file):
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


@pytest.fixture
def prompts():
    """A file that holds prompts alone, one of them twice, one of them empty."""
    return write("prompts.jsonl", [{"prompt": text} for text in [*QUESTIONS, QUESTIONS[0], " "]])


@pytest.fixture(scope="module")
def greedy(tiny_model):
    """What the tiny model says to each question."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    asked = [[{"role": "user", "content": text}] for text in QUESTIONS]
    return [answer["text"] for answer in generate(model, tokenizer, asked, max_new_tokens=8)]


def test_each_prompt_of_a_file_is_answered_once_in_order(prompts, tiny_model, greedy, capsys):
    flags = ["--dataset_name", prompts, "--temperature", "0", "--max_new_tokens", "8"]
    assert main(["sample", str(tiny_model), *flags]) == 0
    assert read("samples.jsonl") == [
        {"prompt": [{"role": "user", "content": text}], "completions": [answer], "ended": [False]}
        for text, answer in zip(QUESTIONS, greedy, strict=True)
    ]
    output = capsys.readouterr().out
    assert re.search(r"^7 rows, and left out:\n  the last user turn is blank +-1\n6 prompts\n", output, re.MULTILINE)
    assert "6 prompts, 6 answers, 6 of them cut short" in output
    assert [path.name for path in Path().glob("*.part")] == []
    assert main(["sample", str(tiny_model), *flags]) == 2
    assert "samples.jsonl exists already. Name another file with --output." in capsys.readouterr().err


def test_the_seed_decides_the_samples(prompts, tiny_model):
    first, same, other = (
        read(sample(str(tiny_model), dataset_name=prompts, num_samples=3, max_new_tokens=6, seed=seed, output=name))
        for seed, name in ((1, "a"), (1, "b"), (2, "c"))
    )
    assert first == same != other
    assert all(len(set(line["completions"])) > 1 for line in first)


@pytest.mark.parametrize("cut", [0, 30])
def test_an_interrupted_call_goes_on_and_writes_the_same(cut, tiny_model, monkeypatch):
    many = write("many.jsonl", [{"prompt": f"Number {number}?"} for number in range(30)])
    options = dict(dataset_name=many, max_new_tokens=4, batch_size=1)
    whole = sample(str(tiny_model), output="whole", **options).read_text()
    asked, most = [], 16

    def counted(model, tokenizer, prompts, **rest):
        asked.append(len(prompts))
        if sum(asked) > most:
            raise KeyboardInterrupt
        return generate(model, tokenizer, prompts, **rest)

    monkeypatch.setattr(sampling, "generate", counted)
    with pytest.raises(KeyboardInterrupt):
        sample(str(tiny_model), output="cut", **options)
    assert not Path("cut").exists()
    [part] = Path().glob("cut.*.part")
    assert len(read(part)) == 16
    part.write_text(part.read_text()[: -cut or None])  # as a killed process may leave it
    asked[:] = []
    monkeypatch.setattr(
        sampling, "generate", lambda *given, **rest: (asked.append(len(given[2])), generate(*given, **rest))[1]
    )
    assert sample(str(tiny_model), output="cut", **options).read_text() == whole
    assert asked == ([8, 6] if not cut else [8, 8, 6])
    assert not part.exists()


def test_other_settings_do_not_go_on_with_what_is_there(prompts, tiny_model, greedy):
    for part in ("x.00000000.part", "x.part"):
        Path(part).write_text('{"completions": ["old"], "ended": [true]}\n')
    lines = read(sample(str(tiny_model), dataset_name=prompts, temperature=0, max_new_tokens=8, output="x"))
    assert [line["completions"][0] for line in lines] == greedy


def test_own_answers_become_the_rejected_side_and_those_that_make_no_pair_are_counted(tiny_model, greedy, capsys):
    chosen = [greedy[0], *(f"A fine answer to {text}" for text in QUESTIONS[1:])]
    rows = [{"prompt": q, "chosen": c, "rejected": "No."} for q, c in zip(QUESTIONS, chosen, strict=True)]
    dataset = write("rows.jsonl", rows)
    flags = ["--dataset_name", dataset, "--pairs", "--temperature", "0", "--max_new_tokens", "8"]
    assert main(["sample", str(tiny_model), *flags]) == 0
    output = capsys.readouterr().out
    assert re.search(r"^5 pairs, and left out:\n  chosen and rejected say the same +-1\n", output, re.MULTILINE)
    written = load_rows(RecipeArguments(dataset_name="pairs.jsonl"))["train"]
    pairs = recognise(written)(written)
    assert recognise(written).__name__ == "preference_jsonl"
    assert [pair["rejected"][0]["content"] for pair in pairs] == greedy[1:]
    assert [pair["chosen"][0]["content"] for pair in pairs] == chosen[1:]
    assert [pair["prompt"][0]["content"] for pair in pairs] == QUESTIONS[1:]


CHECK = """
def check(prompt, answer, reference, least=0):
    assert prompt[0]["content"].startswith("Question")
    return None if len(answer) % 3 == 2 else len(answer) % 3 == int(reference)
"""


@pytest.fixture
def checked():
    """Flags that sample answers to questions with references, and a file with a function that marks them."""
    Path("check.py").write_text(CHECK)
    questions = write("questions.jsonl", [{"question": q, "answer": str(n % 2)} for n, q in enumerate(QUESTIONS)])
    flags = ["--dataset_name", questions, "--num_samples", "4", "--max_new_tokens", "8", "--columns"]
    return [*flags, "prompt=question,reference=answer"]


def test_a_function_of_ones_own_marks_answers_by_the_columns_that_it_names(checked, tiny_model, capsys):
    assert main(["sample", str(tiny_model), *checked]) == 0
    lines = read("samples.jsonl")
    assert [line["reference"] for line in lines] == ["0", "1"] * 3, "kept, so that the answers can be marked later"
    assert main(["sample", str(tiny_model), *checked, "--judge", "check.py:check"]) == 0
    expected, unknown = set(), 0
    for line in lines:
        kinds = {text: len(text) % 3 for text in line["completions"]}
        right, wrong = (
            [text for text in kinds if kinds[text] == mark]
            for mark in sorted({0, 1}, key=lambda m: m != int(line["reference"]))
        )
        unknown += sum(kind == 2 for kind in kinds.values())
        expected |= {(line["prompt"][0]["content"], a, b) for a in right for b in wrong}
    pairs = read("pairs.jsonl")
    assert {(pair["prompt"][0]["content"], pair["chosen"], pair["rejected"]) for pair in pairs} == expected
    assert len(pairs) == len(expected) > 0
    assert {pair["preference_strength"] for pair in pairs} == {1.0}
    assert unknown
    assert re.search(rf"^  an answer that the judge cannot judge +-{unknown}$", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize(
    ("judge", "columns", "message"),
    [
        ("check.py:check", "prompt=question", "The judge needs the columns reference, got"),
        ("check.py:nothing", "prompt=question", "check.py has no function nothing"),
        ("other.py:check", "prompt=question", "There is no file other.py"),
    ],
)
def test_a_judge_that_cannot_judge_is_refused_before_a_model_is_loaded(judge, columns, message, checked, capsys):
    assert main(["sample", "no model is loaded", *checked[:-1], columns, "--judge", judge]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("text", ['[{"role": "user", "content": "Why', '[{"role": "user", "content": "Why?"}]'])
def test_an_answer_that_looks_like_messages_stays_text(text):
    sides = {"prompt": [{"role": "user", "content": "Q?"}], "chosen": [{"role": "assistant", "content": "A."}]}
    [pair] = sampling._own_rejected([{**sides, "completions": [text], "ended": [True]}])
    assert pair["rejected"] == [{"role": "assistant", "content": text}]


def test_prompts_that_the_model_cannot_answer_are_left_out_and_counted(tiny_model, greedy, tmp_path, capsys):
    """Those too long for it or refused by its template; a model without a pad token answers the others."""
    model = str(shutil.copytree(tiny_model, tmp_path / "model"))
    tokenizer = AutoTokenizer.from_pretrained(model)
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
    tokenizer.chat_template, tokenizer.pad_token = refuses + tokenizer.chat_template, None
    tokenizer.save_pretrained(model)
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    users = [[{"role": "user", "content": text}] for text in (QUESTIONS[0], "long " * 500, *QUESTIONS[1:])]
    mixed = write("mixed.jsonl", [{"prompt": prompt} for prompt in (system, *users)])
    lines = read(sample(model, dataset_name=mixed, temperature=0, max_new_tokens=8))
    assert [line["completions"][0] for line in lines] == greedy
    assert [line["prompt"][-1]["content"] for line in lines] == QUESTIONS
    output = capsys.readouterr().out
    for reason in ("the chat template refuses the conversation", "the prompt fills the model's context"):
        assert re.search(rf"^  {reason} +-1$", output, re.MULTILINE)
    with pytest.raises(RecipeError, match=r"No prompts are left\. The lines above name"):
        sample(model, dataset_name=write("long.jsonl", [{"prompt": "long " * 500}]), output="none")


def test_the_test_split_can_be_sampled_too(tiny_model):
    Path("both").mkdir()
    for split in ("train", "test"):
        write(f"both/{split}.jsonl", [{"prompt": f"Of {split}?"}])
    assert main(["sample", str(tiny_model), "--dataset_name", "both", "--dataset_train_split", "test"]) == 0
    assert [line["prompt"][0]["content"] for line in read("samples.jsonl")] == ["Of test?"]


def test_prompts_come_through_the_dataset_adapters(rows_of, tiny_model):
    for name in ("hh", "shp", "oasst1", "ultrafeedback"):
        lines = read(sample(str(tiny_model), dataset_name=f"{rows_of[name]}:9", max_new_tokens=2, output=name))
        assert 3 <= len(lines) <= 9
        assert all(line["prompt"][-1]["role"] == "user" for line in lines)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"temperature": 0.0, "num_samples": 2}, "At temperature 0 all answers to a prompt are the same"),
        ({"pairs": True}, "preference_jsonl needs the columns prompt, chosen and rejected"),
        ({"columns": "prompt=question"}, "which needs a column of its own"),
        ({"dataset_name": "nowhere.jsonl"}, "There is no file or folder nowhere.jsonl"),
    ],
)
def test_a_call_that_makes_no_sense_is_refused(flags, message, prompts):
    with pytest.raises(RecipeError, match=message):
        sample("no model is loaded", **({"dataset_name": prompts} | flags))


@pytest.mark.parametrize(
    "flags", [("--num_samples", "0"), ("--temperature", "-1"), ("--temperature", "nan"), ("--max_new_tokens", "few")]
)
def test_a_number_that_makes_no_sense_is_refused(flags, prompts, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["sample", "no model is loaded", "--dataset_name", prompts, *flags])
    assert f"argument {flags[0]}: invalid number value: '{flags[1]}'" in capsys.readouterr().err


def test_a_model_that_is_not_there_is_named(prompts, capsys):
    assert main(["sample", "outputs/nothing", "--dataset_name", prompts]) == 2
    assert "Cannot load outputs/nothing" in capsys.readouterr().err
