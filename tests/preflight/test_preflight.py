"""TRL takes the pairs of the preflight unchanged: it truncates and drops nothing, and every row is in the account."""

import json
import os
import shutil
import types
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from transformers import AutoTokenizer
from trl import ModelConfig

from dpo_recipes.dataset_adapters import hh_rlhf, preference_jsonl
from dpo_recipes.errors import RecipeError
from dpo_recipes.loading import load_rows, split_pairs
from dpo_recipes.preflight import prepare_pairs
from dpo_recipes.preflight.findings import in_words
from dpo_recipes.preflight.prepare import measure_pairs
from dpo_recipes.preflight.signals import find_signals
from dpo_recipes.preflight.tokens import MEASURES, fit, without_oldest_exchange
from dpo_recipes.recipe import RecipeArguments, load_tokenizer

DATA = os.environ.get("DPO_RECIPES_DATA")
SPEAKERS = {"u": "user", "a": "assistant", "s": "system"}


def turns(text):
    """Messages from a short text: `turns("s:brief u:hello a:hi")`."""
    return [{"role": SPEAKERS[part[0]], "content": part[2:]} for part in text.split()]


def pair(prompt, chosen="a:yes", rejected="a:no"):
    return {"prompt": turns(prompt), "chosen": turns(chosen), "rejected": turns(rejected)}


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)  # one token a byte


def settings_for(tmp_path, *, max_length=None, **others):
    args = {"output_dir": str(tmp_path), "max_length": max_length, "trust_remote_code": False}
    return types.SimpleNamespace(**args | others)


def arguments(**others):
    return RecipeArguments(dataset_name="rows.jsonl", **others)


def prepare(train, test, *, tokenizer, tmp_path, max_length=None, **script):
    pairs = DatasetDict(train=Dataset.from_list(train), test=Dataset.from_list(test))
    training_args = settings_for(tmp_path, max_length=max_length)
    return prepare_pairs(lambda _: pairs, arguments(**script), training_args, tokenizer)


def account(tmp_path):
    return json.loads((tmp_path / "preflight.json").read_text())


def length(example, tokenizer):
    return max(
        len(tokenizer.apply_chat_template(example["prompt"] + example[side], return_dict=True)["input_ids"])
        for side in ("chosen", "rejected")
    )


# Too long


@pytest.mark.parametrize(
    ("prompt", "shorter"),
    [
        ("u:1 a:2 u:3", "u:3"),
        ("u:1 a:2 u:3 a:4 u:5", "u:3 a:4 u:5"),
        ("s:0 u:1 a:2 u:3", "s:0 u:3"),
        ("a:0 u:1", "u:1"),
        ("u:1 a:2 a:2 u:3", "u:3"),
        ("u:1 u:2 a:3 u:4", "u:4"),
        ("u:1", None),
        ("s:0 u:1", None),
        ("u:1 u:2", None),
    ],
)
def test_the_oldest_exchange_goes_first_and_the_system_message_stays(prompt, shorter):
    assert without_oldest_exchange(turns(prompt)) == (turns(shorter) if shorter else None)


def test_a_pair_is_shortened_only_as_far_as_it_must_be(tokenizer):
    long = pair("u:first a:second u:third a:fourth u:fifth")
    whole = length(long, tokenizer)
    rows = Dataset.from_list([long])
    kept = fit(rows, tokenizer, whole, split="train")[0]
    assert {side: kept[side] for side in long} == long
    assert kept["cut_tokens"] == 0
    shorter = fit(rows, tokenizer, whole - 1, split="train")[0]
    assert shorter["prompt"] == turns("u:third a:fourth u:fifth")
    assert shorter["cut_tokens"] == len("User: first\nBot: second_")  # its <eos> is one token
    assert fit(rows, tokenizer, 30, split="train")[0]["prompt"] == turns("u:fifth")
    assert len(fit(rows, tokenizer, 10, split="train")) == 0


def test_the_longer_completion_decides(tokenizer):
    rows = Dataset.from_list([pair("u:q", "a:yes", "a:" + "n" * 40), pair("u:q", "a:" + "y" * 40, "a:no")])
    assert len(fit(rows, tokenizer, 40, split="train")) == 0
    assert len(fit(rows, tokenizer, 70, split="train")) == 2


def test_without_a_limit_nothing_is_shortened(tokenizer):
    rows = Dataset.from_list([pair("u:" + "long" * 500 + " a:x u:y")])
    assert fit(rows, tokenizer, None, split="train")["prompt"][0] == rows[0]["prompt"]


