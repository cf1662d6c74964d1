"""Ours and TRL's own step give the same rows, columns and ids, with every chat template that TRL brings along."""

import copy
import gzip
import json
import os
import re
import types
from pathlib import Path

import pytest
import trl
from datasets import Dataset, load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import logger

from dpo_recipes.dataset_adapters import hh_rlhf, ultrafeedback_binarized
from dpo_recipes.models import pair_ids as tokenization
from dpo_recipes.models.pair_ids import prepare_dataset, split_tokens
from dpo_recipes.shared_prefix import SharedPrefixDPOTrainer

DATA = os.environ.get("DPO_RECIPES_DATA")
FIXTURES = Path(__file__).parents[1] / "fixtures"
TEMPLATES = sorted(Path(trl.__file__).with_name("chat_templates").glob("*.jinja"))
COLUMNS = ["prompt_ids", "chosen_ids", "rejected_ids"]


def message(content, role="user"):
    return {"role": role, "content": content}


def pair(prompt, chosen, rejected):
    """A pair from the texts of its turns, the user's and the assistant's in turn."""
    turns = [message(text, ("user", "assistant")[index % 2]) for index, text in enumerate(prompt)]
    return {"prompt": turns, "chosen": [message(chosen, "assistant")], "rejected": [message(rejected, "assistant")]}


AWKWARD = [
    pair(["hello"], "hi", "no"),
    pair(["one", "two", "three\n\n"], " lead", "trail "),
    pair(["<|im_end|> <|im_start|>assistant\n<eos>"], "<|im_start|>", "<think>a</think>\n\nb"),
    pair(["naïve ﬁ 日本語 🙂‍↔️\u200d e\u0301"], "🙂" * 3, "\t\r\n x"),
    pair([" "], "same start, then this", "same start, then that"),
    pair(["a\n\n\nb   c"], "<", "<|"),
]


def byte_tokenizer(texts, specials):
    """A byte-level BPE tokenizer, trained on the spot."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(specials)})
    return tokenizer


def markers(template):
    """What looks like a special token in a chat template."""
    shapes = (r"<\|[^|'\"{}\s]+\|>", r"</?[a-z_]+>", r"<\uff5c[^'\"{}\s]+?\uff5c>", r"\[/?[A-Z_]+\]")
    return {found for shape in shapes for found in re.findall(shape, template)} - {"<eos>"}


def metaspace_tokenizer(texts, *, scheme):
    """A tokenizer that writes a space before the first piece or before every one, as those of Llama 2 and Gemma do."""
    model = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    model.normalizer = normalizers.NFKC()
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    model.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=1500, special_tokens=special, show_progress=False))
    model.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<eos>", pad_token="<pad>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<think>"]})
    return tokenizer


def word_tokenizer(texts):
    """WordPiece with an accent-stripping normaliser and a closing token, as BERT has them."""
    model = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    model.normalizer = normalizers.BertNormalizer(lowercase=True)
    model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=600, special_tokens=["[UNK]", "[SEP]"], show_progress=False)
    model.train_from_iterator(texts, trainer)
    model.post_processor = processors.TemplateProcessing(single="$A [SEP]", special_tokens=[("[SEP]", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="[SEP]", pad_token="[UNK]")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


def prepared(prepare, pairs, tokenizer, *, max_length=None, truncation_mode="keep_start"):
    args = types.SimpleNamespace(max_length=max_length, truncation_mode=truncation_mode, dataset_num_proc=None)
    return prepare(types.SimpleNamespace(_tokenizer=tokenizer), pairs, tokenizer, args, "train")


def assert_same(rows, tokenizer, **settings):
    """TRL's rows, after a check that ours are the same."""
    pairs = rows if isinstance(rows, Dataset) else Dataset.from_list(rows)
    theirs = prepared(DPOTrainer._prepare_dataset, pairs, tokenizer, **settings)
    ours = prepared(prepare_dataset, pairs, tokenizer, **settings)
    assert ours.features == theirs.features
    assert ours[:] == theirs[:]
    return theirs


