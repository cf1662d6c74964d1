"""What the model will really see: every pair as token ids, cut into prompt and completions as DPOTrainer does it."""

import json
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from datasets import Dataset, Features, Value
from jinja2 import TemplateError
from transformers import GenerationConfig

from dpo_recipes.dataset_adapters import PAIR_FEATURES, Drop, Message, check_pair, keep_pairs, map_rows
from dpo_recipes.dataset_adapters.ledger import SplitAccount, current_ledger
from dpo_recipes.loading import prompt_hashes
from dpo_recipes.models.pair_ids import PairIds, encode_pairs

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
    "template_trims_text": Value("bool"),  # white space does not
    "control_tokens": Value("bool"),  # a message holds the text of a control token
    "chat_markup": Value("bool"),  # a message holds the markup of some chat template
    "largest_id": Value("int32"),
    "unrendered": Value("string"),  # fields of messages, and tools, whose text reaches no token
}
"""The columns that `fit` adds."""
FAULTS = [name for name, kind in MEASURES.items() if kind == Value("bool")]
SPELLED = ("control_tokens", "chat_markup")  # checks of messages that prompts alone go through as well
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
CHAT_MARKUP = re.compile(
    r"<\|?/?(im_(start|end)|start_header_id|end_header_id|eot_id|eom_id|begin_of_text|end_of_turn|start_of_turn)\|?>"
    r"|<[|\uff5c]\s*(system|user|assistant|end|endoftext|end_of_text|User|Assistant)\s*[|\uff5c]>|\[/?INST\]|<</?SYS>>|<image>"
    r"|^\#{2,3} ?(instruction|response|input|human|assistant|user)s?:"
    r"|\A\s*(human|user):\s(?s:.*)^\s*(assistant|bot|gpt|ai):|\A\s*(assistant|bot|gpt):\s|^\s*(assistant|bot|gpt):\s*\Z",
    re.IGNORECASE | re.MULTILINE,
)
_UNRENDERED = ("role", "id", "type", "tool_call_id", "index")  # fields that hold no text to learn from
_BINS = 40
_SHOWN = 3  # pairs


def fit(pairs: Dataset, tokenizer: Any, max_length: int | None, *, split: str) -> Dataset:
    """The pairs whose prompt with either completion has at most `max_length` tokens, by the tokenizer's chat template.

    The oldest turns of a prompt go first, a user turn with its answer at a time; a leading system message stays. What
    is still too long is dropped, and so is what the chat template refuses or `check_pair` does. The pairs may be plain
    text too, as TRL's string format has it; a tokenizer for those must have no chat template. The columns of `MEASURES`
    are added.
    """
    tokenizer("settle")  # a tokenizer's first call changes its state, and with it the key of the map's cache
    marked = map_rows(
        pairs,
        _fit_batch,
        features=Features({**pairs.features, **MEASURES, "drop_reason": Value("string")}),
        desc=f"measuring pairs ({split})",
        tokenizer=tokenizer,
        max_length=max_length,
        stops=stop_ids(tokenizer),
        controls=control_pattern(tokenizer),
    )
    return keep_pairs(marked, name="preflight", split=split)


def fit_prompts(pairs: Dataset, tokenizer: Any, longest: int | None, too_long: str, *, split: str) -> Dataset:
    """The distinct prompts of the pairs, of at most `longest` tokens, with the columns of their first pairs.

    Long ones lose their oldest turns as in `fit`, and are dropped as `too_long` says where that does not help. `chosen`
    and `rejected` go; `prompt_tokens`, `cut_tokens` (added to what `fit` has cut already) and the columns of `SPELLED`
    are added.
    """
    if "tools" in pairs.column_names:  # an online trainer takes functions to call, and no column
        current_ledger().note_unread("tools", len(pairs), len(pairs))
    tokenizer("settle")  # a tokenizer's first call changes its state, and with it the key of the map's cache
    kept = {name: kind for name, kind in pairs.features.items() if name not in ("chosen", "rejected")}
    counts = {name: MEASURES[name] for name in ("prompt_tokens", "cut_tokens", *SPELLED)}
    marked = map_rows(
        pairs,
        _fit_prompts,
        features=Features({**kept, **counts, "drop_reason": Value("string")}),
        desc=f"measuring prompts ({split})",
        tokenizer=tokenizer,
        longest=longest,
        too_long=too_long,
        controls=control_pattern(tokenizer),
    )
    prompts = keep_pairs(marked, name="preflight", split=split)
    first = {key: row for row, key in reversed(list(enumerate(prompt_hashes(prompts))))}
    again = sorted(set(range(len(prompts))).difference(first.values()))
    dropped = {"same_prompt": again} if again else {}
    current_ledger().record("preflight", split, came=len(prompts), kept=len(first), dropped=dropped)
    return prompts.select(sorted(first.values()))


