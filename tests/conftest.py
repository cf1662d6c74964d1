import json
import logging
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("WANDB_MODE", "offline")
# A sixth of what every process imports is for what bitsandbytes gives torch.compile, and nobody calls.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import pytest

for name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL"):  # of a `make test` that runs these tests, not of the makes in them
    os.environ.pop(name, None)

REPOSITORY = Path(__file__).parent.parent
RECIPES = REPOSITORY / "recipes"

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ 'Bot: ' + m['content'] + eos_token }}"
    "{% endgeneration %}{% else %}{{ m['role'].capitalize() + ': ' + m['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Bot:' }}{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of two layers and a byte tokenizer with a chat template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny") / "model"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", *alphabet])}
    bytes_only = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_only, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,  # a block of 4-bit weights
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def reward_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a reward model of random weights, its scores apart, and the tokenizer of `tiny_model`."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = tmp_path_factory.mktemp("reward") / "model"
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def hh_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A jsonl file of 120 rows in the schema of hh-rlhf, written for these tests."""
    topics = ["tea", "bread", "maps", "chess", "rivers", "birds", "clocks", "paint", "wool", "bridges"]
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    with file.open("w") as stream:
        for index in range(120):
            topic = topics[index % len(topics)]
            context = f"\n\nHuman: Question {index}: tell me about {topic}.\n\nAssistant:"
            row = {"chosen": f"{context} Gladly, {topic} it is.", "rejected": f"{context} No. Ask someone else."}
            stream.write(json.dumps(row) + "\n")
    return file


@pytest.fixture(scope="session")
def rows_of(tmp_path_factory: pytest.TempPathFactory, hh_rows: Path) -> dict[str, Path]:
    """By dataset, a jsonl file of rows in its published schema, written for these tests."""

    def message(name: str, parent: str | None, text: str, rank: int | None = None) -> dict[str, object]:
        states = {"deleted": False, "synthetic": False, "review_result": True, "tree_state": "ready_for_export"}
        role = "prompter" if rank is None else "assistant"
        ids = {"message_id": name, "parent_id": parent, "message_tree_id": name.partition("-")[0]}
        return {**ids, "text": text, "role": role, "lang": "en", "rank": rank, **states}

    rows: dict[str, list[dict[str, object]]] = {"shp": [], "oasst1": [], "ultrafeedback": []}
    for index in range(120):
        question, good, bad = f"Question {index}?", f"Gladly: answer {index}.", "No. Ask someone else."
        comments = {"human_ref_A": bad, "human_ref_B": good, "score_A": 3, "score_B": 12, "labels": 0}
        rows["shp"].append(
            {"post_id": f"p{index}", "domain": "askscience_train", "history": f"Post {index}?"} | comments
        )
        root = message(f"m{index}", None, question)
        rows["oasst1"] += [root, *(message(f"m{index}-{n}", f"m{index}", (good, bad)[n], n) for n in (1, 0))]
        turns = [
            [{"role": "user", "content": question}, {"role": "assistant", "content": text}] for text in (good, bad)
        ]
        rated = {"chosen": turns[0], "chosen-rating": 4.5, "rejected": turns[1], "rejected-rating": 2.0}
        rows["ultrafeedback"].append({"source": "evol_instruct", "prompt": question, **rated})
    folder = tmp_path_factory.mktemp("published")
    for name, content in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return {"hh": hh_rows, **{name: folder / f"{name}.jsonl" for name in rows}}


def run_command(*command: str | Path, cwd: Path, timeout: int = 300, **environment: str) -> subprocess.CompletedProcess:
    """Run what a user types, in a folder of its own."""
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def run_train(*words: str | Path, cwd: Path, timeout: int = 300) -> subprocess.CompletedProcess:
    """What `dpo-recipes train` does, in a fork of this process, which has imported what takes a new one ten seconds.

    Only accelerate is left out, by which the other processes of a run are started.
    """
    from trl import DPOTrainer  # noqa: F401

    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("stdout", "stderr")]
        call = ["train", *map(str, words)]
        child = multiprocessing.get_context("fork").Process(target=_train, args=(call, cwd, files))
        child.start()
        child.join(timeout)
        if child.exitcode is None:
            child.kill()
            raise subprocess.TimeoutExpired(call, timeout)
        return subprocess.CompletedProcess(call, child.exitcode, *(file.read_text() for file in files))


def _train(call: list[str], cwd: Path, files: list[Path]) -> None:
    import torch
    from accelerate.state import AcceleratorState, GradientState

    from dpo_recipes import cli, launch

    def recipe(command: list[str], environment: dict[str, str]) -> int:
        os.environ.update(environment)
        first = next(at for at, word in enumerate(command) if word.endswith(".py"))
        sys.argv = command[first:]
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    os.chdir(cwd)
    warnings.resetwarnings()
    logging.getLogger().handlers.clear()  # pytest's
    AcceleratorState._reset_state(reset_partial_state=True)  # of the tests before
    GradientState._reset_state()
    launch.supervise = recipe
    torch.set_num_threads(1)  # as run_command has it
    sys.exit(cli.main(call))


@pytest.fixture(scope="session")
def dpo_recipes() -> Path:
    """The installed command."""
    return Path(sys.executable).parent / "dpo-recipes"
