"""The preflight checks the text that is trained on: with chat templates written here and those of real models."""

import functools
import gzip
import json
import os
import shutil
import types
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from transformers import AutoConfig, AutoTokenizer

from dpo_recipes.dataset_adapters import preference_jsonl
from dpo_recipes.dataset_adapters.ledger import Ledger, SplitAccount
from dpo_recipes.errors import RecipeError
from dpo_recipes.models.pair_ids import encode_pairs
from dpo_recipes.preflight import signals
from dpo_recipes.preflight.prepare import measure_pairs
from dpo_recipes.preflight.tokens import (
    SIDES,
    as_plain_text,
    as_rendered,
    describe,
    fit,
    render,
    rendered_pairs,
    template_options,
)
from dpo_recipes.recipe import RecipeArguments

DATA = os.environ.get("DPO_RECIPES_DATA")
REAL = Path(DATA or "", "..", "tokenizers").resolve()
PATTERNS = {
    "qwen3": "<|im_end|>",
    "gemma3": "<end_of_turn>",
    "llama3_1": "<|eot_id|>",
    "deepseek_v3": "<\uff5cAssistant\uff5c>",
}
HEAD = "{% for m in messages %}{{ m['role'] + ': ' }}"
TAIL = "{{ eos_token if m['role'] == 'assistant' else '\n' }}{% endfor %}"
TAIL += "{% if add_generation_prompt %}assistant: {% endif %}"
WRITES = {  # what a template makes of a content
    "all": "{{ m['content'] }}",
    "trimmed": "{{ m['content'] | trim }}",
    "upper case": "{{ m['content'] | upper }}",
    "truncated": "{{ m['content'][:12] }}",
    "without reasoning": "{{ m['content'].split('</think>')[-1] }}",
}
CALLS = "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}"
TOOL = {"type": "function", "function": {"name": "find", "description": "Find it.", "parameters": {"type": "object"}}}


def turn(role, content, **fields):
    return {"role": role, "content": content, **fields}


def row(number=0, prompt="Is it so? ", chosen="Yes, it is so.", rejected="I do not know that.", **columns):
    return {"prompt": f"{prompt}{number}", "chosen": chosen, "rejected": rejected, **columns}


@pytest.fixture
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="session")
def real(tmp_path_factory):
    """Loads a real tokenizer with its chat template by name, from a folder of its own."""
    if not REAL.is_dir():
        pytest.skip("there is no folder of real tokenizers")

    @functools.cache
    def load(name):
        folder = tmp_path_factory.mktemp(name)
        shutil.copyfile(REAL / name / "tokenizer_config.json", folder / "tokenizer_config.json")
        (folder / "tokenizer.json").write_bytes(gzip.decompress((REAL / name / "tokenizer.json.gz").read_bytes()))
        return AutoTokenizer.from_pretrained(folder)

    return load


def measured(rows, tokenizer, tmp_path, *, max_length=None, **script):
    def load_pairs(_):
        pairs = preference_jsonl(Dataset.from_list(rows, on_mixed_types="use_json"))
        return DatasetDict(train=pairs, test=preference_jsonl(Dataset.from_list([row(prompt="Else? ")], split="test")))

    arguments = RecipeArguments(dataset_name="rows", **script)
    settings = types.SimpleNamespace(output_dir=str(tmp_path), max_length=max_length, trust_remote_code=False)
    return measure_pairs(load_pairs, arguments, settings, tokenizer)


def found(result):
    return {finding.name: finding.text for finding in result.findings}


# Text that a template leaves out


@pytest.mark.parametrize("written", WRITES)
def test_a_template_that_changes_text_is_named_and_one_that_trims_is_counted(written, tokenizer, tmp_path):
    tokenizer.chat_template = HEAD + WRITES[written] + TAIL
    think = "<think>So it is.</think>" if written == "without reasoning" else ""
    rows = [row(number, chosen=f"{think}  Yes, it is so.") for number in range(4)]
    result = measured(rows, tokenizer, tmp_path)
    assert ("template_drops_text" in found(result)) == (written not in ("all", "trimmed"))
    assert result.data["tokens"]["train"]["template_trims_text"] == (4 if written == "trimmed" else 0)
    assert "no_generation_prompt" not in found(result)


def test_sides_that_a_template_makes_equal_are_dropped_as_identical(tokenizer, tmp_path):
    tokenizer.chat_template = HEAD + WRITES["without reasoning"] + TAIL
    same = [row(number, chosen="<think>a</think>Yes.", rejected="<think>bb</think>Yes.") for number in range(3)]
    result = measured([*same, row(9)], tokenizer, tmp_path)
    assert result.data["splits"]["train"]["dropped"]["identical_completions"]["count"] == 3
    assert len(result.pairs["train"]) == 1
    with pytest.raises(RecipeError, match="the chat template leaves out where"):
        measured(same, tokenizer, tmp_path)


