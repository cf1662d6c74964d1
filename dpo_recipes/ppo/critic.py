"""PPO's critic: a sequence classifier with one label, held as a submodule of the policy and called through it."""

import copy
import functools
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils import is_peft_model
from peft import PeftConfig, TaskType, get_peft_model
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
from trl.trainer.utils import FusedCausalLMOutput, disable_dropout_in_model, get_config_model_id

from dpo_recipes.models.open import full_model, load_full
from dpo_recipes.trl_patches import keep_from_vllm

CRITIC = "ppo_critic"
"""The critic's name as a submodule of the policy; no key of a saved policy begins with it."""
CRITIC_FILE = "critic.safetensors"
"""File of a checkpoint that holds the critic's trained weights."""


def add_critic(trainer: GRPOTrainer, critic: Any, *, quantization_config: Any, peft_config: PeftConfig | None) -> None:
    """Loads the critic if it is given by name, prepares it as TRL prepared the policy, and attaches it to the policy.

    Args:
        trainer: Its model is the policy.
        critic: A sequence classifier with one label, a folder or Hub name, or None for the policy's initial model.
        quantization_config: Quantization of a critic that is loaded here.
        peft_config: LoRA settings; by default the policy's.

    Raises:
        ValueError: If the critic cannot read the policy's tokens or gives no single value.
        RecipeError: If the critic cannot be loaded.
    """
    if critic is None or isinstance(critic, str):
        critic = load_critic(trainer, critic, quantization_config)
    if critic in trainer.reward_funcs:
        critic = copy.deepcopy(critic)  # the reward model itself must not be trained
    _check_critic(critic, trainer.processing_class)
    critic.config.get_text_config().pad_token_id = trainer.processing_class.pad_token_id
    policy, args = trainer.model, trainer.args
    if args.disable_dropout:
        disable_dropout_in_model(critic)
    if is_peft_model(policy):
        lora = copy.deepcopy(peft_config or policy.peft_config["default"])
        lora.task_type, lora.modules_to_save, lora.inference_mode = TaskType.SEQ_CLS, ["score"], False
        lora.base_model_name_or_path = None
        critic = get_peft_model(critic, lora)
        if args.activation_checkpointing:  # the Trainer enables it in what a PeftModel wraps
            critic.get_base_model().activation_checkpointing_enable(args.activation_checkpointing_kwargs)
            critic.get_base_model().enable_input_require_grads()
    attach_critic(policy, critic.to(policy.device))
    if trainer.use_vllm:
        keep_from_vllm(trainer, CRITIC)


def load_critic(trainer: GRPOTrainer, name: str | None, quantization_config: Any) -> Any:
    """A critic loaded as TRL loads the policy; a score head that its files lack gives 0.

    Args:
        trainer: Its policy and tokenizer are those that the critic must fit.
        name: A folder or Hub name, or None for the policy's initial model.
        quantization_config: Quantization of the weights.

    Raises:
        ValueError: If its vocabulary is another, the policy has no name, or its architecture takes no score head.
        RecipeError: If it cannot be loaded.
    """
    defaults = {"trust_remote_code": trainer.args.trust_remote_code, "device_map": None}
    options = defaults | (trainer.args.model_init_kwargs or {}) | {"quantization_config": quantization_config}
    options["dtype"] = options.get("dtype") or torch.float32  # as TRL loads the policy
    if name is not None:
        options.pop("revision", None)  # is the policy's
    initial = name or get_config_model_id(trainer.model.config)
    if not initial:
        raise ValueError("The policy has no folder or name to start the critic from. Pass a model as critic.")
    artifact = full_model(initial, **options)
    if name is not None:
        theirs = AutoTokenizer.from_pretrained(name, trust_remote_code=options["trust_remote_code"])
        if theirs.get_vocab() != trainer.processing_class.get_vocab():
            raise ValueError(f"The critic reads the policy's tokens, and {name} has others. Name one with the same.")
    own = sequence_classifier(artifact.config)
    critic = load_full(replace(artifact, is_reward_model=True), own, num_labels=1, **options)
    if not artifact.is_reward_model:
        nn.init.zeros_(critic.score.weight)  # a language model has no score
    return critic


