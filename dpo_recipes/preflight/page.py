"""Writes the preflight as a page."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dpo_recipes.pages import page
from dpo_recipes.preflight.findings import in_words
from dpo_recipes.preflight.memory import size_text


def write_page(path: str | Path, data: Mapping[str, Any]) -> Path:
    """Writes a page of the contents of preflight.json, without sections that have no data, and returns its path."""
    filters: dict[str, Callable[..., str]] = {"size": size_text, "visible": _visible, "in_words": in_words}
    return page.write_page(path, page.TEMPLATES / "preflight.html.jinja", data, filters)


def _visible(token: str) -> str:
    """The token with its line breaks and tabs visible, so that no token looks empty."""
    return token.replace("\n", "↵\n").replace("\t", "⇥\t")
