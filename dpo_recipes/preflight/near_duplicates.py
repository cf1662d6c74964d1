"""Finds texts that are almost the same, in time that grows with their number and not with its square."""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

_HASHES = 16  # of a text
_RUN = 16  # bytes, about three words
_ALIKE, _ALIKE_AT_LEAST = 0.8, 0.5  # resemblance: the mean over prompt, chosen and rejected, and of each of them
_ODD = np.random.default_rng(0).integers(2**63, size=32, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_FOLDED = np.array([ord(chr(code).lower()) * chr(code).isalnum() for code in range(128)] + [*range(128, 256)], np.uint8)


def sketch(texts: list[str]) -> NDArray[np.uint32]:
    """The least of sixteen hashes over each text's runs (MinHash: Broder 1997). Shape (texts, 16).

    A run is the sixteen bytes from the beginning of a word on, without case and punctuation. The share of the hashes in
    which two texts agree estimates their resemblance: their common runs, divided by all their runs.
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


def find_alike(sketches: NDArray[np.uint32], among: NDArray[np.uint32], *, earlier: bool = False) -> NDArray[np.int64]:
    """For each sketch the row in `among` of the first sketch found to resemble it; -1 if there is none.

    Two sketches are compared if they agree in some neighbouring hashes of all their texts (locality-sensitive
    hashing). With `earlier` only rows before the sketch's own count.
    """
    found = np.full(len(sketches), -1)
    neighbours = 4 if sketches.shape[1] == 1 else 2
    for start in range(_HASHES):
        columns = (start + np.arange(neighbours)) % _HASHES
        wanted, keys = _band(sketches, columns), _band(among, columns)
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


def _band(sketches: NDArray[np.uint32], columns: NDArray[np.int64]) -> NDArray[np.uint64]:
    """One hash a sketch, of these columns of all its texts. Shape (sketches,)."""
    values = np.ascontiguousarray(sketches[:, :, columns].reshape(len(sketches), -1)).astype(np.uint64)
    return values @ _ODD[: values.shape[1]]
