"""Prompts of an online recipe: each is kept once, every row is counted, and each leaves room for an answer."""

import json

import pytest
from commands import run_train
from datasets import Dataset, DatasetDict
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import DPOConfig, RLOOConfig

from dpo_recipes.errors import RecipeError
from dpo_recipes.preflight import prepare_pairs, prepare_prompts
from dpo_recipes.recipe import OnlineArguments, RecipeArguments


def says(role, text):
    return {"role": role, "content": text}


def row(*turns, source="a"):
    prompt = [says("user" if index % 2 == 0 else "assistant", turn) for index, turn in enumerate(turns)]
    sides = {side: [says("assistant", side)] for side in ("chosen", "rejected")}
    return {"prompt": prompt, **sides, "source": source}


HELD_OUT = (row("Held out?"),)


@pytest.fixture
def prepare(tiny_model, tmp_path):
    """Prepares the prompts of these rows, and returns them with preflight.json."""

    def prepare(train, test=HELD_OUT, *, reward_model=None, **settings):
        script_args = OnlineArguments(dataset_name="rows", reward_model_name_or_path=reward_model, max_prompt_length=60)
        args = dict(output_dir=str(tmp_path / "run"), use_cpu=True, bf16=False, activation_checkpointing=False)
        args |= dict(per_device_train_batch_size=2, max_completion_length=16)
        for name, value in settings.items():
            if hasattr(script_args, name):
                setattr(script_args, name, value)
            else:
                args[name] = value
        pairs = DatasetDict(train=Dataset.from_list(list(train)), test=Dataset.from_list(list(test)))
        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        prompts = prepare_prompts(lambda _: pairs, script_args, RLOOConfig(**args), tokenizer)
        return prompts, json.loads((tmp_path / "run" / "preflight.json").read_text())

    return prepare


def test_each_prompt_is_kept_once_with_the_columns_of_its_first_pair(prepare, capsys):
    prompts, data = prepare([row("One?", source="a"), row("One?", source="b"), row("Two?", source="c")])
    assert prompts["train"].column_names == ["prompt", "source"]
    assert prompts["train"]["source"][:] == ["a", "c"]
    account = data["splits"]["train"]
    assert account["kept"] == 2
    assert account["dropped"]["same_prompt"]["count"] == 1
    assert account["dropped"]["same_prompt"]["first"] == ["row 2"]
    assert "a prompt that came before" in capsys.readouterr().out
    assert data["verdict"] == "ok", "no fault of the rows"


def test_columns_for_reward_functions_are_kept_whatever_their_names(prepare):
    columns = {"texts": "a text", "whole_prompt": 7, "place": 8}
    prompts, _ = prepare([row("A first question?", "Yes.", "Two, and " * 5) | columns, row("Two?") | columns])
    assert prompts["train"].column_names == ["prompt", "source", *columns]
    assert all(each == {**each, **columns} for each in prompts["train"])


def test_the_oldest_turns_of_a_long_prompt_go_first_and_what_is_too_long_is_dropped(prepare, tiny_model):
    long, last = "x" * 40, "And then?"
    prompts, data = prepare([row(long, "Hm.", last), row("y" * 70), row("Short?")])
    kept = prompts["train"]["prompt"][:]
    assert kept == [[says("user", last)], [says("user", "Short?")]]
    account = data["splits"]["train"]
    assert (account["rows"], account["kept"], account["shortened"]) == (3, 2, 1)
    assert account["dropped"]["prompt_too_long"]["count"] == 1
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    options = dict(add_generation_prompt=True, return_dict=False)
    *lengths, whole = (
        len(tokenizer.apply_chat_template(each, **options)) for each in [*kept, row(long, "Hm.", last)["prompt"]]
    )
    assert data["tokens"]["train"]["prompt"]["max"] == max(lengths)
    assert data["tokens"]["train"]["cut_from"]["prompt"] == whole - lengths[0]


def test_prompts_that_became_equal_are_one_and_none_is_in_both_splits(prepare):
    long = "x" * 40
    train = [row(long, "Hm.", "And then?"), row("And then?"), row(long, "Hm.", "Held out?"), row("Other?")]
    prompts, data = prepare(train)
    assert [prompt[-1]["content"] for prompt in prompts["train"]["prompt"]] == ["And then?", "Other?"]
    dropped = data["splits"]["train"]["dropped"]
    assert (dropped["same_prompt"]["count"], dropped["prompt_in_test"]["count"]) == (1, 1)


