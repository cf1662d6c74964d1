"""`dpo-recipes inspect` describes the tokens that TRL makes, and finds the faults of a chat template."""

import json
import os
import shutil
import sys
import types
from pathlib import Path

import pytest
from commands import run_command
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from trl import SFTConfig

from dpo_recipes.cli import main
from dpo_recipes.dataset_adapters import hh_rlhf, preference_jsonl
from dpo_recipes.doctor.miniature import CHAT_TEMPLATE
from dpo_recipes.errors import RecipeError
from dpo_recipes.loading import load_rows, split_pairs
from dpo_recipes.machine import card_memory
from dpo_recipes.models.pair_ids import encode_pairs
from dpo_recipes.preflight.cost import cost_findings, estimate_cost
from dpo_recipes.preflight.findings import (
    CHECKS,
    THRESHOLDS,
    Finding,
    finding_lines,
    judge,
    judged,
    set_thresholds,
)
from dpo_recipes.preflight.prepare import measure_pairs, prepare_pairs
from dpo_recipes.preflight.tokens import MEASURES, SIDES, fit, render
from dpo_recipes.recipe import RecipeArguments

DATA = os.environ.get("DPO_RECIPES_DATA")
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = "the quick brown fox jumps over a lazy dog and says hello there while it runs \n\n and\n on "


def pair(prompt="Why?", chosen="Because.", rejected="No."):
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


