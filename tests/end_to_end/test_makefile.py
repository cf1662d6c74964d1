import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import REPOSITORY

TARGETS = [
    "help",
    "install",
    "train",
    "compare",
    "evaluate",
    "inspect",
    "doctor",
    "test",
    "test-all",
    "test-faults",
    "test-gpu",
    "lint",
    "typecheck",
    "bench",
    "docs",
    "recipes",
    "clean",
]

# A Python that is asked for its version, for venv, and to make one; `venv` decides what pip in there does.
FAKE_PYTHON = """#!/bin/sh
case "$*" in
  *platform*) echo {version} ;;
  *version_info*) {new_enough} ;;
  *ensurepip*) {has_venv} ;;
  "-m venv"*)
    tools=$(dirname "$0")
    mkdir -p "$3/bin"
    cp "$tools/pip" "$3/bin/python"
    cp "$tools/cli" "$3/bin/dpo-recipes" ;;
esac
"""
WORKING_PIP = '#!/bin/sh\ncase "$*" in *pip*) echo "$*" >>calls ;; esac\n'
FAILING_PIP = """#!/bin/sh
case "$*" in *pip*) ;; *) exit 0 ;; esac
echo "ERROR: No matching distribution found for torch==2.13.0" >&2
for line in 1 2 3 4 5 6 7 8; do echo "  File pip/$line.py, in main" >&2; done
exit 1
"""
FAKE_CLI = '#!/bin/sh\nfor word; do echo "[$word]"; done >train-call\n'


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The Makefile alone, in a folder with a space in its name, with what its stamp depends on."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(REPOSITORY / name, folder)
    return folder


@pytest.fixture
def fake_python(tmp_path: Path) -> Callable[..., Path]:
    def make(*, version: str = "3.11.9", new: bool = True, has_venv: bool = True, pip: str = WORKING_PIP) -> Path:
        tools = tmp_path / "some tools"
        tools.mkdir(exist_ok=True)
        yes = {True: "exit 0", False: "exit 1"}
        python = FAKE_PYTHON.format(version=version, new_enough=yes[new], has_venv=yes[has_venv])
        for name, text in (("python", python), ("pip", pip), ("cli", FAKE_CLI)):
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)
        return tools / "python"

    return make


def make(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Run make as from a fresh shell: without the flags of the make that may be running these tests."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    return subprocess.run(
        ["make", *arguments], cwd=folder, env={**inherited, **environment}, capture_output=True, text=True, check=False
    )


def sentence(result: subprocess.CompletedProcess) -> str:
    """The one line on stderr that is not make's own."""
    assert result.returncode != 0
    lines = [line for line in result.stderr.splitlines() if not line.startswith("make")]
    assert len(lines) == 1, result.stderr
    return lines[0]


def test_make_alone_lists_every_target(copy: Path) -> None:
    result = make(copy)
    assert result.returncode == 0
    assert re.findall(r"^  make ([a-z-]+) +\S", result.stdout, re.MULTILINE)[: len(TARGETS)] == TARGETS
    assert not (copy / ".venv").exists()


def test_every_target_installs_first_but_help_and_clean(copy: Path) -> None:
    for target in TARGETS:
        would_install = "-m venv" in make(copy, "-n", target).stdout
        assert would_install == (target not in ("help", "clean")), target


def test_install_uses_the_one_constraints_file(copy: Path, fake_python: Callable[..., Path]) -> None:
    result = make(copy, "install", f"PYTHON={fake_python()}")
    assert result.returncode == 0, result.stderr
    calls = (copy / "calls").read_text().splitlines()
    assert len(calls) == 2
    assert all("-c constraints.txt" in call for call in calls)
    assert "hatchling editables" in calls[0], "the build backend is pinned as well"
    assert calls[1].endswith("--no-build-isolation -e .[dev]")


def test_a_second_call_installs_nothing(copy: Path, fake_python: Callable[..., Path]) -> None:
    make(copy, "install", f"PYTHON={fake_python()}")
    (copy / "calls").unlink()
    second = make(copy, "install", "PYTHON=no-python-is-needed-now")
    assert second.returncode == 0
    assert not (copy / "calls").exists()