def sequence_classifier(config: PreTrainedConfig) -> Any:
    """The class of a sequence classifier: transformers' own, or its generic score head on the backbone.

    103 of the 189 causal architectures of transformers 5.23 have no class of their own.

    Raises:
        ValueError: If the language model has no such backbone, for example as a part of an encoder-decoder.
    """
    if type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING or getattr(config, "auto_map", None):
        return AutoModelForSequenceClassification
    with torch.device("meta"):
        language_model = AutoModelForCausalLM.from_config(config)
    own = language_model.config
    backbone = MODEL_MAPPING.get(type(own), None)
    parts = [name for name, part in language_model.named_children() if type(part) is backbone]
    if not parts or not hasattr(own.get_text_config(), "hidden_size"):
        raise ValueError(
            f"No critic can be made of a {type(language_model).__name__}: it has no backbone for a score head. Pass a "
            "model with the same tokenizer as critic."
        )
    parent = next(kind for kind in type(language_model).__mro__ if kind.__name__.endswith("PreTrainedModel"))
    facts = {"base_model_prefix": parts[0], "config_class": type(own), "__module__": type(language_model).__module__}
    return type("CriticForSequenceClassification", (GenericForSequenceClassification, parent), facts)


def _check_critic(critic: Any, tokenizer: Any) -> None:
    if not hasattr(critic, "score") or critic.config.num_labels != 1:
        raise ValueError(f"The critic is a {type(critic).__name__}, not a sequence classifier with one label.")
    rows, largest = critic.config.get_text_config().vocab_size, max(tokenizer.get_vocab().values())
    if rows <= largest:
        raise ValueError(
            f"The critic has {rows:,} words and reads the policy's tokens, up to {largest:,}. Let it start from a "
            "model with the same tokenizer, or leave critic out."
        )


@dataclass
class PolicyAndCriticOutput(FusedCausalLMOutput):
    """The policy's output with the critic's values as a field. DDP only sees tensors that are fields of the output."""

    state_values: Tensor | None = None  # `values` is a method of every output
    """Value of the state after each token. Shape (batch, tokens)."""


def attach_critic(policy: Any, critic: Any) -> None:
    """Makes the critic a submodule of the policy and reaches it by the policy's forward alone, as FSDP and DDP ask.

    `policy(..., return_values=True)` returns a `PolicyAndCriticOutput`; `policy(..., values_only=True)` the values,
    shape (batch, tokens). Without either argument the policy is called as before. `policy.save_pretrained` leaves the
    critic out.

    Args:
        policy: A causal language model with TRL's fused LM head, or a PeftModel of one.
        critic: A sequence classifier with one label, or a PeftModel of one; its vocabulary is the policy's.
    """
    original, save = policy.forward, policy.save_pretrained
    policy.add_module(CRITIC, critic)
    classifier = critic.get_base_model() if is_peft_model(critic) else critic

    def values_of(inputs: dict[str, Any]) -> Tensor:
        tokens = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        hidden = classifier.base_model(**tokens, use_cache=False).last_hidden_state
        weights = sorted(classifier.score.parameters(), key=lambda weight: not weight.requires_grad)
        values: Tensor = classifier.score(hidden.to(weights[0].dtype)).squeeze(-1)  # PEFT keeps an untrained copy
        return values.to(torch.promote_types(values.dtype, torch.float32))

    @functools.wraps(original)
    def forward(_: nn.Module, *args: Any, return_values: bool = False, values_only: bool = False, **inputs: Any) -> Any:
        if values_only:
            return values_of(inputs)
        output = original(*args, **inputs)
        return PolicyAndCriticOutput(**output, state_values=values_of(inputs)) if return_values else output

    @functools.wraps(save)
    def save_pretrained(_: nn.Module, *args: Any, **options: Any) -> Any:
        with without_critic(policy):
            return save(*args, **options)

    policy.forward = types.MethodType(forward, policy)
    policy.save_pretrained = types.MethodType(save_pretrained, policy)


@contextmanager
def without_critic(policy: Any) -> Iterator[Any]:
    """Takes the critic out of the policy inside the block, and yields it; yields None inside another such block."""
    critic = dict(policy.named_children()).get(CRITIC)
    if critic is not None:
        delattr(policy, CRITIC)
    try:
        yield critic
    finally:
        if critic is not None:
            policy.add_module(CRITIC, critic)
