"""Tokenises preference pairs to the ids of DPOTrainer, several times as fast, and once for all runs on the pairs."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset
from datasets.fingerprint import Hasher
from trl import DPOConfig, DPOTrainer
from trl.data_utils import common_prefix_length, is_conversational
from trl.trainer.dpo_trainer import logger
from trl.trainer.utils import global_then_local_main_first

from dpo_recipes.trl_patches import encodes_in_rust, fingerprint

_COLUMNS = ["prompt", "chosen", "rejected"]


class PairIds(NamedTuple):
    """Token ids of a pair as DPOTrainer makes them; the tokens of the two completions are trained."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    left_out: list[int]  # end of the prompt, whose ids alone differ from those before a completion


def prepare_dataset(trainer: DPOTrainer, dataset: Any, processing_class: Any, args: DPOConfig, name: str) -> Any:
    """Tokenises pairs to the rows, columns and ids that `DPOTrainer._prepare_dataset` returns.

    Texts are tokenised in batches. Text up to the last special token that a prompt shares with both of its sides is
    tokenised once. The cache of datasets keeps the result under the rows, the tokenizer and its chat template. Streams,
    image processors, tokenizers written in Python, implicit prompts, tools and arguments for the chat template are
    left to TRL.

    Args:
        trainer: Used only if the rows are left to TRL.
        dataset: Pairs in TRL's conversational or string format.
        processing_class: The tokenizer.
        args: `max_length`, `truncation_mode` and `dataset_num_proc` are read.
        name: The split, for the progress bar.
    """
    if isinstance(dataset, Dataset) and not len(dataset):
        return dataset  # of an empty evaluation set TRL would read the first row
    longest, processes, kinds = args.max_length, args.dataset_num_proc, _kinds(dataset)
    if len(kinds) != 1 or not _is_plain(processing_class):
        return DPOTrainer._prepare_dataset(trainer, dataset, processing_class, args, name)
    with global_then_local_main_first():
        processing_class("settle")  # a tokenizer's first call changes its state, and with it the key of the cache
        state = {key: value for key, value in vars(processing_class).items() if key != "deprecation_warnings"}
        key = Hasher.hash([fingerprint(dataset), type(processing_class), state, kinds, Path(__file__).read_bytes()])
        given = {"tokenizer": processing_class, "is_chat": True in kinds}
        how: dict[str, Any] = dict(batched=True, num_proc=processes, desc=f"Tokenizing {name} dataset")
        dataset = dataset.map(_tokenise_batch, fn_kwargs=given, new_fingerprint=key, **how)
        if longest is not None and args.truncation_mode == "keep_start":
            dataset = dataset.filter(
                lambda rows: [len(ids) < longest for ids in rows], input_columns="prompt_ids", **how
            )
    return dataset


def _kinds(dataset: Any) -> set[bool]:
    """Set of True if the columns are conversations, of False if plain text; empty for rows that are left to TRL."""
    names = set(dataset.column_names) if isinstance(dataset, Dataset) else set()
    covered = names.issuperset(_COLUMNS) and not names & {"tools", "chat_template_kwargs"}
    return {is_conversational({column: dataset[0][column]}) for column in _COLUMNS if covered}


def _is_plain(tokenizer: Any) -> bool:
    """Returns whether the tokenizer only calls the one written in Rust, special tokens included."""
    return encodes_in_rust(tokenizer) and not tokenizer.split_special_tokens


def split_tokens(tokenizer: Any, text: str) -> list[str]:
    """Special tokens before which a text may be cut so that the ids of its parts, joined, are those of the whole.

    A tokenizer cuts a text at its special tokens first and then tokenises each piece by itself. So a cut is safe if no
    other token reaches over it and nothing on its left depends on what follows.
    """
    tokens = list(tokenizer.added_tokens_decoder.values())
    ends = {token.content[start:] for token in tokens for start in range(1, len(token.content))}
    return [
        token.content
        for token in tokens
        if token.content in text
        and not (token.normalized or token.lstrip or token.single_word)
        and re.match(r"[^\w\s]", token.content)
        and not any(end.startswith(token.content) or token.content.startswith(end) for end in ends)
    ]


