"""What the model will really see: every pair as token ids, cut into prompt and completions as DPOTrainer does it."""

import random
from typing import Any

import numpy as np
from datasets import Dataset, Features, Value
from jinja2 import TemplateError
from transformers import GenerationConfig

from dpo_recipes.dataset_adapters import Drop, Message, check_pair, keep_pairs, map_rows
from dpo_recipes.ledger import SplitAccount, current_ledger
from dpo_recipes.loading import prompt_hashes
from dpo_recipes.tokenization import PairIds, encode_pairs

SIDES = ("prompt", "chosen", "rejected")
MEASURES = {
    **{f"{side}_tokens": Value("int32") for side in SIDES},
    "cut_tokens": Value("int32"),  # of the prompt, with its oldest turns
    "without_eos": Value("bool"),  # a completion does not end in a token that stops generation
    "eos_inside": Value("bool"),  # a completion of one turn has such a token before its end
    "double_bos": Value("bool"),
    "prompt_not_prefix": Value("bool"),  # the tokens of the prompt alone do not begin both sequences
}
"""The columns that `fit` adds."""
FAULTS = [name for name, kind in MEASURES.items() if kind == Value("bool")]
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
    )
    return keep_pairs(marked, name="preflight", split=split)


def fit_prompts(pairs: Dataset, tokenizer: Any, longest: int | None, too_long: str, *, split: str) -> Dataset:
    """The distinct prompts of the pairs, of at most `longest` tokens, with the columns of their first pairs.

    Long ones lose their oldest turns as in `fit`, and are dropped as `too_long` says where that does not help. `chosen`
    and `rejected` go; `prompt_tokens` and `cut_tokens` are added, those to what `fit` has cut already.
    """
    tokenizer("settle")  # a tokenizer's first call changes its state, and with it the key of the map's cache
    kept = {name: kind for name, kind in pairs.features.items() if name not in ("chosen", "rejected")}
    counts = {name: MEASURES[name] for name in ("prompt_tokens", "cut_tokens")}
    marked = map_rows(
        pairs,
        _fit_prompts,
        features=Features({**kept, **counts, "drop_reason": Value("string")}),
        desc=f"measuring prompts ({split})",
        tokenizer=tokenizer,
        longest=longest,
        too_long=too_long,
    )
    prompts = keep_pairs(marked, name="preflight", split=split)
    first = {key: row for row, key in reversed(list(enumerate(prompt_hashes(prompts))))}
    again = sorted(set(range(len(prompts))).difference(first.values()))
    dropped = {"same_prompt": again} if again else {}
    current_ledger().record("preflight", split, came=len(prompts), kept=len(first), dropped=dropped)
    return prompts.select(sorted(first.values()))


def _fit_prompts(
    batch: dict[str, list[Any]], *, tokenizer: Any, longest: int | None, too_long: str
) -> dict[str, list[Any]]:
    prompts, reasons, tokens, cut = [], [], [], []
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
    columns = {name: values for name, values in batch.items() if name not in ("chosen", "rejected")}
    return {**columns, "prompt": prompts, "prompt_tokens": tokens, "cut_tokens": cut, "drop_reason": reasons}


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


