"""PPO: its mathematics against numbers worked by hand and an independent implementation, and what it learns."""

import copy
import functools
import itertools
import json
import logging
import math
import sys

import pytest
import torch
from commands import REPOSITORY, run_command
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import AutoPeftModelForCausalLM, LoraConfig
from ppo_tasks import (
    ANSWERS_ONLY,
    BANDIT,
    EOS,
    PAD,
    PROMPTS,
    TWO_STEPS,
    WITH_CRITIC,
    WITHOUT,
    WORDS,
    bandit,
    build_trainer,
    count_as,
    logged,
    save_start,
    tiny_config,
    two_steps,
)
from safetensors.torch import load_file
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from dpo_recipes.errors import RecipeError
from dpo_recipes.health.guards import add_guards
from dpo_recipes.ppo import PPOConfig, PPOTrainer
from dpo_recipes.ppo.critic import CRITIC, CRITIC_FILE, sequence_classifier
from dpo_recipes.ppo.math import clipped_value_loss, gae, token_rewards, without_padding


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """The folder of a random policy over a dozen words."""
    return save_start(tmp_path_factory.mktemp("ppo") / "start")


@pytest.fixture
def build(start, tmp_path):
    """A trainer of that policy; settings of PPOConfig and arguments of the trainer can be changed."""

    def build(reward, **changes):
        names = ("model", "prompts", "critic", "peft_config", "eval_dataset")
        arguments = {name: changes.pop(name) for name in names if name in changes}
        return build_trainer(start, tmp_path / "run", reward, settings=changes, **arguments)

    return build


def lora():
    return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


# The mathematics


def slow_gae(rewards, values, mask, gamma, lam):
    """Advantages by the definition, term by term: sum over l of (gamma lam)^l delta_{t+l}, masked tokens left out."""
    advantages = torch.zeros_like(rewards)
    for row in range(len(rewards)):
        steps = [t for t in range(rewards.shape[1]) if mask[row, t]]
        next_values = [*(values[row, t].item() for t in steps), 0.0][1:]
        deltas = [
            rewards[row, t].item() + gamma * after - values[row, t].item()
            for t, after in zip(steps, next_values[: len(steps)], strict=True)
        ]
        for index, t in enumerate(steps):
            advantages[row, t] = sum((gamma * lam) ** step * delta for step, delta in enumerate(deltas[index:]))
    return advantages


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 7), st.floats(0, 1), st.floats(0, 1))
def test_gae_is_its_definition(seed, batch, tokens, gamma, lam):
    generator = torch.Generator().manual_seed(seed)
    rewards, values = (torch.randn(batch, tokens, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = (torch.rand(batch, tokens, generator=generator) < 0.7).double()  # gaps and empty answers, too
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    expected = slow_gae(rewards, values, mask, gamma, lam)
    torch.testing.assert_close(advantages, expected)
    torch.testing.assert_close(returns, (expected + values) * mask)


def test_gae_by_hand():
    rewards, values = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[0.5, 1.0, 1.5]])
    advantages, returns = gae(rewards, values, torch.ones(1, 3), gamma=0.5, lam=0.5)
    # deltas: 1 + 0.5 - 0.5 = 1; 0 + 0.75 - 1 = -0.25; 2 - 1.5 = 0.5; each advantage is delta + 0.25 times the next
    torch.testing.assert_close(advantages, torch.tensor([[0.96875, -0.125, 0.5]]))
    torch.testing.assert_close(returns, torch.tensor([[1.46875, 0.875, 2.0]]))


def test_gae_refuses_shapes_that_differ():
    with pytest.raises(ValueError, match="Shapes differ"):
        gae(torch.zeros(1, 3), torch.zeros(1, 2), torch.ones(1, 3), gamma=1.0, lam=1.0)


def test_rewards_of_tokens_by_hand():
    log_ratio, mask = torch.tensor([[0.2, -0.4], [0.6, 0.0]]), torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    rewards = token_rewards(torch.tensor([1.0, 2.0]), log_ratio, mask, beta=0.5)
    # -0.5 times the log-ratio, and the score at the last token: the second, and the first of an answer of one token
    torch.testing.assert_close(rewards, torch.tensor([[-0.1, 1.2], [1.7, 0.0]]))


def test_the_value_loss_by_hand():
    values, old = torch.tensor([[1.0, 0.0, 9.0]]), torch.tensor([[0.0, 0.1, 0.0]])
    returns, mask = torch.tensor([[1.0, 1.0, 5.0]]), torch.tensor([[1.0, 1.0, 0.0]])
    # first: 0 unclipped, clipped at 0.2: 0.64; second: 1, clipped at 0: 1; third is no token
    torch.testing.assert_close(clipped_value_loss(values, old, returns, mask, 0.2), torch.tensor(0.5 * 1.64 / 2))


