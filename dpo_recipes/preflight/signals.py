"""Looks for pairs that teach something else than they are meant to: give-aways, repeats, contradictions, leaks."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict
from numpy.typing import NDArray
from tqdm.auto import tqdm

from dpo_recipes.dataset_adapters.adapting import row_names
from dpo_recipes.models.likelihood import share_ahead
from dpo_recipes.preflight.findings import CHECKS, Finding, in_words, judge
from dpo_recipes.preflight.near_duplicates import find_alike, sketch

_MARKS = {name: check["pattern"] for name, check in CHECKS.items() if {"label", "pattern"} <= check.keys()}
_USUAL = 10  # pairs of one prompt, as ranked answers make them
_ROWS = 5  # named as examples
_BATCH = 2000  # pairs read at a time
_SAMPLE, _FOLDS = 10_000, 5  # pairs for the rules that are learned, and folds of their prompts


def find_signals(pairs: DatasetDict, *, seed: int = 0) -> dict[str, Any]:
    """Finds what trivial rules predict of the training pairs, and which pairs are repeated, contradicted or leaked.

    Args:
        pairs: `train` and `test`, neither empty, as conversations or as plain text, with the names of their rows.
        seed: Draws the sample for the rules that are learned.

    Returns:
        `pairs` and `prompts` (numbers); `baselines`, each with accuracy (a tie counts one half), low, high, n, the
        share decided and rows; `openers`, the first words that tell the sides apart most; `duplicates`,
        `near_duplicates` and `contradictions`, each with count, of and pairs of rows; `near_leaks`, the same with
        `[test row, training row]`; `frequent_prompt`. At most five rows each.
    """
    train, test = _read(pairs["train"], split="train"), _read(pairs["test"], split="test")
    names, test_names, size = row_names(pairs["train"]), row_names(pairs["test"]), len(train["pair"])
    first: dict[int, int] = {}
    firsts = [first.setdefault(key, row) for row, key in enumerate(train["pair"].tolist())]
    repeats = [(row, earlier) for row, earlier in enumerate(firsts) if earlier != row]
    against = [(row, first[key]) for row, key in enumerate(train["swapped"].tolist()) if key in first]
    alike = find_alike(train["sketch"], train["sketch"], earlier=True)
    alike[[row for row, _ in repeats]] = -1  # exact copies count as such alone
    leaked = find_alike(test["sketch"][:, :1], train["sketch"][:, :1])
    margins = _margins(pairs["train"], train, seed)
    return {
        "pairs": size,
        "prompts": len(np.unique(train["prompt"])),
        "baselines": {name: _baseline(name, *found, names=names) for name, found in margins.items()},
        "openers": _openers(train["first_word"]),
        "duplicates": _account(repeats, names, names),
        "near_duplicates": _account(enumerate(alike), names, names),
        "contradictions": _account(against, names, names),
        "near_leaks": _account(enumerate(leaked), test_names, names),
        "frequent_prompt": _frequent_prompt(pairs["train"], train["prompt"]),
    }


def signal_findings(signals: Mapping[str, Any], thresholds: Mapping[str, float]) -> list[Finding]:
    """The signals above their threshold. The 95 % interval of a rule must also exclude 50 %."""
    findings = []
    for name, rule in signals["baselines"].items():
        if not rule["low"] <= 0.5 <= rule["high"]:
            ahead, verb = max((rule["accuracy"], "wins"), (1 - rule["accuracy"], "loses"))
            findings += judge(name, ahead, 1, thresholds, ahead=ahead, verb=verb, of=rule["n"])
    for name in ("contradictions", "duplicates", "near_duplicates", "near_leaks"):
        found = signals[name]
        findings += judge(name, found["count"], found["of"], thresholds, rows=in_words(found["rows"]))
    times, prompt = signals["frequent_prompt"]["count"], signals["frequent_prompt"]["text"]
    return findings + judge("frequent_prompt", times - _USUAL, signals["pairs"], thresholds, times=times, prompt=prompt)


def _read(rows: Dataset, *, split: str) -> dict[str, NDArray[Any]]:
    """The columns of `_read_batch` for all rows."""
    tables = rows.with_format("arrow").iter(batch_size=_BATCH)
    progress = tqdm(tables, desc=f"looking for signals ({split})", total=-(-len(rows) // _BATCH), leave=False)
    parts = [_read_batch(table) for table in progress]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _read_batch(table: pa.Table) -> dict[str, NDArray[Any]]:
    """Numbers and first words, which are compared in place of the texts.

    Returns:
        Hashes `prompt`, `pair` and `swapped` (chosen and rejected exchanged), of shape (pairs,); `sketch`, of shape
        (pairs, 3, 16); the `first_word` of chosen and rejected and, by the name of a rule, their scores, of shape
        (pairs, 2).
    """
    prompt, *sides = (_texts(table, side) for side in ("prompt", "chosen", "rejected"))
    prompts, chosen, rejected = prompt.to_pylist(), *(side.to_pylist() for side in sides)
    words = [[_first_word(text) for text in answers] for answers in zip(chosen, rejected, strict=True)]
    found = {
        "prompt": np.array([hash(text) for text in prompts]),
        "pair": np.array([hash(texts) for texts in zip(prompts, chosen, rejected, strict=True)]),
        "swapped": np.array([hash(texts) for texts in zip(prompts, rejected, chosen, strict=True)]),
        "sketch": np.stack([sketch(texts) for texts in (prompts, chosen, rejected)], axis=1),
        "first_word": np.array(words, dtype=object),
        "longer": np.stack([pc.utf8_length(side) for side in sides], axis=1),
    }
    for name, pattern in _MARKS.items():
        has_mark = [pc.match_substring_regex(side, pattern).to_numpy(zero_copy_only=False) for side in sides]
        found[name] = np.stack(has_mark, axis=1).astype(int)
    return found


def _texts(table: pa.Table, column: str) -> Any:
    """The texts of a column of strings; for conversations the contents of the turns, one below the other."""
    values = table[column].combine_chunks()
    if not pa.types.is_string(values.type):
        values = pc.binary_join(pa.ListArray.from_arrays(values.offsets, values.values.field("content")), "\n")
    return pc.utf8_trim_whitespace(values)


def _first_word(text: str) -> str:
    match = re.search(r"\w+", text)
    return match[0].lower() if match else ""


def _margins(pairs: Dataset, read: Mapping[str, Any], seed: int) -> dict[str, tuple[Any, Any]]:
    """By the name of a rule: its score of chosen minus its score of rejected, and the rows of these pairs."""
    rows = np.arange(len(pairs))
    margins = {name: (read[name][:, 0] - read[name][:, 1], rows) for name in ("longer", *_MARKS)}
    sample = np.sort(np.random.default_rng(seed).permutation(rows)[:_SAMPLE])
    _, prompts = np.unique(read["sketch"][sample, 0], axis=0, return_inverse=True)
    if prompts.max() < _FOLDS:
        return margins
    table = pairs.select(sample).with_format("arrow")[:]
    texts = [_texts(table, side).to_pylist() for side in ("chosen", "rejected")]
    for name, sides in {"first_word": read["first_word"][sample].T, "bag_of_words": texts}.items():
        margins[name] = _word_margins(*sides, prompts=prompts.ravel(), seed=seed), sample
    return margins


def _word_margins(chosen: Any, rejected: Any, *, prompts: NDArray[Any], seed: int) -> NDArray[np.float64]:
    """Margins of a logistic regression on the words that one side has more of; each fold is left out of its model."""
    from scipy.sparse import vstack
    from sklearn.feature_extraction.text import HashingVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold, cross_val_predict

    words = HashingVectorizer(n_features=2**16, alternate_sign=False, token_pattern=r"\w+")
    differences = words.transform(chosen) - words.transform(rejected)
    both = vstack([differences, -differences])  # each pair both ways: no fold has one class alone
    model = LogisticRegression(C=0.5, fit_intercept=False, solver="liblinear", random_state=seed)
    folds = GroupKFold(_FOLDS, shuffle=True, random_state=seed)
    kind = {"groups": np.tile(prompts, 2), "cv": folds, "method": "decision_function"}
    signs = np.repeat([1, -1], len(prompts))
    return np.asarray(cross_val_predict(model, both, signs, **kind)[: len(prompts)])


def _baseline(name: str, margins: NDArray[Any], rows: NDArray[Any], *, names: list[str]) -> dict[str, Any]:
    share = share_ahead(margins)
    with_it = margins > 0 if share.mean > 0.5 else margins < 0
    return {
        "label": CHECKS[name]["label"],
        **{"accuracy": share.mean, "low": share.low, "high": share.high, "n": share.n},
        "decided": float((margins != 0).mean()),
        "rows": [names[row] for row in rows[with_it][:_ROWS]],
    }


def _openers(first_words: NDArray[Any]) -> list[dict[str, Any]]:
    chosen, rejected = Counter(first_words[:, 0]), Counter(first_words[:, 1])
    size = len(first_words)
    most = sorted(chosen | rejected, key=lambda word: (-abs(chosen[word] - rejected[word]), word))[:_ROWS]
    return [{"word": word, "chosen": chosen[word] / size, "rejected": rejected[word] / size} for word in most]


def _account(rows: Iterable[tuple[int, int]], names: list[str], other_names: list[str]) -> dict[str, Any]:
    """The pairs of a row and another one; those whose other row is -1 do not count."""
    found = [[names[row], other_names[other]] for row, other in rows if other >= 0]
    return {"count": len(found), "of": len(names), "rows": found[:_ROWS]}


def _frequent_prompt(pairs: Dataset, hashes: NDArray[np.int64]) -> dict[str, Any]:
    [(usual, times)] = Counter(hashes.tolist()).most_common(1)
    rows = np.flatnonzero(hashes == usual)[:_ROWS].tolist()
    text = _texts(pairs.select(rows[:1]).with_format("arrow")[:], "prompt")[0].as_py()
    names = row_names(pairs)
    return {"count": times, "of": len(pairs), "rows": [names[row] for row in rows], "text": text[:100]}
