"""Canaries: each private name of TRL, transformers, PEFT, accelerate and datasets that the package relies on.

The sentence of a canary says what to look at when the canary fails.
"""

import ast
import importlib
import inspect
import pkgutil
import threading
from types import SimpleNamespace

import pytest
import torch
import trl.trainer.utils as trl_utils
from datasets import Dataset
from equivalence import BATCH, ROWS, build, model_for, tiny
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers import AttentionInterface, PreTrainedTokenizerFast, Trainer
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoSelfAttention
from trl import DPOTrainer, GRPOTrainer
from trl.generation.vllm_generation import VLLMGeneration
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.dpo_trainer import DataCollatorForPreference

import dpo_recipes
from dpo_recipes import trl_patches
from dpo_recipes.ppo import PPOTrainer
from dpo_recipes.shared_prefix import SharedPrefixDPOTrainer

ARGUMENTS = ["prompts", "completions", "completion_ids_list"]

# What a trainer of ours overrides, or reads of itself
OVERRIDDEN = [
    (DPOTrainer, "_prepare_dataset", ["dataset", "processing_class", "args", "dataset_name"], "models/pair_ids.py"),
    (DPOTrainer, "_precompute_ref_logps", ["dataset", "name", "batch_size"], "shared_prefix/reference_cache.py"),
    (DPOTrainer, "compute_ref_log_probs", ["model", "inputs"], "shared_prefix/trainer.py"),
    (DPOTrainer, "_compute_loss", ["model", "inputs", "return_outputs"], "shared_prefix/trainer.py"),
    (
        DPOTrainer,
        "compute_loss",
        ["model", "inputs", "return_outputs", "num_items_in_batch"],
        "shared_prefix/trainer.py",
    ),
    (GRPOTrainer, "_calculate_rewards", ["inputs", *ARGUMENTS], "the scores in ppo/trainer.py"),
    (GRPOTrainer, "_generate_and_score_completions", ["inputs"], "the rollout in ppo/trainer.py"),
    (GRPOTrainer, "_compute_loss", ["model", "inputs"], "the loss in ppo/trainer.py"),
    (GRPOTrainer, "training_step", ["model", "inputs", "num_items_in_batch"], "the epochs in ppo/trainer.py"),
    (GRPOTrainer, "_tokenize_prompts", ["prompts"], "the check of long prompts in ppo/checks.py"),
    (Trainer, "training_step", ["model", "inputs", "num_items_in_batch"], "micro-batches in shared_prefix/trainer.py"),
    (Trainer, "create_optimizer", ["model"], "the critic's group of weights in ppo/trainer.py"),
    (Trainer, "_save", ["output_dir", "state_dict"], "the critic's file in ppo/trainer.py"),
    (Trainer, "_load_best_model", [], "the critic at the end of a run in ppo/trainer.py"),
    (Trainer, "_load_from_checkpoint", ["resume_from_checkpoint", "model"], "the critic's file in ppo/trainer.py"),
    (Trainer, "_prepare_inputs", ["inputs"], "the guards' batch in health/guards.py"),
]
READ = {
    "_get_per_token_logps_and_entropies": "the rollout's log-probs in ppo/trainer.py",
    "_metrics": "the logs in ppo/trainer.py",
    "_step": "the count of batches in ppo/trainer.py",
    "_name": "health rules and settings, which are listed by method",
    "_tag_names": "the tags of ppo/trainer.py",
    "_paper": "the citation of ppo/trainer.py",
}


@pytest.mark.parametrize(("owner", "method", "parameters", "look_at"), OVERRIDDEN)
def test_overridden_methods_have_kept_their_signature(owner, method, parameters, look_at):
    assert method in vars(owner), f"{method} is no longer {owner.__name__}'s: look at {look_at}"
    now = [*inspect.signature(getattr(owner, method)).parameters][1:]
    assert now == parameters, f"{owner.__name__}.{method} has other parameters: look at {look_at}"


@pytest.mark.parametrize("name", READ)
def test_grpo_trainer_still_has_the_attribute(name):
    source = inspect.getsource(GRPOTrainer)
    assert f"self.{name}" in source or hasattr(GRPOTrainer, name), f"{name} is gone: look at {READ[name]}"