def test_rewards_hold_the_score_at_the_end_and_the_kl_of_each_token(build):
    """With lambda = gamma = 1 and a critic that gives 0, returns are sums of later rewards, which show every reward."""
    trainer = build(count_as, beta=0.5, lam=1.0, whiten_advantages=False, missing_eos_penalty=0.25)
    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(1.5)  # away from the reference
    batch = trainer._generate_and_score_completions([{"prompt": prompt} for prompt in PROMPTS * 8])
    plain = AutoModelForCausalLM.from_pretrained(trainer.model.config.name_or_path)
    tokens = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    kept = batch["completion_ids"].shape[1]
    logps = [
        model(tokens).logits.log_softmax(-1)[:, :-1].gather(2, tokens[:, 1:, None])[:, -kept:, 0]
        for model in (trainer.model, plain)
    ]
    lengths = batch["completion_mask"].sum(dim=1).tolist()
    assert set(lengths) == {1, 2}  # some ended at once
    for row, length in enumerate(lengths):
        ids = batch["completion_ids"][row, :length].tolist()
        score = ids.count(2) / length - (0.25 if EOS not in ids else 0.0)
        rewards = [-0.5 * (logps[0][row, t] - logps[1][row, t]).item() for t in range(length)]
        rewards[-1] += score
        to_go = [sum(rewards[t:]) for t in range(length)]
        assert batch["returns"][row, :length].tolist() == pytest.approx(to_go, abs=1e-5)
        assert not batch["returns"][row, length:].any()
    torch.testing.assert_close(batch["returns"], batch["advantages"])


def test_advantages_are_normalised_over_the_tokens_of_a_rollout(build):
    batch = build(count_as)._generate_and_score_completions([{"prompt": prompt} for prompt in PROMPTS * 8])
    own = batch["advantages"][batch["completion_mask"] > 0]
    assert own.mean().item() == pytest.approx(0, abs=1e-5)
    assert own.std(unbiased=False).item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("one_epoch", [False, True], ids=["PPO", "REINFORCE"])
def test_the_gradient_of_a_step_is_that_of_an_independent_implementation(build, one_epoch, tmp_path):
    """Computes in float64, away from the rollout's policy. With one epoch and values of 0 PPO is REINFORCE."""
    torch.manual_seed(1)
    sizes = dict(
        vocab_size=len(WORDS), n_embd=32, n_layer=2, n_head=2, n_positions=16, pad_token_id=PAD, eos_token_id=EOS
    )
    config = GPT2Config(**sizes, bos_token_id=None, num_labels=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    policy, critic = GPT2LMHeadModel(config).double(), GPT2ForSequenceClassification(config).double()
    policy.save_pretrained(tmp_path / "policy")  # for the reference model
    policy.config.name_or_path = str(tmp_path / "policy")
    if one_epoch:
        torch.nn.init.zeros_(critic.score.weight)
        own = dict(lam=1.0, gamma=1.0, beta=0.0, num_iterations=1, vf_coef=0.0, whiten_advantages=False)
    else:
        own = dict(lam=0.9, gamma=0.95, beta=0.1, vf_coef=0.3, cliprange_value=0.05, epsilon=0.1)
    trainer = build(count_as, model=policy, critic=critic, **own)
    batch = trainer._generate_and_score_completions([{"prompt": prompt} for prompt in PROMPTS * 4])
    if not one_epoch:
        for weight in trainer.model.parameters():
            weight.data += 0.05 * torch.randn_like(weight)
    trainer.current_gradient_accumulation_steps = 1
    trainer.compute_loss(trainer.model, batch).backward()
    mine = {name: weight.grad.clone() for name, weight in trainer.model.named_parameters()}
    trainer.model.zero_grad()

    # The same, from the tokens and scores alone, by the definitions.
    mask = batch["completion_mask"].double()
    tokens = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    seen = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    kept = mask.shape[1]
    plain, judge = GPT2LMHeadModel(config).double(), GPT2ForSequenceClassification(config).double()
    plain.load_state_dict({k: v for k, v in trainer.model.state_dict().items() if CRITIC not in k})
    judge.load_state_dict(trainer.model.get_submodule(CRITIC).state_dict())

    logits = plain(tokens, attention_mask=seen).logits.log_softmax(-1)
    logps = logits[:, :-1].gather(2, tokens[:, 1:, None])[:, -kept:, 0]
    if one_epoch:
        scores = torch.tensor(count_as([row[row > 0].tolist() for row in batch["completion_ids"]]))
        loss = -(scores[:, None] * logps * mask).sum() / mask.sum()  # REINFORCE without a baseline
    else:
        values = judge.score(judge.transformer(tokens, attention_mask=seen)[0])[:, -kept - 1 : -1, 0]
        total = torch.zeros((), dtype=torch.float64)
        for row, t in itertools.product(range(len(mask)), range(kept)):
            if not mask[row, t]:
                continue
            advantage, value, old = (batch[key][row, t] for key in ("advantages", "returns", "old_values"))
            ratio = (logps[row, t] - batch["old_per_token_logps"][row, t]).exp()
            surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.9, 1.1) * advantage)
            near = min(max(values[row, t], old - 0.05), old + 0.05)
            total += -surrogate + 0.3 * 0.5 * torch.maximum((values[row, t] - value) ** 2, (near - value) ** 2)
        loss = total / mask.sum()
    loss.backward()
    theirs = {name: weight.grad for name, weight in plain.named_parameters()}
    if not one_epoch:
        theirs |= {f"{CRITIC}.{name}": weight.grad for name, weight in judge.named_parameters()}
    for name, gradient in theirs.items():
        # TRL's fused head computes logits in float32, all else here is float64.
        assert torch.linalg.vector_norm(mine[name] - gradient) <= 1e-6 * torch.linalg.vector_norm(gradient), name
    assert max(gradient.abs().max().item() for gradient in theirs.values()) > 1e-3


