"""Fills the templates of pages: each is one file without scripts, for a screen, a phone or paper."""

from collections.abc import Callable, Iterable, Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from matplotlib.ticker import MaxNLocator

from dpo_recipes.files import write_text
from dpo_recipes.terminal import duration, shown

TEMPLATES = Path(__file__).parent
NOTHING = "\N{EN DASH}"


def write_page(
    path: str | Path, template: Path, data: Mapping[str, Any], filters: Mapping[str, Callable[..., str]] | None = None
) -> Path:
    """Writes the filled template and returns the path of the file."""
    return write_text(path, fill(template, data, filters))


def fill(template: Path, data: Mapping[str, Any], filters: Mapping[str, Callable[..., str]] | None = None) -> str:
    """The template filled with the data, which an HTML template escapes."""
    environment = Environment(
        loader=FileSystemLoader([template.parent, TEMPLATES]),
        finalize=lambda value: shown(value) if type(value) is str else value,
        autoescape=template.name.endswith((".html.jinja", ".svg.jinja")),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update({"number": number, "ticks": ticks, "scale": scale, "time": time, **(filters or {})})
    return environment.get_template(template.name).render(data)


def number(value: float | None, places: int = 3) -> str:
    """The number with its decimals and thousands separators; a dash for None."""
    return NOTHING if value is None else f"{value:,.{places}f}".replace("-", "\N{MINUS SIGN}")


def ticks(estimates: Iterable[Mapping[str, float]]) -> list[float]:
    """Round numbers on an axis that holds 0 and every interval; an axis of shares ends at 0 and 1."""
    names = ("low", "high", "seeds_low", "seeds_high")
    ends = [0.0, *(end for each in estimates for name in names if isfinite(end := each.get(name) or 0.0))]
    most = 1.0 if min(ends) == 0 and max(ends) <= 1 else max(ends)
    return scale([min(ends), most])


def scale(values: Iterable[float]) -> list[float]:
    """Round numbers at equal distances, from at most the least value to at least the greatest finite one."""
    finite = list(filter(isfinite, values)) or [0.0]
    return list(MaxNLocator(4, steps=(1, 2, 2.5, 5, 10)).tick_values(min(finite), max(finite)))


def time(seconds: float | None) -> str:
    """The duration in words; a dash for None."""
    return NOTHING if seconds is None else duration(seconds)
