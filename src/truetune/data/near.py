"""Rows that say nearly the same: the share of word triples that two texts have in common, from sketches of both.

The set of word triples of a text is kept as 128 numbers: the triples are hashed into that many bins, and each bin
keeps its least hash. The share of equal numbers among the bins that either text fills estimates the Jaccard index of
the two sets (Li, Owen, Zhang 2012, arXiv:1208.1259). Which pairs are worth comparing is told by bands of four numbers,
for which an empty bin borrows from the next one (Shrivastava, Li 2014, arXiv:1406.4784): texts that agree on a whole
band meet there.

Everything is a pure function of the texts: no random number, no order of hashing that a process chooses.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]
Sketch = NDArray[np.uint16]  # [rows, BINS], 0 in a bin without any triple
Pairs = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]

BINS = 128
THRESHOLD = 0.7  # of the triples; a word changed in a text of twenty leaves 17 of 23
LIMIT = 262_144  # rows that are compared: 64 MB of sketches

_BAND = 4  # a pair at the threshold is missed by all 32 bands once in 6,000 times
_BASE, _MIX, _MIX_2 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_EMPTY = np.uint32(0xFFFFFFFF)
_BLOCK = 1 << 17  # characters, or candidate pairs, handled at once
# Scripts that put no blank between words: each of their characters counts as a word.
_UNSPACED = ((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3040, 0x30FF), (0x3400, 0x9FFF), (0xF900, 0xFAFF))


class Sketches:
    """Sketches of texts that come in blocks; those beyond ``limit`` are counted and not kept."""

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit, self.seen = limit, 0
        self._kept = np.empty((limit, BINS), np.uint16)  # of which the system gives what is written to, no more
        self._count = 0

    def add(self, texts: Sequence[str]) -> None:
        """Take in the next texts."""
        room = max(0, self.limit - self.seen)
        self.seen += len(texts)
        for block in _blocks(texts[:room]):
            self._keep(_sketch(block))

    def take(self, made: Sketch) -> None:
        """Take in the sketches of the next texts, made elsewhere."""
        self._keep(made[: max(0, self.limit - self.seen)])
        self.seen += len(made)

    def _keep(self, made: Sketch) -> None:
        self._kept[self._count : self._count + len(made)] = made
        self._count += len(made)

    @property
    def matrix(self) -> Sketch:
        """[rows, 128] uint16, in the order of the texts."""
        return self._kept[: self._count]


def near_repeats(sketches: Sketches, threshold: float = THRESHOLD) -> Pairs:
    """Texts that are nearly an earlier one.

    Returns:
        (text, the earlier text that it resembles most, share of triples in common), by text.
    """
    matrix = sketches.matrix
    rows = _worded(matrix)
    return _above(matrix, matrix, ((rows[a], rows[b]) for a, b in map(_earlier, _band_keys(matrix, rows))), threshold)


def near_shared(held_out: Sketches, known: Sketches, threshold: float = THRESHOLD) -> Pairs:
    """Texts of ``held_out`` that are nearly one of ``known``; as ``near_repeats``."""
    matrix, others = held_out.matrix, known.matrix
    ours, theirs = _worded(matrix), _worded(others)
    if not (len(ours) and len(theirs)):  # to be found out here: the keys of either side take long
        return _above(matrix, others, (), threshold)
    keys = zip(_band_keys(matrix, ours), _band_keys(others, theirs), strict=True)
    found = (_among(key, other) for key, other in keys)
    return _above(matrix, others, ((ours[a], theirs[b]) for a, b in found), threshold)


def word_hashes(texts: Sequence[str]) -> tuple[Words, NDArray[np.int64]]:
    """The words of texts, case and punctuation aside.

    Returns:
        [words] 64-bit hashes, text after text, and [words] the text that each stands in.
    """
    joined = "\n".join(text.lower().replace("\n", " ") for text in texts)
    points = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32)
    kind = _kinds()[np.minimum(points, 0xFFFF)]
    within = kind > 0
    before = np.concatenate([[np.uint8(0)], kind[:-1]])
    starts = np.flatnonzero(within & ((before != 1) | (kind != 1)))
    after = np.concatenate([kind[1:], [np.uint8(0)]])
    ends = np.flatnonzero(within & ((after != 1) | (kind != 1))) + 1
    row = np.concatenate([[0], np.cumsum(points == 10)])[starts]
    return _mixed(_spans(points, starts, ends)), row.astype(np.int64)


def _spans(points: NDArray[np.uint32], starts: NDArray[np.int64], ends: NDArray[np.int64]) -> Words:
    """The polynomial hash of each span: prefix sums of c_i B^i, divided by B^start (modulo 2^64, where B is odd)."""
    powers, inverse = _powers(len(points) + 1)
    sums = np.concatenate([[np.uint64(0)], np.cumsum((points.astype(np.uint64) + np.uint64(1)) * powers[:-1])])
    found: Words = (sums[ends] - sums[starts]) * inverse[starts]
    return found


@functools.lru_cache(maxsize=1)
def _table(size: int) -> tuple[Words, Words]:
    inverse = np.uint64(pow(int(_BASE), -1, 1 << 64))
    ones = [np.full(size, base, np.uint64) for base in (_BASE, inverse)]
    for column in ones:
        column[0] = 1
    return np.cumprod(ones[0], dtype=np.uint64), np.cumprod(ones[1], dtype=np.uint64)


def _powers(size: int) -> tuple[Words, Words]:
    """B^i and B^-i for i below ``size``; one table serves all blocks of the usual length."""
    powers, inverse = _table(max(size, 2 * _BLOCK) if size <= 2 * _BLOCK else size)
    return powers[:size], inverse[:size]


@functools.cache
def _kinds() -> NDArray[np.uint8]:
    """[65536] by code point: 0 between words, 1 inside a word, 2 a word of its own. What is above stands at the end."""
    kinds = np.array([chr(point).isalnum() for point in range(0x10000)], np.uint8)
    for first, last in _UNSPACED:
        kinds[first : last + 1] *= 2
    kinds[0xFFFF] = 2
    return kinds


def _mixed(value: Words) -> Words:
    """Every bit of the result depends on every bit of ``value`` (the finaliser of splitmix64)."""
    value = (value ^ (value >> np.uint64(30))) * _MIX
    value = (value ^ (value >> np.uint64(27))) * _MIX_2
    mixed: Words = value ^ (value >> np.uint64(31))
    return mixed


def _blocks(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Runs of texts of about ``_BLOCK`` characters; a longer text stands alone."""
    bounds, size = [0], 0
    for i, text in enumerate(texts):
        if size + len(text) > _BLOCK and i > bounds[-1]:
            bounds.append(i)
            size = 0
        size += len(text)
    yield from (texts[a:b] for a, b in pairwise([*bounds, len(texts)]) if b > a)


