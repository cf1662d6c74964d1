from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from scipy.stats import binomtest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, RLOOConfig, RLOOTrainer

from dpo_recipes.estimates import length_controlled, mean_with_interval, wilson, wins
from dpo_recipes.models import likelihood
from dpo_recipes.models.generation import generate, read_answer, sample_tokens
from dpo_recipes.models.likelihood import PreferenceLogps, answer_logps, preference_logps, reference_model, sampled_kl


@pytest.mark.parametrize(("wins", "n"), [(0, 10), (7, 10), (10, 10), (512, 1000)])
def test_wilson_agrees_with_scipy(wins, n):
    estimate = wilson(wins, n)
    interval = binomtest(wins, n).proportion_ci(method="wilson")
    assert (estimate.mean, estimate.low, estimate.high) == pytest.approx(
        (wins / n, interval.low, interval.high), abs=1e-6
    )


def test_ties_count_one_half():
    logps = PreferenceLogps(*np.array([[-1.0, -2.0, -3.0], [-2.0, -2.0, -1.0], [1, 1, 1], [1, 1, 1]]))
    assert logps.accuracy().mean == pytest.approx(1.5 / 3)


def test_scores_that_are_infinite_tie_and_those_that_are_none_do_not():
    one, other = np.array([[-np.inf, -np.inf, np.nan, 2.0], [-np.inf, 0.0, 1.0, 1.0]])
    assert wins(one, other).tolist()[:2] == [0.5, 0.0]
    assert np.isnan(wins(one, other)[2])


def test_accuracy_per_token_divides_by_the_length():
    logps = PreferenceLogps(*np.array([[-10.0], [-6.0], [10.0], [2.0]]))
    assert (logps.accuracy().mean, logps.accuracy(per_token=True).mean) == (0.0, 1.0)


def test_implicit_reward_accuracy_is_against_the_start():
    start = PreferenceLogps(*np.array([[-5.0, -5.0], [-1.0, -1.0], [1, 1], [1, 1]]))
    tuned = PreferenceLogps(*np.array([[-4.0, -6.0], [-2.0, -1.0], [1, 1], [1, 1]]))
    assert tuned.accuracy().mean == 0.0
    assert tuned.accuracy_against(start).mean == 0.5


def test_the_bootstrap_interval_holds_the_mean():
    values = np.random.default_rng(1).normal(0.3, 1.0, 400)
    estimate = mean_with_interval(values)
    assert estimate.low < values.mean() < estimate.high
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 / 20, rel=0.15)


@pytest.fixture(scope="module")
def model(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


ON_CPU = dict(use_cpu=True, bf16=False, activation_checkpointing=False)
PROMPTS = [[{"role": "user", "content": "word " * length}] for length in (9, 1, 4, 2, 7)]


def test_batched_greedy_answers_are_those_of_one_at_a_time(model, tokenizer):
    alone = [generate(model, tokenizer, [prompt], max_new_tokens=12)[0] for prompt in PROMPTS]
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=3) == alone


def test_the_seed_decides_the_sample_and_nothing_else_is_disturbed(model, tokenizer):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = generate(model, tokenizer, PROMPTS, max_new_tokens=8, temperature=1.0, seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert first == generate(model, tokenizer, PROMPTS, max_new_tokens=8, temperature=1.0, seed=1)
    assert first != generate(model, tokenizer, PROMPTS, max_new_tokens=8, temperature=1.0, seed=2)
    assert tokenizer.backend_tokenizer.padding is None  # it would be saved with the tokenizer


def test_an_answer_ends_at_its_end_token(model, tokenizer):
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] *= 0
    answers = generate(model, tokenizer, PROMPTS, max_new_tokens=40, temperature=1.5)
    assert any(answer["ended"] for answer in answers)
    for answer in answers:
        assert answer["tokens"] < 40 if answer["ended"] else answer["tokens"] == 40
        assert "<eos>" not in answer["text"]


@pytest.fixture
def trainer(tiny_model, tmp_path):
    turns = [("Question one?", "A good answer.", "No."), ("Question two?", "Yes indeed, it is so.", "Never mind.")]
    pairs = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": prompt}],
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
            }
            for prompt, chosen, rejected in turns * 2 + turns[:1]
        ]
    )
    args = DPOConfig(
        output_dir=str(tmp_path),
        per_device_eval_batch_size=2,
        dataloader_drop_last=True,
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        report_to="none",
    )
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    return DPOTrainer(str(tiny_model), args=args, train_dataset=pairs, eval_dataset=pairs, processing_class=tokenizer)


