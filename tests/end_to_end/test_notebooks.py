"""The notebooks read as a lesson, hold the outputs of their own cells, and run from scratch."""

import ast
import importlib.util
import json
import re
import socket
import subprocess
import sys

import nbformat
import pytest
from commands import REPOSITORY
from lessons import clean, differences, execute
from manual import check_command
from nbformat.v4 import new_code_cell, new_notebook, new_output

NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)


def cells(notebook, kind):
    found = json.loads(notebook.read_text())["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == kind]


def test_there_are_two_notebooks():
    assert [notebook.name for notebook in NOTEBOOKS] == ["01_dpo_from_a_recipe.ipynb", "02_dpo_against_ppo.ipynb"]


@each_notebook
def test_each_cell_holds_its_outputs_and_nothing_of_the_machine(notebook):
    stored = nbformat.read(notebook, as_version=4)
    nbformat.validate(stored)
    assert nbformat.writes(clean(stored)) + "\n" == notebook.read_text(), "python tests/helpers/lessons.py notebooks/*"
    outputs = [output for cell in stored.cells for output in cell.get("outputs", [])]
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert "text/html" in kinds, "tables"
    assert kinds & {"image/png", "image/svg+xml"}, "plots"
    assert not any(output.output_type == "error" for output in outputs)
    silent = [cell.id for cell in stored.cells if cell.cell_type == "code" and not cell.outputs]
    assert len(silent) <= 3, "the cells that install, switch bars off, and read a file"
    text = "\n".join(output.get("text", "") + str(output.get("data", {}).get("text/plain")) for output in outputs)
    assert not re.search(r"/(home|root|tmp|work|content|usr|Users)/|\b20\d\d-\d\d-\d\d|\d\d:\d\d:\d\d", text)
    assert socket.gethostname() not in text
    assert notebook.stat().st_size < 500_000


@each_notebook
def test_a_cell_has_one_idea_in_few_lines(notebook):
    for cell in cells(notebook, "code")[1:]:  # the first one installs
        assert len(cell.splitlines()) <= 10, cell
        python = ast.parse("\n".join(line for line in cell.splitlines() if not line.startswith("%")))
        loops = (ast.For, ast.While, ast.ListComp, ast.DictComp, ast.SetComp, ast.GeneratorExp)
        assert not any(isinstance(node, loops) for node in ast.walk(python)), cell


@each_notebook
def test_nothing_is_defined_and_no_failure_is_passed_over(notebook):
    for cell in cells(notebook, "code"):
        lines = cell.splitlines()
        assert not any(line.lstrip().startswith("!") for line in lines), "a shell command that fails fails no notebook"
        python = ast.parse("\n".join(line for line in lines if not line.startswith("%")))
        defined = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
        assert not any(isinstance(node, defined) for node in ast.walk(python)), cell
        calls = [node for node in ast.walk(python) if isinstance(node, ast.Call) and ast.unparse(node.func) == "main"]
        asserted = [node.test for node in ast.walk(python) if isinstance(node, ast.Assert)]
        assert [ast.unparse(call) for call in calls] == [ast.unparse(test).removesuffix(" == 0") for test in asserted]


@each_notebook
def test_it_begins_with_the_badge_and_the_commands_it_gives_could_run(notebook):
    texts = cells(notebook, "markdown")
    badge = "https://colab.research.google.com/assets/colab-badge.svg"
    assert f"[![Open in Colab]({badge})](https://colab.research.google.com/" in texts[0]
    commands = re.findall(r"^dpo-recipes .*$", "\n".join(texts), re.MULTILINE)
    assert commands
    for command in commands:
        check_command(f".venv/bin/{command}")


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """Returns a function that runs a notebook's first cell in a folder and returns the commands that it called."""

    def install(notebook, folder):
        calls = []
        monkeypatch.setattr(subprocess, "run", lambda command, **options: calls.append((command, options)))
        monkeypatch.chdir(folder)
        exec(cells(notebook, "code")[0], {"input": lambda _: "https://example.org/a.git"})
        assert all(options == {"check": True} for _, options in calls)
        return [command for command, _ in calls]

    return install


@each_notebook
def test_the_first_cell_installs_nothing_where_the_package_is(notebook, installed, tmp_path):
    assert installed(notebook, tmp_path) == []


@each_notebook
def test_the_first_cell_installs_pinned_versions_where_the_package_is_not(notebook, installed, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "-c"]
    assert installed(notebook, REPOSITORY / "notebooks") == [
        [*pip, str(REPOSITORY / "constraints.txt"), str(REPOSITORY)]
    ]
    checkout = str(tmp_path / "dpo-recipes")  # to pip a name without a slash is a package of the index
    clone = ["git", "clone", "--", "https://example.org/a.git", checkout]
    assert installed(notebook, tmp_path) == [clone, [*pip, f"{checkout}/constraints.txt", checkout]]


def cell(*, text=None, table=None, tags=()):
    """A cell with one output, as an execution leaves it."""
    output = new_output("stream", text=text) if text else new_output("execute_result", data={"text/html": table})
    if table:
        output.data["text/plain"] = table
    return new_code_cell("x", metadata={"tags": list(tags)}, outputs=[output])


TABLE = "<table><tr><th></th><th>mean</th></tr><tr><th>before</th><td>{}</td></tr></table>"


@pytest.mark.parametrize(
    ("old", "new", "stale"),
    [
        (dict(text="reward   0.5"), dict(text="reward   0.9"), False),
        (dict(text="reward   0.5"), dict(text="score    0.5"), True),
        (dict(text="anything"), dict(text="else"), False),
        (dict(text="x 1", tags=["same"]), dict(text="x 2"), True),
        (dict(text="x 1 won", tags=["words"]), dict(text="x 2 won"), False),
        (dict(text="x 1 won", tags=["words"]), dict(text="x 1 lost"), True),
        (dict(table=TABLE.format(0.5), tags=["within 0.2"]), dict(table=TABLE.format(0.6)), False),
        (dict(table=TABLE.format(0.5), tags=["within 0.2"]), dict(table=TABLE.format(0.8)), True),
        (dict(table=TABLE.format(0.5)), dict(table=TABLE.format(0.5).replace("mean", "share")), True),
        (dict(table=TABLE.format(0.5)), dict(text="mean 0.5"), True),
    ],
)
def test_a_stale_output_is_found_and_another_machine_is_none(old, new, stale):
    assert bool(differences(*(new_notebook(cells=[cell(**each)]) for each in (old, new)))) == stale


def test_cleaning_keeps_outputs_and_drops_what_differs_between_executions():
    notebook = new_notebook(
        cells=[cell(text="kept"), cell(table=TABLE)], metadata={"language_info": {"name": "python", "version": "3"}}
    )
    notebook.cells[0].outputs.insert(0, new_output("stream", name="stderr", text="a warning"))
    notebook.cells[0].outputs.append(new_output("stream", text=" /home/me/code/recipes/quickstart.py"))
    notebook.cells[0].metadata["execution"] = {"iopub.execute_input": "2026-11-28T13:00:00Z"}
    cleaned = clean(notebook)
    assert [output.text for output in cleaned.cells[0].outputs] == ["kept recipes/quickstart.py"]
    assert [cell.execution_count for cell in cleaned.cells] == [1, 2]
    assert "2026" not in nbformat.writes(cleaned)
    assert cleaned.metadata.language_info == {"name": "python"}


def test_an_execution_keeps_what_a_command_prints(tmp_path):
    commands = "import subprocess\nsubprocess.run(['echo', 'printed'], check=True).returncode"
    nbformat.write(new_notebook(cells=[new_code_cell(commands)]), tmp_path / "x.ipynb")
    [executed] = execute(tmp_path / "x.ipynb", tmp_path).cells
    assert [output.get("text") or output.data["text/plain"] for output in executed.outputs] == ["printed\n", "0"]


@pytest.fixture
def executed(tmp_path):
    """Returns a function that executes a notebook in an empty folder and compares the outputs with the stored ones."""

    def run(notebook):
        fresh = execute(notebook, tmp_path)
        assert differences(nbformat.read(notebook, as_version=4), fresh) == [], "make the outputs again"
        return tmp_path

    return run


@pytest.mark.slow
def test_dpo_from_a_recipe_runs_and_makes_the_chatbot_safer(executed):
    folder = executed(NOTEBOOKS[0])
    scores = json.loads((folder / "outputs/quickstart/metrics.json").read_text())["scores"]["temperature 0.7"]
    before, after = (scores["exact reward"][side]["mean"] for side in ("before", "after"))
    assert after > before + 0.15, "the difference is to be seen"
    assert scores["grammatical"]["after"]["mean"] > 0.85


@pytest.mark.slow
def test_dpo_against_ppo_runs_and_leaves_a_report(executed):
    folder = executed(NOTEBOOKS[1]) / "outputs/compare/quickstart"
    results = json.loads((folder / "results.json").read_text())
    assert [model["algorithm"] for model in results["models"]] == ["sft", "dpo", "rounds", "ppo"]
    assert results["failed"] == []
    assert all(check["held"] for check in results["fairness"]), results["fairness"]
    assert {"report.html", "reward_kl.svg", "two_rewards.svg"} <= {path.name for path in folder.iterdir()}