def _sketch(texts: Sequence[str]) -> Sketch:
    words, row = word_hashes(texts)
    triples = _triples(words, row)
    least = np.full(len(texts) * BINS, _EMPTY, np.uint32)
    place = row * BINS + (triples >> np.uint64(57)).astype(np.int64)
    np.minimum.at(least, place, (triples & np.uint64(0x7FFFFFFF)).astype(np.uint32))
    # The low half: of the least of many values, the high bits tell next to nothing.
    low = np.maximum(least.astype(np.uint16), np.uint16(1))
    sketch: Sketch = np.where(least == _EMPTY, np.uint16(0), low).reshape(-1, BINS)
    return sketch


def _worded(matrix: Sketch) -> NDArray[np.int64]:
    """The rows that have a word at all; a text without one is like no other."""
    return np.flatnonzero(matrix.any(axis=1))


def _triples(words: Words, row: NDArray[np.int64]) -> Words:
    """Each word with the two behind it in the same text; at the end of a text, with what there is."""
    triples = words * _MIX
    for distance, factor in ((1, _BASE), (2, _MIX_2)):
        same = row[distance:] == row[:-distance]
        triples[:-distance] += np.where(same, words[distance:], np.uint64(0)) * factor
    return _mixed(triples)


def _filled(matrix: Sketch) -> Sketch:
    """Each empty bin takes the value of the next one that is not, changed by how far it had to look."""
    twice = np.concatenate([matrix, matrix], axis=1)
    columns = np.arange(2 * BINS)
    source = np.where(twice != 0, columns, 2 * BINS - 1)
    source = np.minimum.accumulate(source[:, ::-1], axis=1)[:, ::-1][:, :BINS]
    distance = (source - columns[:BINS]).astype(np.uint16)
    borrowed: Sketch = np.take_along_axis(twice, source, axis=1) + distance * np.uint16(0x9E37)
    return borrowed