def test_log_probs_before_are_the_references_and_after_the_policys(trainer):
    same = preference_logps(trainer, reference=True)
    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(1.5)
    before, after = preference_logps(trainer, reference=True), preference_logps(trainer)
    assert len(after.chosen) == 5  # every pair, whatever dataloader_drop_last says
    np.testing.assert_array_equal(before.chosen, same.chosen)
    batch = trainer.data_collator([trainer.eval_dataset[1]])
    with torch.no_grad():
        logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    token_logps = logits[:, :-1].log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None])[..., 0]
    expected = (token_logps * batch["completion_mask"][:, 1:]).sum(1).numpy()
    np.testing.assert_allclose([after.chosen[1], after.rejected[1]], expected, rtol=1e-5)
    assert after.chosen_tokens[1] == batch["completion_mask"][0].sum()
    assert abs(after.chosen - before.chosen).min() > 0.1


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_log_probs_of_token_ids_are_those_of_the_models_own_logits(batch_size, model):
    sequences = [([5] * 9, [6, 7, 8]), ([9], [10] * 12), ([11, 12], [13]), ([14] * 4, []), ([15, 16], [17])]
    model.train()
    found = answer_logps(model, sequences, temperature=0.5, batch_size=batch_size)
    assert model.training
    model.eval()
    for (prompt, completion), logps in zip(sequences, found, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] / 0.5
        expected = logits.log_softmax(-1).gather(1, torch.tensor(completion, dtype=torch.long)[:, None]).sum()
        assert logps == pytest.approx(expected.item(), abs=1e-4)
    assert (answer_logps(model, sequences, temperature=0) == answer_logps(model, sequences)).all()


VOCABULARY, LONGEST = 7, 2  # tokens: every answer of up to two tokens can be enumerated