def conversations():
    """The pairs of the fixtures and, where there are real data, of all sets that dataset adapters can read."""
    rows = AWKWARD + list(hh_rlhf(Dataset.from_list(lines(FIXTURES / "hh_rlhf.jsonl"))))
    for file in sorted(Path(DATA).glob("hh-rlhf/*/*.jsonl.gz")) if DATA else []:
        rows += hh_rlhf(Dataset.from_list(lines(file)))
    for file in sorted(Path(DATA).glob("ultrafeedback-binarized-sample/*.jsonl.gz")) if DATA else []:
        rows += ultrafeedback_binarized(Dataset.from_list(lines(file)))
    for file in sorted(Path(DATA).glob("dpo-en-demo/*.jsonl.gz")) if DATA else []:
        for row in lines(file):
            texts = [turn["value"] for turn in row["conversations"] if turn["from"] != "system"]
            rows.append(pair(texts, row["chosen"]["value"], row["rejected"]["value"]))
    for file in sorted(Path(DATA).glob("alpaca-eval-preferences/*.jsonl.gz")) if DATA else []:
        rows += [pair([row["instruction"]], row["chosen"], row["rejected"]) for row in lines(file)]
    for file in sorted(Path(DATA).glob("stack-exchange-paired-tiny/*.jsonl.gz")) if DATA else []:
        rows += [pair([row["question"]], row["response_j"], row["response_k"]) for row in lines(file)]
    for file in sorted(Path(DATA).glob("llmbar/*.jsonl.gz")) if DATA else []:
        rows += [pair([row["input"]], row["output_1"], row["output_2"]) for row in lines(file)]
    return [{column: row[column] for column in ("prompt", "chosen", "rejected")} for row in rows]


def lines(file):
    text = gzip.decompress(file.read_bytes()).decode() if file.suffix == ".gz" else file.read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def rows():
    return conversations()


@pytest.fixture(scope="module")
def texts(rows):
    return [turn["content"] for row in rows[:300] for turn in row["prompt"] + row["chosen"]]


def accepted(rows, tokenizer):
    """The rows that the tokenizer's chat template does not refuse."""
    kept = []
    for row in rows:
        try:
            tokenizer.apply_chat_template(row["prompt"] + row["chosen"], tokenize=False)
            kept.append(row)
        except Exception:  # templates raise what they like, and TRL lets it pass
            continue
    return kept