def render(prompt: Any, chosen: Any, rejected: Any, *, tokenizer: Any) -> tuple[str, str, str]:
    """The three texts that DPOTrainer tokenises: the prompt alone, with the chosen and with the rejected completion.

    Raises:
        Drop: If they make no pair.
    """
    if prompt is None or chosen is None or rejected is None:
        raise Drop("missing_value")
    if isinstance(prompt, str):
        return _render_text(prompt, chosen, rejected, eos=tokenizer.eos_token)
    check_pair({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    try:
        alone = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        first = tokenizer.apply_chat_template(prompt + chosen, tokenize=False)
        second = tokenizer.apply_chat_template(prompt + rejected, tokenize=False)
    except (TemplateError, TypeError, ValueError) as error:
        raise Drop("template_refuses") from error
    if alone.startswith(first) or alone.startswith(second):
        raise Drop("empty_in_template")
    return alone, first, second


def describe(pairs: Dataset, *, account: SplitAccount) -> dict[str, Any]:
    """The token statistics of one split, of pairs as `fit` returns them, for preflight.json."""
    columns = {name: np.array(pairs[name][:], dtype=np.int64) for name in MEASURES}
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
    }


def describe_prompts(prompts: Dataset) -> dict[str, Any]:
    """The token statistics of one split, of prompts as `fit_prompts` returns them, for preflight.json."""
    tokens = np.array(prompts["prompt_tokens"][:], dtype=np.int64)
    cut = int(np.sum(prompts["cut_tokens"][:]))
    return {"prompt": _statistics(tokens, np.histogram_bin_edges(tokens, bins=_BINS)), "cut_from": {"prompt": cut}}


def rendered_pairs(pairs: Dataset, tokenizer: Any, *, split: str) -> list[dict[str, Any]]:
    """Three pairs, drawn by seed 0, token by token: their text, ids, and 1 where the loss is taken."""
    shown = []
    for row in sorted(random.Random(0).sample(range(len(pairs)), min(_SHOWN, len(pairs)))):
        pair = [pairs[row][side] for side in SIDES]
        [ids] = encode_pairs([render(*pair, tokenizer=tokenizer)], tokenizer)
        sides = {}
        for side, completion in (("chosen", ids.chosen), ("rejected", ids.rejected)):
            both = ids.prompt + completion
            sides[side] = {
                "tokens": [tokenizer.decode([token]) for token in both],
                "ids": both,
                "trained": [0] * len(ids.prompt) + [1] * len(completion),
                "prompt_tokens": len(ids.prompt),
            }
        has_prompt = isinstance(pair[0], str) or _has_generation_prompt(pair[0], pair[1], ids, tokenizer)
        shown.append({"split": split, "row": row, "generation_prompt": has_prompt, "sides": sides})
    return shown


def _fit_batch(
    batch: dict[str, list[Any]], *, tokenizer: Any, max_length: int | None, stops: list[int]
) -> dict[str, list[Any]]:
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
                texts[row] = render(prompts[row], batch["chosen"][row], batch["rejected"][row], tokenizer=tokenizer)
            except Drop as drop:
                reasons[row] = str(drop)
        waiting = []
        for row, ids in zip(texts, encode_pairs(list(texts.values()), tokenizer), strict=True):
            first.setdefault(row, len(ids.prompt))
            if max_length is None or len(ids.prompt) + max(len(ids.chosen), len(ids.rejected)) <= max_length:
                completions = batch["chosen"][row], batch["rejected"][row]
                measured[row] = _measure(ids, completions, stops=stops, tokenizer=tokenizer)
                measured[row]["cut_tokens"] = first[row] - len(ids.prompt)
                continue
            shorter = None if isinstance(prompts[row], str) else without_oldest_exchange(prompts[row])
            if shorter is None:
                reasons[row] = "too_long"
            else:
                prompts[row] = shorter
                waiting.append(row)
    columns = {name: [measured[row][name] if row in measured else 0 for row in rows] for name in MEASURES}
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
    }


def _stops(completion: list[int], stops: list[int], tokenizer: Any) -> tuple[bool, bool]:
    """Whether stop tokens are the last of the tokens, but for white space, and whether one comes before these."""
    ends = False
    end = len(completion)
    while end and (completion[end - 1] in stops or not tokenizer.decode([completion[end - 1]]).strip()):
        end -= 1
        ends |= completion[end] in stops
    return ends, not set(stops).isdisjoint(completion[:end])


def _has_generation_prompt(prompt: list[Message], chosen: list[Message], ids: PairIds, tokenizer: Any) -> bool:
    """Whether the answer's header is in the prompt: asking for it adds tokens, or the completion begins with none."""
    without = tokenizer.apply_chat_template(prompt, return_dict=True)["input_ids"]
    said, meant = ("".join(text.split()) for text in (tokenizer.decode(ids.chosen), chosen[0]["content"]))
    return without != ids.prompt or said.startswith(meant)


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
