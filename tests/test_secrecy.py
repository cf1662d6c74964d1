import os
import sys

import pytest
import torch
from trl import DPOConfig, ModelConfig

from dpo_recipes.errors import RecipeError
from dpo_recipes.recipe import RecipeArguments, parse_recipe, run
from dpo_recipes.secrecy import KEYS, hide, hide_flags, machine_paths, shorten_paths

SECRET = "hf_Secret+of/the=tests"
CPU = {"use_cpu": True, "bf16": False, "activation_checkpointing": False, "report_to": "none"}


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["--hub_token", SECRET, "--beta", "0.1"], ["--hub_token", "***", "--beta", "0.1"]),
        ([f"--hub-token={SECRET}"], ["--hub-token=***"]),
        (["--model_init_kwargs", f'{{"token": "{SECRET}"}}'], ["--model_init_kwargs", '{"token": "***"}']),
        (["--vllm_server_base_url", "http://me:word@host/v1"], ["--vllm_server_base_url", "http://***@host/v1"]),
        (
            ["--dataset_name", f"https://host/x.jsonl?api-key={SECRET}"],
            ["--dataset_name", "https://host/x.jsonl?api-key=***"],
        ),
        (["--api_key", SECRET, SECRET], ["--api_key", "***", "***"]),
        (["--pad_token", "<pad>", "--max_length", "8"], ["--pad_token", "<pad>", "--max_length", "8"]),
        (["--hub_token", "--beta", "1"], ["--hub_token", "--beta", "1"]),
    ],
)
def test_a_command_line_is_shown_without_its_secrets(words, shown):
    assert hide_flags(words) == shown


def test_a_secret_is_hidden_in_a_url_and_in_json_too():
    assert hide('a"b a%22b a\\"b', ['a"b', ""]) == "*** *** ***"


@pytest.mark.parametrize(
    "flags",
    [
        ["--hub_token", SECRET],
        [f"--hub_token={SECRET}"],
        ["--model_init_kwargs", f'{{"token": "{SECRET}"}}'],
        ["--model_init_kwargs", '{"token": "of-the-model"}', "--hub_token", SECRET],
    ],
)
def test_the_token_of_the_hub_reaches_its_client_and_no_file(flags, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "another")
    monkeypatch.setattr(sys, "argv", ["recipe.py", *flags])
    recipe = CPU | {"model_name_or_path": "some/model", "output_dir": str(tmp_path)}
    for _ in range(2):  # as in a notebook
        script_args, training_args, _ = parse_recipe(recipe, (RecipeArguments, DPOConfig, ModelConfig))
    assert os.environ["HF_TOKEN"] == SECRET
    torch.save([training_args, script_args], tmp_path / "training_args.bin")  # as the trainer does in a checkpoint
    assert SECRET.encode() not in (tmp_path / "training_args.bin").read_bytes()
    assert SECRET not in str(sys.argv), "trackers keep the command line"
    assert SECRET not in str(script_args.settings)


def test_a_flag_that_is_refused_shows_no_secret(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["recipe.py", "--hf_token", SECRET])
    with pytest.raises(RecipeError, match=r"hf_token.*\*\*\*") as refused:
        parse_recipe(CPU, (RecipeArguments, DPOConfig, ModelConfig))
    assert SECRET not in str(refused.value)


def test_an_error_of_a_library_shows_no_secret(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["recipe.py", "--hub_token", SECRET])
    recipe = CPU | {"model_name_or_path": "some/model", "output_dir": str(tmp_path)}

    def main():
        parse_recipe(recipe, (RecipeArguments, DPOConfig, ModelConfig))
        raise RecipeError(f"The server refused the token {SECRET}.")

    with pytest.raises(SystemExit):
        run(main)
    assert capsys.readouterr().err == "The server refused the token ***.\n"


@pytest.mark.parametrize(
    ("text", "paths", "short"),
    [
        ('"/home/ann/pairs.jsonl"', ["/home/ann/pairs.jsonl"], '"pairs.jsonl"'),
        ("A:/Users/no and C:\\Users\\ann\\x.json", ["A:/Users/no", "C:\\Users\\ann\\x.json"], "no and x.json"),
        ("see ~/runs/one.", ["~/runs/one."], "see one."),
        ("/tmp/a/b:200+outputs/x", ["/tmp/a/b"], "b:200+outputs/x"),
        ("https://huggingface.co/home/ann, us/home/x, and/or", [], None),
        ("#!/usr/bin/env python, 'Q:\\n', </tool_call>, /think", [], None),
    ],
)
def test_paths_that_show_a_machine_are_found_and_shortened(text, paths, short):
    assert machine_paths(text) == paths
    assert shorten_paths(text) == (text if short is None else short)


@pytest.mark.parametrize(
    ("text", "is_key"),
    [(f"x = hf_{'a1' * 17}", True), ("sk-proj-abcdefghijklmnopqrst", True), ("-----BEGIN RSA PRIVATE KEY", True)]
    + [(text, False) for text in ("hf_hub_download", "task-specific-tokens-of-the-model", "risk-free")],
)
def test_keys_of_services_are_known_by_their_beginning(text, is_key):
    assert bool(KEYS.search(text)) == is_key
