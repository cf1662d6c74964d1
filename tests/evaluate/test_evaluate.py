"""Evaluation of a tuned model: its numbers equal a direct computation, and its words follow from the numbers."""

import io
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from hostile_pages import Page
from judge_server import Server
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from scipy.stats import binomtest
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from dpo_recipes.cli import main
from dpo_recipes.dataset_adapters import as_messages
from dpo_recipes.estimates import Estimate, wilson
from dpo_recipes.evaluate.results import verdict
from dpo_recipes.loading import split_pairs
from dpo_recipes.models.pair_ids import encode_pairs
from dpo_recipes.preflight.tokens import render

JUDGE = '''"""A judge of one's own."""


def whim(prompt, answer):
    """A score from 0 to 3 that depends on every character."""
    assert prompt[-1]["role"] == "user"
    return sum(map(ord, answer)) % 4
'''


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A folder of pairs in hh-rlhf's schema, 40 of them held out, chosen of every length beside rejected."""
    folder = tmp_path_factory.mktemp("rows")
    for split, first, count in (("train", 0, 10), ("test", 100, 40)):
        with (folder / f"{split}.jsonl").open("w") as file:
            for number in range(first, first + count):
                context = f"\n\nHuman: Question {number}?\n\nAssistant:"
                good, bad = "Yes" + " indeed" * (number % 5), "No" + " never" * (number % 3)
                good, bad = ("Yes I do", "No never") if number % 4 == 0 else (good, bad)
                file.write(json.dumps({"chosen": f"{context} {good}.", "rejected": f"{context} {bad}."}) + "\n")
    return folder


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory):
    """A run's folder: a LoRA adapter that has moved, and its settings."""
    folder = tmp_path_factory.mktemp("run") / "run"
    torch.manual_seed(3)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), lora)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    (folder / "settings.json").write_text(json.dumps({"model_name_or_path": str(tiny_model), "beta": 0.5}))
    (folder / "done.json").write_text("{}")
    (folder / "README.md").write_text("# run\n")
    return folder


