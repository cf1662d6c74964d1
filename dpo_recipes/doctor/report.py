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
    lines = [part.header, *part.rows] if any(part.header) else part.rows
    widths = [max(len(line[column]) for line in lines) for column in range(len(part.header))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in part.rows]
    height = -(-len(table) // part.fold)
    rows = ["    ".join(table[start::height]).rstrip() for start in range(height)]
    if any(part.header):
        header = "  ".join(cell.ljust(width) for cell, width in zip(part.header, widths, strict=True))
        rows.insert(0, "    ".join([header] * part.fold).rstrip())
    return "\n".join([part.title, *(f"  {line}" for line in rows), *_findings(part, "  ")])


def _findings(part: Part, indent: str) -> list[str]:
    return [f"{indent}! {finding.what}. {finding.remedy}" for finding in part.findings]


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
    clean = [_scrubbed(asdict(part)) for part in parts]
    again = [Part(**{**part, "findings": [Finding(**finding) for finding in part["findings"]]}) for part in clean]
    markdown = write_text(file, as_markdown(again, title))
    return [markdown, write_json(file.with_suffix(".json"), {"title": title, "parts": clean})]


def _scrubbed(value: Any) -> Any:
    match value:
        case str():
            return scrub(value)
        case list():
            return [_scrubbed(entry) for entry in value]
        case dict():
            return {name: _scrubbed(entry) for name, entry in value.items()}
    return value
