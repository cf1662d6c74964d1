"""The preflight as a page."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dpo_recipes.pages import page
from dpo_recipes.preflight.memory import size_text


def write_page(path: str | Path, data: Mapping[str, Any]) -> Path:
    """The path of a page that shows what preflight.json holds; sections without data are left out."""
    filters: dict[str, Callable[..., str]] = {"size": size_text, "visible": _visible}
    return page.write_page(path, page.TEMPLATES / "preflight.html.jinja", data, filters)


def _visible(token: str) -> str:
    """A token with its line breaks and tabs shown, so that none looks empty."""
    return token.replace("\n", "↵\n").replace("\t", "⇥\t")