def _fit_prompts(
    batch: dict[str, list[Any]], *, tokenizer: Any, longest: int | None, too_long: str, controls: str
) -> dict[str, list[Any]]:
    prompts, reasons, tokens, cut = [], [], [], []
    spelled: dict[str, list[bool]] = {name: [] for name in SPELLED}
    gone = batch.get("cut_tokens", [0] * len(batch["prompt"]))
    for prompt, chosen, rejected, already in zip(*(batch[side] for side in SIDES), gone, strict=True):
        count = first = 0
        reason = None
        try:
            while True:
                text = render(prompt, chosen, rejected, tokenizer=tokenizer)[0]
                count = len(tokenizer(text, add_special_tokens=isinstance(prompt, str))["input_ids"])
                first = first or count
                if longest is None or count <= longest:
                    break
                shorter = None if isinstance(prompt, str) else without_oldest_exchange(prompt)
                if shorter is None:
                    raise Drop(too_long)
                prompt = shorter
        except Drop as drop:
            reason = str(drop)
        prompts.append(prompt)
        reasons.append(reason)
        tokens.append(count)
        cut.append(already + first - count)
        for name, holds in _spelled(prompt or "", controls=controls).items():
            spelled[name].append(holds)
    columns = {name: values for name, values in batch.items() if name not in ("chosen", "rejected")}
    return {**columns, **spelled, "prompt": prompts, "prompt_tokens": tokens, "cut_tokens": cut, "drop_reason": reasons}


def without_oldest_exchange(prompt: list[Message]) -> list[Message] | None:
    """The prompt without its first user turn and the answer to it; None where only the last user turn is left."""
    start = 1 if prompt[0]["role"] == "system" else 0
    for turn in range(start + 1, len(prompt)):
        if prompt[turn]["role"] == "user" and prompt[turn - 1]["role"] != "user":
            return prompt[:start] + prompt[turn:]
    return None


def stop_ids(tokenizer: Any) -> list[int]:
    """The tokens at which generation stops: the tokenizer's EOS token and those of the model's generation settings."""
    try:
        more = GenerationConfig.from_pretrained(tokenizer.name_or_path).eos_token_id or []
    except (OSError, ValueError):  # a model need not have any
        more = []
    return sorted({tokenizer.eos_token_id, *([more] if isinstance(more, int) else more)})


def control_pattern(tokenizer: Any) -> str:
    """A regular expression for the texts of the tokenizer's control tokens; one that matches nothing if it has none.

    These are its special tokens and all others in the form of <|a|>; not <think>, which answers may well write.
    """
    tokens = {
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.special or re.fullmatch(r"<[|\uff5c].*[|\uff5c]>", token.content)
    }
    texts = sorted((text for text in tokens if text.strip()), key=lambda text: (-len(text), text))
    return "|".join(map(re.escape, texts)) or r"(?!)"


def as_plain_text(pairs: Dataset, tokenizer: Any) -> Dataset:
    """The conversations with a zero-width space inside each text of a control token, which makes it plain text."""
    if pairs.features["prompt"] == Value("string"):
        return pairs
    options = {"controls": control_pattern(tokenizer)}
    return map_rows(pairs, _break_controls, features=pairs.features, desc="control tokens as text", **options)


def _break_controls(batch: dict[str, list[Any]], *, controls: str) -> dict[str, list[Any]]:
    broken = {}
    for side in set(SIDES).intersection(batch):
        broken[side] = [
            [
                {
                    **turn,
                    "content": re.sub(
                        controls, lambda found: f"{found[0][0]}\u200b{found[0][1:]}", turn["content"] or ""
                    ),
                }
                for turn in turns
            ]
            for turns in batch[side]
        ]
    return {**batch, **broken}


