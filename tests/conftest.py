import json
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import pytest

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
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
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


@pytest.fixture(scope="session")
def dpo_recipes() -> Path:
    """The installed command."""
    return Path(sys.executable).parent / "dpo-recipes"
