"""DPO in rounds: which prompts and pairs a round takes, from which weights it starts, and what the run leaves."""

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from commands import run_train
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_recipes import rounds
from dpo_recipes.errors import RecipeError
from dpo_recipes.models.generation import generate
from dpo_recipes.models.rewards import model_judge
from dpo_recipes.recipe import OnlineArguments
from dpo_recipes.rounds import RoundsConfig, begin_rounds
from dpo_recipes.runs.metrics import rounds_of
from dpo_recipes.runs.model_card import weights_hash
from dpo_recipes.sample.sampling import ranked

PROMPTS = [[{"role": "user", "content": f"Question {number}?"}] for number in range(10)]


@pytest.fixture
def unlocked(monkeypatch):
    """Lets one process take a folder twice, which only another process may do after a kill."""
    monkeypatch.setattr(rounds, "take_folder", lambda folder, _: folder.mkdir(exist_ok=True))


def settings(folder, **changes):
    plain = dict(use_cpu=True, bf16=False, activation_checkpointing=False, num_rounds=3)
    return RoundsConfig(output_dir=str(folder), **plain | changes)


def begun(folder, prompts=PROMPTS, **changes):
    script_args = OnlineArguments(dataset_name="x", reward_model_name_or_path="judge")
    return begin_rounds(script_args, settings(folder, **changes), Dataset.from_dict({"prompt": prompts}))


def asked(rounds):
    return [[prompt[0]["content"] for prompt in this.prompts] for this in rounds]


def test_each_round_has_its_own_share_of_the_prompts_and_all_are_used_once(tmp_path):
    shares = asked(begun(tmp_path / "run"))
    assert [len(share) for share in shares] == [3, 3, 4]
    every = [prompt for share in shares for prompt in share]
    assert sorted(every) == sorted(prompt[0]["content"] for prompt in PROMPTS) != every
    assert asked(begun(tmp_path / "again")) == shares
    assert asked(begun(tmp_path / "seed", seed=1)) != shares


def test_more_prompts_than_there_are_begin_again(tmp_path):
    shares = asked(begun(tmp_path / "run", num_prompts=20, num_rounds=2))
    assert [len(share) for share in shares] == [10, 10]
    assert shares[0] == shares[1]
    assert [len(share) for share in asked(begun(tmp_path / "few", num_prompts=6))] == [2, 2, 2]


@pytest.mark.usefixtures("unlocked")
def test_a_finished_round_is_left_out_and_the_last_one_stays_for_the_end(tmp_path):
    list(begun(tmp_path))
    for number in (1, 3):
        file = tmp_path / f"round-{number}" / "round.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"updates": 2}))
    assert [this.number for this in begun(tmp_path)] == [2, 3]


@pytest.mark.usefixtures("unlocked")
def test_a_round_of_other_prompts_or_sampling_is_refused(tmp_path):
    list(begun(tmp_path))
    for change in (dict(prompts=PROMPTS[1:]), dict(temperature=0.5), dict(num_generations=8)):
        with pytest.raises(RecipeError, match=r"round-1 was begun with other prompts, weights or sampling"):
            list(begun(tmp_path, **change))
    list(begun(tmp_path, learning_rate=1e-3))


def test_settings_without_a_round_a_pair_or_a_prompt_are_refused(tmp_path):
    for change in (dict(num_rounds=0), dict(num_generations=1), dict(num_prompts=2)):
        with pytest.raises(ValueError, match=r"at least two answers|without a prompt"):
            settings(tmp_path, **change)
    with pytest.raises(RecipeError, match="2 prompts are too few for 3 rounds"):
        next(begun(tmp_path, prompts=PROMPTS[:2]))


def test_the_best_answer_meets_the_worst_and_equal_texts_make_no_pair(reward_model, capsys):
    lines = [
        {"prompt": PROMPTS[0], "completions": ["one", "two", "three", "four"]},
        {"prompt": PROMPTS[1], "completions": ["same", "same"]},
    ]
    [pair] = ranked(lines, str(reward_model), best_against_worst=True)
    texts = lines[0]["completions"]
    scores = model_judge(reward_model)([PROMPTS[0]] * 4, texts)
    assert (pair["chosen"], pair["rejected"]) == (texts[scores.argmax()], texts[scores.argmin()])
    assert pair["preference_strength"] == pytest.approx(scores.max() - scores.min(), abs=1e-4)
    said = capsys.readouterr().out
    assert "1 pairs, and left out:" in said
    assert "chosen and rejected say the same" in said
    assert len(ranked(lines, str(reward_model))) == 6


