"""An update that is divided by tokens has the loss, gradients and metrics of the undivided update."""

import copy
import itertools
import json
import random
import sys
from itertools import product

import pytest
import torch
from commands import run_command
from equivalence import LOSSES, assert_same, build, everything_in, examples, model_for, settings_of
from trl import DPOConfig, DPOTrainer

from dpo_recipes.errors import RecipeError
from dpo_recipes.health.guards import ReferenceGuard
from dpo_recipes.recipe import RecipeArguments
from dpo_recipes.runs import start_run
from dpo_recipes.shared_prefix import SharedPrefixDPOTrainer
from dpo_recipes.shared_prefix.micro_batches import divide, divide_padded

draw = random.Random(3)
UPDATE = examples([(draw.randrange(2, 32), draw.randrange(1, 14), draw.randrange(1, 14)) for _ in range(12)])
ROWS = [
    {"prompt": "why " * draw.randrange(1, 7), "chosen": "so " * draw.randrange(1, 7), "rejected": "no" * index}
    for index in range(1, 25)
]
BUDGET = 90  # tokens; a pair has up to 57
DOUBLE = torch.float64
FAST = [(True, "LoRA", DOUBLE), (False, "full", torch.float32)]


def step(trainer, budget=None, *, train=True, **losses):
    """Loss, metrics and gradients of an update that comes in one batch."""
    for name, value in losses.items():
        setattr(trainer, name, value)
    mode = "train" if train else "eval"
    trainer.model.train(train)
    trainer.model.zero_grad()
    trainer._metrics[mode].clear()
    trainer._total_train_tokens = 0
    trainer.tokens_per_step, trainer.current_gradient_accumulation_steps = budget, 1
    batch = trainer.data_collator(UPDATE)
    with everything_in(trainer.model.dtype):
        if train:
            loss = trainer.training_step(trainer.model, batch)
        else:
            loss, *_ = trainer.prediction_step(trainer.model, batch, prediction_loss_only=True)
    gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.item(), copy.deepcopy(trainer._metrics[mode]), gradients


def trained(kind, folder, **settings):
    """A trainer after a few updates of 12 pairs."""
    settings = (
        dict(per_device_train_batch_size=12, rows=ROWS, max_steps=4, logging_steps=1, save_strategy="no") | settings
    )
    trainer = build(kind, model_for("llama", "LoRA"), "LoRA", folder, learning_rate=1e-2, **settings)
    trainer.train()
    return trainer


def logged(trainer):
    """What each update logged, but for times and what the guard on the reference model keeps."""
    timed = ("runtime", "per_second", "total_flos")
    history = trainer if isinstance(trainer, list) else trainer.state.log_history
    updates = [entry for entry in history if ReferenceGuard.KEPT not in entry]
    return [{k: v for k, v in entry.items() if not k.endswith(timed)} for entry in updates]


def assert_same_history(one, other, tolerance=1e-4):
    one, other = logged(one), logged(other)
    assert len(one) == len(other) > 3
    for left, right in zip(one, other, strict=True):
        assert left == pytest.approx(right, rel=tolerance, abs=tolerance)


# The division


def test_micro_batches_are_similar_and_fit():
    for seed in range(30):
        tokens = [random.Random(seed + 100 * place).randrange(1, 200) for place in range(40)]
        parts = divide(tokens, 512)
        assert sorted(pair for part in parts for pair in part) == list(range(40))
        sizes = [sum(tokens[pair] for pair in part) for part in parts]
        assert max(sizes) <= 512
        assert max(sizes) - min(sizes) <= 200
        assert len(parts) <= -(-sum(tokens) // 512) + 1
    assert divide([5, 3, 2], 10) == [[0, 1, 2]]
    assert divide([3, 12, 4, 11], 10) == [[1], [3], [0, 2]]  # a pair over the budget is alone
    assert divide([12], 10) == [[0]]


def test_padded_micro_batches_hold_similar_lengths_and_fit():
    lengths = [7, 2, 8, 2, 3, 30]
    parts = divide_padded(lengths, 36)
    assert parts == [[5], [2, 0], [4, 1, 3]]
    assert all(len(part) == 1 or 2 * len(part) * max(lengths[pair] for pair in part) <= 36 for part in parts)


@pytest.mark.parametrize("shares", [True, False])
def test_no_more_tokens_than_the_budget_go_through_the_model_at_a_time(shares, tmp_path):
    trainer = build(SharedPrefixDPOTrainer, model_for("llama", "LoRA"), "LoRA", tmp_path, shared_prefix=str(shares))
    step(trainer, 120)  # the first batch is compared with plain TRL
    seen = []
    layer = trainer.model.get_base_model().model.layers[0]
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[:2].numel()))
    for train in (True, False):
        step(trainer, 120, train=train)
        real = sum(len(row) for pair in UPDATE for row in pair.values())
        assert max(seen) <= 120
        assert len(seen) >= 6
        assert sum(seen) == 2 * real if shares else sum(seen) > 2 * real  # the policy and the reference model
        seen.clear()