def bpe_tokenizer(template=CHATML, **special):
    """Byte-level BPE that merges across words' letters and line breaks, so that a wrong cut would show."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    tokens = ["<|im_start|>", "<|im_end|>", "<s>", *special.get("extra", [])]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=tokens, initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    bpe.train_from_iterator([WORDS * 3, "assistant\n\nuser\nsystem\n"], trainer)
    names = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "bos_token": special.get("bos")}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, **names)
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def chatml():
    return bpe_tokenizer()


@pytest.fixture(scope="module")
def tiny(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)  # one token a byte


def as_trl_tokenises(pairs, tokenizer):
    from trl import DPOTrainer

    trainer = types.SimpleNamespace(_tokenizer=tokenizer)
    args = types.SimpleNamespace(max_length=None, truncation_mode="keep_start", dataset_num_proc=None)
    return DPOTrainer._prepare_dataset(trainer, pairs, tokenizer, args, "train")


def assert_ids_are_trls(rows, tokenizer):
    pairs = Dataset.from_list(rows)
    ours = encode_pairs([render(*(row[side] for side in SIDES), tokenizer=tokenizer) for row in rows], tokenizer)
    theirs = as_trl_tokenises(pairs, tokenizer)
    assert len(ours) == len(theirs) == len(rows) > 0
    for mine, row in zip(ours, theirs, strict=True):
        assert (mine.prompt, mine.chosen, mine.rejected) == (row["prompt_ids"], row["chosen_ids"], row["rejected_ids"])
    return ours


# The ids are TRL's

pieces = st.sampled_from([*"abehlo wrd\n<|>", "é", "<|im_end|>", "<|im_start|>", " the quick"])
content = st.lists(pieces, max_size=12).map("".join)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(content, content, content, content), min_size=1, max_size=5))
def test_the_ids_are_those_that_dpo_trainer_makes(chatml, drawn):
    rows = []
    for before, prompt, chosen, rejected in drawn:
        row = pair(prompt + "?", chosen + "x", rejected + "y")
        if before.strip():
            turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": before}]
            row["prompt"] = turns + row["prompt"]
        rows.append(row)
    assert_ids_are_trls(rows, chatml)


@pytest.mark.skipif(DATA is None, reason="DPO_RECIPES_DATA names no folder of real data")
@pytest.mark.parametrize("name", ["chatml", "tinytalk-3m", "stories260k"])
def test_the_ids_of_real_rows_are_those_that_dpo_trainer_makes(name, chatml):
    tokenizer = chatml
    if name != "chatml":
        tokenizer = AutoTokenizer.from_pretrained(Path(DATA or "").parent / "models" / name)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = CHATML.replace("<|im_start|>", "<s>").replace("<|im_end|>", "</s>")
    tokenizer.model_max_length = 10**6
    folder = str(Path(DATA or "", "hh-rlhf", "harmless-base"))
    pairs = hh_rlhf(load_rows(RecipeArguments(dataset_name=folder))["test"])
    ids = assert_ids_are_trls(list(pairs)[:250], tokenizer)
    assert not any(three.left_out for three in ids)


def test_plain_text_gets_its_special_tokens_from_the_tokenizer(chatml):
    from tokenizers.processors import TemplateProcessing

    tokenizer = bpe_tokenizer(template=None, bos="<s>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    rows = [{"prompt": "the quick", "chosen": " brown fox", "rejected": " dog<|im_end|>"}]
    [ids] = assert_ids_are_trls(rows, tokenizer)
    assert ids.prompt[0] == tokenizer.bos_token_id
    assert ids.prompt[1] != tokenizer.bos_token_id
    assert ids.chosen[-1] == tokenizer.eos_token_id


def test_a_token_between_blanks_alone_is_none_in_the_middle_of_a_word():
    odd = bpe_tokenizer(template="{% for m in messages %}{{ m['content'] + 'fox' + eos_token }}{% endfor %}")
    odd.add_tokens([AddedToken("fox", single_word=True, special=True)], special_tokens=True)
    rows = [pair("the quick", "brown", "lazy")]
    assert_ids_are_trls(rows, odd)


# What is wrong with a template is found


def settings_for(tmp_path, **others):
    return types.SimpleNamespace(output_dir=str(tmp_path), max_length=None, trust_remote_code=False, **others)


def arguments(**others):
    """Settings of pairs so few that how many are held out is not looked at."""
    return RecipeArguments(**{"dataset_name": "rows", "threshold": ["few_held_out=1"]} | others)


def measured(rows, tokenizer, tmp_path, **script):
    pairs = DatasetDict(train=Dataset.from_list(rows), test=Dataset.from_list([pair("Held out?")]))
    script_args = arguments(**script)
    return measure_pairs(lambda _: pairs, script_args, settings_for(tmp_path), tokenizer)


def found(rows, tokenizer, tmp_path, **script):
    return {finding.name: finding for finding in measured(rows, tokenizer, tmp_path, **script).findings}


ROWS = [pair(f"the quick {number}", f"brown fox {number}", f"lazy dog {number}") for number in range(5)]
BROKEN = {
    "double_bos": "{{ bos_token + bos_token }}" + CHATML,
    "no_generation_prompt": CHATML.partition("{% if add_generation_prompt")[0],
    "without_eos": CHATML.replace("<|im_end|>", "###"),
    "prompt_not_prefix": CHATML.replace("assistant\n' }}", "assistant\nthink: ' }}"),
}


def test_nothing_is_found_where_nothing_is_wrong(chatml, tiny, tmp_path):
    assert found(ROWS, chatml, tmp_path) == {}  # a line break stands after its EOS
    assert found(ROWS, tiny, tmp_path) == {}
    one_bos = bpe_tokenizer("{{ bos_token }}" + CHATML, bos="<s>")
    assert found(ROWS, one_bos, tmp_path) == {}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_template_is_found_by_its_tokens(name, tmp_path):
    broken = bpe_tokenizer(BROKEN[name], bos="<s>")
    findings = found(ROWS, broken, tmp_path)
    assert list(findings) == [name]
    assert findings[name].level == ("failure" if name in ("double_bos", "without_eos") else "warning")
    assert findings[name].remedy


def test_a_header_in_the_users_turn_is_a_generation_prompt(tmp_path):
    template = "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'User: ' + m['content'] + '\nBot:' }}{% else %}"
    template += "{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    assert found(ROWS, bpe_tokenizer(template), tmp_path) == {}


def test_single_pairs_without_an_end_are_a_warning(tmp_path):
    template = CHATML.replace("+ '<|im_end|>'", "+ ('' if 'brown fox 3' in m['content'] else '<|im_end|>')")
    finding = found(ROWS, bpe_tokenizer(template), tmp_path)["without_eos"]
    assert finding.level == "warning"
    assert finding.text.startswith("1 of 6 pairs")


def test_a_stop_token_in_the_middle_of_an_answer_is_found(chatml, tiny, tmp_path):
    inside = [pair("the quick", "brown<|im_end|> fox", "lazy dog"), *ROWS]
    finding = found(inside, chatml, tmp_path)["eos_inside"]
    assert finding.level == "warning"
    assert finding.text.startswith("1 of 7 pairs")
    twice = bpe_tokenizer(CHATML + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}")
    assert found(ROWS, twice, tmp_path) == {}, "two at the end"
    turns = [*pair()["chosen"], {"role": "user", "content": "And?"}, {"role": "assistant", "content": "the end"}]
    assert [*found([{**pair(), "chosen": turns}, *ROWS], chatml, tmp_path)] == ["other_turns"], "each turn has its own"
    # Plain text brings its own EOS token, too.
    plain = [{"prompt": f"the {n}", "chosen": " fox<eos>", "rejected": " dog" + n * "<eos> on"} for n in range(2)]
    pairs = DatasetDict(train=Dataset.from_list(plain), test=Dataset.from_list([{**plain[0], "prompt": "?"}]))
    script_args = arguments()
    result = measure_pairs(lambda _: pairs, script_args, settings_for(tmp_path), tiny)
    assert [found.name for found in result.findings] == ["eos_inside"]


def test_a_stop_token_of_the_models_generation_settings_ends_an_answer(tiny, tmp_path):
    for stops, expected in (([], ["without_eos"]), ([0, 1], [])):
        tokenizer = bpe_tokenizer()
        tokenizer.eos_token = "<s>"  # as with Gemma: the template's end of a turn is another one
        folder = tmp_path / str(len(stops))
        tokenizer.save_pretrained(folder)
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
        assert list(found(ROWS, AutoTokenizer.from_pretrained(folder), tmp_path)) == expected


def test_what_a_pair_looks_like_is_shown_token_by_token(chatml, tmp_path):
    data = measured(ROWS, chatml, tmp_path).data
    assert [shown["split"] for shown in data["rendered"]] == ["train"] * 3
    for shown in data["rendered"]:
        number = int(shown["row"].removeprefix("row ")) - 1
        for side, completion in (("chosen", "brown fox"), ("rejected", "lazy dog")):
            tokens, ids, trained = (shown["sides"][side][key] for key in ("tokens", "ids", "trained"))
            assert len(tokens) == len(ids) == len(trained)
            text = f"<|im_start|>user\nthe quick {number}<|im_end|>\n<|im_start|>assistant\n"
            at = shown["sides"][side]["prompt_tokens"]
            assert "".join(tokens[:at]) == text
            assert "".join(tokens[at:]) == f"{completion} {number}<|im_end|>\n"
            assert trained == [0] * at + [1] * (len(ids) - at)


# Rows and tokens add up


def test_token_statistics_are_those_of_the_pairs_kept(tiny, tmp_path):
    rows = [pair("q" * n, "c" * 3, "r" * n) for n in range(1, 11)]
    data = measured(rows, tiny, tmp_path).data
    train = data["tokens"]["train"]
    around = len("User: \n") + len("Bot:")
    assert train["prompt"]["mean"] == pytest.approx(5.5 + around)
    assert train["prompt"]["p50"] == 5.5 + around
    assert train["rejected"]["max"] == 10 + len(" ") + 1  # and <eos>
    assert train["chosen"]["total"] == 10 * 5
    assert train["longest_pair"] == 10 + around + 11 + 1
    for side in SIDES:
        assert sum(train[side]["histogram"]["counts"]) == 10
        assert len(train[side]["histogram"]["edges"]) == len(train[side]["histogram"]["counts"]) + 1
    assert data["chat_template"] is True


def test_what_plain_trl_would_cut_into_is_counted(tiny, tmp_path):
    long = pair("x" * 60)
    long["prompt"] = [*pair("y" * 60)["prompt"], {"role": "assistant", "content": "z"}, *pair("short")["prompt"]]
    pairs = DatasetDict(train=Dataset.from_list([pair(), long, pair("w" * 60)]), test=Dataset.from_list([pair("?")]))
    training_args = settings_for(tmp_path)
    training_args.max_length = 50
    script_args = arguments()
    result = measure_pairs(lambda _: pairs, script_args, training_args, tiny)
    train = result.data["tokens"]["train"]
    assert (train["shortened"], train["completion_at_risk"]) == (1, 2)
    assert train["cut_from"] == {"prompt": len("User: \n") + 60 + len("Bot: z") + 1, "chosen": 0, "rejected": 0}
    assert [finding.name for finding in result.findings] == ["completion_at_risk"]
    assert "2 of 3 training pairs are over max_length: 1 were dropped, 1 lost" in result.findings[0].text


def test_test_pairs_that_are_drawn_from_do_not_change_the_share_over_max_length(tiny, tmp_path):
    test = [pair(f"{n}{'w' * (60 if n % 2 else 1)}") for n in range(40)]
    pairs = DatasetDict(train=Dataset.from_list([pair(str(n)) for n in range(100, 130)]), test=Dataset.from_list(test))
    training_args = settings_for(tmp_path)
    training_args.max_length = 50
    script_args = arguments(eval_pairs=2)
    result = measure_pairs(lambda _: pairs, script_args, training_args, tiny)
    assert result.findings == []
    assert result.data["tokens"]["test"]["completion_at_risk"] == 20


def test_rows_with_faults_of_their_own_are_warned_of_and_choices_are_not(tiny, tmp_path):
    assert list(found([*ROWS, pair("same?", "a", "a")], tiny, tmp_path)) == ["dropped"]
    assert list(found([*ROWS, pair("Held out?", "a", "b")], tiny, tmp_path)) == [], "prompt_in_test"


anything = st.one_of(st.none(), st.text("ab \n", max_size=6), st.sampled_from(["yes", "no", "x" * 90]))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(anything, anything, anything), min_size=1, max_size=12))
def test_every_row_is_accounted_for_whatever_the_rows_are(tiny, tmp_path_factory, drawn):
    tmp_path = tmp_path_factory.mktemp("account")
    drawn = [("first", "a", "b"), ("held out 1", "a", "b"), *drawn]
    rows = Dataset.from_list([dict(zip(SIDES, row, strict=True)) for row in drawn])
    test = Dataset.from_list([pair(f"held out {number}") for number in range(4)], split="test")
    training_args = settings_for(tmp_path)
    training_args.max_length = 60
    script_args = arguments(eval_pairs=2)
    load_pairs = lambda _: split_pairs({"train": preference_jsonl(rows), "test": preference_jsonl(test)})  # noqa: E731
    result = measure_pairs(load_pairs, script_args, training_args, tiny)
    splits = result.data["splits"]
    for split, account in splits.items():
        dropped = sum(drop["count"] for drop in account["dropped"].values())
        assert account["rows"] + account["moved"] == account["kept"] + account["not_sampled"] + dropped
        assert account["kept"] == len(result.pairs[split])
        tokens = result.data["tokens"][split]
        assert tokens["prompt"]["total"] == sum(result.pairs[split]["prompt_tokens"])
        assert tokens["longest_pair"] <= 60
    assert (splits["train"]["rows"], splits["test"]["rows"]) == (len(drawn), 4)
    assert splits["train"]["dropped"]["prompt_in_test"]["count"] == 1
    assert splits["test"]["not_sampled"] == 2


# Thresholds and verdicts


def test_thresholds_are_set_by_name_and_anything_else_is_refused():
    assert set_thresholds(None) == THRESHOLDS
    assert set_thresholds(["dropped=.5"]) == THRESHOLDS | {"dropped": 0.5}
    for wrong in ("drop=0.5", "dropped", "dropped=", "dropped=many", "=1", "longer=70", "longer=-0.1", "longer=7e-1"):
        with pytest.raises(RecipeError, match=f"--threshold {wrong} is not of the form"):
            set_thresholds([wrong])


def test_a_finding_is_above_its_threshold_and_the_worst_one_decides():
    thresholds = {"without_eos": 0.1, "without_eos_failure": 0.5}
    levels = [[finding.level for finding in judge("without_eos", count, 10, thresholds)] for count in (1, 2, 5, 6)]
    assert levels == [[], ["warning"], ["warning"], ["failure"]]
    both = judge("without_eos", 2, 10, thresholds) + judge("without_eos", 6, 10, thresholds)
    assert [judged(part)["verdict"] for part in (both, both[:1], [])] == ["failures", "warnings", "ok"]


def test_four_findings_are_shown_the_failures_first_and_the_rest_named():
    names = ["longer", "list", "refusal", "formatting", "full_stop", "double_bos"]
    levels = ["failure" if name == "double_bos" else "warning" for name in names]
    findings = [Finding(name, level, "Text.", "Remedy.") for name, level in zip(names, levels, strict=True)]
    lines = finding_lines(findings)
    assert lines[0] == "Failure (double_bos): Text. Remedy."
    assert lines[1:4] == [f"Warning ({name}): Text. Remedy." for name in names[:3]]
    assert lines[4:] == ["2 more: formatting, full_stop"]
    assert len(finding_lines(findings[:4])) == 4


def test_every_check_has_a_threshold_a_text_and_a_remedy():
    assert len(CHECKS) >= 7
    for name, check in CHECKS.items():
        assert {"text", "remedy"} < set(check), name
        assert {"warning", "failure"} & set(check), name


def test_a_failure_stops_a_run_unless_its_threshold_is_raised(tmp_path, capsys):
    broken = bpe_tokenizer(BROKEN["double_bos"], bos="<s>")
    pairs = DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list([pair("Held out?")]))
    script_args = arguments(threshold=None)
    with pytest.raises(RecipeError, match="--threshold double_bos_failure=1"):
        prepare_pairs(lambda _: pairs, script_args, settings_for(tmp_path), broken)
    assert "Failure (double_bos): 6 of 6 pairs" in capsys.readouterr().out
    assert json.loads((tmp_path / "preflight.json").read_text())["verdict"] == "failures"
    script_args.threshold = ["double_bos_failure=1"]
    kept = prepare_pairs(lambda _: pairs, script_args, settings_for(tmp_path), broken)
    assert set(kept["train"].column_names) == set(SIDES)


def test_supervised_fine_tuning_may_start_from_a_template_of_another_end(tmp_path):
    pairs = DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list([pair("Held out?")]))
    script_args = arguments()
    training_args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, activation_checkpointing=False)
    result = measure_pairs(lambda _: pairs, script_args, training_args, bpe_tokenizer(BROKEN["without_eos"]))
    assert [finding.level for finding in result.findings] == ["warning"]


def test_training_does_not_stream(tmp_path, tiny):
    script_args = RecipeArguments(dataset_name="rows.jsonl", dataset_streaming=True)
    with pytest.raises(RecipeError, match=r"a part of a large dataset is rows\.jsonl:50000"):
        prepare_pairs(lambda _: None, script_args, settings_for(tmp_path), tiny)


# Cost


def lengths(*rows):
    return Dataset.from_dict(dict(zip((f"{side}_tokens" for side in SIDES), zip(*rows, strict=True), strict=True)))


def cpu_args(folder, *, batch):
    from trl import DPOConfig

    machine = dict(use_cpu=True, bf16=False, activation_checkpointing=False)
    return DPOConfig(output_dir=str(folder), per_device_train_batch_size=batch, **machine)


def test_cost_counts_what_is_padded_and_what_is_repeated(tiny_model, tmp_path):
    training_args = cpu_args(tmp_path, batch=2)
    script_args = RecipeArguments(pairs_per_update=2)
    pairs = lengths((10, 5, 3), (10, 5, 3), (10, 5, 3), (10, 5, 3))
    script_args.settings = {"model_name_or_path": str(tiny_model), "per_device_train_batch_size": 2, "max_length": 1024}
    cost = estimate_cost(pairs, script_args, training_args, card=("the 24GB card", 24 * 2**30))
    assert (cost["pairs_per_epoch"], cost["updates"]) == (4, 6)  # DPOConfig trains three epochs
    assert (cost["real_tokens"], cost["padded_tokens"]) == (4 * 28, 4 * 2 * 15)
    assert cost["padding_share"] == pytest.approx(1 - 112 / 120)
    assert cost["prefix_share"] == pytest.approx(40 / 112)
    assert cost["shared_prefix_speedup"] == pytest.approx(120 / (4 * 18))
    assert cost["memory_total"] == sum(cost["memory"].values())
    tokens, hidden, keys, inner, layers = 2 * 18, 64, 32, 128, 2  # of the longest batch there is, with shared prompts
    kept = 2 * hidden + 3 * hidden + 3 * keys + 4 * inner + 2 * 2 * hidden
    assert cost["memory"]["activations"] == tokens * (kept * layers + 3 * hidden) * 4
    assert cost["fits"] == {"name": "the 24GB card", "bytes": 24 * 2**30, "fits": True}
    assert cost_findings(cost, THRESHOLDS) == []
    small = {**cost, "fits": {**cost["fits"], "bytes": cost["memory_total"]}}
    assert [finding.name for finding in cost_findings(small, THRESHOLDS)] == ["memory"]


def test_padding_is_that_of_batches_as_trl_makes_them(tiny_model, tmp_path):
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    training_args = cpu_args(tmp_path, batch=3)
    rows = [(5, 2, 9), (4, 7, 1), (8, 1, 1)]
    script_args = RecipeArguments(pairs_per_update=3)
    script_args.settings = {"model_name_or_path": str(tiny_model), "per_device_train_batch_size": 3}
    cost = estimate_cost(lengths(*rows), script_args, training_args)
    ids = [{f"{side}_ids": [1] * count for side, count in zip(SIDES, row, strict=True)} for row in rows]
    batch = DataCollatorForPreference(pad_token_id=0)(ids)
    assert cost["padded_tokens"] == batch["input_ids"].numel()
    assert cost["real_tokens"] == batch["attention_mask"].sum()


def test_a_card_is_named_by_its_memory():
    assert [card_memory(name) for name in ("24GB", "24 GiB", "80g", "16")] == [24576, 24576, 81920, 16384]
    for wrong in ("A100", "24MB", "", "0GB"):
        with pytest.raises(RecipeError, match="names no card"):
            card_memory(wrong)


# The command


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dpo-recipes"])
    return tmp_path


@pytest.fixture(scope="module")
def no_weights(tiny_model, tmp_path_factory):
    """The tiny model without its weights: an inspection needs none."""
    folder = tmp_path_factory.mktemp("bare") / "model"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def test_a_recipe_that_learns_from_prompts_alone_has_no_pairs_to_inspect(here, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["inspect", "hh-rlhf-ppo", "--gpu", "24GB"])
    assert ended.value.code == 2
    assert "Inspect the pairs by a recipe that learns from them" in capsys.readouterr().err


def test_a_reward_recipe_is_inspected_as_pairs_without_a_reference(here, hh_rows, no_weights, capsys):
    flags = ["--dataset_name", str(hh_rows), "--model_name_or_path", str(no_weights), "--pairs_per_update", "8"]
    assert main(["inspect", "hh-rlhf-reward", "--gpu", "24GB", *flags, "--threshold", "longer=1"]) == 0
    cost = json.loads((here / "outputs" / "inspect" / "hh_rlhf_reward" / "preflight.json").read_text())["cost"]
    assert "logits" not in cost["memory"]
    assert (cost["prefix_share"], cost["shared_prefix_speedup"]) == (0.0, 1.0)
    assert cost["padded_tokens"] >= cost["real_tokens"] > 0


def test_a_recipe_is_inspected_with_its_own_settings(here, hh_rows, no_weights, capsys):
    flags = ["--dataset_name", str(hh_rows), "--model_name_or_path", str(no_weights), "--pairs_per_update", "8"]
    assert main(["inspect", "hh-rlhf-lora", "--gpu", "24GB", *flags, "--threshold", "longer=1"]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) <= 45
    folder = here / "outputs" / "inspect" / "hh_rlhf_lora"
    assert {path.name for path in folder.iterdir()} == {"preflight.json", "preflight.html"}
    data = json.loads((folder / "preflight.json").read_text())
    assert (data["recipe"], data["max_length"], data["part"]) == ("hh_rlhf_lora", 1024, None)
    assert data["thresholds"]["longer"] == 1
    assert data["signals"]
    assert data["off_distribution"] is None
    assert data["total"]["kept"] == 120
    assert data["cost"]["updates"] == -(-data["splits"]["train"]["kept"] // 8)
    assert data["cost"]["fits"]["bytes"] == 24 * 2**30
    assert data["cost"]["batch"] == 8, "the profile local, which a card of 24 GB takes, holds 8,192 tokens at a time"
    assert f"Verdict: {data['verdict']}" in out
    assert data["verdict"] == ("warnings" if data["findings"] else "ok")


def test_a_dataset_is_inspected_by_its_columns(here, rows_of, no_weights, capsys):
    flags = ["--model_name_or_path", str(no_weights), "--max_length", "60"]
    assert main(["inspect", str(rows_of["shp"]), *flags, "--profile", "cpu"]) == 0
    data = json.loads((here / "outputs" / "inspect" / "shp" / "preflight.json").read_text())
    assert (data["recipe"], data["dataset"], data["max_length"]) == (None, str(rows_of["shp"]), 60)
    assert data["cost"]["fits"]["name"].startswith("this machine")
    own = here / "own.jsonl"
    own.write_text("".join(json.dumps({"q": f"q{n}", "good": f"g{n}", "bad": f"b{n}"}) + "\n" for n in range(30)))
    assert main(["inspect", str(own), *flags, "--columns", "prompt=q,chosen=good,rejected=bad"]) == 0
    assert json.loads((here / "outputs" / "inspect" / "own" / "preflight.json").read_text())["total"]["kept"] == 30


def test_of_a_stream_the_first_rows_are_inspected_and_called_a_part(here, hh_rows, no_weights, capsys):
    flags = ["--model_name_or_path", str(no_weights), "--dataset_streaming", "true"]
    assert main(["inspect", f"{hh_rows}", "--dataset_name", f"{hh_rows}:40", *flags]) == 0
    data = json.loads((here / "outputs" / "inspect" / hh_rows.stem / "preflight.json").read_text())
    assert data["total"]["rows"] == 40
    assert data["part"] == "the first rows of each split"
    assert "the first rows of each split" in capsys.readouterr().out.splitlines()[0]


def test_a_failure_ends_with_status_2_and_leaves_the_page(here, no_weights, hh_rows, capsys):
    broken = here / "model"
    shutil.copytree(no_weights, broken)
    (broken / "chat_template.jinja").write_text(CHAT_TEMPLATE.replace("+ eos_token ", ""))
    with pytest.raises(SystemExit) as ended:
        main(["inspect", str(hh_rows), "--model_name_or_path", str(broken)])
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert "Failure (without_eos): 120 of 120 pairs" in captured.out
    assert "without_eos_failure=1" in captured.err
    assert (here / "outputs" / "inspect" / hh_rows.stem / "preflight.html").stat().st_size > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["hh-rlhf-lorra"], "Did you mean hh-rlhf-lora"),
        (["nowhere.jsonl", "--model_name_or_path", "MODEL"], "There is no file or folder nowhere.jsonl"),
        (["ROWS"], "No model is named"),
        (["ROWS", "--model_name_or_path", "MODEL", "--betta", "1"], "betta"),
        (["ROWS", "--model_name_or_path", "MODEL", "--threshold", "nothing=1"], "--threshold nothing=1 is not of"),
        (["ROWS", "--gpu", "A100"], "names no card"),
        (["quickstart"], "Train it first: dpo-recipes train quickstart-sft"),
        (["own.py"], "lacks RECIPE or load_pairs"),
    ],
)
def test_a_wrong_call_ends_with_status_2(words, message, here, no_weights, hh_rows, capsys):
    (here / "own.py").write_text("RECIPE = {}\n")
    names = {"ROWS": str(hh_rows), "MODEL": str(no_weights)}
    try:
        status = main(["inspect", *(names.get(word, word) for word in words)])
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_what_a_user_types_runs_and_training_prints_the_same_account(tmp_path, tiny_model, hh_rows, dpo_recipes):
    flags = ["--profile", "cpu", "--dataset_name", hh_rows, "--model_name_or_path", tiny_model]
    result = run_command(dpo_recipes, "inspect", "hh-rlhf-lora", *flags, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    account = [line for line in result.stdout.splitlines() if line.startswith(("rows", "pairs", "tokens of"))]
    assert len(account) == 3
    planned = run_command(dpo_recipes, "train", "hh-rlhf-lora", *flags, "--dry_run", "true", cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr
    assert all(line in planned.stdout for line in account)


def test_the_measures_are_columns_of_the_pairs_that_fit(tiny):
    assert set(fit(Dataset.from_list(ROWS), tiny, None, split="train").column_names) == {*SIDES, *MEASURES}