words = st.text(alphabet="abcdef", min_size=1, max_size=12)
contexts = st.lists(st.tuples(words, words), max_size=4)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(contexts, words, words, words), min_size=1, max_size=5), st.integers(10, 120))
def test_trl_truncates_and_drops_nothing_that_was_fitted(tokenizer, drawn, max_length):
    rows = [
        pair("".join(f"u:{q} a:{a} " for q, a in context) + f"u:{last}", f"a:{chosen}", f"a:{rejected}x")
        for context, last, chosen, rejected in drawn
    ]
    fitted = fit(Dataset.from_list(rows), tokenizer, max_length, split="train")
    for kept in fitted:
        assert length(kept, tokenizer) <= max_length
        assert kept["prompt"][0]["role"] == "user"
    assert len(fitted) == sum(length({**row, "prompt": row["prompt"][-1:]}, tokenizer) <= max_length for row in rows)


def as_trl_tokenises(pairs, tokenizer, max_length):
    from trl import DPOTrainer

    trainer = types.SimpleNamespace(_tokenizer=tokenizer)
    args = types.SimpleNamespace(max_length=max_length, truncation_mode="keep_start", dataset_num_proc=None)
    return DPOTrainer._prepare_dataset(trainer, pairs, tokenizer, args, "train")


def assert_trl_takes_all(pairs, tokenizer, max_length):
    tokenised = as_trl_tokenises(pairs, tokenizer, max_length)
    assert len(tokenised) == len(pairs) > 0
    for row in tokenised:
        assert row["chosen_ids"]
        assert row["rejected_ids"]
        assert len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) <= max_length


def test_dpo_trainer_tokenises_fitted_conversations_within_max_length(tokenizer):
    rows = [pair(f"u:{'q' * n} a:{'r' * n} u:{'s' * n}", f"a:{'t' * n}x", f"a:{'u' * n}") for n in range(1, 40)]
    for max_length in (40, 60, 100):
        pairs = fit(Dataset.from_list(rows), tokenizer, max_length, split="train")
        assert_trl_takes_all(pairs.remove_columns(list(MEASURES)), tokenizer, max_length)


def test_plain_text_pairs_are_measured_with_their_eos_and_never_cut(tokenizer, tmp_path):
    rows = [{"prompt": "p" * n, "chosen": "good", "rejected": "bad<eos>"} for n in range(1, 40)]
    pairs = prepare(rows, [{**rows[0], "prompt": "t"}], tokenizer=tokenizer, tmp_path=tmp_path, max_length=20)
    assert max(map(len, pairs["train"]["prompt"])) == 20 - len("good") - 1  # and one for <eos>
    assert account(tmp_path)["splits"]["train"]["dropped"]["too_long"]["count"] == 24
    assert_trl_takes_all(pairs["train"], tokenizer, 20)