def in_parts(row):
    """The pair as templates of image models take it: a content is a list of parts."""
    return {
        column: [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
        for column, turns in row.items()
    }


# Identical ids


@pytest.mark.slow
@pytest.mark.parametrize("template", TEMPLATES, ids=lambda file: file.stem)
def test_every_chat_template_of_trl_gives_the_same_ids(template, rows, texts):
    tokenizer = byte_tokenizer(texts[:200], markers(template.read_text()) | {"<|im_start|>", "<|im_end|>"})
    tokenizer.chat_template = template.read_text()
    few = [*AWKWARD, *rows[6::1500]]
    few = accepted(few, tokenizer) or accepted(map(in_parts, few), tokenizer)
    assert len(few) > 6
    assert_same(few, tokenizer)


def test_templates_were_found():
    assert len(TEMPLATES) > 50


@pytest.mark.slow
@pytest.mark.skipif(DATA is None, reason="DPO_RECIPES_DATA names no folder of real data")
@pytest.mark.parametrize(("name", "step"), [("qwen2_5", 1), ("gemma3", 6), ("tinytalk-3m", 6), ("stories260k", 6)])
def test_real_rows_give_the_same_ids(name, step, rows, texts):
    """Every row for the first, one in six for the others, whose ids were the same for all rows."""
    folder = Path(DATA).parent / "models" / name
    template = TEMPLATES[0].with_name(f"{'qwen2_5' if folder.exists() else name}.jinja").read_text()
    if folder.exists():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = tokenizer.chat_template or template
    else:
        tokenizer = byte_tokenizer(texts, markers(template))
        tokenizer.chat_template = template
    kept = accepted(rows[::step], tokenizer)
    assert len(kept) > 18_000 / step
    assert_same(kept, tokenizer)


CHATML = TEMPLATES[0].with_name("qwen2_5.jinja").read_text()
KINDS = {
    "byte-level": lambda texts: byte_tokenizer(texts, ["<|im_start|>", "<|im_end|>", "<think>"]),
    "space before the first piece": lambda texts: metaspace_tokenizer(texts, scheme="first"),
    "space before every piece": lambda texts: metaspace_tokenizer(texts, scheme="always"),
    "words": word_tokenizer,
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request, texts):
    tokenizer = KINDS[request.param](texts)
    tokenizer.chat_template = CHATML
    return tokenizer


def test_every_kind_of_tokenizer_gives_the_same_ids(tokenizer, rows):
    assert split_tokens(tokenizer, "<|im_start|>user")
    assert_same([*AWKWARD, *rows[6::200]], tokenizer)


class LowerCase(PreTrainedTokenizerFast):
    """Changes texts in Python before the tokenizer in Rust sees them."""

    def __call__(self, text=None, *args, **options):
        """The call, on lower case."""
        return super().__call__(text.lower() if isinstance(text, str) else [*map(str.lower, text)], *args, **options)


class Begins(PreTrainedTokenizerFast):
    """Puts a token before each conversation, where ids are asked for."""

    def apply_chat_template(self, conversation, *args, tokenize=True, **options):
        """The template's, with one id more."""
        given = super().apply_chat_template(conversation, *args, tokenize=tokenize, **options)
        if tokenize:
            given["input_ids"] = [self.eos_token_id, *given["input_ids"]]
        return given


@pytest.mark.parametrize("kind", [LowerCase, Begins])
def test_a_tokenizer_with_methods_of_its_own_gives_the_ids_of_trl(kind, texts):
    plain = byte_tokenizer(texts[:200], ["<|im_start|>", "<|im_end|>"])
    own = kind(tokenizer_object=plain.backend_tokenizer, eos_token=plain.eos_token, pad_token=plain.pad_token)
    for tokenizer in (plain, own):
        tokenizer.chat_template = CHATML
    pairs = Dataset.from_list(AWKWARD)
    ours, theirs = prepared(prepare_dataset, pairs, own), prepared(DPOTrainer._prepare_dataset, pairs, own)
    assert ours[:] == theirs[:]
    assert ours["prompt_ids"][:] != prepared(prepare_dataset, pairs, plain)["prompt_ids"][:]


def test_a_tokenizer_that_was_saved_while_it_padded_and_cut_gives_the_same_ids(tokenizer, rows):
    pairs = Dataset.from_list(AWKWARD)
    theirs = prepared(DPOTrainer._prepare_dataset, pairs, tokenizer)
    padding = copy.deepcopy(tokenizer)
    padding.backend_tokenizer.enable_padding(direction="left", pad_id=0, pad_token="<pad>")
    padding.backend_tokenizer.enable_truncation(4)
    assert prepared(prepare_dataset, pairs, padding)[:] == theirs[:]


def test_plain_text_gets_its_end_token_and_special_tokens_as_in_trl(tokenizer):
    rows = [
        {"prompt": "Once upon a time", "chosen": " there was a fox", "rejected": f" no{tokenizer.eos_token}"},
        {"prompt": "The end\n", "chosen": "of it", "rejected": "of <|im_start|> all"},
        {"prompt": "Once upon a time", "chosen": "", "rejected": " x"},
        {"prompt": "", "chosen": "a", "rejected": "b"},
    ]
    assert_same(rows, tokenizer)


parts = st.sampled_from(["<|im_start|>", "<|im_end|>", "<|im_", "|>", "<think>", " ", "\n", "a", "Ab", "é", "▁", "<"])
contents = st.lists(parts, max_size=8).map("".join)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.lists(contents, min_size=1, max_size=3), contents, contents), min_size=1, max_size=4))
def test_texts_made_of_special_tokens_give_the_same_ids(tokenizer, drawn):
    rows = [pair(prompt, chosen, rejected) for prompt, chosen, rejected in drawn]
    batch = {column: [row[column] for row in rows] for column in ("prompt", "chosen", "rejected")}
    ours = tokenization._tokenise_batch(batch, tokenizer=tokenizer, is_chat=True)
    for index, row in enumerate(rows):
        prompt, *ids = (ours[column][index] for column in COLUMNS)
        for side, completion in zip(("chosen", "rejected"), ids, strict=True):
            whole = tokenizer.apply_chat_template(row["prompt"] + row[side], return_dict=True)["input_ids"]
            assert prompt + completion == whole


@pytest.mark.parametrize(
    "token",
    [
        AddedToken("<cut>", lstrip=True, normalized=False),
        AddedToken("<cut>", single_word=True, normalized=False),
        AddedToken("<cut>", normalized=True),
        AddedToken("cut>", normalized=False),
        AddedToken("\n<cut>", normalized=False),
    ],
    ids=["eats spaces", "only as a word", "found after normalising", "begins a word", "begins with space"],
)
def test_a_text_is_not_cut_where_the_left_side_depends_on_the_right(token, texts):
    tokenizer = byte_tokenizer(texts[:50], [])
    tokenizer.add_tokens([token], special_tokens=False)
    assert split_tokens(tokenizer, f"a {token.content} b") == []


def test_a_text_is_not_cut_where_another_token_may_reach_over(texts):
    assert split_tokens(byte_tokenizer(texts[:50], ["<a>", "<b>"]), "<a><b>") == ["<a>", "<b>"]
    assert split_tokens(byte_tokenizer(texts[:50], ["<a>", "x<a"]), "<a>") == []
    assert split_tokens(byte_tokenizer(texts[:50], ["<a>", "x<a>x"]), "<a>") == []
    assert split_tokens(byte_tokenizer(texts[:50], ["<<"]), "<<") == []


