"""The chat template and the stop tokens of an exported model, against those of the training."""

import gzip
import json
import os
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from dpo_recipes.cli import main
from dpo_recipes.publish.ollama import Modelfile, read_modelfile, render

CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FOLDED = (  # the system message becomes a part of the first question
    "{% set told = messages[0]['content'] ~ '\n' if messages[0]['role'] == 'system' else '' %}"
    "{% for m in messages if m['role'] != 'system' %}[{{ m['role'] }}]{{ told if loop.first }}{{ m['content'] }}"
    "{{ eos_token if m['role'] == 'assistant' }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
NO_SYSTEM = CHATML.replace(
    "{{ bos_token }}", "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
)
USER, REPLY, SYSTEM = (
    {"role": role, "content": text} for role, text in (("user", "Hi"), ("assistant", "Yes?"), ("system", "Be kind"))
)
LEGACY = "{{ if .System }}<s>{{ .System }}{{ end }}<u>{{ .Prompt }}<a>{{ .Response }}<e>"
NUMBERED = (
    '{{- range $i, $m := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}\n{{- if or (eq $m.Role "user") '
    '(eq .Role "system") }}[{{ $m.Role }}]{{ $m.Content }}{{ else }}{{ .Content | json }}{{ end }}'
    '{{ if and $last (ne .Role "assistant") }}>{{ end }}{{ end }}{{/* the end */}}'
)

ASSIGNED = (
    '{{ $told := "" }}{{- /* by index */ -}}{{ $at := -1 }}{{ range $i, $m := .Messages }}{{ if eq $m.Role "user" }}'
    "{{ $at = $i }}{{ else }}{{ $told = .Content }}{{ end }}{{ end }}{{ $told }} {{ $at }}"
)


@pytest.mark.parametrize(
    ("template", "conversation", "text"),
    [
        (LEGACY, [USER], "<u>Hi<a>"),
        (LEGACY, [SYSTEM, USER, REPLY, USER], "<s>Be kind<u>Hi<a>Yes?<e><u>Hi<a>"),
        (NUMBERED, [SYSTEM, USER], "[system]Be kind[user]Hi>"),
        (NUMBERED, [USER, REPLY], '[user]Hi"Yes?"'),
        (ASSIGNED, [SYSTEM, USER, REPLY, USER], "Yes? 3"),
        ("{{ .Prompt }}", [SYSTEM, USER], "Hi"),
        (
            '{{ range .Messages }}{{ if eq .Role "system" }}{{ continue }}{{ end }}<{{ .Content }}>{{ end }}',
            [SYSTEM, USER],
            "<Hi>",
        ),
        (
            "{{ if not .System }}none{{ else if gt (len .System) 3 }}long{{ else }}short{{ end }}",
            [SYSTEM, USER],
            "long",
        ),
    ],
)
def test_a_template_of_ollama_is_rendered_as_ollama_does(template, conversation, text):
    assert render(Modelfile(template), conversation) == text


def test_a_modelfile_is_read():
    found = read_modelfile(
        'FROM x.gguf\n# TEMPLATE no\nTEMPLATE """a\nb"""\nparameter stop "<e>"\nPARAMETER stop <f>\n'
        "PARAMETER temperature 1\nSYSTEM Be kind\n"
    )
    assert found == Modelfile(template="a\nb", system="Be kind", stops=["<e>", "<f>"])


@pytest.fixture
def model(tiny_model, tmp_path):
    """Makes a folder of the tiny model with that chat template and the special tokens of ChatML."""

    def make(template):
        folder = shutil.copytree(tiny_model, tmp_path / "model")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = template
        tokenizer.add_special_tokens(
            {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "bos_token": "<bos>"}
        )
        tokenizer.save_pretrained(folder)
        settings = json.loads((folder / "generation_config.json").read_text())
        ids = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
        (folder / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": ids}))
        return folder

    return make


def checked(*words, capsys):
    status = main(["template", *map(str, words)])
    return status, "".join(capsys.readouterr())


@pytest.mark.parametrize("template", [CHATML, NO_SYSTEM, None], ids=["ChatML", "no system turn", "the package's own"])
def test_a_modelfile_with_the_models_own_template_is_written_and_proven(template, model, tiny_model, tmp_path, capsys):
    folder = model(template) if template else tiny_model
    status, printed = checked(folder, "--write", tmp_path / "Modelfile", capsys=capsys)
    assert status == 0, printed
    written = (tmp_path / "Modelfile").read_text()
    assert written.startswith(f"FROM {folder}\nTEMPLATE ")
    assert ('PARAMETER stop "<|im_end|>"' in written) == bool(template)
    assert "<bos>" not in written, "Ollama itself puts it in front"
    assert checked(folder, "--against", tmp_path / "Modelfile", capsys=capsys)[0] == 0
    assert checked(folder, "--write", tmp_path / "Modelfile", capsys=capsys)[0] == 2, "never over a file"


@pytest.mark.parametrize(
    ("was", "put", "says"),
    [
        ("<|im_start|>user\n", "<|user|>", "from character 2 on"),
        ("<|im_end|>\n{{ else", "<|im_end|>{{ else", "one question: from character"),
        ('TEMPLATE """', 'TEMPLATE """<bos>', "the file '<bos>"),
        ('PARAMETER stop "<|im_end|>"\n', "", "does not stop at '<|im_end|>'"),
        ("PARAMETER stop", 'SYSTEM "Be rude."\nPARAMETER stop', "the file '<|im_start|>system"),
        ("TEMPLATE", "TEMPERATURE", "has no TEMPLATE"),
        (".Content", ".Content | printf", "cannot be rendered: printf is not known"),
    ],
)
def test_the_first_difference_of_a_modelfile_is_shown(was, put, says, model, tmp_path, capsys):
    folder = model(CHATML)
    checked(folder, "--write", tmp_path / "Modelfile", capsys=capsys)
    text = (tmp_path / "Modelfile").read_text()
    assert was in text
    (tmp_path / "Modelfile").write_text(text.replace(was, put))
    status, printed = checked(folder, "--against", tmp_path / "Modelfile", capsys=capsys)
    assert status == (2 if "cannot be rendered" in says else 1)
    assert says in printed


@pytest.mark.parametrize("template", [FOLDED, CHATML.replace("m['content']", "m['content'] | upper")])
def test_a_template_that_looks_beyond_roles_is_not_translated(template, model, tmp_path, capsys):
    status, printed = checked(model(template), "--write", tmp_path / "Modelfile", capsys=capsys)
    assert status == 2
    assert "looks at more than the role of a turn" in printed
    assert not (tmp_path / "Modelfile").exists()


def test_a_server_that_would_not_stop_is_found(model, tmp_path, capsys):
    folder = model(CHATML)
    status, printed = checked(folder, capsys=capsys)
    assert status == 0
    assert "<|im_start|>user\nHow deep is it?<|im_end|>\n<|im_start|>assistant" in printed
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 1}')
    status, printed = checked(folder, "--against", tmp_path / "generation_config.json", capsys=capsys)
    assert status == 1
    assert "the template ends an answer with '<|im_end|>'" in printed
    shutil.copy(tmp_path / "generation_config.json", folder)
    assert checked(folder, capsys=capsys)[0] == 1


def test_the_metadata_of_a_gguf_file_are_compared(model, tmp_path, capsys):
    gguf = pytest.importorskip("gguf")
    folder = model(CHATML)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for name, template, eos, says in (
        ("same", CHATML, end, None),
        ("other", CHATML.replace("\n{{", "{{"), end, "one question: from character"),
        ("rambles", CHATML, tokenizer.eos_token_id, "stops at the tokens [1], and an answer ends with '<|im_end|>'"),
        ("bare", None, end, "holds no chat template"),
    ):
        writer = gguf.GGUFWriter(tmp_path / f"{name}.gguf", "llama")
        if template:
            writer.add_chat_template(template)
        writer.add_eos_token_id(eos)
        writer.add_bos_token_id(tokenizer.bos_token_id)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        status, printed = checked(folder, "--against", tmp_path / f"{name}.gguf", capsys=capsys)
        assert (status, says is None or says in printed) == (int(says is not None), True), printed


TOKENIZERS = Path(os.environ.get("DPO_RECIPES_DATA", "nowhere")).parent / "tokenizers"


@pytest.mark.parametrize(
    ("name", "end", "translated"),
    [
        ("qwen3", "<|im_end|>", True),
        ("llama3_1", "<|eot_id|>", True),
        ("deepseek_v3", "<｜end▁of▁sentence｜>", True),  # noqa: RUF001
        ("gemma3", "<end_of_turn>", False),
    ],
)
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the tokenizers' own files
def test_templates_of_published_models(name, end, translated, tmp_path, capsys):
    if not (TOKENIZERS / name).is_dir():
        pytest.skip("needs tokenizers of published models in $DPO_RECIPES_DATA/../tokenizers")
    shutil.copy(TOKENIZERS / name / "tokenizer_config.json", tmp_path)
    packed = (TOKENIZERS / name / "tokenizer.json.gz").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(gzip.decompress(packed))
    number = AutoTokenizer.from_pretrained(tmp_path).convert_tokens_to_ids(end)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, number]}))
    status, printed = checked(tmp_path, "--write", tmp_path / "Modelfile", capsys=capsys)
    assert status == (0 if translated else 2), printed
    if translated:
        assert f'PARAMETER stop "{end}"' in (tmp_path / "Modelfile").read_text()
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": number + 1}))
    assert f"ends an answer with {end!r}" in checked(tmp_path, capsys=capsys)[1]