@pytest.fixture(params=["all weights", "precomputed", "LoRA", "second LoRA"])
def changed_trainer(request, tmp_path):
    """A trainer of a model with seven tokens, its policy moved away from its start, and the start's log-probs."""
    from peft import LoraConfig, get_peft_model
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "a": 2, "b": 3, "c": 4, "d": 5, "u": 6}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }} {% if m['role'] == 'assistant' %}<eos>{% endif %}{% endfor %}"
    )
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, initializer_range=0.5
    )
    ends = dict(pad_token_id=0, eos_token_id=1, bos_token_id=None)
    LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes, **ends)).save_pretrained(tmp_path / "start")
    prompts = [[{"role": "user", "content": f"{one} {two} u"}] for one in "abcd" for two in "abcd"]
    answers = {"chosen": "a b", "rejected": "d c"}
    pairs = Dataset.from_list(
        [
            {"prompt": p, **{side: [{"role": "assistant", "content": text}] for side, text in answers.items()}}
            for p in prompts
        ]
    )
    args = DPOConfig(
        output_dir=str(tmp_path / "run"),
        precompute_ref_log_probs=request.param == "precomputed",
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        report_to="none",
        model_init_kwargs={"dtype": "float32"} if "LoRA" not in request.param else None,
    )
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    model, peft_config = str(tmp_path / "start"), lora if request.param == "LoRA" else None
    if request.param == "second LoRA":  # an adapter that has been trained: TRL's reference is a copy of it, "ref"
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(model), lora, autocast_adapter_dtype=False)
        move(model, "lora_B", 0.3)
    trainer = DPOTrainer(
        model,
        args=args,
        train_dataset=pairs,
        eval_dataset=pairs,
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    start = logps_of_all_answers(trainer)
    move(trainer.model, "lora_B.default" if "LoRA" in request.param else "", 0.3)
    return trainer, start


@torch.no_grad()
def move(model, part, by):
    torch.manual_seed(8)
    moved = [parameter for name, parameter in model.named_parameters() if part in name]
    assert moved
    for parameter in moved:
        parameter += by * torch.randn_like(parameter)


@torch.no_grad()
def logps_of_all_answers(trainer):
    """Of every answer of up to two tokens to each prompt, under the policy as it is. Shape (prompts, answers)."""
    first, second = (side.flatten() for side in torch.meshgrid(*[torch.arange(VOCABULARY)] * 2, indexing="ij"))
    at_end = first == trainer.processing_class.eos_token_id  # the end token alone is one answer, not seven
    first, second = (torch.cat([side[~at_end], side[at_end][:1]]) for side in (first, second))
    rows = []
    for prompt in trainer.eval_dataset["prompt"]:
        ids = trainer.processing_class.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        both = torch.cat([torch.tensor(ids).expand(len(first), -1), first[:, None], second[:, None]], dim=1)
        logps = trainer.model(both).logits.double().log_softmax(-1)[:, len(ids) - 1 :]
        one, two = (logps[:, at].gather(1, side[:, None])[:, 0] for at, side in enumerate((first, second)))
        rows.append(one + two.masked_fill(first == trainer.processing_class.eos_token_id, 0))
    return torch.stack(rows).numpy()


def test_the_sampled_kl_is_the_exact_one_within_its_standard_error(changed_trainer):
    trainer, start = changed_trainer
    prompts = list(trainer.eval_dataset["prompt"])
    trainer.model.train()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    estimate = sampled_kl(trainer, prompts * 40, max_new_tokens=LONGEST)
    assert torch.equal(torch.rand(3), expected), "the training's random state has moved"
    assert trainer.model.training
    policy = logps_of_all_answers(trainer)
    np.testing.assert_allclose(np.exp(policy).sum(axis=1), 1, atol=1e-6)
    exact = (np.exp(policy) * (policy - start)).sum(axis=1).mean()
    assert estimate["n"] == 640
    assert 640 < estimate["tokens"] <= 640 * LONGEST
    assert 0 < estimate["standard_error"] < exact / 4
    assert estimate["nats"] == pytest.approx(exact, abs=3 * estimate["standard_error"])


def test_log_probs_before_are_the_starts_whatever_holds_it(changed_trainer):
    trainer, _ = changed_trainer
    before = preference_logps(trainer, reference=True)
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad and "ref" not in name:
            parameter.data.normal_()
    np.testing.assert_array_equal(preference_logps(trainer, reference=True).chosen, before.chosen)
    assert abs(preference_logps(trainer).chosen - before.chosen).min() > 1e-3


def test_the_kl_of_a_policy_at_its_start_is_nothing(trainer):
    prompts = list(trainer.eval_dataset["prompt"])
    estimate = sampled_kl(trainer, prompts[:1], max_new_tokens=4)
    assert estimate["nats"] == pytest.approx(0, abs=1e-4)
    assert estimate["standard_error"] is None
    assert estimate["n"] == 1


@pytest.mark.parametrize("settings", [{"beta": 0.0}, {"beta": 0.1, "sync_ref_model": True}], ids=["none", "moving"])
def test_an_online_trainers_start_is_read_again_where_it_keeps_none(settings, tiny_model, tokenizer, tmp_path):
    args = RLOOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=2, temperature=0.5, report_to="none", **settings, **ON_CPU
    )
    rows = Dataset.from_dict({"prompt": PROMPTS})
    trainer = RLOOTrainer(
        str(tiny_model), lambda **_: [0.0] * 2, args=args, train_dataset=rows, processing_class=tokenizer
    )
    still = sampled_kl(trainer, PROMPTS, max_new_tokens=4)
    assert still["nats"] == pytest.approx(0, abs=1e-4)
    for model in filter(None, (trainer.model, trainer.ref_model)):
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    start = AutoModelForCausalLM.from_pretrained(tiny_model)
    ids = torch.tensor([[3, 4, 5, 6]])
    with reference_model(trainer) as reference, torch.no_grad():
        assert torch.equal(reference(ids).logits, start(ids).logits)
        # At the temperature of training, which the policy's log-probs have too.
        logps = reference(ids, labels=ids, fused_lm_head=True).log_probs[0]
        expected = (start(ids).logits[0, :-1] / 0.5).log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        assert torch.allclose(logps.float(), expected, atol=1e-4)
    assert sampled_kl(trainer, PROMPTS, max_new_tokens=4)["nats"] > 0.01