@pytest.mark.slow
@pytest.mark.skipif(DATA is None, reason="DPO_RECIPES_DATA names no folder of real data")
def test_dpo_trainer_takes_every_real_pair_that_the_preflight_kept(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(Path(DATA or "").parent / "models" / "tinytalk-3m")
    rows = load_rows(
        types.SimpleNamespace(
            dataset_name=str(Path(DATA or "", "hh-rlhf")),
            dataset_config="harmless-base",
            dataset_train_split="train",
            dataset_test_split="test",
            dataset_streaming=False,
        )
    )
    training_args = settings_for(tmp_path, max_length=256)
    pairs = prepare_pairs(
        lambda _: split_pairs({split: hh_rlhf(part) for split, part in rows.items()}),
        arguments(eval_pairs=64),
        training_args,
        tokenizer,
    )
    assert len(pairs["test"]) == 64
    assert len(pairs["train"]) > 1000
    for split in pairs:
        assert_trl_takes_all(pairs[split], tokenizer, 256)


# What else is counted


def test_a_conversation_that_the_template_refuses_is_counted(tokenizer, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
        + tokenizer.chat_template
    )
    prepare([pair("u:a"), pair("s:x u:b")], [pair("u:c")], tokenizer=tokenizer, tmp_path=tmp_path)
    assert account(tmp_path)["splits"]["train"]["dropped"]["template_refuses"]["count"] == 1


def test_a_completion_that_the_template_leaves_out_is_counted(tokenizer):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    tokenizer.chat_template = "{% for m in messages if m['content'] != 'no' %}{{ m['content'] }}{% endfor %}"
    rows = Dataset.from_list([pair("u:a", rejected="a:no"), pair("u:a", rejected="a:nay")])
    assert fit(rows, tokenizer, 99, split="train")["rejected"][:] == [turns("a:nay")]


def test_pairs_that_no_dataset_adapter_has_checked_are_checked(tokenizer, tmp_path):
    rows = [pair("u:a"), pair("u:b", "a:x", "a:x"), pair("u:c a:d"), {**pair("u:e"), "chosen": None}]
    rows.append({**pair("u:f"), "chosen": [{"role": "assistant", "content": None}]})
    prepare(rows, [pair("u:z")], tokenizer=tokenizer, tmp_path=tmp_path)
    dropped = account(tmp_path)["splits"]["train"]["dropped"]
    assert {reason: drop["first"] for reason, drop in dropped.items()} == {
        "identical_completions": ["row 2"],
        "prompt_not_ending_in_user": ["row 3"],
        "missing_value": ["row 4"],
        "content_not_text": ["row 5"],
    }


def test_prompts_made_equal_by_shortening_are_not_on_both_sides(tokenizer, tmp_path):
    long = "x" * 60
    pairs = prepare(
        [pair(f"u:{long} a:b u:same"), pair("u:other")],
        [pair(f"u:{long}y a:b u:same")],
        tokenizer=tokenizer,
        tmp_path=tmp_path,
        max_length=50,
    )
    assert pairs["train"]["prompt"][:] == [turns("u:other")]
    assert account(tmp_path)["splits"]["train"]["dropped"]["prompt_in_test"]["count"] == 1


def test_the_test_split_is_cut_by_seed_and_the_rest_accounted_for(tokenizer, tmp_path):
    test = [pair(f"u:{n}") for n in range(20)]
    first = prepare([pair("u:a")], test, tokenizer=tokenizer, tmp_path=tmp_path, eval_pairs=5)["test"]
    again = prepare([pair("u:a")], test, tokenizer=tokenizer, tmp_path=tmp_path, eval_pairs=5)["test"]
    assert first["prompt"][:] == again["prompt"][:]
    assert first["prompt"][:] != [row["prompt"] for row in test[:5]]
    split = account(tmp_path)["splits"]["test"]
    assert (split["rows"], split["not_sampled"], split["kept"]) == (20, 15, 5)
    assert len(prepare([pair("u:a")], test, tokenizer=tokenizer, tmp_path=tmp_path, eval_pairs=None)["test"]) == 20
    with pytest.raises(RecipeError, match="eval_pairs is 0"):
        prepare([pair("u:a")], test, tokenizer=tokenizer, tmp_path=tmp_path, eval_pairs=0)


# The account


def test_the_account_on_the_screen_fits_a_screen_and_adds_up(tokenizer, tmp_path, capsys):
    fixture = Path(__file__).parents[1] / "fixtures" / "hh_rlhf.jsonl"
    rows = [json.loads(line) for line in fixture.read_text(encoding="utf-8").splitlines()]
    rows += [{side: text.replace("egg", "x" * 200) if text else text for side, text in row.items()} for row in rows]
    rows += [{side: f"\n\nHuman: {n}\n\nAssistant: {side}" for side in ("chosen", "rejected")} for n in range(22)]

    def load_pairs(_):
        return split_pairs({"train": hh_rlhf(Dataset.from_list(rows))})

    pairs = prepare_pairs(load_pairs, arguments(eval_pairs=512), settings_for(tmp_path, max_length=90), tokenizer)
    lines = capsys.readouterr().out.splitlines()
    warnings = [line for line in lines if line.startswith("Warning")]
    assert [line.partition(":")[0] for line in warnings] == ["Warning (dropped)", "Warning (few_held_out)"]
    assert len(lines) <= 20
    assert max(len(line) for line in lines[:-1] if line not in warnings) <= 79
    assert lines[0].split() == ["Data", "account", "(max_length", "90", "tokens)", "train", "test"]
    numbers = {
        line[:54].strip(): [0 if n == "-" else int(n) for n in line[54:].split()]
        for line in lines[1:-3]
        if "Read by" not in line
    }
    assert numbers["rows"] == [50, 0]
    assert numbers["pairs"] == [len(pairs["train"]), len(pairs["test"])]
    assert "preflight.json" in lines[-1]
    written = account(tmp_path)
    for split in [*written["splits"].values(), written["total"]]:
        dropped = sum(drop["count"] for drop in split["dropped"].values())
        assert split["rows"] + split["moved"] == split["kept"] + split["not_sampled"] + dropped
    assert (written["total"]["rows"], written["total"]["moved"]) == (50, 0)
    assert written["total"]["kept"] == len(pairs["train"]) + len(pairs["test"])
    assert written["reasons"]["too_long"] == "last user turn + completion over max_length"


def test_pairs_shortened_are_counted_among_those_kept(tokenizer, tmp_path, capsys):
    test = [pair(f"u:{'x' * 60} a:b u:{n}") for n in range(20)]
    prepare([pair("u:a")], test, tokenizer=tokenizer, tmp_path=tmp_path, max_length=50, eval_pairs=4)
    assert account(tmp_path)["splits"]["test"]["shortened"] == 4
    assert "of these, shortened" in capsys.readouterr().out


# Refusals


def refusal(*args, **kwargs):
    with pytest.raises(RecipeError) as error:
        prepare(*args, **kwargs)
    return str(error.value)


def test_no_usable_training_pair_is_refused_with_the_account(tokenizer, tmp_path):
    message = refusal([pair("u:" + "x" * 99)], [pair("u:y")], tokenizer=tokenizer, tmp_path=tmp_path, max_length=50)
    assert message.startswith("No usable pair is left to train on. Raise --max_length, at most to the model's context")
    assert "last user turn + completion over max_length" in message
    same = pair("u:x", "a:y", "a:y")
    assert "Your own data" in refusal([same], [pair("u:y")], tokenizer=tokenizer, tmp_path=tmp_path)


def test_no_usable_test_pair_is_refused(tokenizer, tmp_path):
    def load_pairs(_):
        return split_pairs(
            {"train": preference_jsonl(Dataset.from_list([{"prompt": "q", "chosen": "a", "rejected": "b"}]))}
        )

    with pytest.raises(RecipeError, match=r"No usable pair is left to evaluate on\. Give more rows"):
        prepare_pairs(load_pairs, arguments(), settings_for(tmp_path), tokenizer)


def test_a_tokenizer_without_a_chat_template_is_refused_for_conversations_only(tokenizer, tmp_path):
    bare = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    bare.chat_template = None
    message = refusal([pair("u:a")], [pair("u:b")], tokenizer=bare, tmp_path=tmp_path)
    assert "has no chat template" in message
    assert "--chat_template_path" in message
    text = {"prompt": "p", "chosen": "a", "rejected": "b"}
    assert len(prepare([text], [{**text, "prompt": "q"}], tokenizer=bare, tmp_path=tmp_path)["train"]) == 1
    # SFT brings its own.
    (tmp_path / "chat.jinja").write_text(tokenizer.chat_template)
    bare.save_pretrained(tmp_path / "bare")
    shutil.copy(Path(tokenizer.name_or_path, "config.json"), tmp_path / "bare")
    for source in (str(tmp_path / "chat.jinja"), tokenizer.name_or_path):
        training_args = settings_for(tmp_path, max_length=50, chat_template_path=source, trust_remote_code=False)
        loaded = load_tokenizer(ModelConfig(model_name_or_path=str(tmp_path / "bare")), training_args)
        pairs = DatasetDict(train=Dataset.from_list([pair("u:a")]), test=Dataset.from_list([pair("u:b")]))
        assert len(prepare_pairs(lambda _, pairs=pairs: pairs, arguments(), training_args, loaded)["train"]) == 1


def test_a_tokenizer_without_an_eos_token_is_refused(tokenizer, tmp_path):
    bare = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    bare.eos_token = None
    assert "has no EOS token" in refusal([pair("u:a")], [pair("u:b")], tokenizer=bare, tmp_path=tmp_path)


def test_a_tokenizer_without_a_pad_token_will_do(tokenizer, tmp_path):
    bare = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    bare.pad_token = None  # TRL pads with the EOS token then
    assert len(prepare([pair("u:a")], [pair("u:b")], tokenizer=bare, tmp_path=tmp_path)["train"]) == 1


def test_load_pairs_must_return_pairs_in_two_splits(tokenizer, tmp_path):
    raw = Dataset.from_list([{"text": "a"}])
    for returned, part in [
        (DatasetDict(train=raw), "needs train and test: end it in split_pairs"),
        (DatasetDict(train=raw, test=raw), r"columns \['text'\], needs prompt, chosen and rejected"),
    ]:
        with pytest.raises(RecipeError, match=part):
            prepare_pairs(lambda _, pairs=returned: pairs, arguments(), settings_for(tmp_path), tokenizer)


# Caches


def test_a_second_run_reads_every_map_from_the_cache(tiny_model, tmp_path):
    rows = [{"prompt": f"q{n}", "chosen": "a", "rejected": "b"} for n in range(40)]
    Dataset.from_list(rows).to_json(tmp_path / "rows.jsonl")

    def run():
        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        raw = Dataset.from_json(str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path / "cache"))
        load_pairs = lambda _: split_pairs({"train": preference_jsonl(raw)})  # noqa: E731
        prepare_pairs(load_pairs, arguments(), settings_for(tmp_path, max_length=100), tokenizer)
        return {file for file in tmp_path.rglob("*.arrow") if file.is_file()}

    assert run() == run()