ARGPARSE = {"_actions", "_optionals"}  # of the standard library; the tests of each verb's help would miss them


def modules():
    found = [each.name for each in pkgutil.walk_packages(dpo_recipes.__path__, "dpo_recipes.")]
    found.remove("dpo_recipes.__main__")  # runs the command
    assert len(found) > 50
    return [importlib.import_module(name) for name in found]


def is_private(name):
    return name.startswith("_") and not name.endswith("__")


@pytest.mark.slow
def test_private_names_are_used_in_trl_patches_alone():
    """Other modules use only methods that our trainers override and attributes that they read, listed above."""
    trees = {module.__name__: ast.parse(inspect.getsource(module)) for module in modules()}
    nodes = [(name, node) for name, tree in trees.items() for node in ast.walk(tree)]
    ours = {node.name for _, node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    stored = [node for _, node in nodes if isinstance(getattr(node, "ctx", None), ast.Store)]
    ours |= {node.id if isinstance(node, ast.Name) else getattr(node, "attr", "") for node in stored}
    ours -= {name for name in ours if is_private(name) and hasattr(GRPOTrainer, name)}
    allowed = ours | READ.keys() | ARGPARSE | {method for _, method, *_ in OVERRIDDEN}
    used = {(name, node.attr) for name, node in nodes if isinstance(node, ast.Attribute) and is_private(node.attr)}
    used |= {
        (name, alias.name)
        for name, node in nodes
        if isinstance(node, ast.ImportFrom) and not str(node.module).startswith("dpo_recipes")
        for alias in node.names
        if is_private(alias.name)
    }
    outside = {(name, private) for name, private in used if name != "dpo_recipes.trl_patches"}
    assert {(name, private) for name, private in outside if private not in allowed} == set()


@pytest.mark.parametrize("trainer", [PPOTrainer, SharedPrefixDPOTrainer])
def test_every_overridden_method_has_a_canary(trainer):
    bases = [base for base in trainer.__mro__ if not base.__module__.startswith("dpo_recipes")]
    overridden = {name for name in vars(trainer) if is_private(name) and any(name in vars(base) for base in bases)}
    assert overridden
    assert overridden <= READ.keys() | {method for _, method, *_ in OVERRIDDEN}


# TRL's DPO step, on which shared_prefix rests


def calls_of(model):
    """A list that fills with the keyword arguments of each call of a model."""
    calls = []
    model.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True)
    return calls


def test_dpo_logs_in_two_attributes_and_gathers_by_the_accelerators_methods(tmp_path):
    """If not, look at trl_patches.unlogged: processes with different numbers of micro-batches would wait for ever."""
    trainer = build(DPOTrainer, tiny("llama"), "LoRA", tmp_path)
    gathered = []
    with trl_patches.unlogged(trainer):
        before = {key: value for key, value in vars(trainer).items() if key != "_metrics"}
        batch = trainer.data_collator(BATCH)
        for name in ("gather", "gather_for_metrics"):
            vars(trainer.accelerator)[name] = lambda tensor: gathered.append(tensor) or tensor
        trainer._compute_loss(trainer.model, batch, False)
        changed = {key for key, value in vars(trainer).items() if before.get(key) is not value} - {"_metrics"}
    assert changed == {"_total_train_tokens"}
    assert len(gathered) > 10
    assert not trainer._metrics["train"]
    assert trainer._total_train_tokens == 0
    assert not {"gather", "gather_for_metrics"} & vars(trainer.accelerator).keys()


def test_dpo_calls_the_model_once_a_pass_with_labels_and_fused_lm_head(tmp_path):
    """If not, look at packing._pack, which reads these arguments and finds the plan among them."""
    trainer = build(DPOTrainer, tiny("llama"), "LoRA", tmp_path)
    batch = trainer.data_collator(BATCH)
    calls = calls_of(trainer.model)
    trainer.compute_loss(trainer.model, batch)
    assert len(calls) == 2  # policy and reference model
    trainer.compute_ref_log_probs(trainer.model, batch)
    assert len(calls) == 3
    for call in calls:
        assert call.keys() == {"input_ids", "attention_mask", "labels", "fused_lm_head", "use_cache"}
        assert call["fused_lm_head"] is True
        assert call["input_ids"].shape == call["labels"].shape == batch["input_ids"].shape
        assert ((call["labels"] != -100) == (batch["completion_mask"] == 1)).all()