@pytest.fixture
def call(rows, tmp_path, monkeypatch):
    """Evaluates a model in an empty folder, and returns the exit status."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(JUDGE)

    def evaluated(model, *flags):
        try:
            return main(["evaluate", str(model), "--dataset_name", str(rows), "--max_new_tokens", "16", *flags])
        except SystemExit as end:
            return end.code

    return evaluated


@torch.no_grad()
def direct(model, tokenizer, rows):
    """Summed log-probs and tokens of the held-out completions, a pair at a time. Each has shape (pairs,)."""
    found = []
    for line in (rows / "test.jsonl").read_text().splitlines():
        context, *answers = [json.loads(line)[side] for side in ("chosen", "rejected")]
        question = context.split("\n\n")[1].removeprefix("Human: ")
        sides = [text.split("Assistant: ")[1] for text in (context, *answers)]
        pair = [[{"role": "user", "content": question}], *([{"role": "assistant", "content": text}] for text in sides)]
        [ids] = encode_pairs([render(*pair, tokenizer=tokenizer)], tokenizer)
        both = []
        for completion in (ids.chosen, ids.rejected):
            whole = torch.tensor([ids.prompt + completion])
            logps = model(whole).logits[0, :-1].double().log_softmax(-1).gather(1, whole[0, 1:, None])[:, 0]
            both += [logps[len(ids.prompt) - 1 :].sum().item(), len(completion)]
        found.append(both)
    return np.array(found).T


def test_every_number_of_the_held_out_pairs_is_that_of_a_direct_computation(call, run, rows, tiny_model, capsys):
    assert call(run, "--judge", "mine.py:whim", "--prompts", "30") == 0
    told = capsys.readouterr().out
    results = json.loads((run / "eval.json").read_text())
    base, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    chosen, c_tokens, rejected, r_tokens = direct(base, tokenizer, rows)
    base.load_adapter(str(run))
    new_chosen, _, new_rejected, _ = direct(base, tokenizer, rows)
    gained = (new_chosen - chosen) - (new_rejected - rejected)
    assert abs(gained).min() > 1e-3

    def same(found, right):
        interval = binomtest(int(right.sum()), len(right)).proportion_ci(method="wilson")
        expected = (right.mean(), interval.low, interval.high, len(right))
        assert tuple(found[key] for key in ("mean", "low", "high", "n")) == pytest.approx(expected, abs=1e-6)

    strata = {"all": c_tokens > 0, "chosen longer": c_tokens > 1.1 * r_tokens}
    strata["chosen shorter"] = r_tokens > 1.1 * c_tokens
    strata["about as long"] = ~strata["chosen longer"] & ~strata["chosen shorter"]
    assert all(members.any() for members in strata.values())
    assert results["pairs"] == 40
    for stratum, members in strata.items():
        kinds = results["preference_accuracy"][stratum]
        same(kinds["summed"]["before"], (chosen > rejected)[members])
        same(kinds["summed"]["after"], (new_chosen > new_rejected)[members])
        same(kinds["per token"]["after"], (new_chosen / c_tokens > new_rejected / r_tokens)[members])
        same(kinds["implicit reward"]["after"], (gained > 0)[members])
        assert "before" not in kinds["implicit reward"]
    assert results["calibration"]["log_loss"] == pytest.approx(np.logaddexp(0, -0.5 * gained).mean(), rel=1e-4)
    for side, logps in (("before", chosen), ("after", new_chosen)):
        expected = math.exp(-logps.sum() / c_tokens.sum())
        assert results["perplexity"][side]["mean"] == pytest.approx(expected, rel=1e-4)

    answers = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]
    assert len(answers) == results["prompts"] == 30
    whims = [[sum(map(ord, row[side]["text"])) % 4 for row in answers] for side in ("before", "after")]
    won = [(np.sign(new - old) + 1) / 2 for old, new in zip(*whims, strict=True)]
    assert len(set(won)) == 3
    assert won == [row["won"] for row in answers]
    assert results["win_rate"]["mean"] == pytest.approx(np.mean(won))
    assert results["ties"]["mean"] == pytest.approx(won.count(0.5) / 30)
    assert 0 <= results["length_controlled"]["low"] <= results["length_controlled"]["high"] <= 1
    gaps = [row["after"]["policy"] - row["after"]["start"] for row in answers]
    assert results["measures"]["kl"]["after"]["mean"] == pytest.approx(np.mean(gaps))
    assert results["kl_standard_error"] == pytest.approx(np.std(gaps, ddof=1) / 30**0.5)
    ended = [row["after"]["ended"] for row in answers]
    assert results["measures"]["unended"]["after"]["mean"] == pytest.approx(1 - np.mean(ended))
    assert results["verdict"]["sentence"] in told
    card = (run / "README.md").read_text()
    assert card.startswith("# run\n")
    assert card.count("## Evaluation") == 1
    page = Page((run / "report.html").read_text()).words
    headline = results["verdict"]["sentence"].replace(": ", " ", 1)
    for text in (headline, "win rate", "chosen shorter", "Calibration", "perplexity on chosen", "at equal length"):
        assert text in page


def test_a_recipe_is_evaluated_by_what_its_run_was_trained_on(call, run, rows, tiny_model, tmp_path, capsys):
    words = ["evaluate", "hh-rlhf-lora", "--profile", "cpu", "--max_new_tokens", "8", "--prompts", "4"]
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert "no trained model in outputs/hh_rlhf_lora" in capsys.readouterr().err
    shutil.copytree(run, tmp_path / "outputs/hh_rlhf_lora", ignore=shutil.ignore_patterns("eval*"))
    held = {"model_name_or_path": str(tiny_model), "dataset_name": str(rows), "beta": 0.2}
    (tmp_path / "outputs/hh_rlhf_lora/settings.json").write_text(json.dumps(held))
    assert main([*words, "--eval_pairs", "12"]) == 0
    results = json.loads(Path("outputs/hh_rlhf_lora/eval.json").read_text())
    named = {key: results[key] for key in ("start", "dataset", "beta", "pairs", "prompts", "judge", "win_rate")}
    assert named == {
        **{"start": str(tiny_model), "dataset": str(rows), "beta": 0.2, "pairs": 12, "prompts": 4},
        **{"judge": None, "win_rate": None},
    }


@pytest.mark.slow
def test_the_same_call_goes_on_and_says_the_same(call, run, tiny_model, monkeypatch, capsys):
    assert call(run, "--prompts", "8", "--output_dir", "one") == 0
    first = capsys.readouterr()
    assert "Answers of after, 2 of 2" in first.out
    assert "nobody judged" in first.out
    shutil.copytree("one", "two")
    Path("two/eval/answers/after.json").unlink()
    assert call(run, "--prompts", "8", "--output_dir", "two") == 0
    assert "Answers of after, 1 of 1" in capsys.readouterr().out
    results = [json.loads(Path(name, "eval.json").read_text()) for name in ("one", "two")]
    assert results[0] | {"made": 0} == results[1] | {"made": 0}


@pytest.mark.slow
def test_a_start_that_was_trained_again_is_asked_again(call, run, tiny_model, tmp_path, capsys):
    start, flags = tmp_path / "start", ("--prompts", "4", "--output_dir", "out", "--base", str(tmp_path / "start"))
    shutil.copytree(tiny_model, start)
    assert call(run, *flags) == 0
    model = AutoModelForCausalLM.from_pretrained(start)
    model.lm_head.weight.data *= 1.5
    model.save_pretrained(start)
    capsys.readouterr()
    assert call(run, *flags) == 0
    assert "Answers of after, 2 of 2" in capsys.readouterr().out


@pytest.mark.slow
def test_what_others_wrote_into_the_card_stays(call, run):
    shutil.copytree(run, "mine", ignore=shutil.ignore_patterns("eval*"))
    Path("mine/README.md").write_text("# mine\n\n## Evaluation\n\nBy hand.\n")
    for _ in range(2):
        assert call("mine", "--prompts", "4") == 0
        with Path("mine/README.md").open("a") as card:
            card.write("\n## License\n")
    card = Path("mine/README.md").read_text()
    assert card.startswith("# mine\n\n## Evaluation\n\nBy hand.\n")
    assert (card.count("nobody judged"), card.count("## License")) == (1, 2)


@pytest.mark.slow
def test_numbers_that_are_none_are_said_and_make_no_number(call, run, tiny_model, tmp_path, capsys):
    (tmp_path / "odd.py").write_text(
        "def score(prompt, answer):\n"
        "    return float('nan') if int(prompt[0]['content'].split()[1][:-1]) % 2 else 1.0\n"
    )
    assert call(run, "--judge", "odd.py:score", "--prompts", "8", "--output_dir", "out") == 0
    results = json.loads(Path("out/eval.json").read_text(), parse_constant=pytest.fail)
    left_out = results["judging"]["unknown"]
    assert 0 < left_out < 8
    assert f"Of 8 prompts {left_out} have no verdict" in capsys.readouterr().out
    assert results["measures"]["judge"]["after"]["mean"] == 1.0

    broken = tmp_path / "broken"
    shutil.copytree(run, broken)
    weights = load_file(broken / "adapter_model.safetensors")
    save_file({name: weight * float("nan") for name, weight in weights.items()}, broken / "adapter_model.safetensors")
    assert call(broken, "--prompts", "4", "--output_dir", "other") == 2
    assert "gives NaN for 80 of 80 held-out completions" in capsys.readouterr().err


def test_a_model_of_another_kind_or_start_is_refused_before_it_answers(call, run, tiny_model, reward_model, capsys):
    assert call(reward_model, "--base", str(tiny_model)) == 2
    assert "is a reward model" in capsys.readouterr().err
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    shutil.copytree(tiny_model, "other")
    held = json.loads(Path("other/tokenizer.json").read_text())
    vocabulary = held["model"]["vocab"]
    held["model"]["vocab"] = dict(zip(vocabulary, reversed(vocabulary.values()), strict=True))
    Path("other/tokenizer.json").write_text(json.dumps(held))
    assert AutoTokenizer.from_pretrained("other").get_vocab() != tokenizer.get_vocab()
    assert call("other", "--base", str(tiny_model)) == 2
    said = capsys.readouterr()
    assert "has other tokens" in said.err
    assert "Answers of" not in said.out


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("reward model", "Merge it (dpo-recipes merge adapter --output_dir DIR), and DIR may judge: --judge DIR."),
        ("prompt", "adapter is an adapter of the kind PROMPT_TUNING, which adds to the prompt"),
        ("another base", "it has no place for model.layers.2."),
    ],
)
def test_an_adapter_that_cannot_be_compared_is_refused_before_pairs_are_read(kind, message, call, tiny_model, capsys):
    loader = AutoModelForSequenceClassification if kind == "reward model" else AutoModelForCausalLM
    model = loader.from_config(AutoConfig.from_pretrained(tiny_model, num_hidden_layers=3, num_labels=1))
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS" if kind == "reward model" else "CAUSAL_LM")
    if kind == "prompt":
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(model, config).save_pretrained("adapter")
    assert call("adapter", "--base", str(tiny_model)) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert "Data account" not in said.out


def test_a_place_that_cannot_be_written_is_found_before_answers_are_made(call, run, capsys):
    Path("file").touch()
    assert call(run, "--output_dir", "file/below") == 2
    said = capsys.readouterr()
    assert "Cannot write into file/below/eval: " in said.err
    assert "Answers of" not in said.out


@pytest.mark.slow
def test_beta_is_the_runs_or_the_one_that_is_given(call, run):
    for flags, beta in (((), 0.5), (("--beta", "0.01"), 0.01)):
        assert call(run, *flags, "--prompts", "4", "--output_dir", "out") == 0
        assert json.loads(Path("out/eval.json").read_text())["beta"] == beta


def test_a_full_model_a_reward_model_and_hostile_answers(call, tiny_model, reward_model, tmp_path, rows):
    tuned = tmp_path / "tuned"
    shutil.copytree(tiny_model, tuned)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    torch.manual_seed(1)
    model.lm_head.weight.data += 0.05 * torch.randn_like(model.lm_head.weight)
    model.save_pretrained(tuned)
    flags = ("--base", str(tiny_model), "--judge", str(reward_model), "--prompts", "8")
    assert call(tuned, *flags, "--temperature", "0", "--output_dir", "out") == 0
    results = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert "kl" not in results["measures"]
    assert results["judging"]["labels"]["n"] == 40
    difference = results["measures"]["judge"]["after"]["mean"] - results["measures"]["judge"]["before"]["mean"]
    assert abs(difference) > 1e-3
    assert results["hashes"]["before"] != results["hashes"]["after"]


@pytest.mark.slow
def test_an_endpoint_judges_by_the_command_and_is_asked_once(call, run, monkeypatch, capsys):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Server() as server:
        flags = ("--judge", server.url, "--judge_model", "a-judge", "--judge_price", "1", "2", "--yes")
        for _ in range(2):
            assert call(run, *flags, "--prompts", "6", "--output_dir", "out") == 0
            assert "At most 12 requests" in capsys.readouterr().out
        server.shutdown()
    results = json.loads(Path("out/eval.json").read_text())
    asked = sum(server.seen.values())
    assert 0 < asked <= 12
    assert results["judging"]["requests"] == results["judging"]["from_cache"] == asked
    assert results["judging"]["cost"] == pytest.approx(asked * (100 * 1 + 10 * 2) / 1e6)
    assert results["judge"] == f"a-judge at {server.url}"
    assert "judge" not in results["measures"]
    assert "one in each order" in Path("out/report.html").read_text()


@pytest.mark.parametrize(
    ("won", "n", "word", "told"),
    [
        (140, 200, "better", "win rate 0.700"),
        (104, 200, "not known", "0.137 wide, and four times the prompts would halve it"),
        (9, 9, "not known", "too few"),
        (80, 200, "worse", "win rate 0.400"),
        (None, 200, "not known", "nobody judged the answers"),
    ],
)
def test_the_verdict_says_what_the_whole_interval_says(won, n, word, told):
    said = verdict(answers_of(n), None if won is None else wilson(won, n), greedy=False)
    assert said["word"] == word
    assert told in said["sentence"]


def test_an_interval_that_touches_one_half_is_not_known():
    for low, high in ((0.5, 0.65), (0.4, 0.5)):
        assert verdict(answers_of(100), Estimate(0.5, low, high, 100), greedy=True)["word"] == "not known"


def test_a_model_that_wins_with_lost_text_is_destroyed():
    found = answers_of(200, text="no no no no no no no no no no")
    said = verdict(found, wilson(180, 200), greedy=True)
    assert said["word"] == "destroyed"
    assert "86% of the 4-grams of the answers are repeats" in said["sentence"]


def answers_of(n, text="a b c d e f"):
    """Answers and log-probs of both models, of which the tuned one's are the text."""
    answers = {
        side: [dict(text=words, tokens=10, scored=10, ended=True, policy=-9.0, start=-10.0)] * n
        for side, words in (("before", "a b c d e f"), ("after", text))
    }
    return {side: {"answers": each, "chosen": [-9.0], "chosen_tokens": [10]} for side, each in answers.items()}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--judge", "none.py:f"], "There is no file none.py"),
        (["--judge", "mine.py:longer"], "has no function longer"),
        (["--judge", "http://127.0.0.1:1/v1"], "--judge_model"),
        (["--judge", "http://127.0.0.1:1/v1", "--judge_model", "m"], "give --yes"),
        (["--judge", "no/such-model"], "Cannot load the reward model"),
        (["--unknown_flag", "1"], "unknown_flag"),
        (["--judge_model", "m"], "is for an endpoint"),
    ],
)
def test_what_is_wrong_is_said_before_a_model_answers(call, run, flags, message, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert call(run, "--output_dir", "out", *flags) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert "Answers of" not in said.out


# Held-out data of one's own


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory):
    """A run that was trained on a file of 40 rows, of which it held out a fifth."""
    folder = tmp_path_factory.mktemp("trained")
    data = folder / "pairs.jsonl"
    rows = [{"prompt": f"Question {n}?", "chosen": f"Yes {n}.", "rejected": f"No {n}."} for n in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(run, folder / "run", ignore=shutil.ignore_patterns("eval*"))
    held = json.loads((run / "settings.json").read_text()) | {"dataset_name": str(data), "held_out": 0.2}
    (folder / "run" / "settings.json").write_text(json.dumps(held))
    return folder / "run", rows


def evaluated(run, data, *flags):
    words = ["--dataset_name", str(data), "--max_new_tokens", "4", "--prompts", "2"]
    assert main(["evaluate", str(run), *words, *flags]) == 0
    return json.loads((run / "eval.json").read_text())


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "folder"])
def test_all_rows_of_a_file_of_ones_own_are_held_out(trained, kind, tmp_path):
    run, rows = trained
    own = Dataset.from_list([row | {"prompt": f"A new {row['prompt']}"} for row in rows])
    path = tmp_path / "own" if kind == "folder" else tmp_path / f"test.{kind}"
    if kind == "folder":
        path.mkdir()
        own.to_json(path / "test.jsonl")
    else:
        {"jsonl": own.to_json, "csv": own.to_csv, "parquet": own.to_parquet}[kind](path)
    results = evaluated(run, path)
    assert (results["pairs"], results["warnings"]) == (40, [])


