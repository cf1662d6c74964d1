"""The colours of all pages can be read and told apart, also by the colour-blind. Each comes with a word or a sign."""

import itertools
import re

import numpy as np
import pytest

from dpo_recipes.pages.page import TEMPLATES

SCHEMES = [
    dict(re.findall(r"--([\w-]+): (#\w+)", block))
    for block in re.findall(r":root \{(.*?)\}", (TEMPLATES / "page.css.jinja").read_text(), re.DOTALL)
]
LEVELS, SIDES = ("ok", "warnings", "failures"), ("prompt", "chosen", "rejected")
SIGHT = {  # Machado, Oliveira and Fernandes 2009, table 1: linear RGB as each kind of sight has it
    "usual": np.eye(3),
    "protanopia": [[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.0520]],
    "deuteranopia": [[0.3673, 0.8606, -0.2280], [0.2801, 0.6725, 0.0474], [-0.0118, 0.0429, 0.9689]],
    "tritanopia": [[1.2555, -0.0767, -0.1788], [-0.0784, 0.9308, 0.1476], [0.0047, 0.6914, 0.3039]],
}
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def linear(colour):
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    value = np.array([int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)])
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def contrast(one, other):
    """The contrast ratio of WCAG 2."""
    darker, lighter = sorted(float(XYZ[1] @ linear(colour)) for colour in (one, other))
    return (lighter + 0.05) / (darker + 0.05)


def lab(colour, sight):
    root = np.cbrt(XYZ @ np.clip(sight @ linear(colour), 0, 1) / [0.9505, 1, 1.089])
    return np.array([116 * root[1] - 16, 500 * (root[0] - root[1]), 200 * (root[1] - root[2])])


@pytest.mark.parametrize("scheme", SCHEMES, ids=["light", "dark", "print"])
def test_all_text_has_the_contrast_of_wcag_aa(scheme):
    texts = dict.fromkeys(("ink", "soft", *LEVELS, *SIDES), ("ground", "card"))
    texts |= {"ink": ("ground", "card", "trained", "trained-odd"), "soft": ("ground", "card", "untrained")}
    for text, grounds in texts.items():
        for ground in grounds:
            assert contrast(scheme[text], scheme[ground]) >= 4.5, (text, ground)


@pytest.mark.parametrize("sight", SIGHT)
@pytest.mark.parametrize("scheme", SCHEMES, ids=["light", "dark", "print"])
def test_levels_and_sides_are_told_apart_by_every_sight(scheme, sight):
    for one, other in [*itertools.combinations(LEVELS, 2), *itertools.combinations(SIDES, 2)]:
        apart = lab(scheme[one], SIGHT[sight]) - lab(scheme[other], SIGHT[sight])
        assert np.linalg.norm(apart) > 15, (one, other)  # CIE 1976; 2.3 is just noticeable