@pytest.mark.parametrize("changed", ["constraints.txt", "pyproject.toml"])
def test_changed_versions_are_installed_over_what_is_there(
    copy: Path, fake_python: Callable[..., Path], changed: str
) -> None:
    make(copy, "install", f"PYTHON={fake_python()}")
    (copy / ".venv" / "kept").touch()
    later = (copy / ".venv" / ".installed").stat().st_mtime + 10
    os.utime(copy / changed, (later, later))
    (copy / "calls").unlink()
    assert make(copy, "install", f"PYTHON={fake_python()}").returncode == 0
    assert (copy / "calls").exists()
    assert (copy / ".venv" / "kept").exists()


def test_a_half_made_venv_is_made_again(copy: Path, fake_python: Callable[..., Path]) -> None:
    assert make(copy, "install", f"PYTHON={fake_python(pip=FAILING_PIP)}").returncode != 0
    (copy / ".venv" / "left").touch()
    assert make(copy, "install", f"PYTHON={fake_python()}").returncode == 0
    assert not (copy / ".venv" / "left").exists()
    assert (copy / "calls").exists()


def test_a_venv_that_was_moved_or_lost_its_python_is_made_again(copy: Path, fake_python: Callable[..., Path]) -> None:
    make(copy, "install", f"PYTHON={fake_python()}")
    moved = copy.rename(copy.with_name("elsewhere"))
    (moved / "calls").unlink()
    make(moved, "install", f"PYTHON={fake_python()}")
    assert (moved / "calls").exists()
    (moved / "calls").unlink()
    (moved / ".venv" / "bin" / "python").unlink()
    make(moved, "install", f"PYTHON={fake_python()}")
    assert (moved / "calls").exists()


def test_train_passes_the_recipe_the_profile_and_the_flags(copy: Path, fake_python: Callable[..., Path]) -> None:
    def words(*arguments: str) -> list[str]:
        result = make(copy, "train", f"PYTHON={fake_python()}", *arguments)
        assert result.returncode == 0, result.stderr
        return re.findall(r"^\[(.*)\]$", (copy / "train-call").read_text(), re.MULTILINE)

    assert words() == ["train", "quickstart"]
    flags = "ARGS=--beta 0.3 --dataset_name 'my rows.jsonl'"
    expected = ["train", "hh-rlhf-lora", "--profile", "gpu", "--beta", "0.3", "--dataset_name", "my rows.jsonl"]
    assert words("RECIPE=hh-rlhf-lora", "PROFILE=gpu", flags) == expected


def test_an_old_python_ends_in_one_sentence(copy: Path, fake_python: Callable[..., Path]) -> None:
    said = sentence(make(copy, "train", f"PYTHON={fake_python(version='3.8.10', new=False)}"))
    assert "needs Python 3.11 or newer" in said
    assert "is 3.8.10" in said
    assert "make PYTHON=" in said


def test_no_python_at_all_ends_in_one_sentence(copy: Path) -> None:
    said = sentence(make(copy, "train", "PYTHON=no-such-python"))
    assert "no-such-python was not found" in said


def test_a_python_without_venv_ends_in_one_sentence(copy: Path, fake_python: Callable[..., Path]) -> None:
    said = sentence(make(copy, "test", f"PYTHON={fake_python(has_venv=False)}"))
    assert "lacks the venv module" in said


