"""The sentiment task of the DPO paper: reviews, pairs of a model's own texts that a classifier ranks, and a comparison.

GPT-2-large, IMDb and the classifier are on the hub: here a GPT-2 of random weights, a classifier of random weights and
reviews written for these tests take their places.
"""

import json
import math
import re
from itertools import combinations
from pathlib import Path

import pytest
import torch
from commands import RECIPES, REPOSITORY, run_command, run_train
from datasets import Dataset
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from dpo_recipes.cli import main
from dpo_recipes.dataset_adapters import plain_text, recognise
from dpo_recipes.dataset_adapters.ledger import Ledger
from dpo_recipes.errors import RecipeError
from dpo_recipes.loading import load_rows
from dpo_recipes.models import rewards
from dpo_recipes.models.generation import generate
from dpo_recipes.recipe import RecipeArguments

REVIEWS = Path(__file__).parents[1] / "fixtures" / "imdb.jsonl"
PREFIXES = ["This film", "The cat, who has no lines,", "My"]
SMALL = ["--pairs_per_update", "4", "--per_device_train_batch_size", "4", "--eval_pairs", "4", "--logging_steps", "1"]
SMALL += ["--warmup_steps", "0", "--max_steps", "4"]


@pytest.fixture(scope="module")
def gpt2(tiny_model, tmp_path_factory):
    """A folder with a GPT-2 of random weights; as GPT-2's own, its tokenizer has no pad token and no chat template."""
    folder = tmp_path_factory.mktemp("gpt2") / "model"
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    ids = dict(bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=512, n_embd=64, n_layer=2, n_head=4, **ids)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def classifier(tiny_model, tmp_path_factory):
    """A folder with a RoBERTa of random weights and two labels, whose tokenizer puts <s> and </s> around a text."""
    folder = tmp_path_factory.mktemp("classifier") / "model"
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = None
    tokenizer.add_special_tokens({"cls_token": "<s>", "sep_token": "</s>"})
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    sizes = dict(
        initializer_range=0.6, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    names = {0: "NEGATIVE", 1: "POSITIVE"}
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=258,
        pad_token_id=tokenizer.pad_token_id,
        id2label=names,
        **sizes,
    )
    RobertaForSequenceClassification(config).save_pretrained(folder)
    return folder


