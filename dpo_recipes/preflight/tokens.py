"""Turns pairs into the token ids that DPOTrainer makes of them, shortens long prompts and looks for faults."""

import json
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
from datasets import Dataset, Features, Value
from jinja2 import TemplateError
from transformers import GenerationConfig

from dpo_recipes.dataset_adapters import PAIR_FEATURES, Drop, Message, check_pair, keep_pairs, map_rows
from dpo_recipes.dataset_adapters.adapting import ROW, row_names
from dpo_recipes.dataset_adapters.ledger import SplitAccount
from dpo_recipes.models.pair_ids import PairIds, encode_pairs
from dpo_recipes.preflight.findings import CHECKS

Batch = dict[str, list[Any]]
Unit = Literal["pair", "prompt", "text"]
"""The part of a row that is measured: the pair, the prompt of an online trainer, or the text of SFT."""
SIDES = ("prompt", "chosen", "rejected")
MEASURES = {
    **{f"{side}_tokens": Value("int32") for side in SIDES},
    "cut_tokens": Value("int32"),  # of the prompt, with its oldest turns
    "without_eos": Value("bool"),  # a completion does not end in a token that stops generation
    "eos_inside": Value("bool"),  # a completion of one turn has such a token before its end
    "double_bos": Value("bool"),
    "prompt_not_prefix": Value("bool"),  # the tokens of the prompt alone do not begin both sequences
    "other_turns": Value("bool"),  # a completion has turns that the assistant does not write
    "template_drops_text": Value("bool"),  # text of a message reaches no token
    "template_trims_text": Value("bool"),  # only white space of a message reaches no token
    "control_tokens": Value("bool"),  # a message holds the text of a control token
    "chat_markup": Value("bool"),  # a message holds the markup of some chat template
    "largest_id": Value("int32"),
    "unrendered": Value("string"),  # fields of messages, and tools, whose text reaches no token
}
"""The columns that `fit` adds to pairs; to prompts alone it adds those of PROMPT_MEASURES."""
PROMPT_MEASURES = ("prompt_tokens", "cut_tokens", "control_tokens", "chat_markup")
FAULTS = [name for name, kind in MEASURES.items() if kind == Value("bool")]
_CHAT_MARKUP = re.compile(CHECKS["chat_markup"]["pattern"])
_WITHOUT_TEXT = ("role", "id", "type", "tool_call_id", "index")  # fields of a message that hold no text to learn from
_BINS = 40
_SHOWN = 3  # pairs


def fit(pairs: Dataset, tokenizer: Any, longest: int | None, *, split: str, unit: Unit = "pair") -> Dataset:
    """The rows of at most `longest` tokens, with their measures as columns; the other rows are counted as dropped.

    A prompt that is too long loses its oldest turns, a user turn with its answer at a time; a leading system message
    stays. A row is dropped if that does not help, or if `check_pair` or the chat template refuses it.

    Args:
        pairs: Conversations, or plain text as TRL's string format has it.
        tokenizer: Without a chat template for plain text.
        longest: Tokens of the prompt with either completion, or of the prompt alone. None keeps all lengths.
        split: Name of the split, for the account.
        unit: Other units than "pair" measure prompts alone, and remove `chosen` and `rejected`.
    """
    tokenizer("settle")  # a tokenizer's first call changes its state, and with it the key of the map's cache
    features = {**pairs.features, **MEASURES}
    if unit != "pair":
        removed = {"chosen", "rejected", *MEASURES}.difference(PROMPT_MEASURES)
        features = {name: kind for name, kind in features.items() if name not in removed}
    features["drop_reason"] = Value("string")
    given = {"tokenizer": tokenizer, "longest": longest, "unit": unit, "columns": list(features)}
    given |= {"stops": stop_ids(tokenizer), "controls": control_pattern(tokenizer)}
    marked = map_rows(pairs, _fit_batch, features=Features(features), desc=f"measuring {unit}s ({split})", **given)
    return keep_pairs(marked, name="preflight", split=split)