def test_the_first_suitable_python_is_taken(copy: Path, fake_python: Callable[..., Path], tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, settings in (
        ("python3.13", {"version": "3.13.0", "has_venv": False}),
        ("python3.12", {"version": "3.12.1"}),
    ):
        shutil.copytree(fake_python(**settings).parent, tools, dirs_exist_ok=True)
        (tools / "python").rename(tools / name)
    result = make(copy, "install", PATH=f"{tools}:{os.environ['PATH']}", PYTHON="")
    assert result.returncode == 0, result.stderr
    assert "python3.12 3.12.1" in result.stdout


def test_a_failed_download_ends_in_one_sentence_that_names_the_log(
    copy: Path, fake_python: Callable[..., Path]
) -> None:
    said = sentence(make(copy, "train", f"PYTHON={fake_python(pip=FAILING_PIP)}"))
    assert "No matching distribution found for torch==2.13.0" in said
    assert "build/install.log" in said
    assert "pip/8.py" in (copy / "build" / "install.log").read_text()
    assert not (copy / "train-call").exists()


def test_an_unreachable_index_is_named_as_the_cause(copy: Path, fake_python: Callable[..., Path]) -> None:
    unreachable = FAILING_PIP.replace(
        "echo", "echo 'WARNING: Retrying (Retry(total=4)) after connection broken' >&2; echo", 1
    )
    said = sentence(make(copy, "train", f"PYTHON={fake_python(pip=unreachable)}"))
    assert "the package index cannot be reached" in said


def test_lint_counts_lines_of_code_by_part_and_refuses_too_many(tmp_path: Path) -> None:
    assert "count_lines.py dpo_recipes $(MOST_LINES)" in (REPOSITORY / "Makefile").read_text()
    text = '"""What it is.\n\nMore."""\n\n# why\nx = 1\ny = """two\nlines"""\n'
    (tmp_path / "runs").mkdir()
    for name in ("runs/page.py", "cli.py", "files.py", "doctor.py"):
        (tmp_path / name).write_text(text)
    count = [sys.executable, REPOSITORY / ".ci" / "count_lines.py", tmp_path]
    limits = ["layer=3", "commands=3", "ground=3", "doctor=3"]
    assert subprocess.run([*count, *limits], check=False).returncode == 0
    for part in limits:
        less = [part.replace("3", "2") if limit == part else limit for limit in limits]
        refused = subprocess.run([*count, *less], capture_output=True, text=True, check=False)
        assert refused.returncode == 1
        assert f"Too many lines of code in {tmp_path}: {part.removesuffix('=3')}." in refused.stderr


def test_constraints_pin_every_requirement_exactly() -> None:
    pins = [line for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[\w.]+", pin) for pin in pins)
    pinned = {pin.partition("==")[0].lower().replace("_", "-") for pin in pins}
    assert "torch==2.13.0" in pins
    project = (REPOSITORY / "pyproject.toml").read_text()
    lists = re.findall(r"^(?:requires|dependencies|dev) = \[(.*?)\]$", project, re.MULTILINE | re.DOTALL)
    wanted = {name.lower() for names in lists for name in re.findall(r'"([A-Za-z0-9_-]+)', names)}
    assert len(wanted) > 15
    assert (wanted - {"dpo-recipes"}) | {"editables"} <= pinned  # the extras of dev are its own


def test_ci_calls_the_developers_own_targets() -> None:
    script = REPOSITORY / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text().rstrip().splitlines()[-1] == "make lint typecheck test-all"
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0


@pytest.mark.slow
def test_a_fresh_copy_installs_the_pinned_versions_and_runs(copy: Path) -> None:
    for name in ("README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, copy)
    for name in ("dpo_recipes", "recipes"):
        shutil.copytree(REPOSITORY / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    first = make(copy, "recipes")
    assert first.returncode == 0, first.stderr
    assert "hh-rlhf-lora" in first.stdout
    second = make(copy, "recipes")
    assert "Installing" not in second.stdout
    assert [line.split()[0] for line in second.stdout.splitlines()] == re.findall(
        r"^  ([a-z0-9-]+)  ", first.stdout, re.M
    )
    pins = {line for line in (copy / "constraints.txt").read_text().splitlines() if not line.startswith("#")}
    listed = [copy / ".venv" / "bin" / "python", "-m", "pip", "list", "--format=freeze"]
    frozen = subprocess.run(listed, capture_output=True, text=True, check=True).stdout.splitlines()
    plain = {re.sub(r"\+\w+$", "", pin).lower().replace("_", "-") for pin in frozen}
    of_torch = ("nvidia-", "cuda-", "triton==")  # where there is CUDA, torch pins these itself
    installed = {pin for pin in plain if not pin.startswith(("pip==", "dpo-recipes==", *of_torch))}
    assert "torch==2.13.0" in installed
    assert installed <= {pin.lower().replace("_", "-") for pin in pins}
