"""Signs that the pairs teach something else than they are meant to: give-aways, repeats, contradictions, leaks."""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from tqdm.auto import tqdm

from dpo_recipes.intervals import wilson
from dpo_recipes.preflight.findings import CHECKS, Finding, judge

_MARKS = {name: check["pattern"] for name, check in CHECKS.items() if {"label", "pattern"} <= check.keys()}
_USUAL = 10  # pairs of one prompt, as ranked answers make them
_ROWS = 5  # named as examples
_SAMPLE, _FOLDS = 10_000, 5  # pairs for the rules that are learned, and folds of their prompts
_HASHES = 16  # of a text
_RUN = 16  # bytes, about three words
_ALIKE, _ALIKE_AT_LEAST = 0.8, 0.5  # resemblance: the mean over prompt, chosen and rejected, and of each of them
_ODD = np.random.default_rng(0).integers(2**63, size=32, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_FOLDED = np.array([ord(chr(code).lower()) * chr(code).isalnum() for code in range(128)] + [*range(128, 256)], np.uint8)


def find_signals(pairs: DatasetDict, *, seed: int = 0) -> dict[str, Any]:
    """What trivial rules predict of the training pairs, and which pairs are repeated, contradicted or leaked.

    Args:
        pairs: `train` and `test`, neither empty, as conversations or as plain text. Row numbers are of these.
        seed: Of the sample for the rules that are learned.

    Returns:
        `pairs` and `prompts` (numbers); `baselines`, each with accuracy (a tie counts one half), low, high, n, the
        share decided and rows; `openers`, the first words that tell the sides apart most; `duplicates`,
        `near_duplicates` and `contradictions`, each with count, of and rows `[row, its like]`; `near_leaks`, the
        same with `[test row, training row]`; `frequent_prompt`. At most five rows each.
    """
    train, test = _read(pairs["train"], split="train"), _read(pairs["test"], split="test")
    size = len(train["pair"])
    first: dict[int, int] = {}
    repeats = [(row, other) for row, key in enumerate(train["pair"]) if (other := first.setdefault(key, row)) != row]
    against = [(row, first[key]) for row, key in enumerate(train["swapped"]) if key in first]
    alike = _alike(train["sketch"], train["sketch"], earlier=True)
    alike[[row for row, _ in repeats]] = -1
    leaked = _alike(test["sketch"][:, :1], train["sketch"][:, :1])
    usual, times = Counter(train["prompt"]).most_common(1)[0]
    rows = [row for row, key in enumerate(train["prompt"]) if key == usual][:_ROWS]
    text = _texts(pairs["train"].select(rows[:1]).with_format("arrow")[:], "prompt")[0].as_py()
    return {
        "pairs": size,
        "prompts": len(set(train["prompt"])),
        "baselines": {name: _baseline(name, *found) for name, found in _margins(pairs["train"], train, seed).items()},
        "openers": _openers(train),
        "duplicates": _account(repeats, of=size),
        "near_duplicates": _account(list(enumerate(alike)), of=size),
        "contradictions": _account(against, of=size),
        "near_leaks": _account(list(enumerate(leaked)), of=len(leaked)),
        "frequent_prompt": {"count": times, "of": size, "rows": rows, "text": text[:100]},
    }


def signal_findings(signals: Mapping[str, Any], thresholds: Mapping[str, float]) -> list[Finding]:
    """The signals above their threshold. A rule must also differ from a coin by its 95 % interval."""
    findings = []
    for name, rule in signals["baselines"].items():
        if not rule["low"] <= 0.5 <= rule["high"]:
            ahead, verb = max((rule["accuracy"], "wins"), (1 - rule["accuracy"], "loses"))
            findings += judge(name, ahead, 1, thresholds, ahead=ahead, verb=verb, of=rule["n"])
    for name in ("contradictions", "duplicates", "near_duplicates", "near_leaks"):
        found = signals[name]
        rows = ", ".join(f"{row} and {other}" for row, other in found["rows"])
        findings += judge(name, found["count"], found["of"], thresholds, rows=rows)
    times, prompt = signals["frequent_prompt"]["count"], signals["frequent_prompt"]["text"]
    return findings + judge("frequent_prompt", times - _USUAL, signals["pairs"], thresholds, times=times, prompt=prompt)


def _read(rows: Dataset, *, split: str) -> dict[str, Any]:
    """What is compared of each pair, in place of its texts.

    Returns:
        `prompt`, `pair` and `swapped` (that with chosen and rejected exchanged), hashes; `sketch` of shape
        (pairs, 3, 16); by the name of a rule the scores of chosen and rejected, of shape (pairs, 2); `first_word`.
    """
    found: dict[str, list[Any]] = {name: [] for name in ("prompt", "pair", "swapped", "sketch", "first_word", "longer")}
    found |= {name: [] for name in _MARKS}
    with tqdm(total=len(rows), desc=f"looking for signals ({split})", leave=False) as progress:
        for table in rows.with_format("arrow").iter(batch_size=2000):
            columns = [_texts(table, side) for side in ("prompt", "chosen", "rejected")]
            prompts, *sides = [column.to_pylist() for column in columns]
            found["prompt"] += map(hash, prompts)
            found["pair"] += map(hash, zip(prompts, *sides, strict=True))
            found["swapped"] += map(hash, zip(prompts, *reversed(sides), strict=True))
            found["sketch"].append(np.stack([_sketch(texts) for texts in (prompts, *sides)], axis=1))
            found["first_word"] += zip(*([_first_word(text) for text in side] for side in sides), strict=True)
            found["longer"].append(np.stack([pc.utf8_length(side) for side in columns[1:]], axis=1))
            for name, pattern in _MARKS.items():
                has = [pc.match_substring_regex(side, pattern).to_numpy(zero_copy_only=False) for side in columns[1:]]
                found[name].append(np.stack(has, axis=1).astype(int))
            progress.update(len(prompts))
    return found | {name: np.concatenate(found[name]) for name in ("sketch", "longer", *_MARKS)}


def _texts(table: pa.Table, column: str) -> Any:
    """The texts of a column of strings; of one of conversations, the contents of the turns, one below the other."""
    values = table[column].combine_chunks()
    if not pa.types.is_string(values.type):
        values = pc.binary_join(pa.ListArray.from_arrays(values.offsets, values.values.field("content")), "\n")
    return pc.utf8_trim_whitespace(values)


def _first_word(text: str) -> str:
    match = re.search(r"\w+", text)
    return match[0].lower() if match else ""


def _sketch(texts: list[str]) -> NDArray[np.uint32]:
    """The least of sixteen hashes over each text's runs (MinHash: Broder 1997). Shape (texts, 16).

    A run is the sixteen bytes from the beginning of a word on, without case and punctuation. Two texts agree in a share
    of the hashes that estimates their resemblance: the runs that they have in common, by all that they have.
    """
    # UTF-8 has no byte 255: sixteen of them begin each text and keep the last runs from reaching into the next text.
    mark = b" " + b"\xff" * _RUN + b" "
    letters = _FOLDED[np.frombuffer(b"".join(mark + text.encode() for text in [*texts, ""]), np.uint8)]
    letters = letters[1:][(letters[1:] > 0) | (letters[:-1] > 0)]  # one 0 behind every word
    starts = np.append(0, np.flatnonzero(letters[: -_RUN - 1] == 0) + 1)
    firsts = np.flatnonzero(letters[starts] == 255)
    runs = sliding_window_view(letters, _RUN)[starts].view(np.uint64)
    hashes = runs[:, 0] * _ODD[-1] + runs[:, 1] * _ODD[-2]
    hashes ^= hashes >> np.uint64(29)
    least = [np.minimum.reduceat(hashes * odd, firsts) >> np.uint64(32) for odd in _ODD[:_HASHES]]
    return np.stack(least, axis=1)[:-1].astype(np.uint32)


def _alike(sketches: NDArray[np.uint32], among: NDArray[np.uint32], *, earlier: bool = False) -> NDArray[np.int64]:
    """For each sketch the first of `among` that is found to resemble it, else -1; with `earlier`, of those before it.

    Compared are those that agree in some neighbouring hashes of all their texts (locality-sensitive hashing).
    """
    found = np.full(len(sketches), -1)
    neighbours = 4 if sketches.shape[1] == 1 else 2
    for start in range(_HASHES):
        columns = (start + np.arange(neighbours)) % _HASHES
        wanted, keys = (
            np.ascontiguousarray(side[:, :, columns].reshape(len(side), -1)).astype(np.uint64)
            @ _ODD[: neighbours * side.shape[1]]
            for side in (sketches, among)
        )
        keys, firsts = np.unique(keys, return_index=True)
        at = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
        same = (keys[at] == wanted) & (found < 0)
        if earlier:
            same &= firsts[at] < np.arange(len(sketches))
        rows = np.flatnonzero(same)
        resemblance = (sketches[rows] == among[firsts[at[rows]]]).mean(axis=2)
        close = (resemblance.mean(axis=1) >= _ALIKE) & (resemblance.min(axis=1) >= _ALIKE_AT_LEAST)
        found[rows[close]] = firsts[at[rows[close]]]
    return found


def _margins(pairs: Dataset, read: Mapping[str, Any], seed: int) -> dict[str, tuple[Any, Any]]:
    """By the name of a rule, how much higher it scores the chosen answer of each pair, and the rows of these pairs."""
    rows = np.arange(len(pairs))
    margins = {name: (read[name][:, 0] - read[name][:, 1], rows) for name in ("longer", *_MARKS)}
    sample = np.sort(np.random.default_rng(seed).permutation(rows)[:_SAMPLE])
    _, prompts = np.unique(read["sketch"][sample, 0], axis=0, return_inverse=True)
    if prompts.max() < _FOLDS:
        return margins
    table = pairs.select(sample).with_format("arrow")[:]
    texts = [_texts(table, side).to_pylist() for side in ("chosen", "rejected")]
    first_words = list(zip(*(read["first_word"][row] for row in sample), strict=True))
    for name, sides in {"first_word": first_words, "bag_of_words": texts}.items():
        margins[name] = _word_margins(*sides, prompts=prompts.ravel(), seed=seed), sample
    return margins


def _word_margins(chosen: list[str], rejected: list[str], *, prompts: NDArray[Any], seed: int) -> NDArray[np.float64]:
    """Of a logistic regression on the words that one side has more of, each fold by a model of the other prompts."""
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


def _baseline(name: str, margins: NDArray[Any], rows: NDArray[Any]) -> dict[str, Any]:
    share = wilson(float((margins > 0).sum() + (margins == 0).sum() / 2), len(margins))
    with_it = margins > 0 if share.mean > 0.5 else margins < 0
    return {
        "label": CHECKS[name]["label"],
        **{"accuracy": share.mean, "low": share.low, "high": share.high, "n": share.n},
        "decided": float((margins != 0).mean()),
        "rows": rows[with_it][:_ROWS].tolist(),
    }


def _openers(read: Mapping[str, Any]) -> list[dict[str, Any]]:
    chosen, rejected = (Counter(side) for side in zip(*read["first_word"], strict=True))
    size = len(read["first_word"])
    most = sorted(chosen | rejected, key=lambda word: (-abs(chosen[word] - rejected[word]), word))[:_ROWS]
    return [{"word": word, "chosen": chosen[word] / size, "rejected": rejected[word] / size} for word in most]


def _account(rows: list[tuple[int, int]], *, of: int) -> dict[str, Any]:
    found = [[row, int(other)] for row, other in rows if other >= 0]
    return {"count": len(found), "of": of, "rows": found[:_ROWS]}