def test_the_rules_read_the_rendered_answers(tokenizer):
    tokenizer.chat_template = HEAD + WRITES["without reasoning"] + TAIL
    rows = [row(number, chosen=f"<think>{'long ' * 9}</think>No. Hm.", rejected="Yes, it is.") for number in range(40)]
    with Ledger():
        pairs = preference_jsonl(Dataset.from_list(rows))
        fitted = fit(pairs, tokenizer, None, split="train")
    rendered = as_rendered(fitted, tokenizer)
    rules = signals.find_signals(DatasetDict(train=rendered, test=rendered))["baselines"]
    assert (rules["longer"]["accuracy"], rendered["chosen"][0]) == (0, "No. Hm.")
    tokenizer.chat_template = HEAD + WRITES["all"] + TAIL
    with Ledger():
        fitted = fit(pairs, tokenizer, None, split="train")
    assert as_rendered(fitted, tokenizer) is fitted


def test_tool_calls_and_tools_that_a_template_leaves_out_are_named(tokenizer, tmp_path):
    call = {"type": "function", "function": {"name": "find", "arguments": {"what": "oak"}}}
    chosen = [turn("assistant", "Wait.", tool_calls=[call], reasoning_content="I look.")]
    rows = [row(number, chosen=chosen, tools=json.dumps([TOOL])) for number in range(3)]
    tokenizer.chat_template = HEAD + WRITES["all"] + TAIL
    text = found(measured(rows, tokenizer, tmp_path))["template_drops_text"]
    assert all(f"{field} in 75%" in text for field in ("tool_calls", "reasoning_content", "tools"))
    reasons = "{{ m.reasoning_content or '' }}"
    tokenizer.chat_template = "{{ (tools or []) | tojson }}" + HEAD + reasons + WRITES["all"] + CALLS + TAIL
    result = measured(rows, tokenizer, tmp_path)
    assert "template_drops_text" not in found(result)
    shown = "".join(result.data["rendered"][0]["sides"]["chosen"]["tokens"])
    assert all(text in shown for text in ("Find it.", "I look.", '"what": "oak"'))


# Loss where none is meant


def test_turns_of_others_inside_a_completion_are_a_finding(tokenizer, tmp_path):
    chosen = [turn("assistant", "Yes."), turn("user", "Why?"), turn("assistant", "So.")]
    assert (
        "2 of 3 pairs"
        in found(measured([row(1, chosen=chosen), row(2, chosen=chosen)], tokenizer, tmp_path))["other_turns"]
    )
    two_answers = [turn("assistant", "Yes."), turn("assistant", "So.")]
    assert "other_turns" not in found(measured([row(1, chosen=two_answers)], tokenizer, tmp_path))


# Markup and control tokens in texts


@pytest.mark.parametrize(
    "prompt",
    [
        "<|im_start|>user\nIs it so?<|im_end|>\n<|im_start|>assistant\n",
        "<s>[INST] Is it so? [/INST]",
        "<start_of_turn>user\nIs it so?<end_of_turn>",
        "### Instruction:\nIs it so?\n\n### Response:\n",
        "Human: Is it so?\n\nAssistant:",
        "<image>\nWhat is this?",
    ],
)
def test_markup_of_a_chat_template_in_prompts_is_found(prompt, tokenizer, tmp_path):
    rows = [
        row(number, chosen=f"Yes, {number}.") | {"prompt": f"{number}" + "\n" + prompt if prompt[0] == "#" else prompt}
        for number in range(3)
    ]
    result = measured(rows, tokenizer, tmp_path)
    assert "3 of 4 pairs" in found(result)["chat_markup"]


@pytest.mark.parametrize(
    "text",
    ["Write: Human: hello.", "Use <b>bold</b> and [links].", "The user: who is it?", "# Instruction\nx", "a | b"],
)
def test_usual_text_is_no_markup(text, tokenizer, tmp_path):
    result = measured([row(number, prompt=text, chosen=f"{text} {number}") for number in range(3)], tokenizer, tmp_path)
    assert not {"chat_markup", "control_tokens"} & set(found(result))


@pytest.mark.parametrize("side", ["prompt", "chosen", "rejected"])
def test_control_tokens_in_texts_are_found_and_can_be_encoded_as_text(side, tokenizer, tmp_path):
    rows = [row(number) | {side: f"What does <eos> mean, {number}?"} for number in range(3)]
    result = measured(rows, tokenizer, tmp_path)
    assert "3 of 4 pairs" in found(result)["control_tokens"]
    result = measured(rows, tokenizer, tmp_path, control_tokens_as_text=True)
    assert not {"control_tokens", "eos_inside"} & set(found(result))
    assert result.pairs["train"][0][side][0]["content"] == "What does <\u200beos> mean, 0?"


