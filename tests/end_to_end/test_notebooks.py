"""The notebooks define nothing, carry no outputs, and run from scratch."""

import ast
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import REPOSITORY, run_command
from manual import check_command

NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)


def cells(notebook, kind):
    found = json.loads(notebook.read_text())["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == kind]


def test_there_are_two_notebooks():
    assert [notebook.name for notebook in NOTEBOOKS] == ["01_dpo_from_a_recipe.ipynb", "02_dpo_against_ppo.ipynb"]


@each_notebook
def test_no_output_is_kept(notebook):
    code = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    assert len(code) > 5
    assert [cell for cell in code if cell["outputs"] or cell["execution_count"] is not None] == []


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
    clone = ["git", "clone", "--", "https://example.org/a.git", "dpo-recipes"]
    assert installed(notebook, tmp_path) == [clone, [*pip, str(Path("dpo-recipes/constraints.txt")), "dpo-recipes"]]


def execute(notebook, folder):
    """Runs a copy in an empty folder, with this Python as its kernel, and leaves the outputs in the copy."""
    copy = Path(shutil.copy(notebook, folder))
    runner = [sys.executable, "-m", "pytest", "-p", "no:xdist", "--nbmake", "--overwrite", "--nbmake-timeout=900"]
    result = run_command(*runner, copy, cwd=folder, timeout=1800, IPYTHONDIR=str(folder / "ipython"))
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-3000:]
    assert '"image/png"' in copy.read_text(), "a picture is shown"


@pytest.mark.slow
def test_dpo_from_a_recipe_runs_and_makes_the_chatbot_safer(tmp_path):
    execute(NOTEBOOKS[0], tmp_path)
    scores = json.loads((tmp_path / "outputs/quickstart/metrics.json").read_text())["scores"]["temperature 0.7"]
    before, after = (scores["exact reward"][side]["mean"] for side in ("before", "after"))
    assert after > before + 0.15, "the difference is to be seen"
    assert scores["grammatical"]["after"]["mean"] > 0.85


@pytest.mark.slow
def test_dpo_against_ppo_runs_and_leaves_a_report(tmp_path):
    execute(NOTEBOOKS[1], tmp_path)
    folder = tmp_path / "outputs/compare/quickstart"
    results = json.loads((folder / "results.json").read_text())
    assert [model["algorithm"] for model in results["models"]] == ["sft", "dpo", "ppo"]
    assert results["failed"] == []
    assert all(check["held"] for check in results["fairness"]), results["fairness"]
    assert {"report.html", "reward_kl.svg", "two_rewards.svg"} <= {path.name for path in folder.iterdir()}
