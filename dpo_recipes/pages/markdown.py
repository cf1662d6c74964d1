"""Escapes names and settings for Markdown, so that text from data and users stays text."""

import html
import json
import re

from dpo_recipes.terminal import shown


def one_line(text: object) -> str:
    """The text on one line, without HTML."""
    return html.escape(" ".join(shown(str(text)).split()), quote=False)


def inline(name: object) -> str:
    """The name on one line, without HTML or marks of Markdown."""
    return re.sub(r"[\\`*\[\]|!~]|(?<!\w)_|_(?!\w)", r"\\\g<0>", one_line(name))


def code(name: object) -> str:
    """The name as a span of code, which ends where the name does."""
    line = " ".join(shown(str(name)).split()).replace("`", "'")
    return f"`{line}`"


def fence(text: str) -> str:
    """The text as a block of code, between fences that are longer than any fence in the text."""
    marks = "`" * max([3, *(len(run) + 1 for run in re.findall("`{3,}", text))])
    return f"{marks}\n{shown(text)}\n{marks}"


def yaml_text(text: str) -> str:
    """The text as a value in a YAML header."""
    return text if re.fullmatch(r"[A-Za-z][\w./-]*", text) else json.dumps(text)
