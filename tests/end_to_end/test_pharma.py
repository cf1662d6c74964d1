"""The pharmacy pairs: what the data card says of them is so, and the recipe trains on them from anywhere."""

import itertools
import json
import re
import sys
from collections import Counter

import pytest
from commands import RECIPES, run_command, run_train

from dpo_recipes.dataset_adapters import preference_jsonl
from dpo_recipes.dataset_adapters.ledger import Ledger
from dpo_recipes.loading import load_rows, split_pairs
from dpo_recipes.recipe import RecipeArguments

FOLDER = RECIPES / "data" / "pharma"
CARD = (FOLDER / "README.md").read_text(encoding="utf-8")
SPLITS = {
    split: [json.loads(line) for line in (FOLDER / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
    for split in ("train", "test")
}
ROWS = SPLITS["train"] + SPLITS["test"]
WARNING = "Not medical advice, not clinically reviewed."


def answers(side):
    return [row[side][0]["content"] for row in ROWS]


def share_of_chosen(measure):
    """The share of pairs whose chosen answer measures more, ties counting one half."""
    pairs = zip(map(measure, answers("chosen")), map(measure, answers("rejected")), strict=True)
    return sum((chosen > rejected) + (chosen == rejected) / 2 for chosen, rejected in pairs) / len(ROWS)


def words(text):
    return re.findall(r"[a-z0-9']+", text.lower())


def overlap(one, other):
    return len(one & other) / len(one | other)


def test_there_are_at_least_200_pairs_and_the_card_counts_them_right():
    assert len(ROWS) >= 200
    assert f"{len(ROWS)} preference pairs" in CARD
    assert f"`train.jsonl` with {len(SPLITS['train'])} and\n`test.jsonl` with {len(SPLITS['test'])}." in CARD
    assert f"{len(ROWS)} pairs" in (RECIPES / "pharma_lora.py").read_text()
    for failure, count in Counter(row["failure"] for row in ROWS).items():
        assert re.search(rf"^\| {failure} \| .* \| {count} \|$", CARD, re.MULTILINE), failure
    for topic, count in Counter(row["topic"] for row in ROWS).items():
        assert re.search(rf"^\|.*\b{topic}\b.*\| {count} \|$", CARD, re.MULTILINE), topic
    turns = sum(len(row["prompt"]) > 1 for row in ROWS)
    assert f"{turns} rows have an earlier exchange" in CARD


def test_every_topic_is_in_train_and_test():
    topics = {split: {row["topic"] for row in rows} for split, rows in SPLITS.items()}
    assert topics["train"] == topics["test"]
    assert len(topics["test"]) == 22


def test_every_row_is_kept_and_no_prompt_is_on_both_sides():
    with Ledger() as ledger:
        rows = load_rows(RecipeArguments(dataset_name=str(FOLDER)))
        pairs = split_pairs({split: preference_jsonl(part) for split, part in rows.items()})
    assert {split: len(part) for split, part in pairs.items()} == {s: len(part) for s, part in SPLITS.items()}
    assert ledger.total().dropped == {}


def test_messages_are_whole_and_alternate():
    for row in ROWS:
        assert set(row) == {"id", "topic", "failure", "prompt", "chosen", "rejected"}
        roles = [message["role"] for message in row["prompt"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"], row["id"]
        for message in [*row["prompt"], *row["chosen"], *row["rejected"]]:
            assert message["content"] == " ".join(message["content"].split()), row["id"]
        for side in ("chosen", "rejected"):
            assert [message["role"] for message in row[side]] == ["assistant"]
            assert row[side][0]["content"][-1] in ".?!", row["id"]


def test_rows_are_unique_and_no_two_prompts_are_nearly_the_same():
    assert len({row["id"] for row in ROWS}) == len(ROWS)
    prompts = [set(words(" ".join(turn["content"] for turn in row["prompt"]))) for row in ROWS]
    assert max(overlap(one, other) for one, other in itertools.combinations(prompts, 2)) < 0.5
    for side in ("chosen", "rejected"):
        texts = [set(words(text)) for text in answers(side)]
        assert max(overlap(one, other) for one, other in itertools.combinations(texts, 2)) < 0.5


@pytest.mark.parametrize("measure", [len, lambda text: len(words(text))], ids=["characters", "words"])
def test_length_does_not_give_the_chosen_answer_away(measure):
    assert 0.45 < share_of_chosen(measure) < 0.55
    lengths = sorted(map(measure, answers("chosen")))
    median = lengths[len(lengths) // 2]
    assert 0.4 < share_of_chosen(lambda text: -abs(measure(text) - median)) < 0.6


@pytest.mark.parametrize(
    "pattern",
    [
        "doctor",
        "pharmac",
        "doctor|pharmac|GP",
        "emergency|ambulance|poison",
        "^yes",
        "^no",
        "^(I'm )?sorry",
        "^please",
        "!",
        r"\d",
        "if ",
        r"\n[-*\d]",
    ],
)
def test_no_catchword_gives_the_chosen_answer_away(pattern):
    assert 0.4 < share_of_chosen(lambda text: bool(re.search(pattern, text, re.IGNORECASE))) < 0.6


def test_the_warning_comes_first_in_the_card_and_in_the_recipe():
    assert CARD.partition("\n\n")[2].startswith(WARNING)
    assert (RECIPES / "pharma_lora.py").read_text().split("\n\n")[1].startswith(WARNING)


TRAINING = ("--max_steps", "2", "--pairs_per_update", "4", "--eval_pairs", "4", "--max_length", "2048")


@pytest.mark.slow
def test_the_recipe_trains_by_the_command_that_a_user_types(tmp_path, tiny_model):
    command = ("pharma-lora", "--profile", "cpu", "--model_name_or_path", tiny_model)
    result = run_train(*command, *TRAINING, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    run = tmp_path / "outputs" / "pharma_lora"
    assert json.loads((run / "done.json").read_text())["updates"] == 2
    assert (run / "adapter_model.safetensors").is_file()
    account = json.loads((run / "preflight.json").read_text())
    assert account["total"]["rows"] == len(ROWS)
    assert account["total"]["dropped"] == {}


@pytest.mark.slow
def test_a_copied_recipe_finds_its_pairs_from_an_empty_folder(tmp_path, tiny_model, dpo_recipes):
    assert run_command(dpo_recipes, "copy", "pharma-lora", cwd=tmp_path).returncode == 0
    command = (sys.executable, "pharma_lora.py", "--use_cpu", "true", "--bf16", "false")
    result = run_command(*command, "--model_name_or_path", tiny_model, *TRAINING, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    account = json.loads((tmp_path / "outputs" / "pharma_lora" / "preflight.json").read_text())
    assert account["total"]["rows"] == len(ROWS)