def positive(classifier, text):
    """The probability of POSITIVE by plain transformers, one text at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    inputs = AutoTokenizer.from_pretrained(classifier)(text, return_tensors="pt", return_token_type_ids=False)
    assert inputs["input_ids"][0, 0] == 258, "the special token in front, which the score is read from"
    with torch.no_grad():
        return model(**inputs).logits.softmax(dim=1)[0, 1].item()


def read(file):
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


# ------------------------------------------------------------------------------------- the classifier


def test_the_score_of_a_classifier_is_the_probability_of_positive(classifier):
    texts = [" was long.", " was a joy, and I shall see it again.", ""]
    expected = [positive(classifier, prefix + text) for prefix, text in zip(PREFIXES, texts, strict=True)]
    found = rewards.model_judge(classifier)(PREFIXES, texts)
    assert found == pytest.approx(expected, abs=1e-5)
    assert max(found) - min(found) > 0.01


def test_the_label_is_found_by_its_name_whatever_its_place(classifier):
    model, tokenizer = rewards.load_reward_model(str(classifier), labels=(1, 2))
    before = rewards.score(model, tokenizer, PREFIXES, ["."] * 3)
    model.config.id2label = {0: "Positive", 1: "Negative"}
    assert rewards.score(model, tokenizer, PREFIXES, ["."] * 3) == pytest.approx(1 - before)


def test_two_labels_are_no_reward_model_for_trl_and_three_are_none_at_all(classifier, tmp_path):
    with pytest.raises(RecipeError, match="has 2 outputs, where a reward model has one score"):
        rewards.load_reward_model(str(classifier))
    config, tokenizer = rewards.read_reward_config(str(classifier))
    config.num_labels = 3
    with pytest.raises(RecipeError, match="has 3 outputs"):
        rewards.check_reward_model(config, tokenizer, [], labels=(1, 2))


def test_the_reward_function_of_the_page_gives_trl_the_same_scores(classifier):
    page = (REPOSITORY / "docs" / "imdb_sentiment.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    namespace = {}
    exec(code.replace("siebert/sentiment-roberta-large-english", str(classifier)), namespace)
    given = dict(prompts=PREFIXES, completions=[" was long."] * 3, completion_ids=[[1]] * 3, log_metric=None)  # by TRL
    found = namespace["positive"](**given)
    assert found == pytest.approx(rewards.model_judge(classifier)(PREFIXES, [" was long."] * 3))


# ----------------------------------------------------------------------------------------- plain text


def test_plain_text_is_gone_on_with_as_it_stands(gpt2):
    """The tokens of a batch are those that plain transformers give each text alone, white space included."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(gpt2).eval(), AutoTokenizer.from_pretrained(gpt2)
    alone = []
    for prefix in PREFIXES:
        ids = tokenizer(prefix, return_tensors="pt", return_token_type_ids=False)
        width = ids["input_ids"].shape[1]
        given = model.generate(**ids, max_new_tokens=12, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        alone.append(tokenizer.decode(given[0, width:], skip_special_tokens=True))
    tokenizer.pad_token = tokenizer.eos_token
    assert [answer["text"] for answer in generate(model, tokenizer, PREFIXES, max_new_tokens=12)] == alone
    sampled = generate(model, tokenizer, PREFIXES * 100, max_new_tokens=1, temperature=1.0)
    assert any(answer["text"] in (" ", "\n", "\t") for answer in sampled), "white space is a part of the text"


def test_pairs_of_plain_text_stay_text_and_are_counted():
    rows = [{"prompt": "This", "chosen": " film.", "rejected": " one.", "margin": 0.5, "other": 1}]
    rows += [{**rows[0], "rejected": " film. "}, {**rows[0], "prompt": None}]
    with Ledger() as ledger:
        pairs = plain_text(Dataset.from_list(rows))
    assert pairs.to_list() == [{"prompt": "This", "chosen": " film.", "rejected": " one.", "margin": 0.5}]
    dropped = {reason: drop.count for reason, drop in ledger.total().dropped.items()}
    assert dropped == {"identical_completions": 1, "missing_value": 1}
    with pytest.raises(RecipeError, match=r"plain_text reads text, and \['prompt'\] hold something else"):
        plain_text(Dataset.from_list([{**rows[0], "prompt": [{"role": "user", "content": "This"}]}]))


# -------------------------------------------------------------------------------------- pairs of its own


def sample(model, *flags, columns="prompt=text"):
    return main(["sample", str(model), "--dataset_name", str(REVIEWS), "--columns", columns, *map(str, flags)])


@pytest.fixture(scope="module")
def pairs(gpt2, classifier, tmp_path_factory):
    """The file of pairs that the command of docs/imdb_sentiment.md writes, of the untrained model."""
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    flags = ["--first_words", 2, 8, "--num_samples", 4, "--max_new_tokens", 16, "--judge", classifier, "--output", file]
    assert sample(gpt2, *flags) == 0
    return file


@pytest.mark.slow
def test_every_two_texts_make_a_pair_ranked_by_the_classifier(pairs, classifier):
    lines = read(pairs)
    reviews = [" ".join(row["text"].split()) for row in read(REVIEWS)]
    prompts = {line["prompt"] for line in lines}
    assert {2, 8} <= {len(prompt.split()) for prompt in prompts} <= set(range(2, 9))
    assert all(any(review.startswith(prompt) for review in reviews) for prompt in prompts)
    sizes = []
    for prompt in prompts:
        own = [line for line in lines if line["prompt"] == prompt]
        texts = {line[side] for line in own for side in ("chosen", "rejected")}
        sizes.append(len(own))
        assert len(own) == len(list(combinations(texts, 2)))
        scores = {text: positive(classifier, prompt + text) for text in texts}
        for line in own:
            difference = scores[line["chosen"]] - scores[line["rejected"]]
            assert 0 < line["preference_strength"] == pytest.approx(difference, abs=1e-5)
    assert sizes.count(6) > 0.9 * len(sizes), "a blank text is left out"


def test_a_reward_model_ranks_answers_of_a_chat_model_too(tiny_model, reward_model, tmp_path, capsys):
    file = tmp_path / "pairs.jsonl"
    flags = ["--num_samples", 2, "--max_new_tokens", 4, "--judge", reward_model, "--output", file]
    assert sample(tiny_model, *flags) == 0
    said = re.search(
        r"^(\d+) pairs, and left out:\n  a blank completion +-(\d+)$", capsys.readouterr().out, re.MULTILINE
    )
    rows = load_rows(RecipeArguments(dataset_name=str(file)))["train"]
    assert recognise(rows).__name__ == "preference_jsonl"
    written = recognise(rows)(rows)
    assert len(written) == int(said[1]) == 60 - int(said[2]) > 50
    scored = [
        rewards.score(*rewards.load_reward_model(str(reward_model)), written["prompt"][:], written[side][:])
        for side in ("chosen", "rejected")
    ]
    assert (scored[0] - scored[1] > 0).all()


def test_a_call_that_makes_no_sense_is_refused_before_a_model_is_loaded(classifier, tiny_model, capsys):
    for flags, message in (
        (["--judge", classifier], "which needs two or more: --num_samples 4"),
        (["--judge", classifier, "--pairs"], "leave out --judge and --first_words"),
        (["--first_words", 2, 8, "--pairs"], "leave out --judge and --first_words"),
        (["--judge", tiny_model, "--num_samples", 2], "is a LlamaForCausalLM, which has no score head"),
        (["--judge", classifier, "--num_samples", 2], "has no chat template, but the prompts are conversations"),
    ):
        assert sample("no model", *flags) == 2
        assert message in capsys.readouterr().err


# --------------------------------------------------------------------------------------------- recipes


def code_of(name):
    return (RECIPES / f"{name}.py").read_text().partition("\ndef load_pairs")[2]


@pytest.mark.parametrize("kind", ["lora", "reward", "ppo"])
def test_the_recipes_have_the_code_of_those_for_hh_rlhf(kind):
    code = code_of(f"hh_rlhf_{kind}")
    assert len(code) > 500
    assert code_of(f"imdb_sentiment_{kind}") == code.replace("hh_rlhf(rows)", "plain_text(rows)")


def test_reviews_are_no_pairs_to_inspect(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["inspect", "imdb-sentiment-sft", "--profile", "cpu"])
    assert "imdb-sentiment-sft learns from prompts alone" in capsys.readouterr().err


def losses_of(run):
    [state] = run.glob("checkpoint-*/trainer_state.json")
    history = json.loads(state.read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def train(folder, name, *flags):
    command = [f"imdb-sentiment-{name}", "--profile", "cpu", "--output_dir", "run", *SMALL, *flags]
    result = run_train(*command, cwd=folder)
    assert result.returncode == 0, result.stdout + result.stderr
    run = folder / "run"
    losses = losses_of(run)
    assert len(losses) == 4
    assert all(map(math.isfinite, losses))
    assert json.loads((run / "done.json").read_text())["data_hash"]
    return result.stdout, run, losses


@pytest.mark.slow
def test_sft_learns_reviews_whole_and_leaves_a_full_model(gpt2, tmp_path):
    flags = ["--dataset_name", REVIEWS, "--model_name_or_path", gpt2, "--max_length", "160"]
    output, run, losses = train(tmp_path, "sft", *flags)
    assert "Data account (max_length 160 tokens)" in output
    assert losses[-1] < losses[0]
    tokenizer = AutoTokenizer.from_pretrained(gpt2)
    kept = [row for row in read(REVIEWS) if len(tokenizer(row["text"])["input_ids"]) < 160]  # and the end token
    account = json.loads((run / "preflight.json").read_text())["total"]
    assert account["dropped"]["text_too_long"]["count"] == account["rows"] - len(kept) > 0
    weights, start = (load_file(folder / "model.safetensors") for folder in (run, gpt2))
    assert {key for key in start if not torch.equal(start[key], weights[key])} == {
        key for key in start if ".c_" in key and key.endswith("weight")
    }
    assert (run / "tokenizer.json").exists()


@pytest.mark.slow
def test_dpo_starts_at_ln_2_and_goes_on_with_the_text(gpt2, pairs, tmp_path):
    flags = ["--dataset_name", pairs, "--model_name_or_path", gpt2, "--learning_rate", "1e-3"]
    _, run, losses = train(tmp_path, "lora", *flags)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    weights = load_file(run / "adapter_model.safetensors")
    assert len(weights) == 2 * 2 * 4  # of two layers the four projections, two matrices each
    assert all(weight.abs().sum() > 0 for weight in weights.values())
    asked = {line["prompt"] for line in read(run / "samples.jsonl")}
    assert asked
    assert asked <= {line["prompt"] for line in read(pairs)}


def test_a_judge_that_cannot_be_had_is_known_before_anything_is_trained(gpt2, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["dpo-recipes"])
    with pytest.raises(SystemExit, match="2"):  # the recipe's own is on the hub
        main(["compare", "imdb-sentiment-lora", "--profile", "cpu", "--model_name_or_path", str(gpt2)])
    assert "Cannot load the reward model siebert/sentiment-roberta-large-english" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_comparison_trains_all_and_is_judged_by_the_classifier(gpt2, classifier, pairs, tmp_path, dpo_recipes):
    tiny = {"pairs_per_update": 4, "per_device_train_batch_size": 4, "warmup_steps": 0, "max_completion_length": 8}
    tiny |= {"generation_batch_size": 8, "num_iterations": 2, "dpo.max_steps": 2, "reward.max_steps": 2}
    tiny["logging_steps"] = 1
    words = [word for key, value in tiny.items() for word in (f"--{key}", str(value))]
    call = ["compare", "imdb-sentiment-lora", "--profile", "cpu", "--quick", "--prompts", "12", "--output_dir", "out"]
    call += ["--dataset_name", "pairs", "--model_name_or_path", gpt2, *words]
    held_out = sorted({line["prompt"] for line in read(pairs)})[::4]
    (tmp_path / "pairs").mkdir()
    for split in ("train", "test"):
        lines = [
            line
            for line in pairs.read_text().splitlines()
            if (json.loads(line)["prompt"] in held_out) == (split == "test")
        ]
        (tmp_path / "pairs" / f"{split}.jsonl").write_text("\n".join(lines))
    result = run_command(dpo_recipes, *call, "--judge", classifier, cwd=tmp_path, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["prompts"] == 12
    assert [model["label"] for model in results["models"]] == ["SFT", "DPO, beta 0.1", "PPO, beta 0.1"]
    assert results["judge"]["name"] == str(classifier)
    assert all(check["held"] for check in results["fairness"]), results["fairness"]
    assert set(results["reward_accuracy"]) == {"reward-0"}, "no judge was trained"
    for name in ("dpo-0.1-0", "reward-0", "ppo-0.1-0"):
        losses = losses_of(tmp_path / "out" / name)
        assert losses
        assert all(map(math.isfinite, losses))
    shown = results["samples"][0]
    records = {
        each["run"]: each for each in read(tmp_path / "out" / "records.jsonl") if each["prompt"] == shown["number"]
    }
    raised = rewards.model_judge(tmp_path / "out" / "reward-0")([shown["prompt"]], [records["ppo-0.1-0"]["text"]])
    assert raised == pytest.approx(records["ppo-0.1-0"]["reward_model"], abs=1e-4)
    for answer in shown["answers"]:
        assert answer["judge"] == pytest.approx(positive(classifier, shown["prompt"] + answer["text"]), abs=1e-5)
    assert str(classifier) in (tmp_path / "out" / "report.md").read_text()
