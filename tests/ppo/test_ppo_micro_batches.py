"""An update of PPO or RLOO that is divided by tokens has the loss, gradients and metrics of the undivided update."""

import copy
import math
import random

import pytest
import torch
from datasets import Dataset
from equivalence import everything_in
from ppo_tasks import ANSWERS_ONLY, EOS, PAD, WORDS, build_trainer, count_as, save_start
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from trl import RLOOConfig

from dpo_recipes.doctor.compute import stir
from dpo_recipes.errors import RecipeError
from dpo_recipes.ppo import PPOConfig, RLOOTrainer
from dpo_recipes.ppo.micro_batches import divide_answers

BUDGET = 60  # tokens with padding; a prompt with its answer has up to 11
UPDATE = 32
PROMPTS = ["w", "x y z w", "y z"] * 32
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
TASK = dict(per_device_train_batch_size=UPDATE, generation_batch_size=UPDATE, max_completion_length=7, num_iterations=2)
TASK |= dict(beta=0.1)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return save_start(tmp_path_factory.mktemp("start"))


@pytest.fixture
def build(start, tmp_path):
    """A trainer of 32 answers an update, with a budget or without, by its loss or by RLOO."""

    def build(budget, loss_type="bnpo", *, model=None, **settings):
        if loss_type != "rloo":
            settings = TASK | {"loss_type": loss_type} | settings
            PPOConfig.tokens_per_step = budget  # `parse_recipe` sets it on an instance
            try:
                return build_trainer(start, tmp_path, count_as, model=model, prompts=PROMPTS, settings=settings)
            finally:
                del PPOConfig.tokens_per_step
        machine = dict(use_cpu=True, bf16=False, activation_checkpointing=False, report_to="none", disable_tqdm=True)
        args = RLOOConfig(str(tmp_path), num_generations=2, generation_kwargs=ANSWERS_ONLY, **TASK | machine | settings)
        args.tokens_per_step = budget
        rows = Dataset.from_dict({"prompt": PROMPTS})
        tokenizer = PreTrainedTokenizerFast.from_pretrained(start)
        return RLOOTrainer(model or str(start), count_as, args, train_dataset=rows, processing_class=tokenizer)

    return build


def step(trainer, batch, dtype):
    """Loss, metrics and gradients of an update; the policy has moved since the rollout."""
    trainer.model.to(dtype).train()
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()
    batch = {key: x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x for key, x in batch.items()}
    with everything_in(dtype):
        loss = trainer.compute_loss(trainer.model, batch)
        trainer.accelerator.backward(loss)
    gradients = {name: w.grad.clone() for name, w in trainer.model.named_parameters() if w.grad is not None}
    return loss.item(), copy.deepcopy(trainer._metrics["train"]), gradients


def rollout(trainer):
    torch.manual_seed(3)
    prompts = PROMPTS[:UPDATE] if trainer.num_generations < 2 else [each for each in PROMPTS[:16] for _ in (1, 2)]
    trainer.model.train()
    return trainer._generate_and_score_completions([{"prompt": prompt} for prompt in prompts])


LOSSES = ["bnpo", "grpo", "dr_grpo", "dapo", "rloo"]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("loss_type", LOSSES)
def test_loss_gradients_and_metrics_are_those_of_the_undivided_update(loss_type, dtype, build):
    whole, divided = build(None, loss_type), build(BUDGET, loss_type)
    batch = rollout(whole)
    for trainer in (whole, divided):
        stir(trainer.model, scale=0.02)
    calls = []
    divided.model.register_forward_pre_hook(
        lambda module, args, given: calls.append(given["input_ids"].shape), with_kwargs=True
    )
    one, other = (step(trainer, batch, dtype) for trainer in (whole, divided))
    assert len(calls) > 4
    assert max(map(math.prod, calls)) <= BUDGET
    tolerance = TOLERANCE[dtype]
    assert other[0] == pytest.approx(one[0], rel=tolerance, abs=tolerance)
    assert one[1].keys() == other[1].keys() > {"entropy", "clip_ratio/low_mean"}
    for name, values in one[1].items():
        assert other[1][name] == pytest.approx(values, rel=10 * tolerance, abs=10 * tolerance), name
    assert one[2].keys() == other[2].keys()
    scale = math.hypot(*(float(g.norm()) for g in one[2].values()))
    for name, gradient in one[2].items():
        assert float((gradient - other[2][name]).norm()) <= tolerance * max(float(gradient.norm()), 1e-6 * scale), name