def stop_ids(tokenizer: Any) -> list[int]:
    """The tokens at which generation stops: the tokenizer's EOS token and those of the model's generation settings."""
    try:
        more = GenerationConfig.from_pretrained(tokenizer.name_or_path).eos_token_id or []
    except (OSError, ValueError):  # a model need not have generation settings
        more = []
    return sorted({tokenizer.eos_token_id, *([more] if isinstance(more, int) else more)})


def control_pattern(tokenizer: Any) -> str:
    """A regular expression for the texts of the tokenizer's control tokens; it matches nothing if there are none.

    Control tokens are the special tokens, and all others in the form of <|a|>; not <think>, which answers may write.
    """
    tokens = {
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.special or re.fullmatch(r"<[|\uff5c].*[|\uff5c]>", token.content)
    }
    texts = sorted((text for text in tokens if text.strip()), key=lambda text: (-len(text), text))
    return "|".join(map(re.escape, texts)) or r"(?!)"


def _fit_batch(
    batch: Batch,
    *,
    tokenizer: Any,
    longest: int | None,
    unit: Unit,
    columns: list[str],
    stops: list[int],
    controls: str,
) -> Batch:
    unmeasured = dict.fromkeys(MEASURES, 0) | {"unrendered": "", "drop_reason": None}
    carried = ("cut_tokens",) if unit == "prompt" else ()  # of the prompt's pair, which was shortened before
    rows = [row | unmeasured | {name: row[name] for name in carried if name in row} for row in _rows(batch)]
    whole: dict[int, int] = {}  # by place in the batch: tokens of the prompt before it was shortened
    waiting = list(range(len(rows)))
    while waiting:
        texts = {place: found for place in waiting if (found := _texts_or_drop(rows[place], tokenizer, unit=unit))}
        waiting = []
        for place, ids in zip(texts, encode_pairs(list(texts.values()), tokenizer), strict=True):
            row = rows[place]
            whole.setdefault(place, len(ids.prompt))
            if unit == "pair" and ids.chosen == ids.rejected:
                row["drop_reason"] = "identical_completions"
            elif longest is None or len(ids.prompt) + max(len(ids.chosen), len(ids.rejected)) <= longest:
                row["cut_tokens"] += whole[place] - len(ids.prompt)
                row |= _measure_prompt(row, ids, controls=controls, sides=SIDES if unit == "pair" else SIDES[:1])
                if unit == "pair":
                    row |= _measure_pair(row, ids, texts[place], stops=stops, tokenizer=tokenizer)
            elif shorter := without_oldest_exchange(row["prompt"]):
                row["prompt"] = shorter
                waiting.append(place)
            else:
                row["drop_reason"] = "too_long" if unit == "pair" else f"{unit}_too_long"
    return {column: [row[column] for row in rows] for column in columns}


def _rows(batch: Batch) -> Iterator[dict[str, Any]]:
    return (dict(zip(batch, cells, strict=True)) for cells in zip(*batch.values(), strict=True))


def _texts_or_drop(row: dict[str, Any], tokenizer: Any, *, unit: Unit) -> tuple[str, str, str] | None:
    """The texts to tokenise; None, with the reason in the row, if there are none.

    A prompt alone is measured as a pair with nothing after the prompt.
    """
    try:
        if unit == "pair":
            return render_row(row, tokenizer)
        alone, _, _ = render(*(row[side] for side in SIDES), tokenizer=tokenizer)  # online trainers pass no columns
        return alone, alone, alone
    except Drop as drop:
        row["drop_reason"] = str(drop)
        return None


def render_row(row: Mapping[str, Any], tokenizer: Any) -> tuple[str, str, str]:
    """The three texts of `render`, the columns of the row that go to the chat template included."""
    return render(*(row[side] for side in SIDES), tokenizer=tokenizer, **template_options(row))


