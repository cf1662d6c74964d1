"""Executes the notebooks, and leaves in them only what belongs to the lesson: outputs, no times, paths or warnings.

Usage: python tests/helpers/lessons.py [--execute] NOTEBOOK ...

Without --execute it keeps the outputs that are there.
"""

import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode


def execute(notebook: Path, folder: Path) -> NotebookNode:
    """Runs a notebook's cells in a folder, and returns it with their outputs; an error in a cell is raised."""
    # ipykernel leaves out what commands print where the first one is set; a library prints the second one.
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTEST_CURRENT_TEST", "WANDB_MODE")}
    found = nbformat.read(notebook, as_version=4)
    client = NotebookClient(found, timeout=1800, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    client.execute(env=kept | {"IPYTHONDIR": str(folder / "ipython")})  # no configuration of the user
    return clean(found)


def clean(notebook: NotebookNode) -> NotebookNode:
    """Returns the notebook without times, standard error and folders of the machine; its cells are numbered."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in notebook.cells:
        cell.metadata = {name: value for name, value in cell.metadata.items() if name == "tags"}
    for number, cell in enumerate(code, start=1):
        cell.execution_count = number
        kept: list[NotebookNode] = []
        for output in cell.outputs:
            if output.output_type == "stream" and output.name == "stderr":
                continue
            if output.output_type == "stream":
                output.text = re.sub(r"/\S*/(?=recipes/)", "", output.text)
                output.text = re.sub(r"/\S*python\S* -m dpo_recipes", "dpo-recipes", output.text)
            if output.output_type == "stream" and kept and kept[-1].output_type == "stream":
                kept[-1].text += output.text
                continue
            if output.output_type == "execute_result":
                output.execution_count = number
            if "metadata" in output:
                output.metadata = {}
            kept.append(output)
        cell.outputs = kept
    return notebook


def differences(stored: NotebookNode, fresh: NotebookNode) -> list[str]:
    """Says where the outputs of two executions differ in what must be the same on every machine.

    That is in every cell the kinds of its outputs, and the columns and rows of its tables. A cell's tag asks for more:
    `same`, the whole text; `words`, the text without its numbers; `within X`, numbers that differ by no more than X.
    """
    found = []
    for old, new in zip(
        *([cell for cell in each.cells if cell.cell_type == "code"] for each in (stored, fresh)), strict=True
    ):
        views = [_skeleton]
        for tag in old.metadata.get("tags", []):
            views += {"same": [_text], "words": [_words]}.get(tag, [])
            bound = float(tag.partition("within ")[2] or "inf")
            pairs = zip(_numbers(old), _numbers(new), strict=False)
            found += [f"{old.id}: {one} and {other}" for one, other in pairs if abs(one - other) > bound]
        found += [f"{old.id}: {view(old)} and {view(new)}" for view in views if view(old) != view(new)]
    return found


def _text(cell: NotebookNode) -> str:
    return "\n".join(output.text if "text" in output else output.data["text/plain"] for output in cell.outputs)


def _words(cell: NotebookNode) -> list[str]:
    """The text without numbers, and without the unit of a time."""
    return re.sub(r"# (min|h)\b", "# s", re.sub(r"\d[\d.,]*|-{3,}", "#", _text(cell))).split()


def _skeleton(cell: NotebookNode) -> list[str]:
    """Kinds of the outputs; of a table its columns and the names of its rows, in HTML or as the terminal shows it."""
    found = []
    for output in cell.outputs:
        found += [output.name] if "name" in output else sorted(output.data)
        found += re.findall(r"<th>(.*?)</th>", "" if "name" in output else output.data.get("text/html", ""))
        found += re.findall(r"^ *(\S.*?)  +[-+]?[\d-].*$", output.get("text", ""), re.MULTILINE)
    return list(dict.fromkeys(re.sub(r"\d[\d.,]*", "#", name) for name in found))


def _numbers(cell: NotebookNode) -> list[float]:
    """The numbers in the cells of a table, or all numbers of a text."""
    tables = "".join(output.data.get("text/html", "") for output in cell.outputs if "data" in output)
    return [
        float(number) for number in re.findall(r"<td>(-?[\d.]+)</td>", tables) or re.findall(r"\d[\d.]*", _text(cell))
    ]


def write(notebook: NotebookNode, path: Path) -> None:
    """Writes the notebook as the repository keeps it, if that changes the file."""
    text = nbformat.writes(notebook) + "\n"
    if text != path.read_text():
        path.write_text(text)


if __name__ == "__main__":
    for file in map(Path, [word for word in sys.argv[1:] if word != "--execute"]):
        if "--execute" in sys.argv:
            with tempfile.TemporaryDirectory() as empty:
                write(execute(file, Path(empty)), file)
        else:
            write(clean(nbformat.read(file, as_version=4)), file)
