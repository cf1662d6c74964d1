"""The list of the files that runs wrote into a folder: no other file there is ever replaced or removed."""

import re
from pathlib import Path
from typing import Any

from dpo_recipes.errors import RecipeError
from dpo_recipes.files import MANIFEST, TEMPORARY, fingerprint, read_json, write_json

NEW_FILES = "*"
"""Declares any new file that lies in the folder itself, for a writer that does not know the names of its files."""

OF_A_SAVE = re.compile(
    r"(adapter_)?model(-\d+-of-\d+)?\.safetensors(\.index\.json)?|critic\.safetensors|training_args\.bin|README\.md|"
    r".*(config|tokenizer|vocab|tokens|tokens_map)\.json|merges\.txt|(spiece|tokenizer)\.model|.*\.jinja"
)
"""Names of the files that a save of a model and its tokenizer may leave when it is killed."""


def claim(folder: str | Path, *kept: str) -> None:
    """Starts the list of a folder, and adds names that runs use and never remove, such as a tracker's folder."""
    held = _read(folder)
    if not (Path(folder) / MANIFEST).exists() or set(kept) - set(held["kept"]):
        write_json(Path(folder) / MANIFEST, held | {"kept": sorted({*held["kept"], *kept})})


def declare(folder: str | Path, *names: str) -> None:
    """Lists names that are about to be written: they count as the run's own even if the process is killed meanwhile."""
    others = strangers(Path(folder)) if NEW_FILES in names else []
    held = _read(folder)
    write_json(Path(folder) / MANIFEST, held | {"open": sorted({*held["open"], *names}), "others": others})


def settle(folder: str | Path, *names: str) -> None:
    """Lists the files that were written under declared names, as they are now, and closes the declaration."""
    held, folder = _read(folder), Path(folder)
    files = {name: known for name, known in held["files"].items() if (folder / name).exists()}
    for top in _tops(folder, held):
        if top.name in names or (NEW_FILES in names and top.is_file() and top.name not in held["others"]):
            written = [path for path in (top, *top.rglob("*")) if path.is_file() and not path.is_symlink()]
            known = {path: [] if top.is_dir() else [fingerprint(path)] for path in written}  # nobody edits a checkpoint
            files |= {path.relative_to(folder).as_posix(): prints for path, prints in known.items()}
    left = sorted(set(held["open"]) - set(names))
    write_json(folder / MANIFEST, held | {"files": files, "open": left, "others": []})


def finished_run(folder: Path) -> str:
    """The sentence about a folder that already holds the run that was asked for."""
    lacks = "" if (folder / "report.html").exists() else f" Its page is missing: dpo-recipes page {folder}."
    return f"{folder} holds this run, finished: nothing to do.{lacks} --overwrite true trains it again."


def was_cut_short(path: Path) -> bool:
    """Returns True if the path was declared and never settled: its writer was stopped before it was complete."""
    return path.name in _read(path.parent)["open"]


def strangers(folder: Path, *, changed_only: bool = False) -> list[str]:
    """Names in a folder of files that no run wrote or that somebody changed since, and of folders that hold such files.

    Args:
        folder: A run's folder, or a folder that is to become one.
        changed_only: Leave out files that no run ever wrote.
    """
    held, found = _read(folder), []
    for top in _tops(folder, held):
        new = NEW_FILES in held["open"] and OF_A_SAVE.fullmatch(top.name) and top.name not in held["others"]
        if (new or top.name in held["open"]) and not top.is_symlink():
            continue
        if not all(_is_own(path, folder, held["files"], changed_only) for path in (top, *top.rglob("*"))):
            found.append(f"{top.name}/" if top.is_dir() else top.name)
    return found


def refuse_strangers(folder: Path, *, changed_only: bool = False) -> None:
    """Raises RecipeError if the folder holds a file that no run wrote, or that somebody changed since."""
    if found := strangers(folder, changed_only=changed_only):
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        is_old = (folder / "done.json").exists() and not (folder / MANIFEST).exists()
        why = "which a version left that kept no list" if is_old else "which no run wrote or somebody changed since"
        raise RecipeError(
            f"A run replaces only files that it knows as its own, and {folder} holds {', '.join(found[:3])}{more}, "
            f"{why}. Choose another --output_dir, or move or delete them yourself."
        )


def clear(folder: Path, *, but: str) -> list[str]:
    """Removes the files of runs from a folder, except `but` and the kept names, and returns the removed names."""
    held, foreign = _read(folder), {name.rstrip("/") for name in strangers(folder)}
    own = [top for top in _tops(folder, held) if top.name not in {*foreign, but}]
    for path in sorted((path for top in own for path in (top, *top.rglob("*"))), reverse=True):
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink()
    files = {name: known for name, known in held["files"].items() if (folder / name).exists()}
    write_json(folder / MANIFEST, held | {"files": files, "open": [], "others": []})
    return [top.name for top in own]


def _read(folder: str | Path) -> dict[str, Any]:
    return {"files": {}, "open": [], "others": [], "kept": []} | read_json(Path(folder) / MANIFEST)


def _tops(folder: Path, held: dict[str, Any]) -> list[Path]:
    """Entries of the folder itself, without the list, the names that are kept, and temporary files that a kill left."""
    there = sorted(folder.iterdir()) if folder.is_dir() else []
    ours = {MANIFEST, *held["kept"]}
    return [path for path in there if not (path.name in ours or re.fullmatch(TEMPORARY, path.name))]


def _is_own(path: Path, folder: Path, files: dict[str, list[str]], changed_only: bool) -> bool:
    """Returns True if runs wrote the path as it is, or if it is a folder of such files."""
    name = path.relative_to(folder).as_posix()
    if name in files:
        same = not files[name] or (path.is_file() and fingerprint(path) in files[name])
        return same and not path.is_symlink()
    is_folder = path.is_dir() and not path.is_symlink()
    return changed_only or (is_folder and any(file.startswith(f"{name}/") for file in files))