def test_dpo_pads_chosen_sequences_and_then_rejected_ones():
    """If not, look at packing.plan_pairs, whose cells count on this order."""
    pair = {"prompt_ids": [5, 6], "chosen_ids": [7, 8, 9], "rejected_ids": [4]}
    batch = DataCollatorForPreference(pad_token_id=0)([pair])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [5, 6, 4, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch["completion_mask"].tolist() == [[0, 0, 1, 1, 1], [0, 0, 1, 0, 0]]


def test_dpo_computes_cached_log_probs_while_it_is_built(tmp_path, monkeypatch):
    """If not, look at SharedPrefixDPOTrainer._install, which is called from there."""
    built, plain = [], DPOTrainer._precompute_ref_logps

    def watched(self, dataset, name, batch_size):
        built.append((name, self.ref_model is None, type(self.data_collator)))
        return plain(self, dataset, name, batch_size)

    monkeypatch.setattr(DPOTrainer, "_precompute_ref_logps", watched)
    build(DPOTrainer, tiny("llama"), "LoRA", tmp_path, precompute_ref_log_probs=True)
    assert built == [("train", True, DataCollatorForPreference)]


def test_the_fused_head_takes_shifted_labels_and_our_function(tmp_path):
    """If not, look at trl_patches.head_function and head.log_probs, which stand in for ChunkedLogProbFunction."""
    model, given = tiny("llama"), []
    trl_utils.add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    ids = torch.tensor([[5, 6, 7]])

    def record(*arguments):
        given.append(arguments)
        return ChunkedLogProbFunction.apply(*arguments)

    plain = model(input_ids=ids, labels=ids, fused_lm_head=True)
    with trl_patches.head_function(record):
        ours = model(input_ids=ids, shift_labels=torch.tensor([[6, 7, -100]]), fused_lm_head=True)
    model(input_ids=ids, labels=ids, fused_lm_head=True)
    ((hidden, weight, bias, targets, temperature, _, softcap, scale, outputs),) = given
    assert hidden.shape == (3, model.config.hidden_size)
    assert weight is model.lm_head.weight
    assert targets.tolist()[:2] == [6, 7]
    assert (bias, temperature, softcap, scale, outputs) == (None, 1.0, None, 1.0, ("log_probs", "entropy"))
    torch.testing.assert_close(ours.log_probs[:, :2], plain.log_probs)
    torch.testing.assert_close(ours.entropy[:, :2], plain.entropy)


def test_another_thread_keeps_trls_head_function():
    """Two trainers may train in two threads of one process."""
    seen = []
    with trl_patches.head_function(print):
        thread = threading.Thread(target=lambda: seen.append(trl_patches._head.get()))
        thread.start()
        thread.join()
        seen.append(trl_patches._head.get())
    assert [*seen, trl_patches._head.get()] == [None, print, None]


def test_the_products_of_the_frozen_head_are_summed_in_float32():
    """If not, look at head.FrozenHeadLogProb, which takes its gradient by this function."""
    total = torch.ones(2, 3)
    trl_patches.addmm_fp32(total, torch.full((2, 4), 2.0), torch.ones(4, 3))
    assert torch.equal(total, torch.full((2, 3), 9.0))


# PEFT


def test_lora_and_saved_modules_are_off_where_their_flag_is_set(tmp_path):
    """If not, look at trl_patches.lora_switched_by_flags, which sets the flags of both kinds of layer."""
    trainer = build(DPOTrainer, model_for("llama", "LoRA with modules_to_save"), "LoRA with modules_to_save", tmp_path)
    model, ids = trainer.model.eval(), torch.tensor([[5, 6, 7]])
    kinds = {
        kind
        for each in model.modules()
        for kind in (BaseTunerLayer, AuxiliaryTrainingWrapper)
        if isinstance(each, kind)
    }
    assert len(kinds) == 2
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * weight.requires_grad * torch.randn_like(weight)
        trained = model(ids).logits
        with trl_utils.use_adapter(model, None):
            reference = model(ids).logits
        with trl_patches.lora_switched_by_flags(model), trl_utils.use_adapter(model, None):
            assert torch.equal(model(ids).logits, reference)
        assert torch.equal(model(ids).logits, trained)
    assert not torch.allclose(trained, reference)


def test_a_lora_layer_casts_its_input_by_a_method_of_its_own():
    """If not, look at trl_patches.keep_input_dtype_under_autocast, which replaces the method."""
    model, seen = tiny("llama", dtype=torch.bfloat16), []
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]), autocast_adapter_dtype=True)
    layer = next(each for each in model.modules() if isinstance(each, BaseTunerLayer))
    layer.lora_A["default"].register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    ids = torch.tensor([[5, 6, 7]])
    model(ids)
    trl_patches.keep_input_dtype_under_autocast(layer)
    model(ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(ids)
    assert seen == [torch.float32, torch.float32, torch.bfloat16]


def test_peft_calls_the_base_model_with_its_hooks_and_with_every_keyword():
    """If not, look at packing.install, which hangs its hooks on the base model, where they find the plan."""
    lora, seen = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]), []
    model = get_peft_model(tiny("llama"), lora)

    def take_plan(module, args, kwargs):
        seen.append(kwargs.pop("plan"))
        return args, kwargs

    model.get_base_model().register_forward_pre_hook(take_plan, with_kwargs=True)
    model.get_base_model().base_model.register_forward_hook(lambda *_: seen.append("backbone"))
    model.get_base_model().register_forward_hook(lambda *_: seen.append("model"))
    model(input_ids=torch.tensor([[5, 6, 7]]), plan="plan")
    assert seen == ["plan", "backbone", "model"]