def _band_keys(matrix: Sketch, rows: NDArray[np.int64]) -> Iterator[Words]:
    """One column of keys for each band: ``rows`` that agree on the band have the same key."""
    half, step = BINS // 2, _BLOCK // BINS
    for first in (0, half):  # filled twice over, so that half of it is held: the sketches of all rows are large
        filled = np.empty((len(rows), half), np.uint16)
        for i in range(0, len(rows), step):
            filled[i : i + step] = _filled(matrix[rows[i : i + step]])[:, first : first + half]
        for start in range(0, half, _BAND):
            yield np.ascontiguousarray(filled[:, start : start + _BAND]).view(np.uint64)[:, 0]


def _earlier(keys: Words) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows with the first row of the same key, and with the last one before them: never all pairs of a key."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    repeats = np.flatnonzero(ordered[1:] == ordered[:-1]) + 1
    first = np.searchsorted(ordered, ordered[repeats])
    return np.tile(order[repeats], 2), np.concatenate([order[first], order[repeats - 1]])


def _among(keys: Words, known: Words) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows with the first and the last of the known rows of the same key."""
    order = np.argsort(known, kind="stable")
    ordered = known[order]
    first, last = (np.searchsorted(ordered, keys, side=side) for side in ("left", "right"))
    rows = np.flatnonzero(first < last)
    return np.tile(rows, 2), np.concatenate([order[first[rows]], order[last[rows] - 1]])


def _above(
    ours: Sketch, theirs: Sketch, candidates: Iterable[tuple[NDArray[np.int64], NDArray[np.int64]]], threshold: float
) -> Pairs:
    """Compare candidates; of each row, the pair with the largest share (the earliest of equals) is kept."""
    pairs = np.zeros(0, np.int64)
    for row, other in candidates:  # one band after another: those that are alike meet again in most of them
        pairs = _distinct(np.concatenate([pairs, row * len(theirs) + other]))
    row, other = np.divmod(pairs, max(1, len(theirs)))
    step = _BLOCK // BINS
    share = np.concatenate(
        [np.zeros(0), *(_share(ours[row[i : i + step]], theirs[other[i : i + step]]) for i in range(0, len(row), step))]
    )
    kept = share >= threshold
    row, other, share = row[kept], other[kept], share[kept]
    best = np.lexsort((other, -share, row))
    rows, first = np.unique(row[best], return_index=True)
    return rows, other[best][first], share[best][first]


def _distinct(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """As ``np.unique``, whose hash table is many times slower than sorting."""
    values = np.sort(values)
    return values[np.concatenate([[True], values[1:] != values[:-1]])] if len(values) else values


def _share(ours: Sketch, theirs: Sketch) -> NDArray[np.float64]:
    """[pairs]: equal bins over the bins that either side fills."""
    shared: NDArray[np.float64] = ((ours == theirs) & (ours != 0)).sum(axis=1) / ((ours != 0) | (theirs != 0)).sum(
        axis=1
    )
    return shared
