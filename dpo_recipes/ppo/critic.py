"""PPO's critic: a sequence classifier with one label, reached through the policy that it is a submodule of."""

import functools
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
)
from transformers.modeling_layers import GenericForSequenceClassification
from trl import GRPOTrainer
from trl.trainer.utils import FusedCausalLMOutput, get_config_model_id

from dpo_recipes.models.open import full_model, load_full

CRITIC = "ppo_critic"
"""The critic's name as a submodule of the policy; no key of a saved policy begins with it."""
CRITIC_FILE = "critic.safetensors"
"""In a checkpoint: what of the critic is trained."""


@dataclass
class PolicyAndCriticOutput(FusedCausalLMOutput):
    """What the policy returns with `return_values=True`: a field of the output, so that DDP finds the tensor."""

    state_values: Tensor | None = None  # `values` is a method of every output
    """Value of the state after each token. Shape (batch, tokens)."""


def attach_critic(policy: Any, critic: Any) -> None:
    """Make the critic a submodule of the policy, and reach it by the policy's forward alone, as FSDP and DDP ask.

    `policy(..., return_values=True)` returns a `PolicyAndCriticOutput`; `policy(..., values_only=True)` the values,
    shape (batch, tokens). Without either the policy is called as before. `policy.save_pretrained` leaves the critic
    out.

    Args:
        policy: With TRL's fused LM head; a PeftModel or not.
        critic: A sequence classifier with one label, or a PeftModel of one; its vocabulary is the policy's.
    """
    original = policy.forward
    policy.add_module(CRITIC, critic)
    classifier = critic.get_base_model() if is_peft_model(critic) else critic

    def values_of(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = classifier.base_model(input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        weights = sorted(classifier.score.parameters(), key=lambda weight: not weight.requires_grad)
        values: Tensor = classifier.score(hidden.to(weights[0].dtype)).squeeze(-1)  # PEFT keeps an untrained copy
        return values.to(torch.promote_types(values.dtype, torch.float32))

    @functools.wraps(original)
    def forward(_: nn.Module, *args: Any, return_values: bool = False, values_only: bool = False, **inputs: Any) -> Any:
        if values_only:
            return values_of(inputs["input_ids"], inputs["attention_mask"])
        output = original(*args, **inputs)
        if return_values:
            values = values_of(inputs["input_ids"], inputs["attention_mask"])
            return PolicyAndCriticOutput(**output, state_values=values)
        return output

    save = policy.save_pretrained

    @functools.wraps(save)
    def save_pretrained(_: nn.Module, *args: Any, **options: Any) -> Any:
        with without_critic(policy):
            return save(*args, **options)

    policy.forward = types.MethodType(forward, policy)
    policy.save_pretrained = types.MethodType(save_pretrained, policy)


@contextmanager
def without_critic(policy: Any) -> Iterator[Any]:
    """The critic, which the policy is without while the block lasts; None inside another such block."""
    critic = policy._modules.pop(CRITIC, None)
    try:
        yield critic
    finally:
        if critic is not None:
            policy.add_module(CRITIC, critic)


def sequence_classifier(config: PreTrainedConfig) -> Any:
    """The class of a sequence classifier: transformers' own, or its generic score head on the backbone.

    Of the 189 causal architectures of transformers 5.23, 103 have no class of their own.

    Raises:
        ValueError: If the language model has no such backbone: it is a part of an encoder-decoder, say.
    """
    if type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING or getattr(config, "auto_map", None):
        return AutoModelForSequenceClassification
    with torch.device("meta"):
        language_model = AutoModelForCausalLM.from_config(config)
    own = language_model.config
    parts = [name for name, part in language_model.named_children() if type(part) is MODEL_MAPPING.get(type(own), None)]
    if not parts or not hasattr(own.get_text_config(), "hidden_size"):
        raise ValueError(
            f"No critic can be made of a {type(language_model).__name__}: it has no backbone for a score head. Pass a "
            "model with the same tokenizer as critic."
        )
    parent = next(kind for kind in type(language_model).__mro__ if kind.__name__.endswith("PreTrainedModel"))
    facts = {"base_model_prefix": parts[0], "config_class": type(own), "__module__": type(language_model).__module__}
    return type("CriticForSequenceClassification", (GenericForSequenceClassification, parent), facts)


def load_critic(trainer: GRPOTrainer, name: str | None, quantization_config: Any) -> Any:
    """What the critic starts from, loaded as TRL loads the policy; a score head that it lacks gives 0.

    Args:
        trainer: Whose policy and tokenizer it must fit.
        name: A folder or Hub name; None: what the policy started from.
        quantization_config: Of the weights.

    Raises:
        ValueError: If it has another vocabulary, the policy has no name, or its architecture takes no score head.
        RecipeError: If it cannot be loaded.
    """
    options = {**(trainer.args.model_init_kwargs or {}), "quantization_config": quantization_config}
    options["dtype"] = options.get("dtype") or torch.float32  # as TRL loads the policy
    options.setdefault("trust_remote_code", trainer.args.trust_remote_code)
    options.setdefault("device_map", None)
    if name is not None:
        options.pop("revision", None)  # is the policy's
    start = name or get_config_model_id(trainer.model.config)
    if not start:
        raise ValueError("The policy has no folder or name to start the critic from. Pass a model as critic.")
    asked = {key: options[key] for key in ("revision", "trust_remote_code") if key in options}
    artifact = full_model(start, **asked)
    if name is not None:
        theirs = AutoTokenizer.from_pretrained(name, trust_remote_code=options["trust_remote_code"])
        if theirs.get_vocab() != trainer._tokenizer.get_vocab():
            raise ValueError(f"The critic reads the policy's tokens, and {name} has others. Name one with the same.")
    own = sequence_classifier(artifact.config)
    critic = load_full(replace(artifact, is_reward_model=True), own, num_labels=1, **options)
    if not artifact.is_reward_model:
        nn.init.zeros_(critic.score.weight)  # a language model has no score
    return critic
