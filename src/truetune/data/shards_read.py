"""Finished shards, read one after another: their rows, and which of them say the same as which.

Rows are compared by their keys (see ``data.row_keys``); those that nearly say the same by the sketches that the first
shards hold.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from truetune.data.duplicates import Head, Likeness, Sketched, compared
from truetune.data.near import LIMIT, Sketches
from truetune.data.row_keys import RowKeys, Side, compare
from truetune.data.schema import Origin, Row
from truetune.data.shards_made import Counts, Shard, load_shard, shard_file


@dataclass(frozen=True)
class Shards:
    """The shards of some files, in the order of the rows.

    Attributes:
        files: the file of each shard.
        counts: each shard in numbers.
    """

    folder: Path
    files: list[str]
    counts: list[Counts]

    def __iter__(self) -> Iterator[Shard]:
        for number in range(len(self.counts)):
            yield self.shard(number)

    def shard(self, number: int) -> Shard:
        """One of them.

        Raises:
            OSError: it is not there any more, or not as it was written.
        """
        found = load_shard(shard_file(self.folder, number))
        if found is None:
            raise OSError(f"shard {number} is not what was written")
        return found

    @property
    def read(self) -> int:
        """Rows in all, those that could not be understood too."""
        return sum(counts.read for counts in self.counts)

    @property
    def templated(self) -> bool:
        """Whether any row needs a template."""
        return any(counts.templated for counts in self.counts)

    @cached_property
    def keys(self) -> RowKeys:
        """``content_key`` of every row that was understood, gathered in a file beside the shards.

        Raises:
            OSError: the disk is full.
        """
        return RowKeys.write(self.folder / "keys", (shard.keys.numpy() for shard in self))

    def origin(self, index: int) -> Origin:
        """Where row ``index`` of those that were understood is."""
        number = bisect_right(self._ends, index)
        start = self._ends[number] - self.counts[number].rows
        return Origin(self.files[number], int(self.shard(number).numbers[index - start]))

    @cached_property
    def _ends(self) -> list[int]:
        return list(itertools.accumulate(counts.rows for counts in self.counts))

    @property
    def sketched_rows(self) -> int:
        """The first rows, in whose shards all that have sketches are."""
        return max((end for end, counts in zip(self._ends, self.counts, strict=True) if counts.sketched), default=0)

    def sketched(self, wanted: NDArray[np.bool_]) -> Sketched:
        """Those of the ``wanted`` rows ([sketched_rows] bool) that have sketches, and these."""
        count = self._ends[-1] if self._ends else 0
        # Comparing them takes a kilobyte a row: where there is no room for all of them, it is left to the rest.
        sketches, origins, end = Sketches(LIMIT if count <= LIMIT else LIMIT // 4), list[tuple[str, Tensor]](), 0
        for number, counts in enumerate(self.counts):
            if end >= len(wanted):
                break
            chosen = wanted[end : end + counts.rows].nonzero()[0]
            end += counts.rows
            if len(chosen) and counts.sketched and sketches.seen < sketches.limit:
                shard = self.shard(number)
                sketches.take(shard.sketches.numpy()[chosen])
                origins.append((self.files[number], shard.numbers[torch.from_numpy(chosen)]))
        return _Rows(origins), sketches


def likeness_of(ours: tuple[Shards, Side], theirs: tuple[Shards, Side]) -> Likeness:
    """``data.duplicates.likeness`` of rows to train on and held-out ones, each of its shards.

    Where both are of the same shards, parted by their keys, none can be in both.
    """
    (shards, mine), (others, held) = ours, theirs
    apart = others is not shards
    repeats, leaked = compare(mine, held if apart else None, first=(shards.sketched_rows, others.sketched_rows))
    named = [(shards.origin(row), shards.origin(first)) for row, first in repeats.named]
    count = held.count()
    new = leaked.spared if apart else held.first(others.sketched_rows)
    return compared(
        Head(repeats.count, named), Head(leaked.count, [others.origin(row) for row, _ in leaked.named]),
        shards.sketched(repeats.spared), others.sketched(new) if count else ([], Sketches()), rows=mine.count(),
        held_out=count,
    )  # fmt: skip


class _Rows(Sequence[Row]):
    """Rows of which nothing but the origin is wanted, from ``(file, [n] numbers)`` of each stretch of them."""

    def __init__(self, parts: list[tuple[str, Tensor]]) -> None:
        self._files = [file for file, _ in parts]
        self._ends = list(itertools.accumulate(len(numbers) for _, numbers in parts))
        self._numbers = torch.cat([torch.empty(0, dtype=torch.int64), *(numbers for _, numbers in parts)])

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        return Row(Origin(self._files[bisect_right(self._ends, index)], int(self._numbers[index])))