@pytest.fixture(scope="module", params=["first", "round"])
def run(request, tmp_path_factory, tiny_model, reward_model, hh_rows):
    """The folder of a run of two rounds with that reference model."""
    folder = tmp_path_factory.mktemp(request.param)
    result = run_train(
        *("hh-rlhf-rounds", "--profile", "cpu", "--dataset_name", hh_rows, "--model_name_or_path", tiny_model),
        *("--reward_model_name_or_path", reward_model, "--num_rounds", "2", "--num_prompts", "40", "--eval_pairs", "4"),
        *("--pairs_per_update", "4", "--per_device_train_batch_size", "4", "--max_steps", "3", "--logging_steps", "1"),
        *("--max_prompt_length", "200", "--max_completion_length", "8", "--learning_rate", "1e-2"),
        *("--reference", request.param, "--save_steps", "2", "--eval_steps", "2", "--output_dir", "run"),
        cwd=folder,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return request.param, folder / "run"


def read(file: Path):
    return json.loads(file.read_text())


@pytest.mark.slow
def test_rounds_leave_one_adapter_that_each_round_has_moved_on(run, tiny_model, reward_model):
    _, folder = run
    names = ("round-1/checkpoint-3", "round-2/checkpoint-2", "round-2/checkpoint-3", "")
    first, between, last, whole = (load_file(folder / name / "adapter_model.safetensors") for name in names)
    assert whole.keys() == first.keys() == last.keys()
    assert all(torch.equal(whole[key], last[key]) for key in whole)
    ends = [sum((weights[key] - whole[key]).norm() for key in whole) for weights in (first, between)]
    assert ends[0] > ends[1] > 0, "round 2 goes on from round 1"
    done, metrics = read(folder / "done.json"), read(folder / "metrics.json")
    assert done["method"] == "DPO in rounds"
    assert done["updates"] == 6
    assert done["start_hash"] == weights_hash(str(tiny_model))
    assert done["reward_model_hashes"] == [weights_hash(str(reward_model))]
    assert metrics["rounds"] == rounds_of(folder)
    assert metrics["kl"]["nats"] > 0.05
    # "before" is the first model, whatever the reference model of the last round was.
    answers = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    prompts, texts = [each["prompt"] for each in answers], [each["before"]["text"] for each in answers]
    model, tokenizer = (kind.from_pretrained(tiny_model) for kind in (AutoModelForCausalLM, AutoTokenizer))
    again = generate(model, tokenizer, prompts, max_new_tokens=128)
    assert [each["text"] for each in again] == texts


@pytest.mark.slow
def test_each_round_has_its_own_schedule_and_the_reference_model_that_was_asked_for(run):
    reference, folder = run
    log = [entry for entry in read(folder / "log.json")["log_history"] if "loss" in entry]
    assert [entry["step"] for entry in log] == [1, 2, 3, 4, 5, 6]
    rates = [entry["learning_rate"] for entry in log]
    assert rates[:3] == rates[3:]
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    at_ln_2 = log[3]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert at_ln_2 == (reference == "round")


@pytest.mark.slow
def test_each_round_keeps_its_account_and_the_page_shows_it(run):
    _, folder = run
    accounts = read(folder / "metrics.json")["rounds"]
    assert [each["round"] for each in accounts] == [1, 2]
    for each in accounts:
        part = folder / f"round-{each['round']}"
        answers, pairs = (
            [json.loads(line) for line in (part / f"{name}.jsonl").read_text().splitlines()]
            for name in ("answers", "pairs")
        )
        assert each["answers"] == sum(len(line["completions"]) for line in answers) == 80
        assert each["prompts"] == len(answers) == 20
        assert each["pairs"] == len(pairs) == 20 - each["equal_texts"] - each["not_ranked"]
        assert each["margin"] == pytest.approx(sum(pair["preference_strength"] for pair in pairs) / len(pairs))
        assert 0 < each["on_policy_share"] <= 1
        assert read(part / "preflight.json")["splits"]["train"]["kept"] == len(pairs)
    assert accounts[0]["on_policy_share"] < 1
    page = (folder / "report.html").read_text()
    assert ">Rounds</h2>" in page
    assert "DPO in rounds of" in page
    health = read(folder / "health.json")
    assert health["updates"] == 6
    assert not [each for each in health["findings"] if each["rule"] == "wrong_reference"]
    steps = [entry["step"] for entry in read(folder / "log.json")["log_history"]]
    assert all(one <= other for one, other in pairwise(steps))