# Equality


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shares", "method", "dtype"),
    [
        pytest.param(*case, marks=[] if case in FAST else pytest.mark.slow)
        for case in product([True, False], ["LoRA", "full"], [DOUBLE, torch.float32])
    ],
    ids=str,
)
def test_every_loss_is_that_of_the_undivided_update(shares, method, dtype, tmp_path):
    model = model_for("llama", method, dtype)
    ours = build(SharedPrefixDPOTrainer, model, method, tmp_path, use_weighting=True, shared_prefix=str(shares))
    plain = build(DPOTrainer, model, method, tmp_path, use_weighting=True) if dtype == DOUBLE or not shares else ours
    for loss in LOSSES:
        sys.stderr.write(f"{loss}\n")  # shown where it fails
        assert_same(step(plain, **settings_of(loss)), step(ours, BUDGET, **settings_of(loss)), dtype)


@pytest.mark.parametrize("loss", ["sigmoid", "sigmoid + bco_pair + sft", "aot", "ld_alpha"])
def test_evaluation_is_that_of_the_undivided_batch(loss, tmp_path):
    model = model_for("llama", "LoRA", DOUBLE)
    both = [build(kind, model, "LoRA", tmp_path) for kind in (DPOTrainer, SharedPrefixDPOTrainer)]
    plain, ours = (
        step(each, budget, train=False, **settings_of(loss)) for each, budget in zip(both, (0, 90), strict=True)
    )
    assert_same(plain, ours, DOUBLE)


def test_a_loss_that_sorts_the_batch_would_differ_by_micro_batch(tmp_path):
    trainer = build(SharedPrefixDPOTrainer, model_for("llama", "LoRA"), "LoRA", tmp_path)
    losses = settings_of("aot_unpaired")
    whole = step(trainer, **losses)
    trainer.loss_types = ["sigmoid"]
    assert step(trainer, BUDGET, **losses)[0] == pytest.approx(whole[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dpo_recipes.shared_prefix.trainer.NOT_A_MEAN", set())
        assert step(trainer, BUDGET, **losses)[0] != pytest.approx(whole[0], rel=1e-3)


def test_a_loss_of_ones_own_is_weighted_by_pairs(tmp_path):
    class Penalised(SharedPrefixDPOTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return super().compute_loss(model, inputs, *args, **kwargs) + inputs["completion_mask"].sum() / len(
                inputs["input_ids"]
            )

    trainer = build(Penalised, model_for("llama", "LoRA"), "LoRA", tmp_path)
    assert step(trainer, BUDGET)[0] == pytest.approx(step(trainer)[0])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"shared_prefix": "false"},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3},
        {"precompute_ref_log_probs": True},
        {"activation_checkpointing": True},
    ],
    ids=str,
)
def test_a_run_is_that_of_the_undivided_updates(settings, tmp_path, monkeypatch):
    """By loss, metrics, gradient norm and tokens of each update. The undivided updates accumulate nothing."""
    one = trained(
        SharedPrefixDPOTrainer, tmp_path, **{k: v for k, v in settings.items() if k == "precompute_ref_log_probs"}
    )
    monkeypatch.setattr(SharedPrefixDPOTrainer, "__init__", with_budget(SharedPrefixDPOTrainer.__init__))
    other = trained(SharedPrefixDPOTrainer, tmp_path, **settings)
    assert other.tokens_per_step == BUDGET
    assert {"loss", "grad_norm", "entropy", "num_tokens"} < one.state.log_history[0].keys()
    if "gradient_accumulation_steps" in settings:  # of which TRL logs the mean of the batches' metrics
        same = ("loss", "grad_norm", "num_tokens", "rewards/chosen", "rewards/margins", "rewards/accuracies")
        for each in (one, other):
            each.state.log_history = [{k: x for k, x in e.items() if k in same} for e in each.state.log_history[:-1]]
    assert_same_history(one, other)


