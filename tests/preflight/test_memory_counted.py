"""The estimate of activations, compared with the bytes that a step on a CPU holds."""

import random
import sys
import weakref

import pytest
import torch
from equivalence import build, examples, step, tiny
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dpo_recipes.preflight.memory import memory_parts
from dpo_recipes.shared_prefix import SharedPrefixDPOTrainer

TOLERANCE = 0.1
"""Share by which the estimate of activations may differ from the bytes that are counted."""
draw = random.Random(1)
PAIRS = examples([(draw.randrange(8, 32), draw.randrange(4, 16), draw.randrange(4, 16)) for _ in range(16)])
PACKED = [sum(map(len, pair.values())) for pair in PAIRS]
LONGEST = max(len(p["prompt_ids"]) + max(len(p["chosen_ids"]), len(p["rejected_ids"])) for p in PAIRS)
LAYERS = 4


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that operators have made and that still live.

    Attributes:
        now: Bytes that live at the moment.
        peak: The most bytes that lived at a time.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def forget(self, key, size):
        self.now -= size
        self.known.discard(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and (key := x.untyped_storage()._cdata) not in self.known | given:
                size = x.untyped_storage().nbytes()
                self.known.add(key)
                self.now += size
                weakref.finalize(x.untyped_storage(), self.forget, key, size)
        self.peak = max(self.peak, self.now)
        return result


def counted(trainer, pairs):
    """Most bytes that a step holds in the layers' backward pass, without weights and their gradients."""
    step(trainer, pairs)  # compares the first batch with plain TRL
    trainer.model.zero_grad(set_to_none=False)
    batch = trainer.data_collator(pairs)
    base = getattr(trainer.model, "get_base_model", lambda: trainer.model)().base_model
    layers = base.h if hasattr(base, "h") else base.layers
    with trainer.accelerator.autocast(), trainer._reference_first(batch) as batch, Live() as live:
        layers[-1].register_full_backward_pre_hook(lambda *_: setattr(live, "peak", live.now))  # the head is done
        trainer.compute_loss(trainer.model, batch).backward()
    return live.peak


FAST = [("llama", "LoRA", {}), ("llama", "LoRA", dict(activation_checkpointing=True))]
SLOW = [
    ("llama", "full", {}),
    ("llama", "LoRA", dict(shared_prefix="false")),
    ("llama", "full", dict(shared_prefix="false")),
    ("llama", "full", dict(activation_checkpointing=True, shared_prefix="false")),
    ("llama", "LoRA", dict(bf16=True)),
    ("qwen3", "LoRA", {}),
    ("gemma3_text", "full", {}),
    ("gpt2", "LoRA", {}),
]


@pytest.mark.parametrize(
    ("architecture", "method", "settings"),
    [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
    ids=str,
)
def test_activations_are_estimated_within_a_tolerance(architecture, method, settings, tmp_path):
    depth = {"n_layer": LAYERS} if architecture == "gpt2" else {"num_hidden_layers": LAYERS}
    kinds = {"layer_types": ["sliding_attention", "full_attention"] * 2} if architecture == "gemma3_text" else {}
    dtype = torch.bfloat16 if settings.get("bf16") else torch.float32
    model = tiny(architecture, dtype=dtype, **depth, **kinds)
    trainer = build(SharedPrefixDPOTrainer, model, method, tmp_path, **settings)
    for weight in trainer.model.parameters():
        weight.data = weight.data.float() if weight.requires_grad else weight.data
    if trainer.args.activation_checkpointing:
        trainer.model.activation_checkpointing_enable({"use_reentrant": False})
    shared = settings.get("shared_prefix") != "false"
    given = trainer.args.to_dict() | dict(per_device_train_batch_size=len(PAIRS), max_length=LONGEST, lora_r=4)
    given |= dict(shared_prefix=str(shared), longest_pair=sum(PACKED) / len(PACKED) if shared else 2 * LONGEST)
    trained = sum(weight.numel() for weight in trainer.model.parameters() if weight.requires_grad)
    weights = {"trained": trained, "frozen": trainer.model.num_parameters() - trained, "quantised": 0}
    estimate = memory_parts(model.config, weights, given, task="preference")["activations"]
    peak = counted(trainer, PAIRS)
    sys.stderr.write(f"{peak / estimate:.2f}\n")
    assert peak == pytest.approx(estimate, rel=TOLERANCE)