@pytest.mark.slow
def test_prompts_that_the_run_was_trained_on_are_named_by_their_lines(trained, tmp_path):
    run, rows = trained
    new = [row | {"prompt": f"A new {row['prompt']}"} for row in rows[:3]]
    file = tmp_path / "test.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in [*new, *rows]))
    results = evaluated(run, file)
    held_out = evaluated(run, run.parent / "pairs.jsonl")["pairs"]
    assert results["pairs"] == 43
    assert 1 < held_out < 20
    [warning] = results["warnings"]
    assert f"trained on the prompts of {40 - held_out} of 43 held-out pairs: {file}, line " in warning


@pytest.mark.slow
def test_the_data_of_the_run_is_split_as_the_run_has_split_it(trained):
    run, rows = trained
    file = run.parent / "pairs.jsonl"
    results = evaluated(run, file)
    pairs = [{side: as_messages(row[side], role="user") for side in ("prompt", "chosen", "rejected")} for row in rows]
    assert results["pairs"] == len(split_pairs({"train": Dataset.from_list(pairs)}, 0.2)["test"])
    assert results["warnings"] == []
    assert evaluated(run, f"{file}:30")["pairs"] <= results["pairs"]
    [warning] = evaluated(run, file, "--held_out", "0.9")["warnings"]
    assert "The run was trained on the prompts of" in warning


def test_training_data_that_is_gone_is_said(trained, tmp_path):
    run, _ = trained
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("eval*"))
    held = json.loads((run / "settings.json").read_text()) | {"dataset_name": str(tmp_path / "gone.jsonl")}
    (tmp_path / "run" / "settings.json").write_text(json.dumps(held))
    [warning] = evaluated(tmp_path / "run", run.parent / "pairs.jsonl")["warnings"]
    assert f"The run's training data, {tmp_path}/gone.jsonl, cannot be read" in warning