def test_an_initial_model_that_is_read_again_is_not_spread_over_the_cards(tiny_model, monkeypatch):
    """TRL's loader spreads it by default, and the other processes train on these cards."""
    model, given = AutoModelForCausalLM.from_pretrained(tiny_model), {}
    monkeypatch.setattr(likelihood, "load_full", lambda *_, **options: given.update(options) or model)
    accelerator = SimpleNamespace(unwrap_model=lambda one: one, device=torch.device("cpu"))
    args = SimpleNamespace(model_init_kwargs={"dtype": "float32"}, sync_ref_model=False)
    trainer = SimpleNamespace(accelerator=accelerator, model=model, ref_model=None, args=args)
    with reference_model(trainer):
        assert given == {"device_map": None, "dtype": "float32"}


def test_every_end_token_of_the_model_ends_an_answer(tiny_model, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    whole = generate(model, tokenizer, PROMPTS, max_new_tokens=12)
    [(_, tokens), *_] = sample_tokens(model, tokenizer, PROMPTS, max_new_tokens=12)
    assert not whole[0]["ended"]
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokens[5]]
    answer = generate(model, tokenizer, PROMPTS, max_new_tokens=12)[0]
    assert answer["ended"]
    assert answer["tokens"] == tokens.index(tokens[5])


def test_a_prompt_that_fills_the_context_spoils_neither_its_batch_nor_the_kl(trainer, tokenizer):
    long = [{"role": "user", "content": "long " * 500}]
    alone = generate(trainer.model, tokenizer, PROMPTS, max_new_tokens=4)
    assert generate(trainer.model, tokenizer, [long, *PROMPTS], max_new_tokens=4)[1:] == alone
    assert sampled_kl(trainer, [long, *PROMPTS], max_new_tokens=4)["n"] == len(PROMPTS)


def test_a_long_prompt_cuts_no_answer_of_its_batch(model, tokenizer):
    """One that leaves room for four tokens, among others whose answers have up to twelve."""
    context = model.config.max_position_embeddings
    [(empty, _)] = sample_tokens(model, tokenizer, [[{"role": "user", "content": ""}]], max_new_tokens=1)
    word = tokenizer(" a", add_special_tokens=False)["input_ids"]
    long = [{"role": "user", "content": " a" * ((context - 4 - len(empty)) // len(word))}]
    alone = sample_tokens(model, tokenizer, PROMPTS, max_new_tokens=12)
    assert max(len(answer) for _, answer in alone) == 12
    (prompt, answer), *others = sample_tokens(model, tokenizer, [long, *PROMPTS], max_new_tokens=12)
    assert len(prompt) + len(answer) <= context
    assert 0 < len(answer) < 12
    assert others == alone


def test_wins_by_length_alone_are_a_coins_at_equal_length():
    rng = np.random.default_rng(0)
    rates = []
    for _ in range(20):
        longer = rng.normal(20, 15, 200)
        won = (rng.random(200) < 1 / (1 + np.exp(-2.5 * np.tanh(longer / longer.std())))).astype(float)
        rates.append((won.mean(), length_controlled(won, longer)))
    raw, controlled = np.mean(rates, axis=0)
    assert raw > 0.75
    assert controlled == pytest.approx(0.5, abs=0.03)


def test_an_answer_ends_where_the_models_positions_do(tokenizer):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=1, n_head=2)
    prompts = [[{"role": "user", "content": "a" * letters}] for letters in (4, 40, 45, 60)]
    config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
    answers = generate(GPT2LMHeadModel(config), tokenizer, prompts, max_new_tokens=100, batch_size=1)
    lengths = [len(tokenizer.apply_chat_template(p, add_generation_prompt=True)["input_ids"]) for p in prompts]
    assert lengths[3] > 64
    for length, answer in zip(lengths, answers, strict=True):
        assert answer["ended"] or length + answer["tokens"] == max(64, length)


def test_text_that_goes_on_keeps_the_space_that_sentencepiece_puts_into_its_first_token(tiny_model):
    words = {token: number for number, token in enumerate(["<unk>", "<eos>", "▁Once", "▁upon", "▁a", "▁time", "s"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>")
    model = AutoModelForCausalLM.from_pretrained(tiny_model)  # whose end token is 1, too
    assert tokenizer.decode([4, 5]) == "a time", "alone it is lost"
    told = read_answer(model, tokenizer, "Once upon", ([2, 3], [4, 5, 1]))
    assert told == {"text": " a time", "tokens": 2, "ended": True}
    assert read_answer(model, tokenizer, "Once upon a time", ([2, 3, 4, 5], [6])) == {
        "text": "s",
        "tokens": 1,
        "ended": False,
    }
