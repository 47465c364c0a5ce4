"""Word n-gram overlap between texts: keeps training text apart from evaluated items and from held-out documents.

Words are hashed from their bytes in bulk: the 30 MB of the built-in sets take about two seconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

NGRAM = 8
SHORTEST = 4

Hashes = NDArray[np.uint64]
Owners = NDArray[np.int64]

# Fixed: equal texts must be dropped on every machine. Odd numbers are invertible modulo 2**64.
_BASE = 0x9E3779B97F4A7C15 | 1
_MULTIPLIERS = np.random.Generator(np.random.PCG64(20240229)).integers(1, 2**63, 64, dtype=np.uint64) | np.uint64(1)
_CHUNK = 1 << 21
_FILTER_BITS = 24


def _codes() -> NDArray[np.uint8]:
    """Return the table from byte to lower-case letter or digit, 0 = between words."""
    table = np.zeros(256, dtype=np.uint8)
    for byte in b"abcdefghijklmnopqrstuvwxyz0123456789":
        table[byte] = byte
        table[ord(chr(byte).upper())] = byte
    return table


_CODES = _codes()


@lru_cache(maxsize=4)
def _powers(count: int, base: int) -> Hashes:
    values = np.full(count, base, dtype=np.uint64)
    values[0] = 1
    return np.multiply.accumulate(values, dtype=np.uint64)


def _chunks(texts: Sequence[str]) -> Iterator[tuple[int, list[bytes]]]:
    """Yield (number of the first text, encoded texts) in pieces of about `_CHUNK` bytes."""
    first, piece, size = 0, [], 0
    for number, text in enumerate(texts):
        piece.append(text.encode())
        size += len(piece[-1]) + 1
        if size >= _CHUNK:
            yield first, piece
            first, piece, size = number + 1, [], 0
    if piece:
        yield first, piece


def words(texts: Sequence[str]) -> tuple[Hashes, Owners]:
    """Return the hash of every lower-case alphanumeric ASCII word of `texts`, and the number of its text."""
    hashes: list[Hashes] = []
    owners: list[Owners] = []
    for first, piece in _chunks(texts):
        codes = _CODES[np.frombuffer(b" ".join(piece) + b" ", dtype=np.uint8)]
        inside = codes != 0
        edges = np.flatnonzero(np.diff(inside.astype(np.int8), prepend=0, append=0))
        begins, ends = edges[0::2], edges[1::2]
        length = max(len(codes), 1)
        sums = np.concatenate([[np.uint64(0)], np.cumsum(codes * _powers(length, _BASE), dtype=np.uint64)])
        word = (sums[ends] - sums[begins]) * _powers(length, pow(_BASE, -1, 2**64))[begins]
        hashes.append((word ^ (word >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9))
        starts = np.cumsum([0, *(len(text) + 1 for text in piece)])
        owners.append(first + np.searchsorted(starts, begins, side="right").astype(np.int64) - 1)
    if not hashes:
        return np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.int64)
    return np.concatenate(hashes), np.concatenate(owners)


def grams(word_hashes: Hashes, owners: Owners, size: int) -> tuple[Hashes, Owners]:
    """Return the hash of each window of `size` words that lies within one text, and the number of its text."""
    count = max(0, len(word_hashes) - size + 1)
    total = np.zeros(count, dtype=np.uint64)
    for offset in range(size):
        total += word_hashes[offset : offset + count] * _MULTIPLIERS[offset]
    within = owners[:count] == owners[len(owners) - count :]
    return total[within], owners[:count][within]


class _Set:
    """Membership of many hashes in a fixed set: a bit filter first, then the sorted values."""

    def __init__(self, values: Hashes) -> None:
        self._values = np.sort(values)
        self._filter = np.zeros(1 << _FILTER_BITS, dtype=bool)
        self._filter[self._slots(self._values)] = True

    @staticmethod
    def _slots(hashes: Hashes) -> Hashes:
        return hashes >> np.uint64(64 - _FILTER_BITS)

    def contains(self, hashes: Hashes) -> NDArray[np.bool_]:
        found = self._filter[self._slots(hashes)]
        candidates = np.flatnonzero(found)
        wanted = hashes[candidates]
        places = np.minimum(np.searchsorted(self._values, wanted), max(len(self._values) - 1, 0))
        found[candidates] = self._values[places] == wanted if len(self._values) else False
        return found


def overlapping(texts: Sequence[str], evaluated: Sequence[str]) -> list[bool]:
    """Return which of `texts` share `NGRAM` words in a row with an evaluated text, or hold a shorter one whole.

    Evaluated texts of fewer than `SHORTEST` words are too common to mean anything, and so are short ones that
    several items repeat ("What will Robin do next?"): both are skipped.
    """
    evaluated_words, evaluated_owner = words(evaluated)
    lengths = np.bincount(evaluated_owner, minlength=len(evaluated))
    text_words, text_owner = words(texts)
    hit = np.zeros(len(texts), dtype=bool)
    for size in range(SHORTEST, NGRAM + 1):
        wanted, owner = grams(evaluated_words, evaluated_owner, size)
        if size < NGRAM:
            whole, counts = np.unique(wanted[lengths[owner] == size], return_counts=True)
            wanted = whole[counts == 1]
        present, owner = grams(text_words, text_owner, size)
        hit[owner[_Set(wanted).contains(present)]] = True
    return [bool(value) for value in hit]


def shared_fraction(texts: Sequence[str], others: Sequence[str], size: int = 13) -> list[float]:
    """Return, per text, the fraction of its `size`-word windows that also occur in `others`; 0 when it has none."""
    known = _Set(grams(*words(others), size)[0])
    hashes, owner = grams(*words(texts), size)
    total = np.bincount(owner, minlength=len(texts))
    shared = np.bincount(owner[known.contains(hashes)], minlength=len(texts))
    return [float(part) / max(int(whole), 1) for part, whole in zip(shared, total, strict=True)]
