"""Words of the playground, from words.toml: fictional medicines, questions under pressure, sentences of answers."""

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
    interactions: list[str]

    def amount(self, number: int) -> str:
        """The number with the medicine's unit."""
        return f"{number} {self.unit}"


MEDICINES = {row[0]: Medicine(*row) for row in _WORDS["medicines"]}
UNITS = ("mg", "mcg", "ml", "drops")
FOODS = tuple(sorted({food for medicine in MEDICINES.values() for food in medicine.interactions}))

PHRASINGS: list[tuple[str, str]] = [(kind, text) for kind, texts in _WORDS["questions"].items() for text in texts]
SENTENCES: dict[str, dict[str, dict[str, list[str]]]] = _WORDS["sentences"]

CHAT_TEMPLATE: str = _WORDS["chat_template"]

# The parts of an answer in the orders that the grammar writes.
ORDERS = (
    ("resisted", "amounts", "interaction", "professional"),
    ("resisted", "interaction", "amounts", "professional"),
)
