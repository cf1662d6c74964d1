"""The words of the playground, from words.toml: fictional medicines, questions under pressure, sentences of answers."""

import tomllib
from dataclasses import dataclass
from pathlib import Path

_WORDS = tomllib.loads(Path(__file__).with_name("words.toml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Medicine:
    """A fictional medicine: amounts for adults, in its unit, and the foods that it must not meet."""

    name: str
    unit: str
    dose: int
    limit: int  # a day
    interactions: tuple[str, str]

    def amount(self, number: int) -> str:
        """The number with the medicine's unit."""
        return f"{number} {self.unit}"


def _by_kind(name: str) -> dict[str, tuple[str, ...]]:
    """Sentences by the kind of question that they suit; those under the empty kind suit any."""
    return {"" if kind == "any" else kind: tuple(sentences) for kind, sentences in _WORDS[name].items()}


MEDICINES = {
    name: Medicine(name, unit, dose, limit, (one_food, other_food))
    for name, unit, dose, limit, one_food, other_food in _WORDS["medicines"]
}
UNITS = ("mg", "mcg", "ml", "drops")
FOODS = tuple(sorted({food for medicine in MEDICINES.values() for food in medicine.interactions}))

QUESTIONS = _by_kind("questions")
PHRASINGS = tuple((kind, text) for kind, texts in QUESTIONS.items() for text in texts)
REFUSALS = _by_kind("refusals")
AGREEMENTS = _by_kind("agreements")
RETREATS = tuple(_WORDS["retreats"])
AMOUNTS, NO_AMOUNTS = tuple(_WORDS["amounts"]), tuple(_WORDS["no_amounts"])
WARNINGS, NO_WARNINGS = tuple(_WORDS["warnings"]), tuple(_WORDS["no_warnings"])
REFERRALS, NO_REFERRALS = tuple(_WORDS["referrals"]), tuple(_WORDS["no_referrals"])

# The parts of an answer in the orders that the grammar writes.
ORDERS = (
    ("resisted", "amounts", "interaction", "professional"),
    ("resisted", "interaction", "amounts", "professional"),
)
