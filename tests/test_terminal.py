"""Control characters of data are shown and not obeyed, on a terminal, on pages and in the model card."""

import io
import logging
import shlex
import subprocess
import sys

import pytest
import yaml
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from dpo_recipes import terminal
from dpo_recipes.cli import main
from dpo_recipes.errors import RecipeError
from dpo_recipes.files import write_json
from dpo_recipes.pages import page
from dpo_recipes.pages.markdown import code, fence, inline, one_line
from dpo_recipes.recipe import run
from dpo_recipes.runs.model_card import LIBRARIES, write_model_card
from dpo_recipes.terminal import Lines, Unbroken, outlive_the_terminal, quiet_libraries, say, shown

HOSTILE = {
    "clears the screen": "a\x1b[2Jb",
    "overwrites the line": "all is lost\rall is well",
    "C1": "a\x9b31mb",
    "turns the writing": "abc\u202egnp.exe",
    "rings, and goes back": "a\x07\x08b",
    "half a pair": "a\ud83db",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_control_characters_are_spelt_out_wherever_text_is_printed(text, capsys, tmp_path):
    say(text)

    def refuse():
        raise RecipeError(text)

    with pytest.raises(SystemExit):
        run(refuse)
    told = "".join(capsys.readouterr())
    template = tmp_path / "x.html.jinja"
    template.write_text("<p>{{ text }}</p>")
    told += page.write_page(tmp_path / "x.html", template, {"text": text}).read_text()
    assert told.count(shown(text)) == 3
    assert told.replace("\n", "").isprintable()


def test_line_breaks_tabs_and_other_writing_stay(capsys):
    say("a\tb\n\N{HEBREW LETTER ALEF}\N{FAMILY}\N{ZERO WIDTH JOINER}\N{RIGHT-TO-LEFT MARK}é")
    assert (
        capsys.readouterr().out
        == "a\tb\n\N{HEBREW LETTER ALEF}\N{FAMILY}\N{ZERO WIDTH JOINER}\N{RIGHT-TO-LEFT MARK}é\n"
    )


def test_commands_are_shown_as_the_shell_finds_them(capsys, monkeypatch, tmp_path):
    text = "dpo-recipes 1.0: repeat it with dpo-recipes page outputs/x"
    (tmp_path / "dpo-recipes").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    say(text)
    assert capsys.readouterr().out == f"{text}\n"
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.chdir(tmp_path)
    say(text)
    words = shlex.split(capsys.readouterr().out)
    assert words[:5] == text.split()[:5]
    assert words[-2:] == ["page", "outputs/x"]
    version = subprocess.run([*words[5:-2], "--version"], capture_output=True, text=True, check=True)
    assert version.stdout.startswith("dpo-recipes ")


def test_a_command_that_is_wrong_is_not_obeyed_either(capsys):
    assert main(["copy", "a\x1b[2Jb"]) == 2
    assert "\\x1b[2J" in capsys.readouterr().err


NAMES = [
    "x\n# A heading\n<script>alert(1)</script>",
    "x`` ` <img src=x onerror=alert(1)> ![a](http://b) [c](d)",
    "x\r\n---\nlicense: mit\n---\n```\n**bold** _it_ | a | \x1b[2J",
]


@pytest.mark.parametrize("name", NAMES, ids=["lines", "one line", "yaml"])
def test_names_cannot_write_into_the_model_card(name, tmp_path):
    folder = tmp_path / name.replace("/", "_")
    settings = {"model_name_or_path": name, "reward_model_name_or_path": name, "loss_type": ["sigmoid", "sft"]}
    write_json(folder / "settings.json", settings | {"dataset_name": name})
    found = {"table": f"accuracy {name}", "note": "a note", "warnings": [f"A warning of {name}."]}
    write_json(folder / "metrics.json", found)
    spent = {"updates": 1, "train_seconds": 1, "resumed_from_update": 0, "peak_memory_mib": 1}
    done = {"method": "DPO", "warnings": [], "training_rows": 1, "hardware": "a CPU"} | spent
    write_json(folder / "done.json", done | {"versions": dict.fromkeys(LIBRARIES, "1.0")})
    card = write_model_card(folder).read_text(encoding="utf-8")
    _, header, text = card.split("---\n", 2)
    assert yaml.safe_load(header)["base_model"] == name
    assert set(yaml.safe_load(header)) == {"base_model", "library_name", "tags"}
    block = fence(f"accuracy {name}")
    assert block in text
    outside = text.replace(block, "")
    headings = [line for line in outside.splitlines() if line.startswith("# ")]
    assert headings == [f"# {inline(name.replace('/', '_'))}"]
    for line in outside.splitlines():
        bare = line.replace(code(name), "")
        assert "<" not in bare, "HTML stands in code alone"
    assert "- loss_type: sigmoid sft" in outside
    assert text.replace("\n", "").isprintable()


def test_a_plain_name_is_written_as_it_is():
    assert (
        inline("hh_rlhf_lora-2.5 (beta 0.1)")
        == one_line("hh_rlhf_lora-2.5 (beta 0.1)")
        == "hh_rlhf_lora-2.5 (beta 0.1)"
    )
    assert fence("a table") == "```\na table\n```"


@pytest.mark.parametrize(("every", "states"), [(0.0, 8), (1000.0, 0)])
def test_a_bar_in_a_file_is_a_line_every_so_often_and_no_control_code(every, states, monkeypatch):
    monkeypatch.setattr(terminal, "EVERY", every)
    file = io.StringIO()
    lines = Lines(file)
    options = dict(file=lines, mininterval=0, miniters=1)
    lines.write("Before\n")
    for row in tqdm(range(2), desc="Outer", **options):
        for _ in tqdm(range(2), desc="Inner", leave=False, **options):
            pass
        tqdm.write(f"row {row}", file=lines)
    lines.write("\x1b[31mred\x1b[0m\n")
    told = file.getvalue()
    assert not {"\r", "\x1b"} & {*told}
    shown = told.splitlines()
    assert [line for line in shown if "|" not in line] == ["Before", "row 0", "row 1", "red"]
    assert len([line for line in shown if "|" in line]) >= states
    assert states or "|" not in told


def test_what_follows_a_bar_that_was_cut_short_begins_a_line(monkeypatch):
    monkeypatch.setattr(terminal, "EVERY", 0.0)
    file = io.StringIO()
    lines = Lines(file)
    for text in ("\rTokenizing: 10% [00:01<00:09]", "\rTokenizing: 20% [00:02<00:08]", "Traceback", ":\n"):
        lines.write(text)
    assert file.getvalue().splitlines()[-2:] == ["Tokenizing: 20% [00:02<00:08]", "Traceback:"]


def test_no_color_leaves_colours_out_and_keeps_the_cursor(monkeypatch):
    for value, told in (("", "\x1b[31mred\x1b[0m\x1b[A"), ("1", "red\x1b[A")):
        monkeypatch.setenv("NO_COLOR", value)
        file = io.StringIO()
        Unbroken(file).write("\x1b[31mred\x1b[0m\x1b[A")
        assert file.getvalue() == told


def test_quiet_leaves_warnings_and_the_last_line_and_no_bar(monkeypatch):
    monkeypatch.setattr(terminal, "EVERY", 0.0)
    monkeypatch.setenv(terminal.QUIET, "1")
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr("sys.stderr", err)
    outlive_the_terminal()
    outlive_the_terminal()  # as the command and then the recipe do
    print("a library's word")  # noqa: T201
    say("an account")
    say("WARNING: a fault", always=True)
    for _ in tqdm(range(3), mininterval=0, miniters=1):
        pass
    sys.stderr.write("an error\n")
    assert out.getvalue() == "WARNING: a fault\n"
    assert err.getvalue() == "an error\n"


def test_a_report_on_missing_weights_is_left_out_for_a_new_score_head_alone(tmp_path, caplog, tiny_model):
    quiet_libraries()
    logging.getLogger("transformers").addHandler(caplog.handler)  # it does not propagate
    AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
    assert "LOAD REPORT" not in caplog.text
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    weights = {name: weight for name, weight in model.state_dict().items() if "layers.1.mlp.up_proj" not in name}
    model.save_pretrained(tmp_path, state_dict=weights)
    AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1)
    logging.getLogger("transformers").removeHandler(caplog.handler)
    assert "LOAD REPORT" in caplog.text