def test_a_prompt_rendered_otherwise_alone_is_cut_and_warned_of_as_in_trl(tokenizer, caplog):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}think{% endif %}"
    messages = []
    for prepare in (DPOTrainer._prepare_dataset, prepare_dataset):
        caplog.clear()
        logger.warning_once.cache_clear()
        prepared(prepare, Dataset.from_list(AWKWARD[:2]), tokenizer)
        messages.append([record.getMessage() for record in caplog.records if "not a prefix" in record.getMessage()])
    assert len(messages[0]) >= 1
    assert messages[0] == messages[1]
    assert_same(AWKWARD, tokenizer)


# The same rows


def test_pairs_whose_prompt_fills_max_length_are_dropped_as_in_trl(tokenizer, rows):
    few = rows[:40]
    lengths = sorted(map(len, assert_same(few, tokenizer)["prompt_ids"][:]))
    middle = lengths[len(few) // 2]
    assert 0 < len(assert_same(few, tokenizer, max_length=middle)) < len(few)
    assert len(assert_same(few, tokenizer, max_length=middle, truncation_mode="keep_end")) == len(few)


@pytest.mark.parametrize("kind", ["tools", "chat_template_kwargs", "implicit prompt"])
def test_what_is_not_covered_is_left_to_trl(kind, texts, monkeypatch):
    tokenizer = byte_tokenizer(texts[:50], ["<|im_start|>", "<|im_end|>"])
    tokenizer.chat_template = CHATML
    extra = {
        "tools": {"tools": json.dumps([{"type": "function", "function": {"name": "f", "description": "d"}}])},
        "chat_template_kwargs": {"chat_template_kwargs": {"enable_thinking": False}},
        "implicit prompt": {},
    }[kind]
    row = AWKWARD[0] | extra
    if kind == "implicit prompt":
        prompt = row.pop("prompt")
        row = {side: prompt + row[side] for side in ("chosen", "rejected")}
    monkeypatch.setattr(tokenization, "_tokenise_batch", None)
    assert_same([row], tokenizer)


def test_streams_are_left_to_trl(texts):
    tokenizer = byte_tokenizer(texts[:50], ["<|im_start|>", "<|im_end|>"])
    tokenizer.chat_template = CHATML
    rows = Dataset.from_list(AWKWARD)
    ours = prepared(prepare_dataset, rows.to_iterable_dataset(), tokenizer)
    assert list(ours) == list(prepared(DPOTrainer._prepare_dataset, rows, tokenizer))


def test_the_trainer_skips_trls_own_step(tiny_model, tmp_path, monkeypatch):
    rows = Dataset.from_list(AWKWARD)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    theirs = prepared(DPOTrainer._prepare_dataset, rows, tokenizer, max_length=128)
    monkeypatch.setattr(DPOTrainer, "_prepare_dataset", None)
    trainer = SharedPrefixDPOTrainer(
        model=str(tiny_model),
        args=DPOConfig(str(tmp_path), max_length=128, use_cpu=True, bf16=False, activation_checkpointing=False),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
    )
    for dataset in (trainer.train_dataset, trainer.eval_dataset):
        assert dataset[:] == theirs[:]


# Once for all runs


@pytest.fixture
def stored(tmp_path):
    """Pairs read anew from a file, as each run does."""
    Dataset.from_list(AWKWARD).to_json(tmp_path / "pairs.jsonl")
    return lambda: load_dataset(
        "json", data_files=str(tmp_path / "pairs.jsonl"), split="train", cache_dir=str(tmp_path / "cache")
    )


def test_a_second_run_does_not_tokenise_again(stored, tiny_model, monkeypatch):
    first = prepared(prepare_dataset, stored(), AutoTokenizer.from_pretrained(tiny_model), max_length=90)
    used = AutoTokenizer.from_pretrained(tiny_model)
    used("a text " * 200, truncation=True, max_length=5)
    used.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    monkeypatch.setattr(tokenization, "_cut", None)
    for max_length in (90, 90, None):
        again = prepared(prepare_dataset, stored(), used, max_length=max_length)
        assert again[0] == first[0]
    used.chat_template = CHATML
    with pytest.raises(TypeError):  # `_cut` is None: another template is another key
        prepared(prepare_dataset, stored(), used)


def test_another_template_or_token_gives_other_ids(stored, tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    ids = [prepared(prepare_dataset, stored(), tokenizer)[:]["prompt_ids"]]
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    ids.append(prepared(prepare_dataset, stored(), tokenizer)[:]["prompt_ids"])
    tokenizer.add_tokens(["hello"])
    ids.append(prepared(prepare_dataset, stored(), tokenizer)[:]["prompt_ids"])
    assert ids[0] != ids[1] != ids[2]
