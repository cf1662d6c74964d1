"""PPO's critic: a sequence classifier with one label, reached through the policy that it is a submodule of."""

import functools
import types
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import GRPOTrainer
from trl.trainer.reward_trainer import suppress_seqcls_warning
from trl.trainer.utils import FusedCausalLMOutput, get_config_model_id

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
    shape (batch, tokens). Without either the policy is called as before.

    Args:
        policy: With TRL's fused LM head; a PeftModel or not.
        critic: A sequence classifier with one label, or a PeftModel of one; its vocabulary is the policy's.
    """
    original = policy.forward
    policy.add_module(CRITIC, critic)
    classifier = critic.get_base_model() if is_peft_model(critic) else critic

    def values_of(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = classifier.base_model(input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        values: Tensor = classifier.score(hidden.to(next(classifier.score.parameters()).dtype)).squeeze(-1)
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

    policy.forward = types.MethodType(forward, policy)


def load_critic(trainer: GRPOTrainer, name: str | None, quantization_config: Any) -> Any:
    """What the critic starts from, loaded as TRL loads the policy; a score head that it lacks gives 0.

    Args:
        trainer: Whose policy and tokenizer it must fit.
        name: A folder or Hub name; None: what the policy started from.
        quantization_config: Of the weights.

    Raises:
        ValueError: If it has another vocabulary, or the policy has no name.
    """
    options = {**(trainer.args.model_init_kwargs or {}), "quantization_config": quantization_config}
    options["dtype"] = options.get("dtype") or torch.float32  # as TRL loads the policy
    options.setdefault("trust_remote_code", trainer.args.trust_remote_code)
    if name is not None:
        options.pop("revision", None)  # is the policy's
        theirs = AutoTokenizer.from_pretrained(name, trust_remote_code=options["trust_remote_code"])
        if theirs.get_vocab() != trainer._tokenizer.get_vocab():
            raise ValueError(f"The critic reads the policy's tokens, and {name} has others. Name one with the same.")
    start = name or get_config_model_id(trainer.model.config)
    if not start:
        raise ValueError("The policy has no folder or name to start the critic from. Pass a model as critic.")
    with suppress_seqcls_warning():
        critic = AutoModelForSequenceClassification.from_pretrained(start, num_labels=1, **options)
    if not any("SequenceClassification" in each for each in critic.config.architectures or ()):
        nn.init.zeros_(critic.score.weight)  # a language model has no score
    return critic