@pytest.mark.parametrize("loss_type", ["bnpo", "rloo"])
def test_a_rollout_is_that_of_the_undivided_passes(loss_type, build):
    """Log-probs by the policy and the reference model, values, advantages and returns."""
    one, other = (rollout(build(budget, loss_type)) for budget in (None, BUDGET))
    assert one.keys() == other.keys()
    for name, x in one.items():
        if torch.is_tensor(x):
            torch.testing.assert_close(other[name], x, rtol=1e-4, atol=1e-5)


def test_positions_that_count_padding_keep_it(build, start, tmp_path):
    """GPT-2 counts padding on the left, which a micro-batch then keeps."""
    torch.manual_seed(4)
    sizes = dict(vocab_size=len(WORDS), n_embd=32, n_layer=1, n_head=2, n_positions=16, bos_token_id=None)
    policy = GPT2LMHeadModel(GPT2Config(**sizes, pad_token_id=PAD, eos_token_id=EOS))
    policy.transformer.wpe.weight.data *= 20
    policy.save_pretrained(tmp_path / "policy")
    whole, divided = (build(budget, model=str(tmp_path / "policy")) for budget in (None, BUDGET))
    batch = rollout(whole)
    one, other = (step(trainer, batch, torch.float32) for trainer in (whole, divided))
    assert other[0] == pytest.approx(one[0], rel=1e-5, abs=1e-6)
    assert other[1]["policy/ratio"] == pytest.approx([1], abs=1e-5)


@pytest.mark.parametrize(("loss_type", "accumulated"), [("bnpo", 4), ("rloo", 2)])
def test_a_run_is_that_of_the_undivided_updates(loss_type, accumulated, build):
    """By what each update logged; with a budget of a recipe an update comes in one batch."""
    settings = dict(max_steps=4, logging_steps=1, save_strategy="no", learning_rate=3e-3, seed=1)
    whole = build(None, loss_type, **settings)
    at_a_time = dict(per_device_train_batch_size=UPDATE // accumulated, gradient_accumulation_steps=accumulated)
    divided = build(BUDGET, loss_type, **settings | at_a_time)
    assert divided.args.per_device_train_batch_size == UPDATE
    for trainer in (whole, divided):
        torch.manual_seed(1)  # of the answers
        trainer.train()
    for one, other in zip(whole.state.log_history, divided.state.log_history, strict=True):
        timed = {name for name in one if "time" in name or "second" in name or name == "total_flos"}
        assert {k: v for k, v in other.items() if k not in timed} == pytest.approx(
            {k: v for k, v in one.items() if k not in timed}, rel=1e-3, abs=1e-4
        )


def test_micro_batches_of_answers_are_similar_and_fit():
    draw = random.Random(5)
    lengths = [(draw.randrange(1, 100), draw.randrange(1, 60)) for _ in range(200)]
    parts = divide_answers(lengths, 1000)
    assert sorted(row for part in parts for row in part) == list(range(200))
    sizes = [len(part) * sum(max(lengths[row][side] for row in part) for side in (0, 1)) for part in parts]
    assert max(sizes) <= 1000
    assert min(sizes) > 0.4 * max(sizes)
    assert divide_answers([(9, 9), (1, 1)], 4) == [[0], [1]]  # an answer over the budget is alone
    assert divide_answers([(1, 1)], 100) == [[0]]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (dict(top_entropy_quantile=0.5), "a quantile of the whole batch"),
        (dict(loss_type="grpo", entropy_coef=0.1), "entropy_coef, a mean over tokens"),
    ],
)
def test_what_cannot_be_divided_is_refused(settings, reason, build):
    with pytest.raises(RecipeError, match=f"tokens_per_step does not go with: .*{reason}"):
        build(BUDGET, **settings)
    with pytest.raises(RecipeError, match="tokens_per_step=auto needs prepare_prompts"):
        build("auto")
