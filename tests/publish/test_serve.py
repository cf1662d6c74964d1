"""A model behind `transformers serve` answers as it does here: by OpenAI's client, and as the judge of `evaluate`."""

import importlib.util
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest
from commands import run_forked, run_train
from lora_runs import save_lora_run
from manual import DOCS, commands

from dpo_recipes import playground
from dpo_recipes.files import read_jsonl
from dpo_recipes.models.generation import generate
from dpo_recipes.models.open import open_model

MODEL = "outputs/quickstart_merged"
LONGEST = 48  # tokens of an answer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(importlib.util.find_spec(name) for name in ("fastapi", "uvicorn", "openai")),
        reason="needs pip install 'transformers[serving]'",
    ),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the quickstart's SFT model, briefly trained, a LoRA adapter on it, and both merged."""
    folder = tmp_path_factory.mktemp("serve")
    done = run_train("quickstart-sft", "--profile", "cpu", "--max_steps", "80", "--eval_pairs", "16", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    before = Path.cwd()
    os.chdir(folder)
    try:
        save_lora_run(folder / "outputs" / "quickstart", "outputs/quickstart_sft", std=0.05)
    finally:
        os.chdir(before)
    merged = run_forked("merge", "outputs/quickstart", cwd=folder)
    assert merged.returncode == 0, merged.stderr
    return folder


@pytest.fixture(scope="module")
def address(place):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    [line] = [line for line in commands(DOCS / "deploy.md") if "transformers serve" in line]
    line = line.replace("outputs/hh_rlhf_lora_merged", MODEL).replace("8000", str(port))
    command = [Path(sys.executable).with_name("transformers"), *shlex.split(line)[1:]]
    with (place / "serve.log").open("w") as log:
        server = subprocess.Popen(command, cwd=place, stdout=log, stderr=log)
    for _ in range(240):
        assert server.poll() is None, (place / "serve.log").read_text()
        with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
            break
        time.sleep(0.5)
    yield f"http://127.0.0.1:{port}/v1"
    server.terminate()
    server.wait(timeout=30)


def test_greedy_answers_are_the_same_token_by_token(place, address, monkeypatch):
    from openai import OpenAI

    monkeypatch.chdir(place)
    questions = [prompt[-1]["content"] for prompt in playground.evaluation_prompts()[:12]]
    prompts = [
        [{"role": "system", "content": "Be kind."}] * (row % 2) + [{"role": "user", "content": text}]
        for row, text in enumerate(questions)
    ]
    model, tokenizer = open_model(MODEL)
    here = generate(model, tokenizer, prompts, max_new_tokens=LONGEST)
    client = OpenAI(base_url=address, api_key="none")
    for prompt, mine in zip(prompts, here, strict=True):
        options = dict(model=MODEL, messages=prompt, temperature=0, max_tokens=LONGEST)
        reply = client.chat.completions.create(**options)
        theirs = reply.choices[0].message.content
        assert theirs.strip() == mine["text"]
        assert tokenizer(theirs)["input_ids"] == tokenizer(mine["text"])["input_ids"]
        assert reply.usage.completion_tokens == mine["tokens"] + mine["ended"]
        asked = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
        assert reply.usage.prompt_tokens == len(asked)
        pieces = [
            part.choices[0].delta.content or "" for part in client.chat.completions.create(**options, stream=True)
        ]
        assert "".join(pieces).strip() == mine["text"]
    assert len({answer["text"] for answer in here}) > 3, "a model that always says the same proves little"


def test_evaluate_asks_it_as_a_judge(place, address, tmp_path):
    shutil.copytree(place / "outputs", tmp_path / "outputs")
    asked = ["--judge", address, "--judge_model", MODEL, "--yes"]
    few = ["--profile", "cpu", "--prompts", "4", "--max_new_tokens", "40", "--eval_pairs", "4"]
    result = run_forked("evaluate", "quickstart", *few, *asked, cwd=tmp_path)
    replies = read_jsonl(tmp_path / "outputs/quickstart/eval/judgements.jsonl")
    assert len(replies) in (2, 4, 6, 8), result.stdout + result.stderr  # both orders; equal answers are not asked about
    assert all(reply["text"] and reply["usage"]["completion_tokens"] > 1 for reply in replies)
    assert result.returncode == 2, "a model of a million weights knows no verdict"
    assert "gave no verdict that can be read" in result.stderr
