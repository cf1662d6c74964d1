"""A reward model is fed as TRL feeds it, and one that cannot score is refused in words."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
)
from trl import RewardConfig, RewardTrainer, RLOOConfig, RLOOTrainer

from dpo_recipes.doctor.miniature import CHAT_TEMPLATE
from dpo_recipes.errors import RecipeError
from dpo_recipes.models.likelihood import pair_scores
from dpo_recipes.models.rewards import calibration, check_reloads, check_reward_model, load_reward_model, score

ON_CPU = dict(use_cpu=True, bf16=False, activation_checkpointing=False, report_to="none", disable_tqdm=True)


def says(role, text):
    return [{"role": role, "content": text}]


PROMPTS = [says("user", "Hi?"), says("user", "How are the rivers today?"), says("system", "Be brief.")]
PROMPTS[2] = PROMPTS[2] + says("user", "Name one.")
ANSWERS = [says("assistant", "Ho."), says("assistant", "High, after a week of rain."), says("assistant", "The Elbe.")]
OTHERS = [says("assistant", "No."), says("assistant", "Wet."), says("assistant", "I know many, but I shall not tell.")]


def test_scores_are_those_of_the_pairs_as_reward_trainer_tokenises_them(reward_model, tmp_path):
    model, tokenizer = load_reward_model(str(reward_model))
    pairs = Dataset.from_dict({"prompt": PROMPTS, "chosen": ANSWERS, "rejected": OTHERS})
    args = RewardConfig(output_dir=str(tmp_path), per_device_eval_batch_size=2, **ON_CPU)
    trainer = RewardTrainer(model=model, args=args, train_dataset=pairs, eval_dataset=pairs, processing_class=tokenizer)
    chosen, rejected = pair_scores(trainer)
    assert score(model, tokenizer, PROMPTS, ANSWERS) == pytest.approx(chosen, abs=1e-5)
    assert score(model, tokenizer, PROMPTS, OTHERS) == pytest.approx(rejected, abs=1e-5)
    assert np.abs(chosen - rejected).min() > 1e-3


@pytest.mark.parametrize("as_text", [False, True], ids=["conversations", "plain text"])
def test_scores_are_those_that_an_online_trainer_gives(as_text, reward_model, tiny_model, tmp_path):
    prompts, answers = (PROMPTS, ANSWERS) if not as_text else (["Once ", "A tree"], ["upon a time.", " stands."])
    args = RLOOConfig(output_dir=str(tmp_path), per_device_train_batch_size=2, **ON_CPU)
    rows = Dataset.from_dict({"prompt": prompts})
    trainer = RLOOTrainer(str(tiny_model), str(reward_model), args=args, train_dataset=rows)
    theirs = trainer._calculate_rewards([{"prompt": prompt} for prompt in prompts], prompts, answers, None)
    ours = score(*load_reward_model(str(reward_model)), prompts, answers)
    assert ours == pytest.approx(theirs[:, 0].numpy(), abs=1e-5)
    assert np.ptp(ours) > 1e-3


def test_scores_keep_the_order_of_the_completions_whatever_the_batches(reward_model):
    model, tokenizer = load_reward_model(str(reward_model))
    alone = [score(model, tokenizer, [prompt], [answer])[0] for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    texts = [answer[0]["content"] for answer in ANSWERS]  # plain text is an assistant's turn
    for batch_size in (1, 2, 16):
        assert score(model, tokenizer, PROMPTS, texts, batch_size=batch_size) == pytest.approx(alone, abs=1e-5)


def test_of_a_text_beyond_the_positions_the_first_token_and_the_last_ones_are_read(reward_model, capsys):
    tokenizer = AutoTokenizer.from_pretrained(reward_model)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=24, n_embd=16, n_layer=1, n_head=2, num_labels=1, pad_token_id=0
    )
    model = GPT2ForSequenceClassification(config).eval()
    texts = ["Short.", "A text of thirty-six letters, or so."]
    scores = score(model, tokenizer, ["", ""], texts)
    for text, scored in zip(texts, scores, strict=True):
        ids = tokenizer(text)["input_ids"]
        ids = ids if len(ids) <= 24 else ids[:1] + ids[-23:]
        with torch.no_grad():
            assert model(torch.tensor([ids])).logits.item() == pytest.approx(scored, abs=1e-5)
    assert "1 of 2 texts have more than the 24 tokens that their judge reads" in capsys.readouterr().out


def test_the_mode_of_the_model_is_left_alone(reward_model):
    model, tokenizer = load_reward_model(str(reward_model))
    score(model.train(), tokenizer, PROMPTS, ANSWERS)
    assert model.training


NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"


@pytest.mark.parametrize(
    ("config", "tokenizer", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, {}, "is a LlamaForCausalLM, which has no score head"),
        ({"num_labels": 3}, {}, "has 3 outputs, where a reward model has one score"),
        ({"vocab_size": 100}, {}, "token ids up to 257, but its embedding has 100 rows"),
        ({"max_position_embeddings": 50}, {}, "takes 50 tokens, but the longest prompt has 40 of its tokens"),
        ({}, {"chat_template": None}, "has no chat template, but the prompts are conversations"),
        ({}, {"chat_template": NO_SYSTEM}, "refuses conversations of system, user, assistant: no system"),
        ({}, {"pad_token": None, "eos_token": None}, "neither a pad nor an EOS token"),
    ],
    ids=["causal", "outputs", "vocabulary", "context", "no template", "template refuses", "no pad"],
)
def test_what_cannot_score_is_refused(config, tokenizer, message, reward_model):
    parts = AutoConfig.from_pretrained(reward_model), AutoTokenizer.from_pretrained(reward_model)
    check_reward_model(*parts, PROMPTS, max_completion_length=20)
    for part, changes in zip(parts, (config, tokenizer), strict=True):
        for name, value in changes.items():
            setattr(part, name, value)
    with pytest.raises(RecipeError, match=message):
        check_reward_model(*parts, PROMPTS, max_completion_length=20)


def test_a_model_in_memory_is_checked_as_its_configuration_is(reward_model, tiny_model):
    model, tokenizer = load_reward_model(str(reward_model))
    check_reward_model(model, tokenizer, PROMPTS)
    headless = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
    with pytest.raises(RecipeError, match="which has no score head"):
        check_reward_model(headless, tokenizer, PROMPTS)


def test_plain_text_needs_no_chat_template(reward_model):
    config, tokenizer = AutoConfig.from_pretrained(reward_model), AutoTokenizer.from_pretrained(reward_model)
    tokenizer.chat_template = None
    check_reward_model(config, tokenizer, ["Once upon a time", "A tree"])


@pytest.mark.parametrize(
    ("name", "message"),
    [("nowhere", "Cannot load the reward model nowhere"), (None, "is a LlamaForCausalLM, which has no score head")],
)
def test_what_is_no_reward_model_is_not_loaded(name, message, tiny_model):
    with pytest.raises(RecipeError, match=message):
        load_reward_model(name or str(tiny_model))


def test_a_head_that_was_not_kept_is_found_out(reward_model):
    model, tokenizer = load_reward_model(str(reward_model))
    assert tokenizer.chat_template == CHAT_TEMPLATE
    probe = dict(tokenizer(["Bot: one", "Bot: two"], return_tensors="pt", return_token_type_ids=False))
    check_reloads(str(reward_model), model, probe)
    with torch.no_grad():
        model.score.weight += 0.1
    with pytest.raises(RuntimeError, match="scores a batch differently"):
        check_reloads(str(reward_model), model, probe)


def test_calibration_by_hand():
    margins = np.log(np.array([0.6 / 0.4, 0.6 / 0.4, 0.9 / 0.1])) * np.array([1, -1, 1])
    fit = calibration(margins, bins=5)
    assert fit["log_loss"] == pytest.approx(-np.log([0.6, 0.4, 0.9]).mean())
    assert fit["brier"] == pytest.approx(np.mean([0.4**2, 0.6**2, 0.1**2]))
    # Two pairs said to be right with 0.6 are so by half; one with 0.9 is right.
    rows = [(row["n"], row["said"], row["right"]) for row in fit["reliability"]]
    assert rows == [(2, pytest.approx(0.6), 0.5), (1, pytest.approx(0.9), 1.0)]
    assert fit["expected_calibration_error"] == pytest.approx((2 * 0.1 + 1 * 0.1) / 3)


def test_a_perfectly_calibrated_model_has_a_small_error():
    random = np.random.default_rng(0)
    margins = random.normal(0, 2, 20_000)
    margins *= np.where(random.random(20_000) < 1 / (1 + np.exp(-np.abs(margins))), 1, -1) * np.sign(margins)
    assert calibration(margins)["expected_calibration_error"] < 0.02
    assert calibration(5 * margins)["expected_calibration_error"] > 0.1


def test_equal_scores_are_half_right():
    fit = calibration(np.zeros(4))
    assert (fit["log_loss"], fit["brier"]) == (pytest.approx(np.log(2)), 0.25)
    assert fit["expected_calibration_error"] == 0
    assert [row["n"] for row in fit["reliability"]] == [4]