# transformers and accelerate


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt2"])
def test_a_mask_of_four_dimensions_reaches_an_attention_function_that_was_registered(model_type):
    """If not, look at packing._pack, which lets the plan ride on such a mask, and at the mask code of transformers."""
    model, masks = tiny(model_type), []
    name = trl_patches.attention_name(model.config)
    plain = AttentionInterface()[name]

    def attention(module, query, key, value, attention_mask, **given):
        masks.append(attention_mask)
        return plain(module, query, key, value, None, **given)

    mask = torch.zeros(1, 1, 1, 1)
    mask.plan = "rides along"
    AttentionInterface.register(name, attention)
    try:
        model.base_model(input_ids=torch.tensor([[5, 6, 7]]), attention_mask=mask, position_ids=torch.arange(3)[None])
    finally:
        AttentionInterface.register(name, plain)
    assert name == "sdpa"
    assert len(masks) == model.config.num_hidden_layers
    assert all(each is mask for each in masks)


def test_models_say_if_they_take_an_attention_function():
    """If not, look at support.why_not and its reason "attention outside of transformers' interface"."""
    assert trl_patches.takes_attention_function(tiny("llama"))
    assert not trl_patches.takes_attention_function(tiny("gpt_neo"))


def test_eager_attention_is_a_function_of_the_models_file():
    """If not, look at packing._attention, which calls it for batches without a plan."""
    model = tiny("llama")
    function = trl_patches.eager_attention(model.model.layers[0].self_attn)
    assert [*inspect.signature(function).parameters][:5] == ["module", "query", "key", "value", "attention_mask"]


