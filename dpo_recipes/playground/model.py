"""Builds the playground's tokenizer and untrained model."""

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

from dpo_recipes.playground.pairs import write_pairs
from dpo_recipes.playground.words import CHAT_TEMPLATE

EOS, PAD = "<|end|>", "<|pad|>"
VOCABULARY = 1024
MAX_NEW_TOKENS = 72
"""Most tokens of an answer: more than the longest one needs."""
ARCHITECTURE: dict[str, Any] = dict(
    hidden_size=160,
    intermediate_size=432,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=512,
    tie_word_embeddings=True,
    initializer_range=0.05,  # the usual 0.02 learns more slowly at this width
)


def _tokenizer_text() -> list[str]:
    """Questions and answers from which the tokenizer learns its words."""
    pairs = write_pairs("train", 2000, 0)
    return [pair[column][0]["content"] for pair in pairs for column in ("prompt", "chosen", "rejected")]


def _build_tokenizer() -> Any:
    """A byte-level BPE tokenizer, which reads any text and spells nearly every word of the grammar as one token."""
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    special = [PAD, EOS, "<|system|>", "<|user|>", "<|assistant|>"]
    tokenizer.train_from_iterator(
        _tokenizer_text(), VOCABULARY, min_frequency=0, show_progress=False, special_tokens=special
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(tokenizer.to_str()),
        eos_token=EOS,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=ARCHITECTURE["max_position_embeddings"],
    )


def build_model(folder: str | Path | None = None, *, seed: int = 0) -> Path:
    """Builds a small Llama with random weights and its tokenizer once, finds it again by its content; returns its path.

    Args:
        folder: Folder that keeps the models; by default `dpo-recipes` in the user's cache folder.
        seed: Seed of the weights.
    """
    root = Path(folder) if folder else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dpo-recipes"
    versions = [torch.__version__, transformers.__version__, tokenizers.__version__]
    content = json.dumps([_tokenizer_text(), CHAT_TEMPLATE, VOCABULARY, ARCHITECTURE, seed, versions])
    path = root / f"playground-{hashlib.sha256(content.encode()).hexdigest()[:12]}"
    if path.is_dir():
        return path
    tokenizer = _build_tokenizer()
    config = transformers.LlamaConfig(
        **ARCHITECTURE,
        vocab_size=len(tokenizer),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(config).float()
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".playground-", dir=root) as temporary:
        written = Path(temporary) / path.name
        model.save_pretrained(written)
        tokenizer.save_pretrained(written)
        try:
            os.replace(written, path)
        except OSError:
            if not path.is_dir():  # another process was first, and its folder holds the same model
                raise
    return path
