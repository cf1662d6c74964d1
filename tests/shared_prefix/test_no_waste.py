"""Counts what a step computes, waits for and keeps: a count is the same on a busy machine.

tests/shared_prefix/test_shared_prefix.py counts tokens and passes of the backbone and rows of the head.
"""

import sys
from collections import Counter
from pathlib import Path

import datasets
import pytest
import torch
from equivalence import BATCH, build, step, tiny
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.utils._python_dispatch import TorchDispatchMode
from trl import DPOTrainer

from dpo_recipes.shared_prefix import packing
from dpo_recipes.shared_prefix.trainer import SharedPrefixDPOTrainer

ATEN = torch.ops.aten
WAITS = {ATEN._local_scalar_dense.default, ATEN.nonzero.default, ATEN.masked_select.default, ATEN.equal.default}
SELECTS = {ATEN.index.Tensor, ATEN.index_put.default, ATEN.index_put_.default}  # by a mask: the device counts first
LENGTHS = [tuple(len(pair[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")) for pair in BATCH]


@pytest.fixture(autouse=True)
def own_reference_cache(tmp_path, monkeypatch):
    """Gives each test an empty cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


class Watch(TorchDispatchMode):
    """Counts operators that make the host wait for a device, by the file that calls them, and casts of activations.

    Attributes:
        waits: Number of waits, by file.
        casts: Casts of tensors that are no weights, inside LoRA layers.
        weights: Addresses of the model's weights.
        depth: Number of LoRA layers that compute at the moment.
    """

    def __init__(self, model):
        super().__init__()
        self.waits, self.casts, self.depth = Counter(), [], 0
        self.weights = {weight.data_ptr() for weight in model.parameters()}
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                module.register_forward_pre_hook(lambda *_: self.enter(1))
                module.register_forward_hook(lambda *_: self.enter(-1))

    def enter(self, levels):
        self.depth += levels

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = kwargs or {}
        by_mask = function in SELECTS and any(x is not None and x.dtype == torch.bool for x in args[1])
        if function in WAITS or by_mask:
            self.waits[calling_file()] += 1
        casts = function is ATEN._to_copy.default and given.get("dtype") not in (None, args[0].dtype)
        if casts and self.depth and args[0].data_ptr() not in self.weights:
            self.casts.append(f"{args[0].dtype} to {given['dtype']}, {tuple(args[0].shape)}")
        return function(*args, **given)


def calling_file():
    """The nearest file on the stack that is neither torch's nor a test."""
    frame = sys._getframe(2)
    while frame and {"torch", "tests"} & {*Path(frame.f_code.co_filename).parts}:
        frame = frame.f_back
    return "/".join(Path(frame.f_code.co_filename).parts[-3:]) if frame else "unknown"


def watched_step(trainer, monkeypatch):
    """A step after the one that compares the first batch, watched."""
    step(trainer)
    batch = trainer.data_collator(BATCH)
    monkeypatch.setattr(packing.Plan, "belongs_to", lambda self, batch: True)  # not asked on a card after that step
    with Watch(trainer.model) as watch, trainer.accelerator.autocast():
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
    return watch


@pytest.mark.parametrize("method", ["LoRA", "full"])
def test_only_the_metrics_of_trl_wait_for_the_device(method, tmp_path, monkeypatch):
    watched = {}
    for kind in (DPOTrainer, SharedPrefixDPOTrainer):
        trainer = build(kind, tiny("llama"), method, tmp_path)
        watched[kind] = watched_step(trainer, monkeypatch).waits
    metrics = "trl/trainer/dpo_trainer.py"
    assert set(watched[SharedPrefixDPOTrainer]) == {metrics}
    assert watched[SharedPrefixDPOTrainer][metrics] == watched[DPOTrainer][metrics]


def test_lora_layers_cast_nothing_but_weights_under_autocast(tmp_path, monkeypatch):
    trainer = build(SharedPrefixDPOTrainer, tiny("llama", dtype=torch.bfloat16), "LoRA", tmp_path, bf16=True)
    for weight in trainer.model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    assert watched_step(trainer, monkeypatch).casts == []


def saved_floats(layers, folder):
    """Numbers that a step keeps for its backward, in a model with this many layers; weights do not count."""
    trainer = build(SharedPrefixDPOTrainer, tiny("llama", num_hidden_layers=layers), "LoRA", folder)
    step(trainer)
    weights = {weight.untyped_storage().data_ptr() for weight in trainer.model.parameters()}
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor is held: no other gets its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        trainer.compute_loss(trainer.model, trainer.data_collator(BATCH))
    return sum(size for place, (size, _) in saved.items() if place not in weights) // 4


def test_a_layer_keeps_what_its_gradients_need_and_no_more_copies_than_are_known(tmp_path):
    """Counts the saved numbers of one layer, as those of two layers less those of one."""
    config, rank, linear_layers = tiny("llama").config, 4, 7
    width, middle, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    grouped = config.num_key_value_heads * config.head_dim  # width of the keys, and of the values
    needed = 2 * (width + 1)  # each norm: its input, and the factor that it computes
    needed += 2 * width + rank * linear_layers  # LoRA: the inputs of q, k, v and of gate, up; the outputs of all A
    needed += width + 2 * grouped + width + heads  # attention: q, k, v, output, and the logarithm of its softmax's sum
    needed += 4 * middle  # gate, its activation, up, and their product
    tokens = sum(p + c + r for p, c, r in LENGTHS)
    keys = sum(2 * p + c + r for p, c, r in LENGTHS)  # both completions of a pair attend to its prompt
    copies = 2 * (keys - tokens) * grouped  # keys and values: a prompt's once for each completion
    copies += tokens * width  # the output: a segment at a time, and as one row
    assert saved_floats(2, tmp_path) - saved_floats(1, tmp_path) == tokens * needed + copies
