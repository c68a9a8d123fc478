"""The keys of many rows in a file, and which rows say the same, found with a small part of the keys in memory.

A key is a hash, so its low bits part any rows into shares of about one size, and rows that say the same meet in one
share: going through one share after another needs the memory of one. So that each is read once, whatever their number,
a side's keys are first written anew, share behind share.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray

from truetune.data.duplicates import LISTED
from truetune.data.split import held_out

Keys = NDArray[np.int64]
Places = NDArray[np.int64]

_SHARE = 1 << 18  # keys of a share, about: with their places and their order they take 8 MB
_STRETCH = 1 << 18  # keys read at once
_RECORD = 16  # bytes of a key and its place


@dataclass(frozen=True)
class RowKeys:
    """``split.content_key`` of ``count`` rows, [count] int64 in a file of the machine's own byte order."""

    path: Path
    count: int

    @classmethod
    def write(cls, path: Path, parts: Iterable[Keys]) -> RowKeys:
        """Keep the keys of all rows, part after part.

        Raises:
            OSError: the disk is full.
        """
        count = 0
        with path.open("wb") as file:
            for part in parts:
                file.write(np.ascontiguousarray(part).data)
                count += len(part)
        return cls(path, count)

    def stretches(self) -> Iterator[tuple[int, Keys]]:
        """``(first row, [m] keys)`` of all rows, a stretch at a time.

        Raises:
            OSError: the file is not there any more.
        """
        with self.path.open("rb") as file:
            for first in range(0, self.count, _STRETCH):
                yield first, np.fromfile(file, np.int64, _STRETCH)


@dataclass(frozen=True)
class Side:
    """The rows that are trained on, or those that are held out by a share (see ``split.held_out``).

    Attributes:
        keys: of the rows of both sides.
        share: of them that is held out; 0 holds none out.
        held: which side is meant.
    """

    keys: RowKeys
    share: float
    held: bool = False

    def chosen(self, keys: Keys) -> NDArray[np.bool_]:
        """[n] bool: whose key is one of this side."""
        found: NDArray[np.bool_] = held_out(torch.from_numpy(keys), self.share).numpy()
        return found if self.held else ~found

    def count(self) -> int:
        """Rows of this side."""
        return sum(int(self.chosen(keys).sum()) for _, keys in self.keys.stretches())

    def first(self, rows: int) -> NDArray[np.bool_]:
        """[rows] bool: which of the first ``rows`` rows are of this side."""
        found = np.zeros(rows, np.bool_)
        for first, keys in self.keys.stretches():
            if first >= rows:
                break
            found[first : first + len(keys)] = self.chosen(keys)[: rows - first]
        return found

    @contextlib.contextmanager
    def parted(self, shares: int) -> Iterator[Parted]:
        """This side's rows in ``shares`` shares (a power of two), in a file beside the keys for as long as it is open.

        Reads the keys twice, to count and to write: O(rows) time, and 16 bytes of the disk for each row of this side.

        Raises:
            OSError: the disk is full, or the keys' file is not there any more.
        """
        counts = np.zeros(shares, np.int64)
        for _, keys in self.keys.stretches():
            counts += np.bincount(keys[self.chosen(keys)] & (shares - 1), minlength=shares)
        with tempfile.TemporaryFile(dir=self.keys.path.parent) as file:
            parted = Parted(file, counts.cumsum())
            at = parted.ends - counts
            for first, keys in self.keys.stretches():
                at += parted.put(keys, np.flatnonzero(self.chosen(keys)), first, at)
            yield parted


@dataclass(frozen=True)
class Parted:
    """A side's rows in shares: key and place of each, [n, 2] int64, those of a share behind those of the one before.

    Attributes:
        file: open for both reading and writing.
        ends: [shares] int64, the record behind the last one of each share.
    """

    file: IO[bytes]
    ends: Places

    def put(self, keys: Keys, wanted: Places, first: int, at: Places) -> Places:
        """Write the ``wanted`` ones of ``keys``, which are those of rows ``first`` and on.

        Args:
            at: [shares] int64, the record from which on those of each share go.

        Returns:
            [shares] int64, how many of them are of each share.
        """
        numbers = keys[wanted] & (len(self.ends) - 1)
        order = wanted[numbers.argsort(kind="stable")]  # within a share the rows stay in order
        records = np.stack([keys[order], order + first], axis=1)
        counts = np.bincount(numbers, minlength=len(self.ends))
        ends = counts.cumsum()
        for number in counts.nonzero()[0].tolist():
            self.file.seek(int(at[number]) * _RECORD)
            self.file.write(records[ends[number] - counts[number] : ends[number]].data)
        return counts

    def share(self, number: int) -> Iterator[tuple[Keys, Places]]:
        """Keys and places of the rows of a share, in order, bit by bit."""
        begin, end = int(self.ends[number - 1]) if number else 0, int(self.ends[number])
        for start in range(begin, end, _STRETCH):
            self.file.seek(start * _RECORD)
            found = self.file.read(min(_STRETCH, end - start) * _RECORD)
            records = np.frombuffer(found, np.int64).reshape(-1, 2)
            yield records[:, 0], records[:, 1]

    def whole(self, number: int) -> tuple[Keys, Places]:
        """The same at once."""
        parts = [(np.zeros(0, np.int64),) * 2, *self.share(number)]
        keys, places = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
        return keys, places


@dataclass
class Same:
    """Rows that say what another one says, found in any order.

    Attributes:
        count: how many there are.
        named: the first of them, each with the row that says the same.
        spared: [n] bool, which of the first n rows are none of them; they start as those of interest.
    """

    spared: NDArray[np.bool_]
    count: int = 0
    named: list[tuple[int, int]] = field(default_factory=list)

    def add(self, rows: Places, others: Places) -> None:
        """Take in rows, each with the row that says the same."""
        self.count += len(rows)
        self.spared[rows[rows < len(self.spared)]] = False
        head = rows.argsort(kind="stable")[:LISTED]
        self.named = sorted([*self.named, *zip(rows[head].tolist(), others[head].tolist(), strict=True)])[:LISTED]


def compare(ours: Side, theirs: Side | None, *, first: tuple[int, int]) -> tuple[Same, Same]:
    """The rows of ``ours`` that repeat an earlier one of them, and those of ``theirs`` that are among ``ours``.

    Takes O(n log s) time for n rows in shares of s, a number that does not grow with n: the keys are read twice (see
    ``Side.parted``), and each share once. What is quadratic, with n² / 2³⁶, is the number of pieces that the shares are
    written in: 150 thousand of 100 million rows.

    Args:
        theirs: None where no row can be on both sides.
        first: up to which row of each side ``Same.spared`` goes.
    Raises:
        OSError: as ``Side.parted``.
    """
    shares = 1 << max(0, (ours.keys.count - 1) // _SHARE).bit_length()
    repeats = Same(ours.first(first[0]))
    leaked = Same(theirs.first(first[1]) if theirs else np.zeros(0, np.bool_))
    with ours.parted(shares) as mine, theirs.parted(shares) if theirs else contextlib.nullcontext() as others:
        for number in range(shares):
            keys, places = mine.whole(number)
            order = keys.argsort(kind="stable")  # so that the first of a kind comes first
            ordered = keys[order]
            again = order[1:][ordered[1:] == ordered[:-1]]
            repeats.add(places[again], places[order[np.searchsorted(ordered, keys[again])]])
            for found, rows in others.share(number) if others and len(ordered) else ():
                at = np.searchsorted(ordered, found).clip(max=len(ordered) - 1)
                known = ordered[at] == found
                leaked.add(rows[known], places[order[at[known]]])
    return repeats, leaked