def with_budget(init):
    return lambda self, *args, **kwargs: init(self, *args, tokens_per_step=BUDGET, **kwargs)


def test_reference_log_probs_of_undivided_batches_are_found_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    settings = dict(precompute_ref_log_probs=True, rows=ROWS, per_device_train_batch_size=12)
    first = build(SharedPrefixDPOTrainer, model_for("llama", "LoRA"), "LoRA", tmp_path, **settings)
    whole = first.train_dataset["ref_chosen_logps"][:]
    [file] = (tmp_path / "cache").rglob("reference/*")
    monkeypatch.setattr(SharedPrefixDPOTrainer, "__init__", with_budget(SharedPrefixDPOTrainer.__init__))
    build(SharedPrefixDPOTrainer, model_for("llama", "LoRA"), "LoRA", tmp_path, **settings)
    assert [*(tmp_path / "cache").rglob("reference/*")] == [file]
    file.unlink()
    divided = build(SharedPrefixDPOTrainer, model_for("llama", "LoRA"), "LoRA", tmp_path, **settings)
    assert divided.train_dataset["ref_chosen_logps"][:] == pytest.approx(whole, rel=1e-5)


# Out of memory


def fails(trainer, calls):
    """Lets the model run out of memory in these of its calls, after it has drawn random numbers."""
    count = itertools.count(1)

    def hook(*_):
        if next(count) in calls:
            torch.rand(3)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    trainer.model.register_forward_pre_hook(hook)


