"""A run's model and its base are asked side by side, in and out of a terminal."""

import io
import json
import os
import pty
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lora_runs import save_lora_run
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from dpo_recipes.cli import main
from dpo_recipes.errors import RecipeError
from dpo_recipes.models.generation import generate
from dpo_recipes.models.merge import merge
from dpo_recipes.models.open import open_model
from dpo_recipes.terminal import shown


@pytest.fixture
def start(tiny_model):
    return tiny_model


@pytest.fixture
def run(start, tmp_path):
    return save_lora_run(tmp_path / "outputs" / "run", start)


def test_a_reward_model_answers_nothing(tiny_model, tmp_path):
    AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="is a reward model: it scores, and answers nothing"):
        open_model(str(tmp_path))


ASKED = ["--max_new_tokens", "12", "--temperature", "0"]


def said(model, tokenizer, question, *, system=None, **options):
    """What `generate` has a model say, as a terminal shows it."""
    messages = [{"role": "system", "content": system}] if system else []
    options = dict(max_new_tokens=12, temperature=0.0) | options
    return shown(generate(model, tokenizer, [[*messages, {"role": "user", "content": question}]], **options)[0]["text"])


def answers(output):
    """The text under each heading, in order."""
    return [block.partition("\n")[2].strip() for block in output.split("\n--- ")[1:]]


def test_base_and_tuned_answer_one_prompt_under_their_names(run, start, capsys):
    assert main(["try", str(run), "Hello?", "--system", "Be brief.", *ASKED]) == 0
    output = capsys.readouterr().out
    assert f"--- base: {start}\n" in output
    assert f"--- tuned: {run}\n" in output
    tuned, tokenizer = open_model(str(run))
    base, _ = open_model(str(start))
    expected = [said(model, tokenizer, "Hello?", system="Be brief.") for model in (base, tuned)]
    assert answers(output) == expected
    assert expected[0] != expected[1]


def test_the_seed_decides_both_answers(run, capsys):
    texts = []
    for seed in ("1", "1", "2"):
        assert main(["try", str(run), "Hello?", "--seed", seed, "--max_new_tokens", "12"]) == 0
        texts.append(answers(capsys.readouterr().out))
    assert texts[0] == texts[1]
    assert all(one != other for one, other in zip(texts[1], texts[2], strict=True))


def test_each_line_that_is_piped_in_is_a_prompt(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("One?\n\n  Two?"))
    assert main(["try", str(run), *ASKED]) == 0
    output = capsys.readouterr().out
    tuned, tokenizer = open_model(str(run))
    assert output.index("> One?") < output.index("> Two?")
    for text, question in zip(answers(output)[1::2], ("One?", "Two?"), strict=True):  # white space in front is shown
        assert text.partition("\n\n> ")[0].endswith(said(tuned, tokenizer, question))


def test_a_full_model_stands_beside_the_start_that_its_settings_or_the_call_name(run, start, capsys):
    folder = merge(str(run))
    assert main(["try", str(folder), "Hello?", *ASKED]) == 0  # merge.json names it
    assert f"--- base: {start}\n" in capsys.readouterr().out
    (folder / "merge.json").unlink()
    assert main(["try", str(folder), "Hello?", *ASKED]) == 2
    assert "does not say what it was trained from. Name that model with --base." in capsys.readouterr().err
    assert main(["try", str(folder), "Hello?", "--base", str(start), *ASKED]) == 0
    named = answers(capsys.readouterr().out)
    assert main(["try", str(run), "Hello?", *ASKED]) == 0
    assert answers(capsys.readouterr().out) == named
    (folder / "settings.json").write_text(json.dumps({"model_name_or_path": str(start)}))
    assert main(["try", str(folder), "Hello?", *ASKED]) == 0
    assert answers(capsys.readouterr().out) == named


def test_a_model_without_a_chat_template_is_no_model_to_try(run, start, tmp_path, capsys):
    AutoModelForCausalLM.from_pretrained(start).save_pretrained(tmp_path / "bare")
    tokenizer = AutoTokenizer.from_pretrained(start)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "bare")
    assert main(["try", str(tmp_path / "bare"), "Hello?", "--base", str(start)]) == 2
    assert "has no chat template" in capsys.readouterr().err
    assert main(["try", str(start), "Hello?", "--base", str(tmp_path / "bare"), *ASKED]) == 0  # as before SFT


def test_the_prompt_may_stand_behind_the_flags_and_flags_are_spelt_out(run, capsys):
    assert main(["try", str(run), *ASKED, "Hello?"]) == 0
    expected = capsys.readouterr().out
    assert main(["try", str(run), "Hello?", *ASKED]) == 0
    assert capsys.readouterr().out == expected
    for wrong in (["Hello?", *ASKED, "Again?"], [*ASKED, "--temp", "0"]):
        with pytest.raises(SystemExit, match="2"):
            main(["try", str(run), *wrong])
        assert f"unrecognized arguments: {' '.join(wrong[-1:] if '?' in wrong[-1] else wrong[-2:])}" in (
            capsys.readouterr().err
        )


def test_a_prompt_that_cannot_be_answered_is_said_to_be_so_and_the_next_is_asked(run, monkeypatch, capsys):
    tokenizer = AutoTokenizer.from_pretrained(run)
    tokenizer.chat_template = "{% if messages|length > 1 %}{{ raise_exception('no') }}{% endif %}" + (
        tokenizer.chat_template
    )
    tokenizer.save_pretrained(run)
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{'long ' * 500}\nShort?"))
    assert main(["try", str(run), *ASKED]) == 0
    output = capsys.readouterr().out
    assert "(not asked: the prompt fills the model's context)" in output
    assert len(answers(output)) == 2
    assert main(["try", str(run), "Short?", "--system", "Be brief.", *ASKED]) == 2
    said = capsys.readouterr()
    assert "Not asked: the chat template refuses the conversation." in said.err
    assert not answers(said.out)


