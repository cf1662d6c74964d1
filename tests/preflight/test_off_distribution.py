"""How far completions are from what the model would write, against the model's own logits."""

import json
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_recipes.cli import main
from dpo_recipes.doctor.miniature import CHAT_TEMPLATE
from dpo_recipes.preflight import off_distribution
from dpo_recipes.preflight.off_distribution import measure


def pair(prompt, chosen, rejected):
    speakers = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    texts = zip(speakers.items(), (prompt, chosen, rejected), strict=True)
    return {side: [{"role": role, "content": content}] for (side, role), content in texts}


ROWS = [pair(f"Question {n}?" * (1 + n % 4), f"Gladly: {n}." * (1 + n % 5), "No, thank you.") for n in range(23)]
PAIRS = DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS[:1]))


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


def by_hand(model, tokenizer, row, side):
    """Mean log-prob and mean entropy of the completion's tokens, from the logits of one sequence."""
    assert tokenizer.chat_template == CHAT_TEMPLATE
    prompt = len(tokenizer(f"User: {row['prompt'][0]['content']}\nBot:")["input_ids"])
    ids = tokenizer(f"User: {row['prompt'][0]['content']}\nBot: {row[side][0]['content']}<eos>", return_tensors="pt")
    with torch.no_grad():
        logps = model(**ids).logits[0, prompt - 1 : -1].log_softmax(dim=-1)
    own = logps.gather(1, ids["input_ids"][0, prompt:, None]).mean()
    return float(own), float(-(logps.exp() * logps).sum(dim=1).mean())


def test_quantiles_are_those_of_the_models_own_logits(tiny_model, tokenizer, monkeypatch):
    monkeypatch.setattr(off_distribution, "_BATCH", 4)
    measured = measure(PAIRS, str(tiny_model), tokenizer)
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    numbers = {
        side: np.array([by_hand(model, tokenizer, row, side) for row in ROWS]) for side in ("chosen", "rejected")
    }
    assert measured["n"] == len(ROWS)
    for side, of_side in numbers.items():
        surplus = -of_side[:, 0] - of_side[:, 1]
        for name, values in (("logp_per_token", of_side[:, 0]), ("surplus", surplus)):
            expected = {f"p{place}": np.percentile(values, place) for place in (5, 50, 95)}
            assert measured[side][name] == pytest.approx(expected, abs=1e-5)
        assert measured[side]["far"] == (surplus >= 1).mean()
    assert measured["agrees"] == (numbers["chosen"][:, 0] > numbers["rejected"][:, 0]).mean()
    worst = np.argsort(numbers["rejected"].sum(axis=1))[:5]
    assert set(measured["rows"]) == {f"row {row + 1}" for row in worst}


def peaked(tiny_model, folder):
    """A copy of the tiny model that is sure of what it writes; no such text is in the pairs."""
    shutil.copytree(tiny_model, folder)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        model.get_output_embeddings().weight *= 40
    model.save_pretrained(folder)
    return folder


def test_a_model_that_is_sure_of_other_words_would_never_write_them(tiny_model, tokenizer, tmp_path):
    flat = measure(PAIRS, str(tiny_model), tokenizer)
    assert flat["rejected"]["far"] == flat["chosen"]["far"] == 0, "a random model expects anything"
    assert measure(PAIRS, str(peaked(tiny_model, tmp_path / "model")), tokenizer)["rejected"]["far"] == 1


def test_the_sample_is_drawn_by_its_seed(tiny_model, tokenizer, monkeypatch):
    monkeypatch.setattr(off_distribution, "_SAMPLE", 6)
    drawn = [measure(PAIRS, str(tiny_model), tokenizer, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0]["n"] == 6
    assert set(drawn[0]["rows"]) <= {f"row {row + 1}" for row in range(len(ROWS))}


def test_it_is_asked_for_by_with_model(tiny_model, hh_rows, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = str(peaked(tiny_model, tmp_path / "model"))
    words = ["inspect", str(hh_rows), "--model_name_or_path", model, "--with_model", "true", "--output_dir", "out"]
    assert main(words) == 0
    data = json.loads((tmp_path / "out" / "preflight.json").read_text())
    assert data["off_distribution"]["rejected"]["far"] == 1
    assert "off_distribution" in {finding["name"] for finding in data["findings"]}
    assert "Warning (off_distribution): 100% of the rejected answers" in capsys.readouterr().out
    assert "Likelihood of the completions" in (tmp_path / "out" / "preflight.html").read_text()
