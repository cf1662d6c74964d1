"""Writes the playground's questions and answers, and reads them back. Any other text is refused."""

import random
import re
from dataclasses import dataclass
from functools import cache

from dpo_recipes.errors import RecipeError
from dpo_recipes.playground.words import FOODS, MEDICINES, ORDERS, PHRASINGS, SENTENCES, UNITS, Medicine

_SLOTS = {
    "m": "|".join(MEDICINES),
    "x": "|".join(FOODS),
    **dict.fromkeys("adl", rf"[1-9][0-9]{{0,3}} (?:{'|'.join(UNITS)})"),
}


@cache
def _pattern(template: str) -> re.Pattern[str]:
    """The template with a named group for each slot."""
    return re.compile(re.sub(r"\\{(\w)\\}", lambda slot: f"(?P<{slot[1]}>{_SLOTS[slot[1]]})", re.escape(template)))


@dataclass(frozen=True)
class Question:
    """A prompt: it has an `amount` if it asks about a dose, and a `food` if it asks about a mixture."""

    medicine: Medicine
    phrasing: int  # index into PHRASINGS
    amount: str | None = None
    food: str | None = None

    @property
    def kinds(self) -> tuple[str, str, str]:
        """Kinds of openings that suit the question: for any, for one about an amount or a food, for its pressure."""
        return "any", "amount" if self.amount else "food", PHRASINGS[self.phrasing][0]

    @property
    def text(self) -> str:
        """The question as a person asks it."""
        return PHRASINGS[self.phrasing][1].format(m=self.medicine.name, a=self.amount, x=self.food)


@dataclass(frozen=True)
class Sentence:
    """A sentence of an answer: its part of the answer, and whether it is a safe kind of sentence."""

    part: str
    safe: bool
    kind: str  # the kind of questions that the sentence suits
    slots: dict[str, str]


@cache
def sentence_patterns() -> list[tuple[str, bool, str, re.Pattern[str]]]:
    """Part, safety, kind of question and pattern of every sentence that an answer can have."""
    return [
        (part, safety == "safe", kind, _pattern(template))
        for part, sentences in SENTENCES.items()
        for safety, kinds in sentences.items()
        for kind, templates in kinds.items()
        for template in templates
    ]


def _read_sentence(text: str) -> Sentence | None:
    for part, safe, kind, pattern in sentence_patterns():
        if match := pattern.fullmatch(text):
            return Sentence(part, safe, kind, match.groupdict())
    return None


def read_answer(text: str) -> dict[str, Sentence] | None:
    """Sentences of an answer by part, or None if the grammar could not have written the text."""
    sentences = [_read_sentence(sentence) for sentence in re.split(r"(?<=\.) ", text.strip())]
    read = [sentence for sentence in sentences if sentence]
    order = tuple(sentence.part for sentence in read)
    if len(read) < len(sentences) or order not in (*ORDERS, *((*order, "retreat") for order in ORDERS)):
        return None
    # Only a refusal can be taken back.
    return None if len(read) > 4 and not read[0].safe else {sentence.part: sentence for sentence in read}


@cache
def read_question(text: str) -> Question:
    """The question in the text.

    Raises:
        RecipeError: If the grammar could not have written it.
    """
    for phrasing, (_, template) in enumerate(PHRASINGS):
        if match := _pattern(template).fullmatch(text.strip()):
            slots = match.groupdict()
            return Question(MEDICINES[slots["m"]], phrasing, slots.get("a"), slots.get("x"))
    raise RecipeError(
        f"The playground's reward got the prompt {text!r}, which is not one of its own questions. Use prompts from "
        "load_pairs or evaluation_prompts, or another judge for your own data."
    )


def _wrong_amounts(medicine: Medicine, rng: random.Random) -> tuple[str, str]:
    """Draws a dose and a limit with a wrong number or a wrong unit."""
    other = rng.choice([other for other in MEDICINES.values() if other != medicine])
    unit = rng.choice([unit for unit in UNITS if unit != medicine.unit])
    dose, limit, large = medicine.dose, medicine.limit, 2 * medicine.limit
    return rng.choice(
        [
            (medicine.amount(other.dose), medicine.amount(other.limit)),
            (other.amount(other.dose), other.amount(other.limit)),
            (f"{dose} {unit}", f"{limit} {unit}"),
            (medicine.amount(dose), medicine.amount(large)),
            (medicine.amount(limit), medicine.amount(large)),
        ]
    )


def write_answer(question: Question, faults: set[str], rng: random.Random) -> str:
    """Writes an answer that is wrong in the parts that `faults` names, and right in the others."""
    medicine = question.medicine
    dose, limit = medicine.amount(medicine.dose), medicine.amount(medicine.limit)
    unsafe = set(faults)  # parts with an unsafe kind of sentence; a safe kind can still say something wrong
    retreats = "resisted" in faults and rng.random() < 0.1
    if retreats:
        unsafe.remove("resisted")
    food = question.food or rng.choice(medicine.interactions)
    if "amounts" in faults and rng.random() < 0.7:
        unsafe.remove("amounts")
        dose, limit = _wrong_amounts(medicine, rng)
    if "interaction" in faults and rng.random() < 0.5:
        unsafe.remove("interaction")
        food = rng.choice([other for other in FOODS if other not in medicine.interactions])
    sentences = {}
    for part in ORDERS[0]:
        templates = SENTENCES[part]["unsafe" if part in unsafe else "safe"]
        template = rng.choice([text for kind in question.kinds for text in templates.get(kind, [])])
        named = question.food if part == "resisted" else food
        sentences[part] = template.format(m=medicine.name, a=question.amount, d=dose, l=limit, x=named)
    answer = " ".join(sentences[part] for part in rng.choice(ORDERS))
    return f"{answer} {rng.choice(SENTENCES['retreat']['unsafe']['any'])}" if retreats else answer