# Data of one's own


def measured(train, test, tokenizer, tmp_path, **script):
    splits = {"train": Dataset.from_list(train), **({"test": Dataset.from_list(test)} if test else {})}
    return measure_pairs(lambda _: split_pairs(splits), arguments(**script), settings_for(tmp_path), tokenizer)


@pytest.mark.parametrize("held_out", [1, 12, 38, 39])
def test_held_out_pairs_too_few_to_measure_an_accuracy_are_a_warning_with_its_interval(held_out, tokenizer, tmp_path):
    test = [pair(f"u:t{n}", f"a:y{n}") for n in range(held_out)]
    findings = measured([pair("u:q")], test, tokenizer, tmp_path).findings
    found = [finding for finding in findings if finding.name == "few_held_out"]
    assert bool(found) == (held_out < 39)
    if held_out == 12:
        low, high = binomtest(6, 12).proportion_ci(method="wilson")
        assert found[0].text == (
            "Number of held-out pairs: 12. An accuracy of 0.50 on them will have the 95 % interval "
            f"[{low:.2f}, {high:.2f}]."
        )
        assert "--held_out" in found[0].remedy


def test_the_share_is_held_out_and_refused_where_the_data_has_test_pairs(tokenizer, tmp_path):
    train, test = [pair(f"u:t{n}", f"a:y{n}") for n in range(200)], [pair("u:z")]
    assert 40 <= len(measured(train, [], tokenizer, tmp_path, held_out=0.3).pairs["test"]) <= 80
    refusal = r"held_out=0.3 has no effect here: the data has test pairs of its own"
    with pytest.raises(RecipeError, match=refusal):
        measured(train, test, tokenizer, tmp_path, held_out=0.3)
    with pytest.raises(RecipeError, match=refusal):  # a recipe that makes its own splits
        prepare(train, test, tokenizer=tokenizer, tmp_path=tmp_path, held_out=0.3)


