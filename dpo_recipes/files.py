"""Writes files whole or not at all, and reads JSON that may be missing."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import IO, Any

from dpo_recipes.errors import RecipeError

MANIFEST = ".dpo_recipes.json"
"""Name of the file that lists what runs wrote into its folder; the module `manifest` reads it."""
TEMPORARY = r"\..+\.\d+\.tmp"
"""Pattern of the temporary files of `write_bytes`, which a kill leaves behind."""
SAMPLED = 2**20  # bytes at either end of a file that its fingerprint reads


def write_bytes(path: str | Path, data: bytes, *, listed: bool = True) -> Path:
    """Writes the data and returns the path. Readers see the old file or the new one, never a part of it.

    In a folder with a manifest the file is listed first, with its old and its new content. `listed=False` does not list
    it: the file then belongs to the user, and no run removes it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if listed and path.name != MANIFEST and (held := read_json(path.parent / MANIFEST)):
        known = [*held["files"].get(path.name, [])[-1:], fingerprint(BytesIO(data))]
        write_json(path.parent / MANIFEST, held | {"files": held["files"] | {path.name: known}})
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def check_writable(folder: Path) -> None:
    """Raises RecipeError unless files can be written into the folder, which is made where it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RecipeError(f"Cannot write into {folder}: {error.strerror}. Name another place for it.") from error


def fingerprint(file: Path | IO[bytes]) -> str:
    """A hash of a file's size and of its first and last MiB: enough for weights, of which training changes all."""
    if isinstance(file, Path):
        with file.open("rb") as stream:
            return fingerprint(stream)
    size = file.seek(0, os.SEEK_END)
    digest = hashlib.sha256(str(size).encode())
    for start in (0, max(SAMPLED, size - SAMPLED)):
        file.seek(start)
        digest.update(file.read(SAMPLED))
    return digest.hexdigest()[:32]


def write_text(path: str | Path, text: str, *, listed: bool = True) -> Path:
    """Writes the text and returns the path."""
    return write_bytes(path, text.encode(), listed=listed)


def write_json(path: str | Path, data: Any) -> Path:
    """Writes the data as indented JSON and returns the path."""
    return write_text(path, json.dumps(data, indent=2, ensure_ascii=False, default=str) + "\n")


def write_jsonl(path: str | Path, rows: Iterable[Any], *, listed: bool = True) -> Path:
    """Writes one JSON object a line and returns the path."""
    return write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), listed=listed)


def read_jsonl(file: Path) -> list[Any]:
    """The rows of a file of JSON lines, without a last line that was cut short; empty if the file is missing."""
    lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.exists() else []
    return [json.loads(line) for line in lines]


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one if the file is missing or broken."""
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return held if isinstance(held, dict) else {}
