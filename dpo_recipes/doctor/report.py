"""Writes the doctor's tables for the screen, as Markdown and as JSON, without private text."""

import getpass
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dpo_recipes.files import write_json, write_text

SECRET_NAMES = re.compile(r"KEY|TOKEN|SECRET|PASS|CREDENTIAL|AUTH", re.IGNORECASE)
SECRET_FORMS = re.compile(r"\b(?:hf_|sk-|ghp_|gho_|github_pat_|glpat-|xox[a-z]-|AKIA)[\w-]{8,}")
PATHS = re.compile(r"(?:(?<![\w./<>-])(?:~\w*|[A-Za-z]+:/|\.{1,2})?|<path>)(?:/[\w.@+%~:-]+)+/?")
QUOTED_PATHS = re.compile(r"""(?<=(['"]))[/~][^'"\n]*(?=\1)""")


@dataclass
class Finding:
    """A fault of this machine and its remedy."""

    what: str
    remedy: str


@dataclass
class Part:
    """One table of the doctor, with its findings."""

    title: str
    header: list[str]
    rows: list[list[str]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    note: str = ""
    """Explanation of the table, written to the file only."""
    fold: int = 1
    """Number of blocks of rows that stand next to each other on the screen."""


def scrub(text: str) -> str:
    """The text without paths, user name, host name and secrets, which include values of environment variables."""
    secrets = [value for name, value in os.environ.items() if SECRET_NAMES.search(name) and len(value) > 5]
    if secrets:  # in one pass, longest first: "secret" may itself be the value of a variable
        text = re.sub("|".join(map(re.escape, sorted(secrets, key=len, reverse=True))), "<secret>", text)
    text = QUOTED_PATHS.sub("<path>", SECRET_FORMS.sub("<secret>", text))  # quoted paths may hold spaces
    folders = {str(Path.home()), str(Path.cwd()), os.environ.get("HOME", "")} - {"", "/"}
    for folder in sorted(folders, key=len, reverse=True):
        text = text.replace(folder, "<path>")
    text = PATHS.sub("<path>", text)
    names = {getpass.getuser(), os.environ.get("USER", ""), platform.node(), platform.node().partition(".")[0]}
    for name in sorted(names - {""}, key=len, reverse=True):
        text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "<name>", text)
    return text


def on_screen(part: Part) -> str:
    """The part as an aligned table, with its findings below."""
    lines = [part.header, *part.rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    header, *table = ("  ".join(map(str.ljust, line, widths)) for line in lines)
    height = -(-len(table) // part.fold)
    rows = [[header] * part.fold] if any(part.header) else []
    rows += [table[start::height] for start in range(height)]
    shown = [f"  {'    '.join(row)}".rstrip() for row in rows]
    return "\n".join([part.title, *shown, *(f"  ! {finding.what}. {finding.remedy}" for finding in part.findings)])


def as_markdown(parts: Sequence[Part], title: str) -> str:
    """The parts as Markdown tables under a title."""
    out = [f"# {title}"]
    for part in parts:
        lines = [part.header, ["---"] * len(part.header), *part.rows]
        out += ["", f"## {part.title}", "", *(f"| {' | '.join(line)} |" for line in lines)]
        out += ["", part.note] if part.note else []
        out += ["", *(f"- **{finding.what}.** {finding.remedy}" for finding in part.findings)] if part.findings else []
    return "\n".join([*out, ""])


def write_report(file: Path, parts: Sequence[Part], title: str) -> list[Path]:
    """Writes the scrubbed parts as Markdown to `file` and as JSON next to it; returns the two files."""
    held = {"title": title, "parts": [_scrubbed(asdict(part)) for part in parts]}
    return [write_text(file, scrub(as_markdown(parts, title))), write_json(file.with_suffix(".json"), held)]


def _scrubbed(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _scrubbed(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_scrubbed(entry) for entry in value]
    return scrub(value) if isinstance(value, str) else value