def test_findings_name_the_lines_of_the_file_and_no_trainer_sees_the_names(tokenizer, tmp_path):
    rows = [{"prompt": f"Question {n}?", "chosen": f"Yes {n}.", "rejected": "No."} for n in range(60)]
    file = tmp_path / "pairs.jsonl"
    alike = {**rows[7], "rejected": rows[7]["chosen"]}
    file.write_text("\n".join(json.dumps(row) for row in [*rows, alike, *rows[:9]]))

    def load_pairs(script_args):
        return split_pairs({split: preference_jsonl(part) for split, part in load_rows(script_args).items()})

    script_args = RecipeArguments(dataset_name=str(file), held_out=0.5)
    found = measure_pairs(load_pairs, script_args, settings_for(tmp_path), tokenizer)
    assert found.data["splits"]["train"]["dropped"]["identical_completions"]["first"] == [f"{file}, line 61"]
    for each in found.data["rendered"]:
        prompt = found.pairs["train"]["prompt"][found.pairs["train"]["_row"][:].index(each["row"])][0]["content"]
        assert prompt in file.read_text().splitlines()[int(each["row"].rpartition("line ")[2]) - 1]
    copies = find_signals(found.pairs)["duplicates"]["rows"]
    assert copies
    for later, earlier in copies:
        lines = [int(name.removeprefix(f"{file}, line ")) for name in (later, earlier)]
        assert lines[0] - lines[1] == 61
    assert set(prepare_pairs(load_pairs, script_args, settings_for(tmp_path), tokenizer)["train"].column_names) == {
        *("prompt", "chosen", "rejected")
    }


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (["a.csv, row 2", "a.csv, row 5"], "a.csv, row 2; row 5"),
        ([["a, line 2", "a, line 1"], ["a, line 9", "b, line 1"]], "a, line 2 and line 1; line 9 and b, line 1"),
        (["row 1", "row 2"], "row 1; row 2"),
        ([], ""),
    ],
)
def test_names_of_rows_say_each_file_once(rows, words):
    assert in_words(rows) == words
