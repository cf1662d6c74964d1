"""Private names of TRL, transformers, PEFT and accelerate that this package replaces or relies on.

Methods that a trainer of ours overrides, and private attributes of that trainer itself, stand in the trainer. Every
other private name is used here and nowhere else. tests/test_trl_patches.py has a canary for each name of both kinds:
it fails when a library changes the name, and says what to look at.
"""

from typing import Any

from trl import GRPOTrainer


def tokenize_prompts(trainer: GRPOTrainer, prompts: Any) -> list[list[int]]:
    """Ids of the prompts as GRPOTrainer gives them to the policy."""
    ids: list[list[int]] = trainer._tokenize_prompts(prompts)[0]
    return ids


def keep_from_vllm(trainer: GRPOTrainer, name: str) -> None:
    """Leaves weights with this name in their key out of what TRL sends to the vLLM engine, which has no such model."""
    named = trainer.vllm_generation._iter_named_params
    trainer.vllm_generation._iter_named_params = lambda: (each for each in named() if name not in each[0])
