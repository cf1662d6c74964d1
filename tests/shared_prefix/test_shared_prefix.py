"""Shared prompts give plain TRL's log-probs, loss, metrics and gradients, or they are not shared."""

import ast
import copy
import inspect
import math
from itertools import pairwise

import datasets
import pytest
import torch
from datasets import Dataset
from equivalence import (
    ARCHITECTURES,
    BATCH,
    DOCUMENT,
    LOSSES,
    METHODS,
    ROWS,
    TOLERANCE,
    assert_same,
    build,
    error,
    everything_in,
    examples,
    model_for,
    settings_of,
    step,
    tiny,
    trainers,
)
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from trl import DPOTrainer
from trl.kernels import ChunkedLogProbFunction

from dpo_recipes import trl_patches
from dpo_recipes.errors import RecipeError
from dpo_recipes.models.likelihood import preference_logps
from dpo_recipes.shared_prefix import head, packing, support
from dpo_recipes.shared_prefix.support import TESTED
from dpo_recipes.shared_prefix.trainer import PLAN, SharedPrefixDPOTrainer

DOUBLE = torch.float64

# TRL 1.16 turns it off and on again for the reference pass, by its old name.
old_name = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_(en|dis)able` is deprecated:FutureWarning")


@pytest.fixture(autouse=True)
def own_reference_cache(tmp_path, monkeypatch):
    """Gives each test an empty cache, whose key would be the same for a model that hooks have changed."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def test_every_architecture_that_shares_by_default_is_compared_with_plain_trl():
    assert list(ARCHITECTURES) == TESTED


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_architectures(model_type, dtype, tmp_path):
    plain, shared = (step(each) for each in trainers(tiny(model_type, dtype=dtype), "LoRA", tmp_path))
    assert_same(plain, shared, dtype)
    assert abs(plain[0] - math.log(2)) > 1e-5
    assert len(plain[2]) > 8


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_architecture_by_every_method(model_type, method, tmp_path):
    for dtype in [torch.float32] if method == "LoRA on 4 bits" else [torch.float32, torch.float64]:
        plain, shared = (step(each) for each in trainers(model_for(model_type, method, dtype), method, tmp_path))
        assert_same(plain, shared, dtype)


@pytest.mark.parametrize("method", METHODS)
def test_losses_by_every_method(method, tmp_path):
    dtype = torch.float32 if method == "LoRA on 4 bits" else DOUBLE
    both = trainers(model_for("llama", method, dtype), method, tmp_path, use_weighting=True)
    for loss in LOSSES:
        plain, shared = (step(each, **settings_of(loss)) for each in both)
        # discopop divides the margin by 0.05 before it weighs two losses, and its rounding with it.
        assert_same(plain, shared, dtype, times=20 if (loss, dtype) == ("discopop", torch.float32) else 1)
    assert len(LOSSES) > 15


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_losses_of_every_architecture(model_type, tmp_path):
    both = trainers(tiny(model_type, dtype=DOUBLE), "full", tmp_path, use_weighting=True)
    for loss in LOSSES:
        plain, shared = (step(each, **settings_of(loss)) for each in both)
        assert_same(plain, shared, DOUBLE), loss


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_the_tolerance_is_what_plain_trl_differs_from_itself(dtype, tmp_path):
    """The same pairs in another order change the order of sums, and nothing else."""
    for method in ("full", "LoRA"):
        plain, shared = trainers(tiny("llama", dtype=dtype), method, tmp_path)
        gradients = [step(plain, pairs)[2] for pairs in (BATCH, BATCH[::-1], BATCH[2:] + BATCH[:2])]
        of_order = max(error(gradients[0], other) for other in gradients[1:])
        ours = error(gradients[0], step(shared)[2])
        assert 0 < of_order < TOLERANCE[dtype]
        assert ours < 30 * of_order


PAIRS = {
    "empty prompts": examples([(0, 5, 3), (0, 1, 4), (6, 2, 2)]),
    "one-token completions": examples([(4, 1, 1), (9, 1, 3), (1, 6, 1)]),
    "completions that begin alike": examples([(5, 7, 9), (3, 4, 4)], same_start=4),
    "one completion begins the other": examples([(5, 3, 9)], same_start=3),
    "a batch of one": examples([(7, 4, 11)]),
    "truncated by max_length": examples([(50, 30, 8), (63, 5, 9), (10, 70, 90)]),
    "prompts that leave no room": examples([(64, 5, 9), (80, 4, 4), (20, 3, 5)]),
    "no token of a completion left": examples([(64, 5, 9), (70, 1, 2)]),
}


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_lengths_at_their_limits(train, tmp_path):
    for method in ("full", "LoRA"):
        both = trainers(tiny("mistral", dtype=DOUBLE), method, tmp_path)
        for name, pairs in PAIRS.items():
            plain, shared = (step(trainer, pairs, train=train) for trainer in both)
            assert_same(plain, shared, DOUBLE), name
            assert (PLAN in both[1].data_collator(pairs)) == (name != "no token of a completion left")


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_per_token_results(model_type, tmp_path):
    trainer = build(SharedPrefixDPOTrainer, tiny(model_type, dtype=DOUBLE), "LoRA", tmp_path)
    batch = trainer.data_collator([pair for pairs in PAIRS.values() for pair in pairs][:14])
    completions, plan = batch.pop("completion_mask"), batch.pop(PLAN)
    batch |= {"labels": batch["input_ids"].masked_fill(completions == 0, -100), "fused_lm_head": True}
    with everything_in(DOUBLE):
        plain, shared = trainer.model(**batch), trainer.model(**batch, **{PLAN: plan})
    for name in ("log_probs", "entropy", "mean_logits"):
        assert torch.allclose(plain[name], shared[name], rtol=0, atol=1e-10), name
    assert torch.equal(plain["is_top1"], shared["is_top1"])
    assert torch.equal(plain["label_mask"], shared["label_mask"])
    assert plain["loss"].item() == pytest.approx(shared["loss"].item(), rel=1e-10)


@pytest.mark.filterwarnings("ignore:`return_outputs=True`:FutureWarning")
def test_logits_are_plain_trls_where_they_are_asked_for(tmp_path):
    both = trainers(tiny("llama"), "LoRA", tmp_path)
    results = [each.prediction_step(each.model.eval(), each.data_collator(BATCH), False) for each in both]
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][0].item() == pytest.approx(results[1][0].item(), rel=1e-5)


@pytest.mark.slow
def test_random_lengths(tmp_path):
    both = trainers(tiny("qwen2", dtype=DOUBLE), "LoRA", tmp_path)
    length = st.integers(1, 40)

    @settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(st.lists(st.tuples(st.integers(0, 40), length, length), min_size=1, max_size=5), st.integers(0, 5))
    def compare(lengths, same_start):
        assume(
            all(c != r or c > same_start for _, c, r in lengths)
        )  # equal completions have a margin of rounding alone
        pairs = examples(lengths, same_start=same_start)
        assert_same(*(step(trainer, pairs) for trainer in both), DOUBLE)

    compare()


@pytest.mark.parametrize("share", [True, False])
def test_a_plan_leads_every_token_there_and_back(share):
    """Compares a plan with the definition: rows without padding, one by one."""
    lengths, width = [(3, 2, 4), (0, 3, 1), (2, 0, 1), (1, 1, 1)], 8
    plan = packing.plan_pairs(lengths, width, share=share)
    sequences = [(p, c) for p, c, _ in lengths] + [(p, r) for p, _, r in lengths]
    predicted = [row * (width - 1) + i - 1 for row, (p, n) in enumerate(sequences) for i in range(max(p, 1), p + n)]
    assert sorted(plan["cells"].tolist()) == predicted
    for predictor, cell in zip(plan["predicting"].tolist(), plan["cells"].tolist(), strict=True):
        row, column = divmod(cell, width - 1)
        pair, source = row % len(lengths), plan["sources"][predictor].item()
        p = lengths[pair][0]
        # The prompt's tokens are alike in both rows of a pair; where it is shared, those of chosen stand for both.
        assert source in {row * width + column} | ({pair * width + column} if column < p else set())
        assert plan["positions"][predictor] == column
    tokens = sum(p + c + r + (0 if share else p) for p, c, r in lengths)
    assert len(plan["sources"]) == tokens == len(set(plan["sources"].tolist()))


HEADS = {
    "untied": ("llama", {}),
    "tied": ("llama", dict(tie_word_embeddings=True)),
    "bias": ("llama", {}),
    "softcapping": ("gemma2", {}),
    "a large vocabulary": ("llama", dict(vocab_size=9000)),
    "scaled": ("granite", dict(logits_scaling=3.0)),
}


@pytest.mark.parametrize("method", ["full", "LoRA"])
@pytest.mark.parametrize("name", HEADS)
def test_heads(name, method, tmp_path, monkeypatch):
    monkeypatch.setattr(head, "TILE_BYTES", 4 * 258 * 64)  # several tiles
    model_type, changes = HEADS[name]
    model = tiny(model_type, dtype=DOUBLE, **changes)
    if name == "bias":
        model.lm_head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size, dtype=DOUBLE)
    assert_same(*(step(trainer) for trainer in trainers(model, method, tmp_path)), DOUBLE)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("outputs", [("log_probs",), ("log_probs", "entropy", "mean_logits", "is_top1")])
def test_the_frozen_head_is_trls(with_bias, outputs, monkeypatch):
    monkeypatch.setattr(head, "TILE_BYTES", 1)
    generator = torch.manual_seed(0)
    weight, bias = torch.randn(9000, 16, generator=generator), torch.randn(9000, generator=generator)
    targets = torch.randint(9000, (150,), generator=generator)
    given = (weight, bias if with_bias else None, targets, 1.0, 8192, None, 1.0, outputs)
    results = []
    for function in (ChunkedLogProbFunction, head.FrozenHeadLogProb):
        hidden = torch.randn(150, 16, generator=torch.manual_seed(1)).requires_grad_()
        found = function.apply(hidden, *given)
        (found[0] * torch.linspace(-1, 1, 150)).sum().backward()
        results.append([*found, hidden.grad])
    for trls, ours, name in zip(*results, ("log_probs", "entropy", "spread", "mean", "top", "gradient"), strict=True):
        if trls is not None and name != "spread":
            assert torch.allclose(trls.double(), ours.double(), rtol=1e-5, atol=1e-5), name


@old_name
@pytest.mark.parametrize("method", ["full", "LoRA"])
def test_activation_checkpointing(method, tmp_path):
    both = trainers(tiny("gemma3_text", dtype=DOUBLE), method, tmp_path, activation_checkpointing=True)
    for trainer in both:  # as transformers' `train` does
        trainer.model.activation_checkpointing_enable()
    assert_same(*(step(trainer) for trainer in both), DOUBLE)


@pytest.mark.parametrize("method", ["full", "LoRA", "LoRA from LoRA (ref)"])
def test_precomputed_reference(method, tmp_path):
    both = trainers(tiny("qwen3", dtype=DOUBLE), method, tmp_path, precompute_ref_log_probs=True)
    plain, shared = (trainer.train_dataset for trainer in both)
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        assert shared[name] == pytest.approx(plain[name], rel=1e-6)
        assert len({*shared[name]}) == 8
    pairs = [dict(row) for row in plain][:4]
    assert_same(*(step(trainer, pairs) for trainer in both), DOUBLE)


def losses_of(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


RUN = dict(logging_steps=1, save_strategy="no", max_grad_norm=0.0, lr_scheduler_type="constant", learning_rate=1e-3)


@pytest.mark.slow
def test_a_reference_that_follows_the_policy(tmp_path):
    settings = RUN | dict(sync_ref_model=True, ref_model_sync_steps=2, ref_model_mixup_alpha=0.5, max_steps=8)
    both = trainers(tiny("llama"), "full", tmp_path, **settings)
    plain, shared = (losses_of(trainer) for trainer in both)
    assert shared == pytest.approx(plain, rel=1e-4)
    assert len(plain) == 8


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "LoRA", "LoRA on 4 bits"])
def test_three_hundred_steps_follow_plain_trl(method, tmp_path):
    rows = [
        {"prompt": chr(258 + n % 200) * (1 + n % 7), "chosen": "ĆĄ" * (1 + n % 5), "rejected": "ĈĊĎ" * (1 + n % 4)}
        for n in range(64)
    ]
    settings = RUN | dict(max_steps=300, learning_rate=3e-4, lr_scheduler_type="cosine", max_grad_norm=1.0)
    plain, shared = (
        losses_of(each) for each in trainers(model_for("llama", method), method, tmp_path, rows=rows, **settings)
    )
    assert len(plain) == 300
    assert plain[-1] < plain[0] / 2
    assert shared == pytest.approx(plain, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("switch", ["share_prompts", "frozen_head", "lean_reference"])
def test_each_ingredient_can_be_left_out(switch, tmp_path, monkeypatch):
    monkeypatch.setattr(SharedPrefixDPOTrainer, switch, False)
    for method in ("LoRA", "full"):
        both = trainers(tiny("gemma3_text", dtype=DOUBLE), method, tmp_path)
        assert_same(*(step(trainer) for trainer in both), DOUBLE)


def test_the_reference_pass_leaves_lora_as_it_was(tmp_path):
    for method in ("LoRA", "LoRA with modules_to_save", "LoRA from LoRA (ref)"):
        trainer = build(SharedPrefixDPOTrainer, model_for("llama", method), method, tmp_path)
        trained = {name: p.requires_grad for name, p in trainer.model.named_parameters()}
        step(trainer)
        assert {name: p.requires_grad for name, p in trainer.model.named_parameters()} == trained
        assert not any(getattr(module, "_disable_adapters", False) for module in trainer.model.modules())
    with pytest.raises(ZeroDivisionError), trainer._shared({}, lean=True):
        raise ZeroDivisionError
    assert trl_patches._head.get() is None
    assert "disable_adapter" not in vars(trainer.model)


@old_name
@pytest.mark.parametrize(
    ("method", "settings", "passes"),
    [
        ("LoRA", {}, 2),
        ("full", {}, 2),
        ("LoRA", dict(precompute_ref_log_probs=True), 1),
        ("LoRA", dict(activation_checkpointing=True), 2),
    ],
    ids=["LoRA", "full", "cached", "checkpointing"],
)
def test_no_token_is_computed_twice(method, settings, passes, tmp_path, monkeypatch):
    """Counts tokens and passes of the backbone and rows of the head where they are computed."""
    trainer = build(SharedPrefixDPOTrainer, tiny("llama"), method, tmp_path, **settings)
    if settings.get("activation_checkpointing"):
        trainer.model.activation_checkpointing_enable()
    pairs = [pair | {"ref_chosen_logps": -9.0, "ref_rejected_logps": -9.0} for pair in BATCH]
    step(trainer, pairs)  # the comparison with plain TRL, once
    backbone, layers, rows = [], [], []
    for model in filter(None, (trainer.model, trainer.ref_model)):
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        base.model.register_forward_pre_hook(
            lambda module, args, kwargs: backbone.append(kwargs["input_ids"].numel()), with_kwargs=True
        )
        for layer in base.model.layers:
            layer.mlp.register_forward_pre_hook(lambda module, args: layers.append(args[0].shape[:2].numel()))
    for function in (ChunkedLogProbFunction, head.FrozenHeadLogProb):
        apply = function.apply
        monkeypatch.setattr(
            function, "apply", lambda hidden, *rest, apply=apply: rows.append(len(hidden)) or apply(hidden, *rest)
        )
    step(trainer, pairs)
    tokens = sum(len(pair[name]) for pair in BATCH for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
    completions = sum(len(pair[name]) for pair in BATCH for name in ("chosen_ids", "rejected_ids"))
    assert backbone == [tokens] * passes
    assert rows == [completions] * passes
    recomputed = 1 if settings.get("activation_checkpointing") else 0
    assert layers == [tokens] * 2 * (passes + recomputed)


def reference_varlen(q, k, v, query_ends, key_ends, longest_query, longest_key, *, scale, window_size, enable_gqa):
    """`varlen_attn` by its documentation: causal from the end of the keys, `window_size[0]` tokens back."""
    assert enable_gqa
    assert window_size[1] == 0
    assert query_ends.dtype == key_ends.dtype == torch.int32
    assert (longest_query, longest_key) == (query_ends.diff().max(), key_ends.diff().max())
    k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
    outputs = []
    for (a, b), (c, d) in zip(pairwise(query_ends), pairwise(key_ends), strict=True):
        back = torch.arange(d - c - (b - a), d - c)[:, None] - torch.arange(d - c)
        seen = (back >= 0) & ((back <= window_size[0]) | (window_size[0] < 0))
        scores = torch.einsum("qhd,khd->hqk", q[a:b], k[c:d]) * scale
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(dim=-1), v[c:d]))
    return torch.cat(outputs)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("window", [None, 4])
def test_varlen_attention_gets_the_right_indices(window, share, monkeypatch):
    monkeypatch.setattr(packing, "varlen_attn", reference_varlen)
    plan = packing.plan_pairs([(5, 3, 6), (1, 7, 1), (0, 2, 4)], 16, share=share)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, len(plan["sources"]), 8, dtype=DOUBLE) for heads in (4, 2, 2))
    expected = packing.attend(q, k, v, plan, scale=0.3, window=window, softcap=None)
    assert torch.allclose(packing.attend_varlen(q, k, v, plan, scale=0.3, window=window), expected, atol=1e-12)


def test_the_signature_of_varlen_attention_in_torch_2_11_serves_too(monkeypatch):
    def of_torch_2_11(q, k, v, ends_q, ends_k, longest_q, longest_k, *, scale, window_size):
        ends = (ends_q, ends_k, longest_q, longest_k)
        return reference_varlen(q, k, v, *ends, scale=scale, window_size=window_size, enable_gqa=True)

    monkeypatch.setattr(packing, "varlen_attn", of_torch_2_11)
    plan = packing.plan_pairs([(5, 3, 6), (1, 7, 1)], 16)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, len(plan["sources"]), 8, dtype=DOUBLE) for heads in (4, 2, 2))
    expected = packing.attend(q, k, v, plan, scale=0.3, window=None, softcap=None)
    assert torch.allclose(packing.attend_varlen(q, k, v, plan, scale=0.3, window=None), expected, atol=1e-12)


# What does not share

FALLS_BACK = {
    "mixtral": (
        "mixtral",
        dict(num_local_experts=4, num_experts_per_tok=2, num_key_value_heads=2),
        "a mixture of experts",
    ),
    "olmoe": ("olmoe", dict(num_experts=4, num_experts_per_tok=2), "a mixture of experts"),
    "bloom": ("bloom", dict(n_layer=2, n_head=4), "positions that are not given by position_ids"),
    "lfm2": ("lfm2", dict(num_key_value_heads=2, layer_types=["conv", "full_attention"]), "layers of type conv"),
    "olmo2": ("olmo2", {}, "the architecture olmo2, not tested"),
}


@pytest.mark.parametrize("name", FALLS_BACK)
def test_untested_architectures_are_plain_trl_and_say_so(name, tmp_path, caplog):
    model_type, changes, reason = FALLS_BACK[name]
    model = tiny(model_type, **changes)
    ours = build(SharedPrefixDPOTrainer, model, "full", tmp_path, shared_prefix="auto")
    said = [record.message for record in caplog.records if "Prompts are not shared" in record.message]
    assert said == [f"Prompts are not shared, this is plain TRL: {reason}. shared_prefix=false silences this."]
    plain = step(build(DPOTrainer, model, "full", tmp_path))
    shared = step(ours)
    assert shared[0] == plain[0]
    assert all(torch.equal(gradient, shared[2][key]) for key, gradient in plain[2].items())
    if "not tested" not in reason:
        with pytest.raises(RecipeError, match=f"shared_prefix=true does not go with: {reason}"):
            build(SharedPrefixDPOTrainer, model, "full", tmp_path, shared_prefix="true")


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(truncation_mode="keep_end"), "truncation_mode=keep_end"),
        (dict(disable_dropout=False, peft_config=LoraConfig(lora_dropout=0.1, target_modules="all-linear")), "dropout"),
        (dict(peft_config=PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)), "PEFT other than LoRA"),
        (dict(activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": True}), "reentrant"),
        (
            dict(
                peft_config=LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=[5], target_modules="all-linear")
            ),
            "LoRA",
        ),
    ],
    ids=["keep_end", "dropout", "prompt tuning", "reentrant", "activated LoRA"],
)
def test_settings_that_do_not_share(changes, reason, tmp_path, caplog):
    trainer = build(SharedPrefixDPOTrainer, tiny("llama"), "LoRA", tmp_path, shared_prefix="auto", **changes)
    assert not trainer.sharing
    assert f"this is plain TRL: {reason}" in caplog.text or reason in caplog.text
    with pytest.raises(RecipeError, match="shared_prefix=true does not go with"):
        build(SharedPrefixDPOTrainer, tiny("llama"), "LoRA", tmp_path, shared_prefix="true", **changes)


def mix_neighbours(module, args, output):
    """Adds half of each token's left neighbour, as a convolution along the row would, whatever the mask."""
    return output + 0.5 * torch.nn.functional.pad(output, (0, 0, 1, 0))[:, :-1]


def test_a_model_that_shares_wrongly_is_caught_on_the_first_batch(tmp_path, caplog):
    model = tiny("llama")
    model.model.layers[0].mlp.register_forward_hook(mix_neighbours)
    plain, shared = (
        build(kind, model, "LoRA", tmp_path, **({} if kind is DPOTrainer else {"shared_prefix": "auto"}))
        for kind in (DPOTrainer, SharedPrefixDPOTrainer)
    )
    assert shared.sharing
    result = step(plain)
    again = copy.deepcopy(shared)
    batch = shared.data_collator(BATCH)
    loss = shared.compute_loss(shared.model.train(), batch)
    assert not shared.sharing
    assert "log-probs of the first batch that differ from plain TRL's by" in caplog.text
    assert loss.item() == result[0]
    assert step(shared)[0] == result[0] if PLAN not in batch else True
    again.shared_prefix = "true"
    with pytest.raises(RecipeError, match="differ from plain TRL"):
        again.compute_loss(again.model, batch)


SIXTEEN_BITS = {
    "autocast": dict(bf16=True),
    "weights": dict(dtype=torch.bfloat16, bf16=True),
    "weights alone": dict(dtype=torch.bfloat16),
}


@pytest.mark.parametrize("share", [0.5, 0.02, 0.0])
@pytest.mark.parametrize("kind", SIXTEEN_BITS)
def test_a_fault_does_not_hide_behind_the_rounding_of_16_bits(kind, share, tmp_path):
    """A layer that takes 2 % of its neighbour along the row moves gradients no further than bfloat16 itself."""
    settings = dict(SIXTEEN_BITS[kind])
    model = tiny("llama", dtype=settings.pop("dtype", torch.float32))
    layer = model.model.layers[0].mlp
    layer.register_forward_hook(
        lambda module, args, output: output + share * torch.nn.functional.pad(output, (0, 0, 1, 0))[:, :-1]
    )
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    trainer = build(SharedPrefixDPOTrainer, model, "LoRA", tmp_path, shared_prefix="auto", **settings)
    trainer.compute_loss(trainer.model.train(), trainer.data_collator(BATCH))
    assert trainer.sharing is (share == 0.0)
    weights = {name.replace(".base_layer", ""): weight for name, weight in trainer.model.named_parameters()}
    for name, weight in before.items():
        assert torch.equal(weights[f"base_model.model.{name}"], weight), "the comparison leaves the weights alone"


# What is changed after the trainer was built


def set_attention(name):
    return lambda trainer: trainer.model.get_base_model().set_attn_implementation(name)


def enable_reentrant(trainer):
    trainer.model.enable_input_require_grads()
    trainer.model.gradient_checkpointing_enable({"use_reentrant": True})


def add_noise(trainer):
    trainer.model.get_input_embeddings().neftune_noise_alpha = 5.0


def add_dropout(trainer):
    trainer.model.get_base_model().model.layers[0].self_attn.attention_dropout = 0.5


CHANGES = {
    "attention set to sdpa": (set_attention("sdpa"), True),
    "attention set to eager": (set_attention("eager"), False),
    "reentrant checkpointing in the model": (enable_reentrant, False),
    "noise in the model": (add_noise, False),
    "dropout in the model": (add_dropout, False),
}


@old_name
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_model_is_seen_at_the_next_step(change, tmp_path):
    apply, shares = CHANGES[change]
    trainer = build(SharedPrefixDPOTrainer, tiny("llama"), "LoRA", tmp_path, shared_prefix="auto")
    before = step(trainer)
    assert trainer.sharing
    apply(trainer)
    after = step(trainer)
    assert trainer.sharing is shares
    if "dropout" not in change:
        assert after[0] == pytest.approx(before[0], rel=1e-5)
        assert error(before[2], after[2]) < 1e-5


class Reversed(SharedPrefixDPOTrainer):
    """A user's step, which changes the rows of a batch after the data collator made its plan."""

    def _compute_loss(self, model, inputs, *args, **kwargs):
        inputs = {name: value.flip(0) if torch.is_tensor(value) else value for name, value in inputs.items()}
        return super()._compute_loss(model, inputs, *args, **kwargs)


def test_a_batch_that_was_changed_after_its_plan_was_made_is_not_shared(tmp_path, caplog):
    trainer = build(Reversed, tiny("llama"), "LoRA", tmp_path, shared_prefix="auto")
    loss = step(trainer)[0]
    assert "batches that were changed after the data collator" in caplog.text
    trainer.shared_prefix = trainer.sharing = False
    assert step(trainer)[0] == pytest.approx(loss, rel=1e-6)


def test_a_plan_moves_as_the_tensors_of_its_batch_do(tmp_path):
    trainer = build(SharedPrefixDPOTrainer, tiny("llama"), "LoRA", tmp_path)
    batch = {name: value.to("cpu") for name, value in trainer.data_collator(BATCH).items()}
    assert batch[PLAN].belongs_to(batch)
    assert trainer.compute_loss(trainer.model.train(), batch).isfinite()
    assert trainer.sharing


def test_a_compiled_model_runs_as_plain_trl(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHDYNAMO_DISABLE")
    compiled = torch.compile(tiny("llama"), backend="eager")
    trainer = build(SharedPrefixDPOTrainer, compiled, "full", tmp_path, shared_prefix="auto")
    plain = step(build(DPOTrainer, tiny("llama"), "full", tmp_path))
    assert (type(compiled).__name__, trainer.sharing) == ("OptimizedModule", False)
    assert step(trainer)[0] == pytest.approx(plain[0], rel=1e-6)


def test_noise_on_embeddings_runs_as_plain_trl(tmp_path, caplog):
    build(SharedPrefixDPOTrainer, tiny("llama"), "LoRA", tmp_path, shared_prefix="auto", neftune_noise_alpha=5.0)
    assert "this is plain TRL: noise on embeddings (NEFTune)" in caplog.text


def step_and_saved_bytes(trainer):
    """Result of `step`, and the bytes of the tensors that were saved for the backward."""
    saved = {}

    def keep(tensor):
        saved[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        return step(trainer), sum(saved.values())


def test_lora_does_not_copy_its_input_to_float32_under_autocast(tmp_path, monkeypatch):
    """Compares gradients, which are the same bit for bit, and saved bytes, which are fewer."""
    found = []
    for cast in (BaseTunerLayer._cast_input_dtype, trl_patches._cast_input_dtype):
        monkeypatch.setattr(trl_patches, "_cast_input_dtype", cast)
        trainer = build(SharedPrefixDPOTrainer, tiny("llama", dtype=torch.bfloat16), "LoRA", tmp_path, bf16=True)
        for weight in trainer.model.parameters():
            if weight.requires_grad:
                weight.data = weight.data.float()
        trainer.compute_loss(trainer.model, trainer.data_collator(BATCH))  # the first one is compared with TRL's
        found.append(step_and_saved_bytes(trainer))
    (with_casts, more), (without, fewer) = found
    assert without[0] == with_casts[0]
    assert all(torch.equal(gradient, without[2][name]) for name, gradient in with_casts[2].items())
    assert fewer < 0.95 * more


class Doubled(SharedPrefixDPOTrainer):
    """A user's `compute_loss`, which does not call TRL's."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return 2 * self._compute_loss(model, inputs, return_outputs)


@pytest.mark.parametrize("is_wrong", [False, True])
def test_a_loss_of_ones_own_is_compared_and_shares_too(is_wrong, tmp_path):
    model = tiny("llama")
    if is_wrong:
        model.model.layers[0].mlp.register_forward_hook(mix_neighbours)
    plain = step(build(DPOTrainer, model, "LoRA", tmp_path))
    shared = build(Doubled, model, "LoRA", tmp_path, shared_prefix="auto")
    loss = shared.compute_loss(shared.model.train(), shared.data_collator(BATCH))
    assert loss.item() == pytest.approx(2 * plain[0], rel=1e-6)
    assert shared.sharing is not is_wrong


def test_a_comparison_that_ran_out_of_memory_is_made_again(tmp_path):
    """auto_find_batch_size catches such an error and goes on with fewer pairs."""
    model = tiny("llama")
    model.model.layers[0].mlp.register_forward_hook(mix_neighbours)
    trainer = build(SharedPrefixDPOTrainer, model, "LoRA", tmp_path, shared_prefix="auto")

    def run_out(*_):
        raise MemoryError

    hook = trainer.model.register_forward_pre_hook(run_out)
    with pytest.raises(MemoryError):
        trainer.compute_loss(trainer.model, trainer.data_collator(BATCH))
    hook.remove()
    trainer.compute_loss(trainer.model, trainer.data_collator(BATCH))
    assert not trainer.sharing


def test_the_first_batch_is_checked_before_reference_log_probs_are_cached(tmp_path, caplog):
    model = tiny("llama")
    model.model.layers[0].mlp.register_forward_hook(mix_neighbours)
    settings = dict(precompute_ref_log_probs=True)
    plain = build(DPOTrainer, model, "LoRA", tmp_path, **settings)
    shared = build(SharedPrefixDPOTrainer, model, "LoRA", tmp_path, shared_prefix="auto", **settings)
    assert not shared.sharing
    assert shared.train_dataset["ref_chosen_logps"] == plain.train_dataset["ref_chosen_logps"]


@pytest.mark.parametrize(("given", "shares"), [("false", False), (False, False), (True, True), ("auto", True)])
def test_the_setting_as_a_word_or_as_yaml_reads_it(given, shares, tmp_path):
    trainer = build(SharedPrefixDPOTrainer, tiny("llama"), "LoRA", tmp_path, shared_prefix=given)
    assert trainer.sharing is shares
    assert (PLAN in trainer.data_collator(BATCH)) is shares
    with pytest.raises(RecipeError, match="shared_prefix=on is not auto, true or false"):
        build(SharedPrefixDPOTrainer, tiny("llama"), "LoRA", tmp_path, shared_prefix="on")


# What must not change


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt_neo", "gpt2"])
def test_generation_and_plain_calls_are_as_before(model_type, tmp_path):
    model = tiny(model_type)
    inputs = {"input_ids": torch.tensor([[0, 0, 5, 6, 7, 8], [9, 8, 7, 6, 5, 4]])}
    inputs["attention_mask"] = (inputs["input_ids"] > 0).long()
    calls = dict(**inputs, max_new_tokens=12, do_sample=False)
    before, logits = model.eval().generate(**calls), model(**inputs).logits
    trainer = build(SharedPrefixDPOTrainer, model, "LoRA", tmp_path)
    trained = trainer.model.eval()
    with trained.disable_adapter():
        assert torch.equal(trained.generate(**calls), before)
        torch.testing.assert_close(trained(**inputs).logits, logits)  # addresses may choose another kernel
    step(trainer)
    trained.eval()
    with trained.disable_adapter():
        assert torch.equal(trained.generate(**calls), before)
    trainer.save_model(tmp_path / "saved")
    trained.get_base_model().config.save_pretrained(tmp_path / "saved")
    assert "shared_" not in (tmp_path / "saved" / "config.json").read_text()


@pytest.mark.parametrize("method", ["full", "LoRA"])
@pytest.mark.parametrize("model_type", ["llama", "gpt_neo"])
def test_a_second_round_begins_with_the_same_model(model_type, method, tmp_path):
    first = build(SharedPrefixDPOTrainer, tiny(model_type, dtype=DOUBLE), method, tmp_path)
    step(first)
    model = first.model.merge_and_unload() if method == "LoRA" else first.model
    assert_same(*(step(trainer) for trainer in trainers(model, method, tmp_path)), DOUBLE)


def test_evaluation_reads_the_same_log_probs(tmp_path):
    both = trainers(tiny("mistral"), "LoRA", tmp_path)
    for trainer in both:
        trainer.eval_dataset = BATCH
    for reference in (False, True):
        plain, shared = (preference_logps(trainer, reference=reference) for trainer in both)
        assert shared.chosen == pytest.approx(plain.chosen, rel=1e-6)
        assert shared.rejected == pytest.approx(plain.rejected, rel=1e-6)


def test_a_stream_is_evaluated_as_in_trl(tmp_path):
    rows = Dataset.from_list(ROWS[:7]).to_iterable_dataset()
    plain, shared = (trainer.evaluate(rows) for trainer in trainers(tiny("llama"), "LoRA", tmp_path))
    for name in ("eval_loss", "eval_entropy", "eval_rewards/margins"):
        assert shared[name] == pytest.approx(plain[name], rel=1e-5)


def test_metrics_without_a_gradient_while_the_model_trains(tmp_path):
    both = trainers(tiny("llama"), "LoRA", tmp_path)
    for trainer in both:
        with torch.no_grad():
            trainer.compute_loss(trainer.model.train(), trainer.data_collator(BATCH))
    plain, shared = (trainer._metrics["train"] for trainer in both)
    assert shared["entropy"] == pytest.approx(plain["entropy"], rel=1e-5)


def test_sixteen_bits_differ_by_their_rounding(tmp_path):
    both = trainers(tiny("llama"), "LoRA", tmp_path, bf16=True)
    plain, shared = (step(trainer) for trainer in both)
    exact = step(build(DPOTrainer, tiny("llama"), "LoRA", tmp_path))
    assert error(exact[2], shared[2]) < 2 * error(exact[2], plain[2])


# The document


def test_the_documents_tables_are_those_of_the_tests():
    """Compares rows, columns and bounds of the tables that `python tests/helpers/equivalence.py` writes."""
    tables = DOCUMENT.read_text().split("<!-- tables -->")[1].split("<!-- end of tables -->")[0].strip().split("\n\n")
    for rows, lines in zip((ARCHITECTURES, LOSSES), tables, strict=True):
        header, _, *cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines.splitlines()]
        assert header[1:] == METHODS
        assert [row[0] for row in cells] == list(rows)
        for row in cells:
            for method, cell in zip(METHODS, row[1:], strict=True):
                bounds = [1e-5] if method == "LoRA on 4 bits" else [1e-10, 1e-5]
                assert all(float(number) <= bound for number, bound in zip(cell.split(" / "), bounds, strict=True))


def test_the_document_names_every_reason_to_fall_back():
    rows = DOCUMENT.read_text().split("## What falls back")[1].split("## Limits")[0]
    returned = [node.value for node in ast.walk(ast.parse(inspect.getsource(support))) if isinstance(node, ast.Return)]
    reasons = [key for value in returned if isinstance(value, ast.Dict) for key in value.keys]
    assert len(reasons) == 21
    for reason in reasons:
        pieces = [
            part.value if isinstance(part, ast.Constant) else "..." for part in getattr(reason, "values", [reason])
        ]
        assert f"| {''.join(pieces)} |" in rows
