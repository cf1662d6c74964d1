"""Draws the playground's data: preference pairs, rows that teach the language, and prompts that no pair has."""

import random
from collections.abc import Iterator
from functools import cache
from typing import Any

from datasets import Dataset, DatasetDict

from dpo_recipes.errors import RecipeError
from dpo_recipes.playground.grammar import Question, write_answer
from dpo_recipes.playground.judge import PARTS, Message
from dpo_recipes.playground.words import MEDICINES, PHRASINGS

EVALUATION_COMBINATIONS = 200
TEST_COMBINATIONS = 100


def ask(combination: tuple[str, int], rng: random.Random) -> Question:
    """A question with that medicine and phrasing; the amount or the food is drawn."""
    medicine, phrasing = MEDICINES[combination[0]], combination[1]
    if "{a}" in PHRASINGS[phrasing][1]:
        above_limit = sorted({medicine.limit + medicine.dose, 2 * medicine.limit, 3 * medicine.limit})
        return Question(medicine, phrasing, amount=medicine.amount(rng.choice(above_limit)))
    return Question(medicine, phrasing, food=rng.choice(medicine.interactions))


def _draw_faults(rng: random.Random) -> set[str]:
    """Draws the wrong parts of a rejected answer: 30 % have one; the others give in and have one to three more."""
    if rng.random() < 0.3:
        return {rng.choice((*PARTS, "resisted"))}
    return {"resisted", *rng.sample(PARTS[:3], rng.choice((1, 2, 3)))}


@cache
def combinations() -> dict[str, tuple[tuple[str, int], ...]]:
    """The (medicine, phrasing) combinations of train, test and evaluation; each belongs to one of the three."""
    drawn = [(name, phrasing) for name in MEDICINES for phrasing in range(len(PHRASINGS))]
    random.Random("combinations").shuffle(drawn)
    tested = EVALUATION_COMBINATIONS + TEST_COMBINATIONS
    return {
        "evaluation": tuple(drawn[:EVALUATION_COMBINATIONS]),
        "test": tuple(drawn[EVALUATION_COMBINATIONS:tested]),
        "train": tuple(drawn[tested:]),
    }


def write_pairs(split: str, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yields so many pairs over the combinations of the split."""
    rng = random.Random(f"{split} {seed}")  # a string is hashed the same in every process
    for index in range(count):
        question = ask(rng.choice(combinations()[split]), rng)
        faults = _draw_faults(rng)
        chosen, rejected = write_answer(question, set(), rng), write_answer(question, faults, rng)
        yield {
            "id": f"{split}-{seed}-{index}",
            "prompt": [{"role": "user", "content": question.text}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
            "faults": len(faults),
        }


def load_pairs(
    dataset_name: str | None, *, train_pairs: int = 704, test_pairs: int = 400, seed: int = 0
) -> DatasetDict:
    """Preference pairs, split in train and test: chosen is right in all parts, rejected is wrong in `faults` parts.

    Args:
        dataset_name: `playground`. The argument exists so that another name is refused rather than ignored.
        train_pairs: Pairs over the training combinations of medicine and phrasing.
        test_pairs: Pairs over the combinations held out for testing.
        seed: Seed of the pairs; the combinations of a split stay the same.

    Raises:
        RecipeError: If `dataset_name` is another dataset.
    """
    if dataset_name != "playground":
        raise RecipeError(
            f"This recipe makes its own pairs and reads no dataset, got dataset_name {dataset_name!r}. For your own "
            "pairs take a recipe that reads them: dpo-recipes train preference-lora --dataset_name FILE."
        )
    sizes = {"train": train_pairs, "test": test_pairs}
    return DatasetDict({split: Dataset.from_list(list(write_pairs(split, n, seed))) for split, n in sizes.items()})


def both_answers(pairs: Dataset) -> Dataset:
    """Prompt-completion rows for SFTTrainer: the chosen and the rejected answer of every pair, one after the other."""
    rows = ({"prompt": pair["prompt"], "completion": pair[side]} for pair in pairs for side in ("chosen", "rejected"))
    return Dataset.from_list(list(rows))


def evaluation_prompts(count: int = EVALUATION_COMBINATIONS, *, seed: int = 0) -> list[list[Message]]:
    """Prompts with different (medicine, phrasing) combinations, of which no pair of load_pairs has any."""
    if not 0 < count <= EVALUATION_COMBINATIONS:
        raise RecipeError(f"The playground has 1 to {EVALUATION_COMBINATIONS} evaluation prompts, got {count}.")
    rng = random.Random(f"evaluation {seed}")
    drawn = rng.sample(combinations()["evaluation"], count)
    return [[{"role": "user", "content": ask(combination, rng).text}] for combination in drawn]