def as_rendered(pairs: Dataset, tokenizer: Any) -> Dataset:
    """The pairs with each side as one text; a completion as its tokens say it, where its contents are not all it is.

    Args:
        pairs: As `fit` returns them. They are returned as they are where the chat template writes all contents.
        tokenizer: That of `fit`.
    """
    if pairs.features["prompt"] == Value("string"):
        return pairs
    if pairs.features["chosen"] == PAIR_FEATURES["chosen"] and not any(pairs["template_drops_text"]):
        return pairs
    features = Features(dict.fromkeys(SIDES, Value("string")))
    return map_rows(pairs, _rendered_batch, features=features, desc="rendering", tokenizer=tokenizer)


def _rendered_batch(batch: dict[str, list[Any]], *, tokenizer: Any) -> dict[str, list[str]]:
    texts: dict[str, list[str]] = {side: [] for side in SIDES}
    for values in zip(*batch.values(), strict=True):
        row = dict(zip(batch, values, strict=True))
        pair = [row[side] for side in SIDES]
        said = ["\n".join(turn["content"] or "" for turn in turns) for turns in pair]
        if row["template_drops_text"] or any(len(turn) > len(Message.__required_keys__) for turn in pair[1] + pair[2]):
            [ids] = encode_pairs([render(*pair, tokenizer=tokenizer, **template_options(row))], tokenizer)
            said[1:] = tokenizer.batch_decode([ids.chosen, ids.rejected], skip_special_tokens=True)
        for side, text in zip(SIDES, said, strict=True):
            texts[side].append(text)
    return texts