def test_for_a_comparison_the_prompts_are_those_of_the_pairs_that_dpo_keeps(prepare, tiny_model, tmp_path):
    rows = [row("One?"), row("A turn of some length.", "Yes.", "Two?"), row("One?", "So.", "Much too long. " * 8)]
    rows += [row("Three?") | {"rejected": [says("assistant", "An answer that is longer than all else. " * 3)]}]
    longest = 48  # bytes: the second loses a turn, the last two go
    prompts, data = prepare(rows, max_pair_length=longest, max_prompt_length=4)
    assert [prompt[-1]["content"] for prompt in prompts["train"]["prompt"][:]] == ["One?", "Two?"]
    assert len(prompts["train"]["prompt"][1]) == 1
    account = data["splits"]["train"]
    assert (account["shortened"], account["dropped"]["too_long"]["count"]) == (1, 2)
    assert data["max_pair_length"] == longest

    pairs = DatasetDict(train=Dataset.from_list(rows), test=Dataset.from_list(list(HELD_OUT)))
    args = DPOConfig(
        str(tmp_path / "dpo"), max_length=longest, use_cpu=True, bf16=False, activation_checkpointing=False
    )
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    prepare_pairs(lambda _: pairs, RecipeArguments(dataset_name="rows"), args, tokenizer)
    of_dpo = json.loads((tmp_path / "dpo" / "preflight.json").read_text())
    assert of_dpo["prompts"] == data["prompts"]
    assert of_dpo["splits"]["train"]["kept"] == account["kept"] == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"max_completion_length": 2016},
            r"1 of 3 prompts leave no room for an answer of max_completion_length=2016 tokens in the 2048 of .* "
            "--max_completion_length 1024 --max_prompt_length 1024",
        ),
        ({"generation_batch_size": 8}, r"A rollout is .* = 4 prompts, and there are 2 to train on"),
        ({"max_prompt_length": 5}, r"No usable .* left to train on. Raise --max_prompt_length"),
        ({"dataset_streaming": True}, "dataset_streaming is true"),
        ({"eval_pairs": 0}, "eval_pairs is 0"),
        ({"reward_model_name_or_path": "nowhere"}, "Cannot load the reward model nowhere"),
    ],
)
def test_prompts_that_cannot_be_learned_from_are_refused(settings, message, prepare):
    with pytest.raises(RecipeError, match=message):
        prepare([row("What is the longest word that you know?"), row("Two?")], **settings)


def test_a_policy_is_no_reward_model(prepare, tiny_model):
    with pytest.raises(RecipeError, match="is a LlamaForCausalLM, which has no score head"):
        prepare([row("One?"), row("Two?")], reward_model=str(tiny_model))


def test_plain_text_is_a_prompt_too(prepare):
    pairs = [{"prompt": text, "chosen": "a", "rejected": "b"} for text in ("Once", "Once", "A tree", "y" * 70)]
    prompts, data = prepare(pairs, [{"prompt": "Held out", "chosen": "a", "rejected": "b"}])
    assert prompts["train"]["prompt"][:] == ["Once", "A tree"]
    assert data["splits"]["train"]["dropped"]["prompt_too_long"]["count"] == 1


def test_a_dry_run_counts_what_sampling_and_scoring_take(tmp_path, tiny_model, hh_rows):
    reward_model = tmp_path / "reward"
    AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1).save_pretrained(reward_model)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(reward_model)
    (reward_model / "model.safetensors").unlink()  # no weight is loaded
    result = run_train(
        *("hh-rlhf-rloo", "--profile", "cpu", "--dataset_name", hh_rows, "--dry_run", "true"),
        *("--model_name_or_path", tiny_model, "--reward_model_name_or_path", reward_model, "--output_dir", "run"),
        *("--pairs_per_update", "8", "--generation_batch_size", "16", "--max_prompt_length", "100"),
        *("--max_completion_length", "20", "--num_iterations", "2"),
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    lines = {line.split()[0]: line.split(maxsplit=1)[-1] for line in result.stdout.splitlines() if line.strip()}
    assert lines["prompts"].split() == ["116", "4"]
    assert lines["update"] == "8 answers = 4 a device x 1 process(es) x 2 accumulated"
    # 116 prompts are 29 rollouts of 4 prompts with 4 answers, learned from twice by 8.
    assert lines["updates"] == str(29 * 16 * 2 // 8)
    assert "reward model 0 MB" in lines["memory"]
    # 16 answers of 120 tokens; 2 layers, keys and values, 2 heads of 16 numbers, 4 bytes.
    assert f"keys and values {16 * 120 * 2 * 2 * 2 * 16 * 4 / 1e6:.0f} MB" in lines["memory"]
    assert {path.name for path in tmp_path.iterdir()} == {"reward"}