def _tokenise_batch(batch: dict[str, list[Any]], *, tokenizer: Any, is_chat: bool) -> dict[str, list[Any]]:
    output: dict[str, list[Any]] = {column: batch[column] for column in _COLUMNS}
    for side in () if is_chat else ("chosen", "rejected"):
        output[side] = [text.removesuffix(tokenizer.eos_token) + tokenizer.eos_token for text in output[side]]
    alone = output["prompt"]
    whole = [row[0] + side for row in zip(*output.values(), strict=True) for side in row[1:]]
    if is_chat:
        alone = tokenizer.apply_chat_template(alone, tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(whole, tokenize=False)
    pairs = encode_pairs(list(zip(alone, whole[::2], whole[1::2], strict=True)), tokenizer, is_chat=is_chat)
    for ids in pairs:
        if ids.left_out:  # in TRL's words
            logger.warning_once(
                "The tokenized prompt is not a prefix of the tokenized prompt+completion, usually because the chat "
                "template renders the prompt alone differently or because tokens merge across the boundary. The "
                "completion starts where they diverge, and this end of the prompt is left out of the training "
                f"sequence: {tokenizer.decode(ids.left_out)!r}. The model is trained on a context that differs from "
                "the one it sees at inference. To avoid it, use a chat template that renders the prompt the same way "
                "in both cases, or end the prompt on a token boundary. This warning is shown once, but it likely "
                "applies to every example in the dataset."
            )
    return output | {f"{side}_ids": [getattr(ids, side) for ids in pairs] for side in _COLUMNS}


def encode_pairs(
    texts: Sequence[tuple[str, str, str]], tokenizer: Any, *, is_chat: bool | None = None
) -> list[PairIds]:
    """Token ids that DPOTrainer makes of pairs.

    Args:
        texts: Of each pair the prompt, the prompt with the chosen and the prompt with the rejected completion.
        tokenizer: The tokenizer.
        is_chat: The texts come from a chat template, which writes special tokens itself; the tokenizer adds them to
            plain text. By default they do if the tokenizer has a chat template.
    """
    is_chat = tokenizer.chat_template is not None if is_chat is None else is_chat
    is_plain = _is_plain(tokenizer)
    cuts = split_tokens(tokenizer, texts[0][0]) if is_chat and is_plain and texts else []
    pieces = [_cut(*three, cuts) for three in texts]
    distinct = list({piece for row in pieces for piece in row})
    if is_plain:
        backend = tokenizer.backend_tokenizer
        backend.no_padding()  # it keeps what its last call asked for, and is saved with it
        backend.no_truncation()
        encodings = backend.encode_batch_fast(distinct, add_special_tokens=not is_chat)
        ids = [encoding.ids for encoding in encodings]
    else:
        ids = [tokenizer(text, add_special_tokens=not is_chat, verbose=False)["input_ids"] for text in distinct]
    ids_of = dict(zip(distinct, ids, strict=True))
    return [_split_ids(*row, ids_of=ids_of) for row in pieces]


def _cut(prompt: str, chosen: str, rejected: str, cuts: list[str]) -> tuple[str, str, str, str]:
    """Cuts off the beginning that the three texts share, empty if there is no place to cut, from the rest of each."""
    at, cut = max(((prompt.rfind(cut), cut) for cut in cuts), default=(0, ""))
    if at <= 0 or not (chosen.startswith(prompt[:at] + cut) and rejected.startswith(prompt[:at] + cut)):
        at = 0
    return prompt[:at], prompt[at:], chosen[at:], rejected[at:]


def _split_ids(start: str, *rests: str, ids_of: dict[str, list[int]]) -> PairIds:
    """Token ids of a pair: the completion begins where TRL says, at the first difference from the prompt alone."""
    shared = ids_of[start] if start else []  # an empty text may have special tokens
    prompt, chosen, rejected = (ids_of[rest] for rest in rests)
    end = min(common_prefix_length(prompt, chosen), common_prefix_length(prompt, rejected))
    return PairIds(shared + prompt[:end], chosen[end:], rejected[end:], prompt[end:])