def test_prompts_of_the_online_trainers_are_looked_through_too(tokenizer):
    rows = [row(number, prompt="<|user|> Is it so, <eos>? ") for number in range(3)]
    with Ledger():
        prompts = fit(preference_jsonl(Dataset.from_list(rows)), tokenizer, None, split="train", unit="prompt")
    described = describe(prompts, account=SplitAccount())
    assert (described["control_tokens"], described["chat_markup"]) == (3, 3)


def test_columns_of_the_datas_own_drop_no_pair(tokenizer):
    own = {"drop_reason": "a column of mine", "cut_tokens": "3"}
    pairs = preference_jsonl(Dataset.from_list([row()]))
    for name, cell in own.items():
        pairs = pairs.add_column(name, [cell])
    with Ledger():
        [kept] = fit(pairs, tokenizer, None, split="train")
    assert kept["cut_tokens"] == 0


# Tokenizers of real models


@pytest.mark.slow
@pytest.mark.parametrize("name", PATTERNS)
def test_the_checks_know_the_templates_and_control_tokens_of_real_models(name, real):
    tokenizer = real(name)
    before = [turn("user", "Is it?"), turn("assistant", "<think>I think so.</think>\n\nYes.")]
    rows = [
        row(prompt='Why <so> "it"?  ', chosen="<b>Ja</b>: \"naïve\" 'so' & {x}", rejected=" No,  it is\n\n not. "),
        row(prompt=f"What is {PATTERNS[name]}? "),
        row() | {"prompt": [*before, turn("user", "Why?")]},
        row(chosen="<think>I think so.</think>\n\nYes."),
    ]
    with Ledger():
        adapted = preference_jsonl(Dataset.from_list(rows, on_mixed_types="use_json"))
        pairs = fit(adapted, tokenizer, None, split="train")
    assert pairs["control_tokens"][:] == [False, True, False, False]
    assert pairs["template_drops_text"][:] == [False, False, name == "qwen3", False]  # earlier reasoning goes
    assert not any(pairs["double_bos"])
    assert all(shown["generation_prompt"] for shown in rendered_pairs(pairs, tokenizer, split="train"))
    control = tokenizer.convert_tokens_to_ids(PATTERNS[name])
    texts = [each["prompt"][1][0]["content"] for each in (adapted, as_plain_text(adapted, tokenizer))]
    assert [control in tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts] == [True, False]


@pytest.mark.slow
@pytest.mark.parametrize("name", PATTERNS)
def test_tools_and_calls_reach_the_tokens_that_trl_makes(name, real):
    tokenizer = real(name)
    call = {"type": "function", "function": {"name": "find", "arguments": {"what": "oak"}}}
    rows = [row(number, chosen=[turn("assistant", "", tool_calls=[call])], tools=[TOOL]) for number in range(2)]
    with Ledger():
        pairs = fit(preference_jsonl(Dataset.from_list(rows)), tokenizer, None, split="train")
    options = dict(tools=[TOOL], return_dict=True)  # as DPOTrainer calls it
    for pair in pairs:
        texts = render(*(pair[side] for side in SIDES), tokenizer=tokenizer, **template_options(pair))
        [ids] = encode_pairs([texts], tokenizer)
        theirs = tokenizer.apply_chat_template(pair["prompt"] + pair["chosen"], **options)["input_ids"]
        assert ids.prompt + ids.chosen == theirs
    assert pairs["unrendered"][:] == ["" if name == "qwen3" else "tool_calls tools"] * 2


# The model


@pytest.mark.parametrize(("rows", "refused"), [(-1, True), (0, False)])
def test_token_ids_beyond_the_embedding_are_refused(rows, refused, tokenizer, tmp_path):
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path)
    AutoConfig.for_model("llama", vocab_size=len(tokenizer) + rows).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    if refused:
        with pytest.raises(
            RecipeError, match=rf"token ids up to {len(tokenizer) - 1}, but .* has {len(tokenizer) - 1} rows"
        ):
            measured([row()], tokenizer, tmp_path)
    else:
        measured([row()], tokenizer, tmp_path)


def test_a_token_that_no_text_uses_may_lie_beyond_the_embedding(tokenizer, tmp_path):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<picture>"]})
    tokenizer.save_pretrained(tmp_path)
    AutoConfig.for_model("llama", vocab_size=len(tokenizer) - 1).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    measured([row()], tokenizer, tmp_path)
    with pytest.raises(RecipeError, match="token ids up to"):
        measured([row(prompt="A <picture>? ")], tokenizer, tmp_path)


@pytest.mark.parametrize("max_length", [None, 65])
def test_a_max_length_beyond_the_context_is_refused(max_length, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    AutoConfig.for_model("llama", vocab_size=len(tokenizer), max_position_embeddings=64).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    measured([row()], tokenizer, tmp_path, max_length=64)
    with pytest.raises(RecipeError, match="has 64 positions"):
        measured([row(), row(1, chosen="Yes. " * 20)], tokenizer, tmp_path, max_length=max_length)