def test_values_and_advantages_of_a_rollout_are_those_of_an_independent_implementation(build):
    """Computes critic, reference model, scores, GAE and normalisation from the tokens alone."""
    torch.manual_seed(2)
    critic = LlamaForSequenceClassification(tiny_config(num_labels=1))
    trainer = build(count_as, critic=critic, beta=0.3, lam=0.8, gamma=0.9)
    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(1.5)
    batch = trainer._generate_and_score_completions([{"prompt": prompt} for prompt in PROMPTS * 8])
    mask, kept = batch["completion_mask"].double(), batch["completion_mask"].shape[1]
    tokens = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    judge = LlamaForSequenceClassification(tiny_config(num_labels=1))
    judge.load_state_dict(trainer.model.get_submodule(CRITIC).state_dict())
    with torch.no_grad():
        values = judge.score(judge.model(tokens).last_hidden_state)[:, -kept - 1 : -1, 0].double() * mask
        reference = AutoModelForCausalLM.from_pretrained(trainer.model.config.name_or_path)
        old, start = (
            model(tokens).logits.double().log_softmax(-1)[:, :-1].gather(2, tokens[:, 1:, None])[:, -kept:, 0]
            for model in (trainer.model, reference)
        )
    rewards = -0.3 * (old - start) * mask
    for row in range(len(mask)):
        length = int(mask[row].sum())
        rewards[row, length - 1] += batch["completion_ids"][row, :length].tolist().count(2) / length
    expected = slow_gae(rewards, values, mask, 0.9, 0.8)
    torch.testing.assert_close(batch["old_values"].double(), values, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(batch["returns"].double(), (expected + values) * mask, rtol=1e-4, atol=1e-5)
    own = expected[mask > 0]
    whitened = (expected - own.mean()) / own.std(unbiased=False) * mask
    torch.testing.assert_close(batch["advantages"].double(), whitened, rtol=1e-3, atol=1e-4)


def test_padding_that_a_batch_does_not_need_changes_nothing(build, monkeypatch):
    trainer = build(count_as, prompts=["w", "x y z w"] * 32, max_completion_length=6, beta=0.1)
    batch = trainer._generate_and_score_completions([{"prompt": prompt} for prompt in ("w", "x y z w") * 16])
    trainer.current_gradient_accumulation_steps = 1
    short = (batch["completion_mask"].sum(dim=1) < batch["completion_mask"].shape[1]) & (torch.arange(32) % 2 == 0)
    few = {name: part[short] if part.dim() else part for name, part in batch.items() if torch.is_tensor(part)}
    cut = without_padding(few)
    assert cut["completion_ids"].shape[1] < few["completion_ids"].shape[1]
    assert cut["completion_mask"].sum() == few["completion_mask"].sum()
    assert cut["prompt_ids"] is few["prompt_ids"]
    gradients = []
    for cutting in (without_padding, lambda batch: batch):
        monkeypatch.setattr("dpo_recipes.ppo.trainer.without_padding", cutting)
        trainer.model.zero_grad()
        trainer.compute_loss(trainer.model, few).backward()
        gradients.append({name: weight.grad.clone() for name, weight in trainer.model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])


def test_answers_that_were_cut_may_count_for_nothing(build):
    """Trains without error even where no answer of a batch counts."""
    settings = dict(mask_truncated_completions=True, max_completion_length=1, per_device_train_batch_size=2)
    trainer = build(count_as, prompts=["x y z w"] * 64, max_steps=16, **settings)
    trainer.train()
    assert all(math.isfinite(loss) for loss in logged(trainer, "loss"))


def test_positions_that_count_padding_are_those_of_the_rollout(build, tmp_path):
    """GPT-2 counts padding: before the first update the ratio of every batch is 1."""
    torch.manual_seed(4)
    sizes = dict(vocab_size=len(WORDS), n_embd=32, n_layer=1, n_head=2, n_positions=16, bos_token_id=None)
    policy = GPT2LMHeadModel(GPT2Config(**sizes, pad_token_id=PAD, eos_token_id=EOS))
    policy.transformer.wpe.weight.data *= 20
    policy.save_pretrained(tmp_path / "policy")
    settings = dict(learning_rate=0.0, num_iterations=1, per_device_train_batch_size=2, max_steps=16)
    trainer = build(count_as, model=str(tmp_path / "policy"), prompts=["w", "x y z w"] * 32, **settings)
    trainer.train()
    assert logged(trainer, "policy/ratio") == pytest.approx([1.0] * 16, abs=1e-4)


def test_rewards_are_weighted_and_summed_or_the_least_of_an_ensemble_counts(build):
    def twice(completion_ids, **_):
        return [2.0] * len(completion_ids)

    def sometimes(completion_ids, **_):
        return [None if index % 2 else 5.0 for index in range(len(completion_ids))]

    inputs = ([{}] * 4, ["w"] * 4, ["a"] * 4, [[2]] * 4)
    for aggregation, expected in (("sum", [7.0, 2.0, 7.0, 2.0]), ("min", [2.0] * 4)):
        trainer = build([twice, sometimes], reward_aggregation=aggregation, reward_weights=[1.0, 1.0])
        trainer._calculate_rewards(*inputs)
        assert trainer._scores.tolist() == expected
    trainer = build([twice, sometimes], reward_aggregation="min", reward_weights=[3.0, 1.0])
    trainer._calculate_rewards(*inputs)
    assert trainer._scores.tolist() == [5.0, 6.0, 5.0, 6.0]


# What it learns


def test_a_bandit_with_contexts_is_solved(build):
    trainer = build(bandit, **BANDIT)
    trainer.train()
    assert sum(logged(trainer, "score")[:4]) / 4 < 0.3
    assert sum(logged(trainer, "score")[-20:]) / 20 > 0.97


@pytest.mark.slow
def test_the_critic_assigns_credit_over_two_steps(build):
    """The task is solved much sooner than without a critic: a prompt's luck is larger than an answer's reward."""

    def rollouts_until_solved(seed, **changes):
        trainer = build(two_steps, seed=seed, **TWO_STEPS | changes)
        trainer.train()
        scores = logged(trainer, "score")  # the luck of a rollout's prompts averages to 0
        recent = [sum(scores[end - 8 : end]) / 8 for end in range(8, len(scores) + 1)]
        return next((end for end, score in enumerate(recent, start=8) if score > 1.8), len(scores)), trainer

    with_critic = [rollouts_until_solved(seed, **WITH_CRITIC) for seed in range(3)]
    without = [rollouts_until_solved(seed, **WITHOUT) for seed in range(3)]
    for _, trainer in with_critic:
        assert sum(logged(trainer, "score")[-20:]) / 20 > 1.9
        assert sum(logged(trainer, "value/explained_variance")[-20:]) / 20 > 0.5
    assert sum(count for count, _ in with_critic) < 0.7 * sum(count for count, _ in without)


@pytest.mark.slow
def test_a_large_beta_holds_the_policy_at_the_reference(build):
    kl = {}
    for beta in (0.0, 20.0):
        trainer = build(count_as, beta=beta, max_steps=48, learning_rate=1e-2, seed=1)
        trainer.train()
        reference = AutoModelForCausalLM.from_pretrained(trainer.model.config.name_or_path)
        tokens = torch.tensor([[WORDS.index(prompt)] for prompt in PROMPTS])
        with torch.no_grad():
            new, old = (model(tokens).logits[:, -1].log_softmax(-1) for model in (trainer.model, reference))
        kl[beta] = (new.exp() * (new - old)).sum(-1).mean().item()
    assert kl[0.0] > 0.5
    assert kl[20.0] < 0.05


# The critic, and what is kept of a run


def test_warm_up_trains_the_critic_alone(build):
    trainer = build(count_as, critic_warmup_steps=4, max_steps=4, weight_decay=0.1)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    after = trainer.model.state_dict()
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved
    assert all(name.startswith(CRITIC) for name in moved)


def test_the_critic_has_its_own_learning_rate(build):
    trainer = build(count_as, critic_learning_rate=0.5, learning_rate=0.1)
    groups = trainer.create_optimizer().param_groups
    rates = {id(weight): group["lr"] for group in groups for weight in group["params"]}
    names = {name: rates[id(weight)] for name, weight in trainer.model.named_parameters()}
    assert {rate for name, rate in names.items() if name.startswith(CRITIC)} == {0.5}
    assert {rate for name, rate in names.items() if not name.startswith(CRITIC)} == {0.1}
    decays = {group["weight_decay"] for group in groups if group["lr"] == 0.5}
    assert decays == {group["weight_decay"] for group in groups if group["lr"] == 0.1}


def test_a_critic_starts_at_zero_or_at_the_reward_model(build, start, tmp_path):
    torch.manual_seed(3)
    reward_model = LlamaForSequenceClassification(tiny_config(num_labels=1))
    reward_model.save_pretrained(tmp_path / "reward")
    PreTrainedTokenizerFast.from_pretrained(start).save_pretrained(tmp_path / "reward")
    tokens = torch.tensor([[10, 2, 3]])
    inputs = dict(input_ids=tokens, attention_mask=torch.ones_like(tokens), values_only=True)
    assert not build(count_as).model(**inputs).any()
    values = build(count_as, critic=str(tmp_path / "reward"), peft_config=lora()).model(**inputs)
    torch.testing.assert_close(values[0, -1], reward_model(tokens).logits[0, 0])


def config_of(kind):
    """A tiny configuration of an architecture for which transformers has no sequence classifier."""
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    tokens = dict(vocab_size=len(WORDS), pad_token_id=PAD, eos_token_id=EOS, bos_token_id=None)
    more = dict(num_key_value_heads=1, max_position_embeddings=16)
    if kind == "glm4_moe":
        more |= dict(moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1)
    if kind == "lfm2":
        more |= dict(full_attn_idxs=[1])
    return AutoConfig.for_model(kind, **sizes | tokens | more)


@pytest.mark.parametrize("kind", ["granite", "cohere2", "glm4_moe", "lfm2"])
@pytest.mark.parametrize("method", ["full", "LoRA"])
def test_a_critic_is_made_for_architectures_without_a_sequence_classifier(build, start, kind, method, tmp_path):
    config = config_of(kind)
    assert type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    torch.manual_seed(0)
    policy = AutoModelForCausalLM.from_config(config)
    policy.save_pretrained(tmp_path / kind)
    PreTrainedTokenizerFast.from_pretrained(start).save_pretrained(tmp_path / kind)
    lora_of_attention = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    arguments = {} if method == "full" else {"peft_config": lora_of_attention}
    trainer = build(count_as, model=str(tmp_path / kind), max_steps=2, critic_learning_rate=1e-2, **arguments)
    tokens = torch.tensor([[10, 2, 3]])
    inputs = dict(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    assert not trainer.model(**inputs, values_only=True).any()  # its head starts at 0
    critic = trainer.model.get_submodule(CRITIC)
    classifier = critic.get_base_model() if method == "LoRA" else critic
    with torch.no_grad():
        hidden = classifier.base_model(**inputs, use_cache=False).last_hidden_state
        torch.testing.assert_close(hidden, policy.eval().model(**inputs, use_cache=False).last_hidden_state)
    trainer.train()
    assert trainer.model(**inputs, values_only=True).any()


@pytest.mark.parametrize("kind", ["whisper", "blenderbot-small", "trocr"])
def test_an_architecture_that_takes_no_critic_is_refused_with_the_remedy(kind):
    with pytest.raises(
        ValueError, match=r"No critic can be made of a .*Pass a model with the same tokenizer as critic"
    ):
        sequence_classifier(AutoConfig.for_model(kind))


def test_settings_may_be_left_out(start, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    machine = dict(use_cpu=True, bf16=False, activation_checkpointing=False, max_completion_length=2)
    monkeypatch.setattr("dpo_recipes.ppo.trainer.PPOConfig", functools.partial(PPOConfig, **machine))
    prompts = Dataset.from_dict({"prompt": PROMPTS * 2})
    trainer = PPOTrainer(str(start), count_as, train_dataset=prompts)
    assert trainer.args.output_dir == "start-PPO"
    assert trainer.args.num_iterations == 4


@pytest.mark.parametrize("method", ["full", "LoRA"])
def test_a_policy_that_is_saved_by_hand_has_no_trace_of_the_critic(build, method, tmp_path):
    trainer = build(count_as, peft_config=lora() if method == "LoRA" else None)
    trainer.model.save_pretrained(tmp_path / "saved")
    weights = load_file(next((tmp_path / "saved").glob("*model.safetensors")))
    assert weights
    assert not any(CRITIC in name or "score" in name for name in weights)
    assert CRITIC in dict(trainer.model.named_children())
    loader = AutoPeftModelForCausalLM if method == "LoRA" else AutoModelForCausalLM
    again = loader.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    tokens = torch.tensor([[10, 2, 3]])
    torch.testing.assert_close(again(tokens).logits, trainer.model(tokens).logits)


@pytest.mark.parametrize("method", ["full", "LoRA"])
def test_what_is_saved_is_the_policy_without_a_trace_of_the_critic(build, method, tmp_path):
    peft_config = lora() if method == "LoRA" else None
    trainer = build(count_as, peft_config=peft_config, max_steps=4)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    weights = load_file(next((tmp_path / "saved").glob("*model.safetensors")))
    assert weights
    assert not any(CRITIC in name or "score" in name for name in weights)
    assert (
        "score"
        not in (tmp_path / "saved").joinpath("adapter_config.json" if peft_config else "config.json").read_text()
    )
    loader = AutoPeftModelForCausalLM if peft_config else AutoModelForCausalLM
    again = loader.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    tokens = torch.tensor([[10, 2, 3]])
    torch.testing.assert_close(again(tokens).logits, trainer.model(tokens).logits)

    further = build(count_as, model=again.merge_and_unload() if peft_config else str(tmp_path / "saved"))
    further.train()
    assert further.state.global_step == 4


@pytest.mark.parametrize("method", ["full", pytest.param("LoRA", marks=pytest.mark.slow)])
def test_a_resumed_run_is_bit_identical_from_a_rollout_boundary(build, method, tmp_path, caplog):
    """Compares losses, weights of policy and critic, and the optimizer; save_steps is rounded up to a rollout."""

    def run(folder, max_steps, **resume):
        trainer = build(
            *(count_as,),
            **dict(peft_config=lora() if method == "LoRA" else None, max_steps=max_steps, beta=0.1, seed=5),
            **dict(save_strategy="steps", save_steps=3, output_dir=str(tmp_path / folder), target_kl=0.05),
            **dict(critic_learning_rate=1e-2, lr_scheduler_type="constant"),
        )
        trainer.train(**resume)
        return trainer

    with caplog.at_level(logging.WARNING):
        whole = run("whole", 12)
    assert "Saving every 4 updates: a rollout is 4 of them" in caplog.text
    assert {path.name for path in (tmp_path / "whole").glob("checkpoint-*")} == {f"checkpoint-{n}" for n in (4, 8, 12)}
    run("part", 8)
    caplog.clear()
    rest = run("part", 12, resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-4"))
    assert "missing keys" not in caplog.text
    for one, other in zip(whole.state.log_history[4:-1], rest.state.log_history[4:-1], strict=True):
        assert {k: v for k, v in one.items() if "time" not in k} == {k: v for k, v in other.items() if "time" not in k}
    for file in ("model.safetensors" if method == "full" else "adapter_model.safetensors", CRITIC_FILE):
        left, right = (load_file(tmp_path / folder / "checkpoint-12" / file) for folder in ("whole", "part"))
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)
    states = [torch.load(tmp_path / folder / "checkpoint-12" / "optimizer.pt") for folder in ("whole", "part")]
    assert all(
        torch.equal(states[0]["state"][index]["exp_avg"], states[1]["state"][index]["exp_avg"])
        for index in states[0]["state"]
    )


@pytest.mark.parametrize("method", ["full", "LoRA"])
def test_the_best_policy_is_loaded_at_the_end(build, method, tmp_path):
    saving = dict(save_strategy="steps", save_steps=4, eval_strategy="steps", eval_steps=4, max_steps=8)
    saving |= dict(load_best_model_at_end=True, metric_for_best_model="score", per_device_eval_batch_size=4)
    held_out, peft_config = Dataset.from_dict({"prompt": PROMPTS}), lora() if method == "LoRA" else None
    trainer = build(count_as, peft_config=peft_config, eval_dataset=held_out, **saving)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best
    saved = load_file(f"{best}/{'adapter_' if peft_config else ''}model.safetensors")
    trainer.save_model(str(tmp_path / "last"))
    last = load_file(tmp_path / "last" / f"{'adapter_' if peft_config else ''}model.safetensors")
    assert saved.keys() == last.keys()
    assert all(torch.equal(saved[name], last[name]) for name in saved)


def test_updates_stop_where_the_policy_has_moved_too_far(build):
    """The first update of a rollout is always made; after a stop no weight moves until the next rollout."""
    moves = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            moves.append(model.lm_head.weight.detach().clone())

    trainer = build(count_as, target_kl=1e-4, learning_rate=1e-2, max_steps=12)
    trainer.add_callback(Watch())
    trainer.train()
    stopped = [bool(share) for share in logged(trainer, "policy/stopped")]
    assert stopped[::4] == [False] * 3
    assert all(stopped[3::4])
    for step in range(1, 12):
        assert torch.equal(moves[step], moves[step - 1]) == stopped[step]


SCRIPT = """
import sys, torch
sys.path.insert(0, {helpers!r})
from datasets import Dataset
from transformers import PreTrainedTokenizerFast, TrainerCallback
from ppo_tasks import ANSWERS_ONLY, PROMPTS, PPOConfig, PPOTrainer, count_as

class Compare(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step:
            return
        model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
        both = {{name: trainer.accelerator.gather(part) for name, part in trainer._buffered_inputs[0].items()}}
        assert len(both["advantages"]) == 16, both["advantages"].shape
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        own = torch.autograd.grad(trainer._compute_loss(model, both), weights)
        for weight, gradient in zip(weights, own):
            torch.testing.assert_close(weight.grad, gradient, rtol=1e-4, atol=1e-7)
        print("the gradient of both is that of one", flush=True)

args = PPOConfig(
    output_dir="run", use_cpu=True, bf16=False, activation_checkpointing=False, report_to="none", save_strategy="no",
    per_device_train_batch_size=8, generation_batch_size=32, num_iterations=2, max_steps=8, max_completion_length=2,
    learning_rate=1e-2, beta=0.1, max_grad_norm=0.0, generation_kwargs=ANSWERS_ONLY | {{"min_new_tokens": 2}},
)
trainer = PPOTrainer(
    {start!r}, count_as, args, train_dataset=Dataset.from_dict({{"prompt": PROMPTS * 16}}),
    processing_class=PreTrainedTokenizerFast.from_pretrained({start!r}), callbacks=[Compare()],
)
trainer.train()
for name, weight in trainer.model.named_parameters():
    first, second = trainer.accelerator.gather(weight.detach()[None])
    assert torch.equal(first, second), name
assert trainer.accelerator.num_processes == 2
print("both have the same weights", flush=True)
"""


@pytest.mark.slow
def test_two_processes_are_one(start, tmp_path):
    """Two processes have the gradient of one process with both batches, and their weights stay equal."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(helpers=str(REPOSITORY / "tests" / "helpers"), start=str(start)))
    accelerate = REPOSITORY / "recipes" / "accelerate" / "cpu2.yaml"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", accelerate, script]
    result = run_command(*launch, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("the gradient of both is that of one") == 2
    assert result.stdout.count("both have the same weights") == 2


@pytest.mark.slow
def test_policy_and_critic_train_on_a_base_of_4_bits(build, tiny_model, tmp_path):
    """With guards, the trained weights are float32 in policy and critic."""
    quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    args = PPOConfig(
        **dict(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", save_strategy="no", max_steps=4),
        **dict(per_device_train_batch_size=4, generation_batch_size=8, num_iterations=2, max_completion_length=4),
        **dict(learning_rate=1e-2, activation_checkpointing=True, logging_steps=1),
    )

    def letters(completions, **_):
        return [float(completion[0]["content"].isalpha()) - len(completion[0]["content"]) for completion in completions]

    trainer = PPOTrainer(
        str(tiny_model),
        letters,
        args,
        train_dataset=Dataset.from_dict({"prompt": [[{"role": "user", "content": f"Say {n}"}] for n in range(16)]}),
        quantization_config=quantized,
        peft_config=lora(),
    )
    add_guards(trainer)
    critic = trainer.model.get_submodule(CRITIC)
    assert critic.is_quantized
    trained = {name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    assert {weight.dtype for weight in trained.values()} == {torch.float32}
    assert {CRITIC in name for name in trained} == {True, False}
    before = {name: weight.detach().clone() for name, weight in trained.items()}
    trainer.train()
    moved = {name for name, weight in trained.items() if not torch.equal(before[name], weight)}
    assert any(name.startswith(CRITIC) and "lora_B" in name for name in moved)
    assert any(not name.startswith(CRITIC) and "lora_B" in name for name in moved)
    assert any("score" in name for name in moved)
    assert all(math.isfinite(loss) for loss in logged(trainer, "loss"))


def test_evaluation_reports_what_training_does(build):
    held_out = Dataset.from_dict({"prompt": PROMPTS})
    trainer = build(count_as, eval_dataset=held_out, beta=0.1, per_device_eval_batch_size=1, eval_strategy="no")
    metrics = trainer.evaluate()
    names = {"score", "kl", "value/explained_variance", "value/loss", "policy/ratio", "entropy"}
    assert {f"eval_{name}" for name in names} <= set(metrics) | set(trainer.state.log_history[-1])


# Wrong use


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(scale_rewards="group"), "no use for scale_rewards='group'"),
        (dict(importance_sampling_level="sequence"), "no use for importance_sampling_level"),
        (dict(loss_type="sapo"), "no clipped surrogate"),
        (dict(lam=1.5), "must lie in"),
        (dict(reward_aggregation="mean"), "neither 'sum' nor 'min'"),
        (dict(gradient_accumulation_steps=3), "no whole number of updates"),
        (dict(per_device_train_batch_size=1, generation_batch_size=3), "generation_batch_size=3 is odd"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(build, settings, message):
    with pytest.raises(ValueError, match=message):
        build(count_as, **settings)


def test_a_critic_that_cannot_read_the_policys_tokens_or_gives_no_value_is_refused(build, tiny_model):
    with pytest.raises(ValueError, match=r"reads the policy's tokens, and .* has others"):
        build(count_as, critic=str(tiny_model))
    with pytest.raises(ValueError, match=r"has 8 words and reads the policy's tokens, up to 13"):
        build(count_as, critic=LlamaForSequenceClassification(tiny_config(num_labels=1, vocab_size=8)))
    for other in (LlamaForCausalLM(tiny_config()), LlamaForSequenceClassification(tiny_config(num_labels=2))):
        with pytest.raises(ValueError, match="not a sequence classifier with one label"):
            build(count_as, critic=other)


def test_a_reward_model_that_the_critic_starts_from_is_not_trained(build, start, tmp_path):
    torch.manual_seed(3)
    LlamaForSequenceClassification(tiny_config(num_labels=1)).save_pretrained(tmp_path / "reward")
    reward_model = LlamaForSequenceClassification.from_pretrained(tmp_path / "reward")
    PreTrainedTokenizerFast.from_pretrained(start).save_pretrained(tmp_path / "reward")
    before = copy.deepcopy(reward_model.state_dict())
    prompts = [f"{prompt} " for prompt in PROMPTS] * 16  # text, which the answer follows
    trainer = build(reward_model, prompts=prompts, critic=reward_model, peft_config=lora())
    trainer.train()
    after = trainer.reward_funcs[0].state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_optimizer_without_the_critic_is_refused(build, start):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    args = PPOConfig(output_dir="-", bf16=False, use_cpu=True, activation_checkpointing=False)
    with pytest.raises(ValueError, match="lacks the critic's weights"):
        PPOTrainer(str(start), count_as, args, optimizers=(optimizer, None))


def test_prompts_that_make_no_rollout_are_refused(build):
    with pytest.raises(
        RecipeError, match="4 prompts with num_generations=1 make no rollout of generation_batch_size=32"
    ):
        build(count_as, prompts=PROMPTS)


def test_activation_checkpointing_reaches_policy_and_critic(build):
    """With LoRA, gradients are the same with and without checkpointing."""
    gradients = []
    for checkpointing in (True, False):
        trainer = build(count_as, peft_config=lora(), activation_checkpointing=checkpointing, max_steps=1, seed=7)
        trainer.train()
        layers = [module for module in trainer.model.modules() if hasattr(module, "gradient_checkpointing")]
        assert {layer.gradient_checkpointing for layer in layers} == {checkpointing}
        assert len(layers) >= 4
        gradients.append(logged(trainer, "grad_norm")[0])
    assert gradients[0] == pytest.approx(gradients[1], rel=1e-4)


def test_prompts_without_room_for_an_answer_are_refused(build):
    with pytest.raises(RecipeError, match=r"1 of 65 prompts have more than 14 tokens, up to 15"):
        build(count_as, prompts=[*PROMPTS * 16, "w " * 15])
    with pytest.raises(RecipeError, match=r"1 of 65 prompts have more than 14 tokens, up to 15"):
        build(count_as, eval_dataset={"held out": Dataset.from_dict({"prompt": ["w " * 15]})})


def test_a_reward_model_that_cannot_score_is_refused_before_anything_is_generated(build, start):
    """A language model would get a random score head."""
    with pytest.raises(RecipeError, match="LlamaForCausalLM, which has no score head"):
        build(str(start))


@pytest.mark.parametrize("aggregation", ["sum", "min"])
@pytest.mark.parametrize("bad", [None, math.nan, -math.inf])
def test_a_score_that_is_no_number_ends_the_run(build, bad, aggregation):
    def broken(completion_ids, **_):
        return [bad] + [1.0] * (len(completion_ids) - 1)

    trainer = build(broken, reward_aggregation=aggregation)
    with pytest.raises(RecipeError, match=r"1 of 32 answers got a score that is no number.* from broken"):
        trainer.train()


def test_scores_that_are_all_the_same_and_answers_that_never_end_are_named_once(build, caplog):
    def constant(completion_ids, **_):
        return [0.5] * len(completion_ids)

    with caplog.at_level(logging.WARNING):
        build(constant, max_steps=8, generation_kwargs=ANSWERS_ONLY | {"min_new_tokens": 2}).train()
    assert caplog.text.count("have the same score, 0.5: nothing to learn from. See what constant makes") == 1
    assert caplog.text.count("None of a rollout's 32 answers has ended within 2 tokens") == 1


def test_a_reward_function_without_a_number_is_named_once(build, caplog):
    def silent(completion_ids, **_):
        return [math.nan] * len(completion_ids)

    with caplog.at_level(logging.WARNING):
        build([count_as, silent], max_steps=8).train()
    assert caplog.text.count("silent gave no number (NaN or None) for any of 32 answers") == 1
    assert "count_as gave" not in caplog.text


def test_tools_are_refused(build, start):
    with pytest.raises(ValueError, match="no use for tools"):
        PPOTrainer(
            str(start),
            count_as,
            PPOConfig(output_dir="-", bf16=False, use_cpu=True, activation_checkpointing=False),
            tools=[len],
        )


# The canary of GRPOTrainer's rollouts; the others are in tests/test_trl_patches.py


def test_grpo_still_counts_batches_and_keeps_a_rollout_as_before(build):
    """If not, look at the epochs in ppo/trainer.py: `_step` counts batches, and a rollout is made for each multiple."""
    made = []

    class Watched(PPOTrainer):
        def _generate_and_score_completions(self, inputs):
            made.append(self._step)
            return super()._generate_and_score_completions(inputs)

    trainer = build(count_as, max_steps=8)
    trainer.__class__ = Watched
    trainer.train()
    assert made == [0, 4]
    assert trainer._step == 8
    assert len(trainer._buffered_inputs) == 2
    assert {"prompt_ids", "completion_ids", "old_per_token_logps", "advantages", "returns", "old_values"} <= set(
        trainer._buffered_inputs[0]
    )


def test_the_config_is_json(tmp_path):
    args = PPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, activation_checkpointing=False)
    assert json.loads(json.dumps(args.to_dict()))["num_generations"] == 1
    assert (args.num_generations, args.num_generations_eval) == (1, 1)