def dropping(budget, folder, monkeypatch, **given):
    """A run with dropout, so that its results depend on random numbers, with a budget that was estimated."""
    monkeypatch.setattr(DPOConfig, "tokens_per_step", budget, raising=False)  # `decide` sets both on an instance
    monkeypatch.setattr(DPOConfig, "budget_is_estimated", True, raising=False)
    settings = dict(per_device_train_batch_size=12, rows=ROWS, max_steps=4, logging_steps=1, save_strategy="no") | given
    settings |= dict(shared_prefix="false", disable_dropout=False, learning_rate=1e-2)
    model = model_for("gpt2", "LoRA")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    return build(SharedPrefixDPOTrainer, model, "LoRA", folder, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("call", [4, 7], ids=["reference", "policy"])  # the guard on the reference model calls twice
def test_an_update_without_memory_is_repeated_with_half_of_the_estimated_budget(call, tmp_path, monkeypatch, caplog):
    half = dropping(BUDGET, tmp_path, monkeypatch)
    half.train()
    ours, stored = dropping(2 * BUDGET, tmp_path, monkeypatch), []
    ours.on_halved = stored.append
    fails(ours, {call})
    ours.train()
    assert logged(ours) == logged(half)  # to the last bit: gradients, metrics and random numbers were undone
    assert ours.tokens_per_step == BUDGET
    assert stored == [BUDGET]
    assert f"goes on, with tokens_per_step={BUDGET}" in caplog.text


def test_a_second_error_of_memory_ends_the_run_and_a_budget_of_ones_own_is_never_halved(tmp_path, monkeypatch):
    trainer = dropping(2 * BUDGET, tmp_path, monkeypatch)
    fails(trainer, {5, 11})
    with pytest.raises(
        RecipeError, match=f"Out of memory with {BUDGET} tokens.*half of what was estimated.*Give fewer"
    ):
        trainer.train()
    trainer = dropping(2 * BUDGET, tmp_path, monkeypatch)
    trainer.budget_is_estimated = False
    fails(trainer, {5})
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train()


# Refusals


def test_a_budget_that_nobody_has_found_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(DPOConfig, "tokens_per_step", "auto", raising=False)
    with pytest.raises(RecipeError, match="tokens_per_step=auto needs prepare_pairs"):
        build(SharedPrefixDPOTrainer, model_for("llama", "LoRA"), "LoRA", tmp_path)


def test_what_cannot_be_divided_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(SharedPrefixDPOTrainer, "__init__", with_budget(SharedPrefixDPOTrainer.__init__))
    given = dict(shared_prefix="auto", loss_type=["aot"], disable_dropout=False)
    with pytest.raises(RecipeError, match="tokens_per_step does not go with: dropout and the loss aot"):
        build(SharedPrefixDPOTrainer, model_for("llama", "LoRA"), "LoRA", tmp_path, **given)
    with pytest.raises(RecipeError, match="the auxiliary loss of a mixture of experts"):
        build(SharedPrefixDPOTrainer, model_for("mixtral", "full"), "full", tmp_path, shared_prefix="auto")


def test_a_flag_for_a_trainer_that_cannot_divide_is_refused_and_a_profiles_budget_is_not(tmp_path, monkeypatch):
    trainer = build(DPOTrainer, model_for("llama", "LoRA"), "LoRA", tmp_path)
    monkeypatch.setattr("sys.argv", ["mine.py", "--tokens_per_step", str(BUDGET)])
    with pytest.raises(RecipeError, match="tokens_per_step has no effect on DPOTrainer"):
        start_run(trainer, RecipeArguments(tokens_per_step=BUDGET))
    monkeypatch.setattr("sys.argv", ["mine.py", "--config", "gpu.yaml"])
    start_run(trainer, RecipeArguments(tokens_per_step=BUDGET))


def test_the_budget_of_a_recipe_takes_the_pairs_of_an_update_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(DPOConfig, "tokens_per_step", BUDGET, raising=False)  # `parse_recipe` sets it on an instance
    given = dict(per_device_train_batch_size=4, gradient_accumulation_steps=3, rows=ROWS)
    trainer = build(SharedPrefixDPOTrainer, model_for("llama", "LoRA"), "LoRA", tmp_path, **given)
    assert trainer.tokens_per_step == BUDGET
    assert trainer.args.gradient_accumulation_steps == 1
    assert len(next(iter(trainer.get_train_dataloader()))["input_ids"]) == 2 * 12
    plain = build(DPOTrainer, model_for("llama", "LoRA"), "LoRA", tmp_path, **given)
    assert len(next(iter(plain.get_train_dataloader()))["input_ids"]) == 2 * 4


# Processes

PROCESSES = """
import json, sys
from torch.nn.parallel import DistributedDataParallel
sys.path[:0] = [sys.argv[1]]
from equivalence import build, model_for
from dpo_recipes.shared_prefix import SharedPrefixDPOTrainer

rows, settings, budget = map(json.loads, sys.argv[2:])
trainer = build(SharedPrefixDPOTrainer, model_for("llama", "LoRA"), "LoRA", "run", rows=rows, **settings)
trainer.tokens_per_step = budget
parts = []
divide = trainer._divide
trainer._divide = lambda inputs: parts.append(divide(inputs)) or parts[-1]
alone, no_sync = [], DistributedDataParallel.no_sync
DistributedDataParallel.no_sync = lambda model: alone.append(1) or no_sync(model)
trainer.train()
rank = trainer.accelerator.process_index
with open(f"rank{rank}.json", "w") as stream:
    counts = {"parts": [len(each.parts) for each in parts], "alone": len(alone)}
    json.dump({"log": trainer.state.log_history, **counts}, stream)
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_with_unequal_divisions_train_as_one(processes, tmp_path):
    settings = dict(max_steps=4, logging_steps=1, save_strategy="no", learning_rate=1e-2)
    settings |= dict(eval_strategy="no", dataloader_pin_memory=False)
    (tmp_path / "train.py").write_text(PROCESSES)

    def run(count, budget):
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(count), "train.py"]
        given = json.dumps(settings | {"per_device_train_batch_size": 12 // count})
        helpers = next(path for path in sys.path if path.endswith("helpers"))
        arguments = [helpers, json.dumps(ROWS), given, json.dumps(budget)]
        result = run_command(*launch, *arguments, cwd=tmp_path, ACCELERATE_USE_CPU="true")
        assert result.returncode == 0, result.stderr
        return [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(count)]

    [one], several = run(1, None), run(processes, BUDGET)
    assert len({str(each["parts"]) for each in several}) > 1  # the processes divide differently
    assert max(max(each["parts"]) for each in several) > 2
    for each in several:  # a division for the reference model and one for the policy, whose last part synchronises
        assert each["alone"] == sum(each["parts"]) / 2 - settings["max_steps"]
    assert_same_history(one["log"], several[0]["log"])