def test_gpt_neo_calls_its_attention_with_query_key_value_and_mask():
    """If not, look at packing._gpt_neo_attention, which replaces it."""
    model, calls = tiny("gpt_neo"), []

    def attention(plain, module, *tensors):
        calls.append((type(module), [tensor is None or tensor.dim() for tensor in tensors]))
        return plain(*tensors)

    ids = torch.tensor([[5, 6, 7]])
    plain = model(ids).logits
    for module in model.modules():
        if isinstance(module, GPTNeoSelfAttention):
            trl_patches.replace_gpt_neo_attention(module, attention)
    assert torch.equal(model(ids).logits, plain)
    assert len(calls) == model.config.num_layers
    for kind, dimensions in calls:
        assert (kind, dimensions[:3], len(dimensions)) == (GPTNeoSelfAttention, [4, 4, 4], 4)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_(en|dis)able` is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_is_a_partial_function_of_the_layer(reentrant):
    """If not, look at trl_patches.has_reentrant_checkpointing and support.changeable."""
    model = tiny("llama").train()
    assert not any(map(trl_patches.has_reentrant_checkpointing, model.modules()))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert any(map(trl_patches.has_reentrant_checkpointing, model.modules())) is reentrant


def test_accelerate_keeps_the_forward_that_it_wraps_in_autocast(tmp_path):
    """If not, look at models/precision.py, which compares the first batch in float32."""
    model = build(DPOTrainer, tiny("llama"), "full", tmp_path, bf16=True).ref_model
    ids, autocast = torch.tensor([[5, 6, 7]]), []
    model.base_model.register_forward_pre_hook(lambda *_: autocast.append(torch.is_autocast_enabled("cpu")))
    model(ids)
    trl_patches.forward_without_autocast(model)(ids)
    assert autocast == [True, False]
    assert trl_patches.forward_without_autocast(tiny("llama")) is None


@pytest.mark.parametrize("method", ["__call__", "_encode_plus", "apply_chat_template"])
def test_a_tokenizer_with_an_encoding_of_its_own_is_known(method):
    """If not, look at models/pair_ids.py, which encodes by the tokenizer's part in Rust alone."""
    own = type("Own", (PreTrainedTokenizerFast,), {method: lambda *_: None})
    assert trl_patches.encodes_in_rust(PreTrainedTokenizerFast.__new__(PreTrainedTokenizerFast))
    assert not trl_patches.encodes_in_rust(own.__new__(own))
    assert method in vars(PreTrainedTokenizerFast) or hasattr(PreTrainedTokenizerFast, method)


# Trainers


@pytest.mark.slow
def test_a_trainer_counts_from_its_first_update_and_can_skip_its_epochs(tmp_path):
    """If not, look at runs/run.py and runs/model_card.py, which resume and record a run."""
    run = dict(max_steps=2, save_strategy="no", logging_steps=1)
    trainer = build(DPOTrainer, tiny("llama"), "LoRA", tmp_path, **run)
    trainer.train()
    assert (trl_patches.first_update(trainer), trainer.state.global_step) == (0, 2)
    skipped = build(DPOTrainer, tiny("llama"), "LoRA", tmp_path, **run)
    trl_patches.skip_epochs(skipped)
    skipped.train()
    assert skipped.state.global_step == 0
    assert trl_patches.method_name(trainer) == "DPO"


def test_a_batch_is_prepared_as_the_trainer_prepares_it(tmp_path):
    """If not, look at health/guards.py, which computes the first loss by itself."""
    trainer = build(DPOTrainer, tiny("llama"), "LoRA", tmp_path)
    batch = trainer.data_collator(BATCH)
    prepared = trl_patches.prepare_inputs(trainer, batch)
    assert prepared.keys() == batch.keys()
    assert all(torch.equal(prepared[name], part) for name, part in batch.items())


def test_vllm_gets_every_weight_but_those_left_out():
    """If not, look at trl_patches.keep_from_vllm: the engine has no place for PPO's critic."""
    assert [*inspect.signature(VLLMGeneration._iter_named_params).parameters] == ["self"]
    assert "self._iter_named_params()" in inspect.getsource(VLLMGeneration.sync_weights)
    named = {"model.weight": 1, "ppo_critic.weight": 2}
    trainer = SimpleNamespace(vllm_generation=SimpleNamespace(_iter_named_params=lambda: iter(named.items())))
    trl_patches.keep_from_vllm(trainer, "ppo_critic")
    assert dict(trainer.vllm_generation._iter_named_params()) == {"model.weight": 1}


def test_a_dataset_has_the_fingerprint_of_its_rows():
    """If not, look at models/pair_ids.py and shared_prefix/reference_cache.py, whose caches are named by it."""
    one, same, other = Dataset.from_list(ROWS), Dataset.from_list(ROWS), Dataset.from_list(ROWS[1:])
    prints = [trl_patches.fingerprint(each.map(dict)) for each in (one, same, other)]
    assert prints[0] == prints[1] != prints[2]