def test_a_folder_that_is_not_here_is_not_said_to_lack_something(capsys):
    assert main(["try", "outputs/nothing", "Hello?"]) == 2
    assert "outputs/nothing is not here. Name the folder of a run." in capsys.readouterr().err


class Terminal:
    """A command in a terminal: what it prints, and keys for it."""

    def __init__(self, *command):
        self.keys, theirs = pty.openpty()
        options = dict(stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, close_fds=True)
        take = (
            "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
        )
        self.process = subprocess.Popen([sys.executable, "-c", take, *map(str, command)], **options)
        os.close(theirs)
        self.output = ""

    def type(self, text):
        os.write(self.keys, text.encode())

    def wait_for(self, text, seconds=60):
        """What came up to and with the text, which is taken off."""
        end = time.monotonic() + seconds
        while text not in self.output:
            ready, _, _ = select.select([self.keys], [], [], max(0, end - time.monotonic()))
            assert ready, f"no {text!r} in {self.output!r}"
            try:
                self.output += os.read(self.keys, 4096).decode(errors="replace")
            except OSError:  # the other end is closed
                assert text in self.output, self.output
        before, _, self.output = self.output.partition(text)
        return before


@pytest.fixture
def terminal(run, start, tmp_path, dpo_recipes):
    """`dpo-recipes try` in a terminal, whose answers never end: the end token is one that the model cannot say."""
    endless = Path(shutil.copytree(start, tmp_path / "endless"))
    for file, key in (
        (endless / "config.json", "eos_token_id"),
        (endless / "generation_config.json", "eos_token_id"),
        (run / "adapter_config.json", "base_model_name_or_path"),
    ):
        value = None if key == "eos_token_id" else str(endless)
        file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    tokenizer = AutoTokenizer.from_pretrained(run)
    tokenizer.add_special_tokens({"eos_token": "<never>"})
    tokenizer.save_pretrained(run)
    opened = Terminal(dpo_recipes, "try", run, "--max_new_tokens", "100000", "--temperature", "3")
    yield opened
    opened.process.kill()
    opened.process.wait()
    os.close(opened.keys)


@pytest.mark.slow
def test_ctrl_c_ends_one_answer_and_ctrl_d_the_session(terminal):
    terminal.wait_for("\n> ")
    terminal.type("Hello?\n")
    for heading in ("--- base: ", "--- tuned: "):
        terminal.wait_for(heading)
        terminal.wait_for("\n")
        assert "User:" not in terminal.wait_for(" ")  # it streams, and nothing but the answer
        terminal.type("\x03")
        terminal.wait_for("(stopped)")
    terminal.wait_for("\n> ")  # and asks again
    terminal.type("\x04")
    assert terminal.process.wait(timeout=60) == 0


@pytest.mark.slow
def test_an_empty_line_ends_the_session(terminal):
    terminal.wait_for("\n> ")
    terminal.type("\n")
    assert terminal.process.wait(timeout=60) == 0


CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path({marker!r}).touch()


class Own(LlamaConfig):
    model_type = "own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = Own
"""


@pytest.fixture
def with_code(tiny_model, tmp_path, monkeypatch):
    """A model that brings code of its own, and the file that the code leaves where it is run."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "theirs" / "model"
    shutil.copytree(tiny_model, folder)
    marker = tmp_path / "it ran"
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, marker


@pytest.mark.parametrize("where", ["model", "parent folder"])
@pytest.mark.parametrize("verb", ["try", "sample", "answer", "evaluate", "merge"])
def test_code_of_a_model_runs_by_a_flag_alone(verb, where, with_code, tiny_model, tmp_path, monkeypatch, capsys):
    folder, marker = with_code
    monkeypatch.chdir(tmp_path)
    settings = {"trust_remote_code": True, "model_name_or_path": str(folder)}
    ((folder if where == "model" else folder.parent) / "settings.json").write_text(json.dumps(settings))
    if verb == "merge":  # a LoRA adapter on that model
        lora = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), LoraConfig(task_type="CAUSAL_LM"))
        lora.save_pretrained(folder.parent / "lora")
        lora_config = folder.parent / "lora" / "adapter_config.json"
        lora_config.write_text(lora_config.read_text().replace(str(tiny_model), str(folder)))
        (folder.parent / "lora" / "settings.json").write_text(json.dumps(settings))
    rows = [{"prompt": f"Question {n}?", "chosen": "Yes.", "rejected": "No.", "instruction": "Hm?"} for n in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["--dataset_name", "rows.jsonl", "--max_new_tokens", "4"]
    call = {
        "try": ["try", str(folder), "Hello?", "--base", str(tiny_model), "--max_new_tokens", "4"],
        "sample": ["sample", str(folder), *data],
        "answer": ["answer", str(folder), "--benchmark", "alpaca_eval", *data],
        "evaluate": ["evaluate", str(folder), "--profile", "cpu", "--base", str(tiny_model), "--prompts", "2", *data],
        "merge": ["merge", str(folder.parent / "lora")],
    }[verb]
    if verb == "evaluate":
        with pytest.raises(SystemExit) as caught:
            main(call)
        assert caught.value.code == 2
    else:
        assert main(call) == 2
    assert "code of its own. Read it, and let it run with --trust_remote_code true." in capsys.readouterr().err
    assert not marker.exists()
    assert main([*call, "--trust_remote_code", "true"]) == 0
    assert marker.exists()