def template_options(row: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that TRL passes to the chat template from columns of a row, besides its messages."""
    options = {"tools": json.loads(row["tools"])} if row.get("tools") else {}
    return options | (row.get("chat_template_kwargs") or {})


def render(prompt: Any, chosen: Any, rejected: Any, *, tokenizer: Any, **options: Any) -> tuple[str, str, str]:
    """The three texts that DPOTrainer tokenises: the prompt alone, with the chosen and with the rejected completion.

    `options` go to the chat template: those of `template_options`.

    Raises:
        Drop: If they make no pair.
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
    if alone.startswith(first) or alone.startswith(second):
        raise Drop("empty_in_template")
    return alone, first, second


def describe(pairs: Dataset, *, account: SplitAccount) -> dict[str, Any]:
    """The token statistics of one split, of pairs as `fit` returns them, for preflight.json."""
    columns = {name: np.array(pairs[name][:], dtype=np.int64) for name in MEASURES if name != "unrendered"}
    counts = {side: columns[f"{side}_tokens"] for side in SIDES}
    edges = np.histogram_bin_edges(np.concatenate(list(counts.values())), bins=_BINS)
    too_long = account.dropped["too_long"].count if "too_long" in account.dropped else 0
    return {
        **{side: _statistics(values, edges) for side, values in counts.items()},
        "longest_pair": int((counts["prompt"] + np.maximum(counts["chosen"], counts["rejected"])).max()),
        "cut_from": {"prompt": int(columns["cut_tokens"].sum()), "chosen": 0, "rejected": 0},
        "shortened": account.shortened,
        "completion_at_risk": account.shortened + too_long,  # TRL alone would cut into these
        **{name: int(columns[name].sum()) for name in FAULTS},
        "unrendered": Counter(field for cell in pairs["unrendered"] for field in cell.split()),
        "largest_id": int(columns["largest_id"].max()),
    }


def describe_prompts(prompts: Dataset) -> dict[str, Any]:
    """The token statistics of one split, of prompts as `fit_prompts` returns them, for preflight.json."""
    tokens = np.array(prompts["prompt_tokens"][:], dtype=np.int64)
    cut = int(np.sum(prompts["cut_tokens"][:]))
    histogram = np.histogram_bin_edges(tokens, bins=_BINS)
    spelled = {name: sum(prompts[name]) for name in SPELLED}
    return {"prompt": _statistics(tokens, histogram), "cut_from": {"prompt": cut}, **spelled}


def rendered_pairs(pairs: Dataset, tokenizer: Any, *, split: str) -> list[dict[str, Any]]:
    """Three pairs, drawn by seed 0, token by token: their text, ids, and 1 where the loss is taken."""
    shown = []
    for row in sorted(random.Random(0).sample(range(len(pairs)), min(_SHOWN, len(pairs)))):
        pair, options = [pairs[row][side] for side in SIDES], template_options(pairs[row])
        [ids] = encode_pairs([render(*pair, tokenizer=tokenizer, **options)], tokenizer)
        sides = {}
        for side, completion in (("chosen", ids.chosen), ("rejected", ids.rejected)):
            both = ids.prompt + completion
            sides[side] = {
                "tokens": [tokenizer.decode([token]) for token in both],
                "ids": both,
                "trained": [0] * len(ids.prompt) + [1] * len(completion),
                "prompt_tokens": len(ids.prompt),
            }
        has_prompt = isinstance(pair[0], str) or _has_generation_prompt(pair[0], ids, tokenizer, **options)
        shown.append({"split": split, "row": row, "generation_prompt": has_prompt, "sides": sides})
    return shown


def _fit_batch(
    batch: dict[str, list[Any]], *, tokenizer: Any, max_length: int | None, stops: list[int], controls: str
) -> dict[str, list[Any]]:
    given = [name for name in TEMPLATE_COLUMNS if name in batch]
    rows = range(len(batch["prompt"]))
    prompts = list(batch["prompt"])
    reasons: list[str | None] = [None for _ in rows]
    first: dict[int, int] = {}  # tokens of the prompt before it was shortened
    measured: dict[int, dict[str, Any]] = {}
    waiting = list(rows)
    while waiting:
        texts = {}
        for row in waiting:
            try:
                options = template_options({name: batch[name][row] for name in given})
                pair = prompts[row], batch["chosen"][row], batch["rejected"][row]
                texts[row] = render(*pair, tokenizer=tokenizer, **options)
            except Drop as drop:
                reasons[row] = str(drop)
        waiting = []
        for row, ids in zip(texts, encode_pairs(list(texts.values()), tokenizer), strict=True):
            if ids.chosen == ids.rejected:
                reasons[row] = "identical_completions"
                continue
            first.setdefault(row, len(ids.prompt))
            if max_length is None or len(ids.prompt) + max(len(ids.chosen), len(ids.rejected)) <= max_length:
                pair = prompts[row], batch["chosen"][row], batch["rejected"][row]
                measured[row] = _measure(ids, pair[1:], stops=stops, tokenizer=tokenizer)
                tools = batch["tools"][row] if "tools" in batch else None
                measured[row] |= _text_faults(pair, texts[row], tools, controls=controls)
                measured[row]["cut_tokens"] = first[row] - len(ids.prompt)
                continue
            shorter = None if isinstance(prompts[row], str) else without_oldest_exchange(prompts[row])
            if shorter is None:
                reasons[row] = "too_long"
            else:
                prompts[row] = shorter
                waiting.append(row)
    none = {"unrendered": ""}
    columns = {name: [measured.get(row, none).get(name, 0) for row in rows] for name in MEASURES}
    return {**batch, "prompt": prompts, **columns, "drop_reason": reasons}


def _measure(ids: PairIds, completions: tuple[Any, Any], *, stops: list[int], tokenizer: Any) -> dict[str, Any]:
    ends, inside = zip(*(_stops(side, stops, tokenizer) for side in (ids.chosen, ids.rejected)), strict=True)
    one_turn = all(isinstance(turns, str) or len(turns) == 1 for turns in completions)
    return {
        **{f"{side}_tokens": len(getattr(ids, side)) for side in SIDES},
        "without_eos": not all(ends),
        "eos_inside": one_turn and any(inside),
        "double_bos": tokenizer.bos_token_id is not None and ids.prompt[:2] == [tokenizer.bos_token_id] * 2,
        "prompt_not_prefix": bool(ids.left_out),
        "largest_id": max(ids.prompt + ids.chosen + ids.rejected),
        "other_turns": not one_turn and any(turn["role"] != "assistant" for side in completions for turn in side),
    }


def _text_faults(
    pair: tuple[Any, ...], texts: tuple[str, str, str], tools: str | None, *, controls: str
) -> dict[str, Any]:
    """The faults of a conversation's messages beside the text that the chat template makes of them."""
    if isinstance(pair[0], str):
        return {"unrendered": ""}
    messages = [(turn, texts[1]) for turn in pair[0] + pair[1]] + [(turn, texts[2]) for turn in pair[2]]
    found, trimmed = set(), False
    for turn, text in messages:
        for field, value in turn.items():
            for leaf in () if field in _UNRENDERED or (field, turn["role"]) == ("name", "tool") else _leaves(value):
                if leaf not in text and not _says(text, leaf):
                    found.add(field)
                trimmed |= field == "content" and leaf not in text
    names = [tool.get("function", tool).get("name", "") for tool in json.loads(tools or "[]")]
    if any(name not in texts[0] for name in names):
        found.add("tools")
    return {
        "template_drops_text": bool(found),
        "template_trims_text": trimmed and "content" not in found,
        "unrendered": " ".join(sorted(found)),
        **_spelled([turn for turn, _ in messages], controls=controls),
    }


def _spelled(messages: Any, *, controls: str) -> dict[str, bool]:
    """Returns two flags: messages spell control tokens; messages spell chat markup. Plain text may do both."""
    contents = [] if isinstance(messages, str) else [turn["content"] or "" for turn in messages]
    return {
        "control_tokens": any(re.search(controls, content) for content in contents),
        "chat_markup": any(CHAT_MARKUP.search(content) for content in contents),
    }


def _leaves(value: Any) -> Iterator[str]:
    """The texts in a field of a message, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, part in value.items():
            yield from () if name in _UNRENDERED else _leaves(part)
    elif isinstance(value, list):
        for part in value:
            yield from _leaves(part)


def _says(text: str, leaf: str) -> bool:
    """Returns True if the text holds the leaf, white space aside, as it is or as JSON writes it."""
    within, plain, as_json = (
        "".join(each.split()) for each in (text, leaf, json.dumps(leaf, ensure_ascii=False)[1:-1])
    )
    return plain in within or as_json in within


def _stops(completion: list[int], stops: list[int], tokenizer: Any) -> tuple[bool, bool]:
    """Whether stop tokens are the last of the tokens, but for white space, and whether one comes before these."""
    ends = False
    end = len(completion)
    while end and (completion[end - 1] in stops or not tokenizer.decode([completion[end - 1]]).strip()):
        end -= 1
        ends |= completion[end] in stops
    return ends, not set(stops).isdisjoint(completion[:end])


def _has_generation_prompt(prompt: list[Message], ids: PairIds, tokenizer: Any, **options: Any) -> bool:
    """Returns True if the answer's header is in the prompt: asking for it adds tokens, or answers lack one."""
    without = tokenizer.apply_chat_template(prompt, return_dict=True, **options)["input_ids"]
    answers = ([{"role": "assistant", "content": text}] for text in ("Yes.", "No."))
    [probe] = encode_pairs([render(prompt, *answers, tokenizer=tokenizer, **options)], tokenizer)
    return bool(without != ids.prompt or tokenizer.decode(probe.chosen).strip().casefold().startswith("yes"))


def _render_text(prompt: str, chosen: str, rejected: str, *, eos: str) -> tuple[str, str, str]:
    if not prompt:
        raise Drop("empty_prompt")
    if not chosen.strip() or not rejected.strip():
        raise Drop("empty_completion")
    if chosen.strip() == rejected.strip():
        raise Drop("identical_completions")
    first, second = (prompt + text if text.endswith(eos) else prompt + text + eos for text in (chosen, rejected))
    return prompt, first, second


def _statistics(values: Any, edges: Any) -> dict[str, Any]:
    p50, p90, p99 = (float(value) for value in np.percentile(values, [50, 90, 99]))
    histogram = {"edges": edges.tolist(), "counts": np.histogram(values, edges)[0].tolist()}
    extremes = {"max": int(values.max()), "total": int(values.sum()), "histogram": histogram}
    return {"mean": float(values.mean()), "p50": p50, "p90": p90, "p99": p99, **extremes}