def template_options(row: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that TRL passes to the chat template from columns of a row, besides its messages."""
    options = {"tools": json.loads(row["tools"])} if row.get("tools") else {}
    return options | (row.get("chat_template_kwargs") or {})


def render(prompt: Any, chosen: Any, rejected: Any, *, tokenizer: Any, **options: Any) -> tuple[str, str, str]:
    """The three texts that DPOTrainer tokenises: the prompt alone, with the chosen and with the rejected completion.

    Args:
        prompt: Messages, or plain text.
        chosen: Like the prompt.
        rejected: Like the prompt.
        tokenizer: Its chat template writes the messages, or its EOS token ends the plain texts.
        **options: Arguments of the chat template, as `template_options` returns them.

    Raises:
        Drop: If the three make no pair.
    """
    if prompt is None or chosen is None or rejected is None:
        raise Drop("missing_value")
    if isinstance(prompt, str):
        return _render_text(prompt, chosen, rejected, eos=tokenizer.eos_token)
    check_pair({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    try:
        alone = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True, **options)
        first = tokenizer.apply_chat_template(prompt + chosen, tokenize=False, **options)
        second = tokenizer.apply_chat_template(prompt + rejected, tokenize=False, **options)
    except (TemplateError, TypeError, ValueError) as error:
        raise Drop("template_refuses") from error
    if alone.startswith((first, second)):
        raise Drop("empty_in_template")
    return alone, first, second


def _render_text(prompt: str, chosen: str, rejected: str, *, eos: str) -> tuple[str, str, str]:
    if not prompt:
        raise Drop("empty_prompt")
    if not chosen.strip() or not rejected.strip():
        raise Drop("empty_completion")
    if chosen.strip() == rejected.strip():
        raise Drop("identical_completions")
    return prompt, prompt + chosen.removesuffix(eos) + eos, prompt + rejected.removesuffix(eos) + eos


def without_oldest_exchange(prompt: str | list[Message]) -> list[Message] | None:
    """The prompt without its first user turn and the answer to it; None for plain text or a last user turn alone."""
    if isinstance(prompt, str):
        return None
    start = 1 if prompt[0]["role"] == "system" else 0
    for turn in range(start + 1, len(prompt)):
        if prompt[turn]["role"] == "user" and prompt[turn - 1]["role"] != "user":
            return prompt[:start] + prompt[turn:]
    return None


def _measure_prompt(row: Mapping[str, Any], ids: PairIds, *, controls: str, sides: tuple[str, ...]) -> dict[str, Any]:
    """The measures of a prompt. Only messages are searched: plain text may spell control tokens and markup."""
    messages = [] if isinstance(row["prompt"], str) else [turn for side in sides for turn in row[side]]
    contents = [turn["content"] or "" for turn in messages]
    return {
        "prompt_tokens": len(ids.prompt),
        "control_tokens": any(re.search(controls, content) for content in contents),
        "chat_markup": any(_CHAT_MARKUP.search(content) for content in contents),
    }


def _measure_pair(
    row: Mapping[str, Any], ids: PairIds, texts: tuple[str, str, str], *, stops: list[int], tokenizer: Any
) -> dict[str, Any]:
    """The measures of a pair that are not those of its prompt alone."""
    completions = row["chosen"], row["rejected"]
    one_turn = all(isinstance(turns, str) or len(turns) == 1 for turns in completions)
    ends, inside = zip(*(_stops(side, stops, tokenizer) for side in (ids.chosen, ids.rejected)), strict=True)
    return {
        **{"chosen_tokens": len(ids.chosen), "rejected_tokens": len(ids.rejected)},
        "without_eos": not all(ends),
        "eos_inside": one_turn and any(inside),
        "double_bos": tokenizer.bos_token_id is not None and ids.prompt[:2] == [tokenizer.bos_token_id] * 2,
        "prompt_not_prefix": bool(ids.left_out),
        "other_turns": not one_turn and any(turn["role"] != "assistant" for side in completions for turn in side),
        "largest_id": max(ids.prompt + ids.chosen + ids.rejected),
        **_unrendered(row, texts),
    }


def _stops(completion: list[int], stops: list[int], tokenizer: Any) -> tuple[bool, bool]:
    """Returns two flags: the completion ends in a stop token (white space aside); a stop token occurs earlier."""
    ends = False
    end = len(completion)
    while end and (completion[end - 1] in stops or not tokenizer.decode([completion[end - 1]]).strip()):
        end -= 1
        ends |= completion[end] in stops
    return ends, not set(stops).isdisjoint(completion[:end])


def _unrendered(row: Mapping[str, Any], texts: tuple[str, str, str]) -> dict[str, Any]:
    """The measures that say which text of the messages and tools the chat template leaves out or trims."""
    if isinstance(row["prompt"], str):
        return {}
    alone, with_chosen, with_rejected = texts
    dropped, trimmed = set(), False
    for text, turns in ((with_chosen, row["prompt"] + row["chosen"]), (with_rejected, row["rejected"])):
        for field, leaf in _leaves_of_fields(turns):
            trimmed |= field == "content" and leaf not in text
            if leaf not in text and not _says(text, leaf):
                dropped.add(field)
    tools = [tool.get("function", tool).get("name", "") for tool in json.loads(row.get("tools") or "[]")]
    if any(name not in alone for name in tools):
        dropped.add("tools")
    faults = {"template_drops_text": bool(dropped), "template_trims_text": trimmed and "content" not in dropped}
    return faults | {"unrendered": " ".join(sorted(dropped))}


def _leaves_of_fields(turns: list[Message]) -> Iterator[tuple[str, str]]:
    """Each text of the messages that a template should write, with the name of its field."""
    for turn in turns:
        for field, value in turn.items():
            if field not in _WITHOUT_TEXT and (field, turn["role"]) != ("name", "tool"):
                yield from ((field, leaf) for leaf in _leaves(value))


def _leaves(value: Any) -> Iterator[str]:
    """The texts in a field of a message, however deep."""
    if isinstance(value, str):
        yield value
    if isinstance(value, dict):
        value = [part for name, part in value.items() if name not in _WITHOUT_TEXT]
    for part in value if isinstance(value, list) else ():
        yield from _leaves(part)


def _says(text: str, leaf: str) -> bool:
    """Returns True if the text holds the leaf, white space aside, as it is or as JSON writes it."""
    as_json = json.dumps(leaf, ensure_ascii=False)[1:-1]
    return any("".join(form.split()) in "".join(text.split()) for form in (leaf, as_json))


def as_plain_text(pairs: Dataset, tokenizer: Any) -> Dataset:
    """The conversations with a zero-width space inside each text of a control token, which makes it plain text."""
    if pairs.features["prompt"] == Value("string"):
        return pairs
    controls = control_pattern(tokenizer)
    return map_rows(pairs, _break_controls, features=pairs.features, desc="control tokens as text", controls=controls)


def _break_controls(batch: Batch, *, controls: str) -> Batch:
    def broken(turn: dict[str, Any]) -> dict[str, Any]:
        return {**turn, "content": re.sub(rf"(?={controls})([\s\S])", "\\1\u200b", turn["content"] or "")}

    return {**batch, **{side: [list(map(broken, turns)) for turns in batch[side]] for side in SIDES}}


def as_rendered(pairs: Dataset, tokenizer: Any) -> Dataset:
    """The pairs with each side as one text; a completion is decoded from its tokens where its contents are not all.

    Args:
        pairs: As `fit` returns them. They are returned unchanged where the chat template writes all contents.
        tokenizer: The one that `fit` was given.
    """
    if pairs.features["prompt"] == Value("string"):
        return pairs
    if pairs.features["chosen"] == PAIR_FEATURES["chosen"] and not any(pairs["template_drops_text"]):
        return pairs
    features = Features(dict.fromkeys((*SIDES, *{ROW}.intersection(pairs.column_names)), Value("string")))
    return map_rows(pairs, _rendered_batch, features=features, desc="rendering", tokenizer=tokenizer)


def _rendered_batch(batch: Batch, *, tokenizer: Any) -> Batch:
    texts = [_said(row, tokenizer) for row in _rows(batch)]
    sides = {side: [text[place] for text in texts] for place, side in enumerate(SIDES)}
    return sides | {name: batch[name] for name in (ROW,) if name in batch}


def _said(row: Mapping[str, Any], tokenizer: Any) -> list[str]:
    """The text of each side of a pair, without special tokens."""
    said = ["\n".join(turn["content"] or "" for turn in row[side]) for side in SIDES]
    has_fields = any(len(turn) > len(Message.__required_keys__) for turn in row["chosen"] + row["rejected"])
    if row["template_drops_text"] or has_fields:
        [ids] = encode_pairs([render_row(row, tokenizer)], tokenizer)
        said[1:] = tokenizer.batch_decode([ids.chosen, ids.rejected], skip_special_tokens=True)
    return said


def describe(rows: Dataset, *, account: SplitAccount) -> dict[str, Any]:
    """The token statistics of one split, of rows as `fit` returns them, for preflight.json."""
    measured = [name for name in MEASURES if name in rows.column_names and name != "unrendered"]
    columns = {name: np.array(rows[name][:], dtype=np.int64) for name in measured}
    counts = {side: columns[f"{side}_tokens"] for side in SIDES if f"{side}_tokens" in columns}
    edges = np.histogram_bin_edges(np.concatenate(list(counts.values())), bins=_BINS)
    found: dict[str, Any] = {side: _statistics(values, edges) for side, values in counts.items()}
    found["cut_from"] = dict.fromkeys(counts, 0) | {"prompt": int(columns["cut_tokens"].sum())}
    found |= {name: int(columns[name].sum()) for name in FAULTS if name in columns}
    if "chosen" not in counts:
        return found
    too_long = account.dropped["too_long"].count if "too_long" in account.dropped else 0
    return found | {
        "longest_pair": int((counts["prompt"] + np.maximum(counts["chosen"], counts["rejected"])).max()),
        "shortened": account.shortened,
        "completion_at_risk": account.shortened + too_long,  # TRL alone would cut into these
        "unrendered": Counter(field for cell in rows["unrendered"] for field in cell.split()),
        "largest_id": int(columns["largest_id"].max()),
    }


def _statistics(values: Any, edges: Any) -> dict[str, Any]:
    p50, p90, p99 = (float(value) for value in np.percentile(values, [50, 90, 99]))
    histogram = {"edges": edges.tolist(), "counts": np.histogram(values, edges)[0].tolist()}
    extremes = {"max": int(values.max()), "total": int(values.sum()), "histogram": histogram}
    return {"mean": float(values.mean()), "p50": p50, "p90": p90, "p99": p99, **extremes}


def rendered_pairs(pairs: Dataset, tokenizer: Any, *, split: str) -> list[dict[str, Any]]:
    """Three pairs, drawn by seed 0, token by token: their text, ids, and 1 where the loss is taken."""
    drawn = sorted(random.Random(0).sample(range(len(pairs)), min(_SHOWN, len(pairs))))
    names = row_names(pairs)
    return [{"split": split, "row": names[row], **_token_by_token(pairs[row], tokenizer)} for row in drawn]


def _token_by_token(row: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    [ids] = encode_pairs([render_row(row, tokenizer)], tokenizer)
    sides = {}
    for side, completion in (("chosen", ids.chosen), ("rejected", ids.rejected)):
        both = ids.prompt + completion
        sides[side] = {
            "tokens": [tokenizer.decode([token]) for token in both],
            "ids": both,
            "trained": [0] * len(ids.prompt) + [1] * len(completion),
            "prompt_tokens": len(ids.prompt),
        }
    return {"generation_prompt": _has_generation_prompt(row, ids, tokenizer), "sides": sides}


def _has_generation_prompt(row: Mapping[str, Any], ids: PairIds, tokenizer: Any) -> bool:
    """Returns True if the answer's header is in the prompt, or answers have no header; plain text has no header."""
    if isinstance(row["prompt"], str):
        return True
    options = template_options(row)
    if ids.prompt != tokenizer.apply_chat_template(row["prompt"], return_dict=True, **options)["input_ids"]:
        return True  # asking for the header adds tokens
    answers = ([{"role": "assistant", "content": text}] for text in ("Yes.", "No."))
    [probe] = encode_pairs([render(row["prompt"], *answers, tokenizer=tokenizer, **options)], tokenizer)
    return bool(tokenizer.decode(probe.chosen).strip().casefold().startswith("yes"))
