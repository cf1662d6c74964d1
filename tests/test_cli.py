import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import venv
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import REPOSITORY, run_forked
from manual import check_command

from dpo_recipes import __version__, catalog
from dpo_recipes.cli import AT_ONCE, build_parser, main
from dpo_recipes.launch.launch import Launch

RECIPES = sorted(path.stem.replace("_", "-") for path in (REPOSITORY / "recipes").glob("[!_]*.py"))


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: an empty one."""
    folder = tmp_path / "empty folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_alone_it_prints_the_help(capsys: pytest.CaptureFixture) -> None:
    assert main([]) == 0
    output = capsys.readouterr().out
    assert all(command in output for command in ("list", "copy", "train", "merge", "sample", "answer", "try"))


def test_version(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out.split() == ["dpo-recipes", __version__]


def test_the_module_runs_as_the_command_does() -> None:
    command = [sys.executable, "-m", "dpo_recipes", "--version"]
    assert subprocess.run(command, capture_output=True, text=True).stdout.split() == ["dpo-recipes", __version__]


VERBS = list(next(action.choices for action in build_parser()._actions if isinstance(action.choices, dict)))


@pytest.mark.parametrize("verb", [None, *VERBS])
def test_help_fits_one_screen_and_ends_in_examples_that_could_run(
    verb: str | None, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit, match="0"):
        main([verb, "--help"] if verb else ["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 100
    assert ("--quiet" in "\n".join(lines)) == (verb not in (None, *AT_ONCE))
    examples = lines[lines.index("Examples:") + 1 :]
    assert examples
    for example in examples:
        assert verb is None or example.startswith(f"  dpo-recipes {verb}")
        check_command(example.strip().partition(" >")[0])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["trane", "quickstart"], "Did you mean train?"),
        (["evalaute"], "Did you mean evaluate?"),
        (["merge", "outputs/x", "--outputdir", "y"], "--outputdir y. Did you mean --output_dir?"),
        (["doctor", "--quik"], "Did you mean --quick or --quiet?"),
        (["answer", "x", "--benchmark", "mtbench", "--dataset_name", "y"], "Did you mean mt_bench?"),
    ],
)
def test_a_mistyped_word_is_answered_with_the_close_one(
    words: list[str], told: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert told in capsys.readouterr().err


def test_a_mistyped_profile_is_answered_with_the_close_one(capsys: pytest.CaptureFixture) -> None:
    assert main(["train", "quickstart", "--profile", "gpuu"]) == 2
    assert "Did you mean gpu?" in capsys.readouterr().err


def test_a_word_that_is_close_to_no_verb_gets_no_guess(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["xyzzy"])
    assert "Did you mean" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("tr", {"train", "try"}),
        ("train hh-rlhf-l", {"hh-rlhf-lora"}),
        ("train my", {"my_own.py"}),
        ("train quickstart --pro", {"--profile"}),
        ("train quickstart --profile t", {"turing"}),
        ("completion z", {"zsh"}),
    ],
)
def test_bash_completes_verbs_recipes_flags_and_files(
    typed: str, offered: set[str], dpo_recipes: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["completion", "bash"]) == 0
    Path("completion.sh").write_text(capsys.readouterr().out)
    Path("my_own.py").touch()
    words = ["dpo-recipes", *typed.split()]
    script = (
        f"source completion.sh; COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; "
        '_shtab_dpo_recipes 2>/dev/null; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    environment = {**os.environ, "PATH": f"{dpo_recipes.parent}:{os.environ['PATH']}"}
    shell = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert {*shell.stdout.split()} == offered


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_a_script_that_asks_for_the_recipes(shell: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "dpo-recipes list" in script
    assert "--tokens_per_step" not in script, "settings are the recipe's own"
    assert all(verb in script for verb in VERBS)


@pytest.mark.slow
def test_help_of_a_recipe_lists_its_settings(capfd: pytest.CaptureFixture) -> None:
    assert main(["train", "quickstart", "--help"]) == 0
    told = capfd.readouterr().out
    assert "--tokens_per_step" in told
    assert "--lora_r" in told


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, hh_rows: Path) -> dict[str, tuple[str, str]]:
    """What long verbs write into files, by verb: as usual, and under --quiet."""
    folder = tmp_path_factory.mktemp("printed")
    data = ["--dataset_name", hh_rows, "--max_length", "256"]
    train = ["hh-rlhf-lora", "--model_name_or_path", tiny_model, *data, "--profile", "cpu", "--pairs_per_update", "4"]
    calls = {
        "inspect": ["hh-rlhf-lora", "--model_name_or_path", tiny_model, *data, "--profile", "cpu"],
        "train": [*train, "--max_steps", "2", "--eval_pairs", "8", "--overwrite", "true"],
        "merge": ["outputs/hh_rlhf_lora"],
        "evaluate": ["outputs/hh_rlhf_lora", *data, "--profile", "cpu", "--prompts", "2", "--max_new_tokens", "4"],
        "sample": [tiny_model, "--dataset_name", hh_rows, "--max_new_tokens", "4", "--output", "samples.jsonl"],
    }
    found = {}
    for verb, call in calls.items():
        texts = []
        for more in ([], ["--quiet"]):
            (folder / "samples.jsonl").unlink(missing_ok=True)
            result = run_forked(verb, *call, *more, cwd=folder)
            assert result.returncode == 0, result.stdout + result.stderr
            texts.append(result.stdout + result.stderr)
        found[verb] = (texts[0], texts[1])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["inspect", "train", "merge", "evaluate", "sample"])
def test_a_file_gets_few_lines_without_control_codes_and_under_quiet_the_last_one(
    verb: str, printed: dict[str, tuple[str, str]]
) -> None:
    usual, quiet = printed[verb]
    for text in (usual, quiet):
        assert not {"\r", "\x1b"} & {*text}
        assert "it/s" not in text
    assert len(usual.splitlines()) < 120
    kept = [line for line in quiet.splitlines() if line]
    last = {
        "inspect": "Verdict: ",
        "train": "Not known: ",
        "merge": "Model ",
        "evaluate": "Not known: ",
        "sample": "Answers ",
    }
    assert kept[-1].startswith(last[verb])
    assert [line for line in kept[:-1] if not re.match(r"(?i)warning|\d+ more: ", line)] == []


def test_list_gives_each_recipe_with_the_first_line_of_its_docstring(capsys: pytest.CaptureFixture) -> None:
    assert main(["list"]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert RECIPES
    assert [name for name, _ in lines] == RECIPES
    assert dict(lines)["hh-rlhf-lora"].startswith("DPO with a LoRA adapter")


def test_recipes_of_the_current_folder_come_first(capsys: pytest.CaptureFixture) -> None:
    Path("recipes").mkdir()
    Path("recipes/hh_rlhf_lora.py").write_text('"""My own."""\n')
    Path("recipes/broken.py").write_text("def\n")
    assert catalog.find_recipe("hh-rlhf-lora") == Path("recipes/hh_rlhf_lora.py")
    assert main(["list"]) == 0
    listed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert listed["hh-rlhf-lora"] == "My own."
    assert "cannot be read" in listed["broken"], "one broken file does not hide the others"


@pytest.mark.parametrize("name", ["hh-rlhf-lora", "hh_rlhf_lora"])
def test_hyphens_and_underscores_name_the_same_recipe(name: str) -> None:
    assert catalog.find_recipe(name).samefile(REPOSITORY / "recipes" / "hh_rlhf_lora.py")


def test_copy_puts_the_recipe_here_and_says_what_to_run(capsys: pytest.CaptureFixture) -> None:
    assert main(["copy", "hh-rlhf-lora"]) == 0
    assert Path("hh_rlhf_lora.py").read_text() == (REPOSITORY / "recipes" / "hh_rlhf_lora.py").read_text()
    assert "dpo-recipes train hh_rlhf_lora.py" in capsys.readouterr().out
    Path("my recipes").mkdir()
    assert main(["copy", "hh-rlhf-lora", "my recipes"]) == 0
    assert "dpo-recipes train 'my recipes/hh_rlhf_lora.py'" in capsys.readouterr().out


def test_copy_refuses_to_replace_a_file(capsys: pytest.CaptureFixture) -> None:
    Path("hh_rlhf_lora.py").write_text("mine")
    assert main(["copy", "hh-rlhf-lora"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert Path("hh_rlhf_lora.py").read_text() == "mine"


def test_copy_to_another_name_or_folder() -> None:
    Path("sub").mkdir()
    assert main(["copy", "hh-rlhf-lora", "mine.py"]) == 0
    assert main(["copy", "hh-rlhf-lora", "sub"]) == 0
    assert Path("mine.py").is_file()
    assert Path("sub/hh_rlhf_lora.py").is_file()


@pytest.mark.parametrize("destination", ["no/such/folder/mine.py", "mine.txt"])
def test_copy_to_where_it_cannot_be_is_refused(destination: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["copy", "hh-rlhf-lora", destination]) == 2
    assert destination in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "copy"])
def test_an_unknown_recipe_lists_what_there_is(command: str, capsys: pytest.CaptureFixture) -> None:
    assert main([command, "hh-rlhf-lara"]) == 2
    message = capsys.readouterr().err
    assert "Did you mean hh-rlhf-lora" in message
    assert all(f"\n  {name} " in message for name in RECIPES)
    assert "DPO with a LoRA adapter" in message


def test_a_path_that_is_not_there_is_refused(capsys: pytest.CaptureFixture) -> None:
    assert main(["train", "mine.py"]) == 2
    assert "no file mine.py" in capsys.readouterr().err


def test_an_unknown_flag_of_list_is_refused(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["list", "--beta", "0.3"])
    assert "--beta" in capsys.readouterr().err


def test_a_flag_of_yes_or_no_names_its_two_words(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["merge", "outputs/run", "--trust_remote_code", "maybe"])
    assert "argument --trust_remote_code: got 'maybe', needs true or false" in capsys.readouterr().err


def test_train_passes_on_every_flag_it_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple] = []
    prepared = SimpleNamespace(run=lambda: 7)
    monkeypatch.setattr(
        "dpo_recipes.launch.command.prepare", lambda *names, **given: calls.append((names, given)) or prepared
    )
    flags = ["--beta", "0.3", "--pro", "x", "--learning_rate", "-1e-6", "--loss_type", "sigmoid", "sft", "--lora_r=4"]
    assert main(["train", "quickstart", *flags, "--profile", "cpu"]) == 7
    assert calls == [(("quickstart",), {"profile": "cpu", "accelerate": None, "machines": None, "flags": flags})]


def test_ctrl_c_between_two_stages_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(launch: Launch) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(Launch, "run", interrupted)
    assert main(["train", "quickstart"]) == 130


def test_settings_are_read_without_running_the_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.py"
    recipe.write_text("import no_such_module\nRECIPE = dict(a='b', **LORA, c=1, d=str(2))\n")
    assert catalog.recipe_setting(recipe, "a") == "b"
    assert [catalog.recipe_setting(recipe, key) for key in ("c", "d", "e")] == [None, None, None]


def test_the_command_starts_without_torch_and_at_once(dpo_recipes: Path) -> None:
    started = time.monotonic()
    subprocess.run([dpo_recipes, "list"], check=True, capture_output=True)
    assert time.monotonic() - started < 2, "0.1 s on an idle machine"
    code = "import sys; from dpo_recipes.cli import main; main(['completion', 'bash']); "
    code += "sys.exit(str({'torch', 'trl', 'transformers', 'psutil'} & {*sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr
    assert loaded.strip() == "set()"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command, from a wheel in an environment that sees the libraries but not this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    for name in ("dpo_recipes", "recipes"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = ["-m", "pip", "--disable-pip-version-check", "-q"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source]
    subprocess.run([sys.executable, *build], check=True)
    shutil.rmtree(source)

    environment = folder / "environment"
    venv.create(environment, with_pip=False)
    [packages] = environment.glob("lib/python*/site-packages")
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    [wheel] = folder.glob("*.whl")
    install = [*pip, "install", "--no-deps", "--no-index", "--ignore-installed", wheel]
    subprocess.run([environment / "bin" / "python", *install], check=True)
    return environment / "bin" / "dpo-recipes"


@pytest.mark.slow
def test_an_installed_wheel_lists_copies_and_trains_in_an_empty_folder(
    installed: Path, empty_folder: Path, tiny_model: Path, hh_rows: Path
) -> None:
    def run(*arguments: str | Path) -> subprocess.CompletedProcess:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run([installed, *arguments], env=environment, capture_output=True, text=True, check=False)

    listed = run("list")
    assert [line.split()[0] for line in listed.stdout.splitlines()] == RECIPES
    assert run("copy", "hh-rlhf-lora").returncode == 0
    assert [path.name for path in empty_folder.iterdir()] == ["hh_rlhf_lora.py"]
    trained = run(
        *("train", "hh_rlhf_lora.py", "--profile", "cpu", "--max_steps", "2", "--max_length", "256"),
        *("--model_name_or_path", tiny_model, "--dataset_name", hh_rows, "--pairs_per_update", "4"),
    )
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert str(installed.parent.parent) in trained.stdout.splitlines()[0], "the profile comes from the wheel"
    assert (empty_folder / "outputs" / "hh_rlhf_lora" / "done.json").is_file()


def test_options_of_a_judge_that_cannot_be_read_are_not_shown(capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "some/model", "--judge_options", '{"api_key": "a-secret", }'])
    told = capsys.readouterr().err
    assert "a JSON object is needed" in told
    assert "a-secret" not in told
