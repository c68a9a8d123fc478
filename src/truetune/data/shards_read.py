"""Finished shards, read one after another: their rows, and which of them say the same as which.

Rows are compared by their keys, eight bytes each; those that nearly say the same by the sketches that the first shards
hold.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import overload

import torch
from torch import Tensor

from truetune.data.duplicates import LISTED, Head, Likeness, Sketched, compared
from truetune.data.near import LIMIT, Sketches
from truetune.data.schema import Origin, Row
from truetune.data.shards_made import Counts, Shard, load_shard, shard_file

_STRETCH = 1 << 20  # keys that are looked up at once


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
    def keys(self) -> Tensor:
        """[rows] int64: ``content_key`` of every row that was understood."""
        keys = torch.empty(self._ends[-1] if self._ends else 0, dtype=torch.int64)
        end = 0
        for shard in self:
            keys[end : end + len(shard.keys)] = shard.keys
            end += len(shard.keys)
        return keys

    def origin(self, index: int) -> Origin:
        """Where row ``index`` of those that were understood is."""
        number = bisect_right(self._ends, index)
        start = self._ends[number] - self.counts[number].rows
        return Origin(self.files[number], int(self.shard(number).numbers[index - start]))

    @cached_property
    def _ends(self) -> list[int]:
        return list(itertools.accumulate(counts.rows for counts in self.counts))

    def sketched(self, wanted: Tensor) -> Sketched:
        """Those of the ``wanted`` rows ([rows] bool) that have sketches, and these."""
        count = len(wanted)
        # Comparing them takes a kilobyte a row: where there is no room for all of them, it is left to the rest.
        sketches, origins, end = Sketches(LIMIT if count <= LIMIT else LIMIT // 4), list[tuple[str, Tensor]](), 0
        for number, counts in enumerate(self.counts):
            chosen = wanted[end : end + counts.rows].nonzero()[:, 0]
            end += counts.rows
            if len(chosen) and counts.sketched and sketches.seen < sketches.limit:
                shard = self.shard(number)
                sketches.take(shard.sketches.numpy()[chosen.numpy()])
                origins.append((self.files[number], shard.numbers[chosen]))
        return _Rows(origins), sketches


def likeness_of(ours: tuple[Shards, Tensor], theirs: tuple[Shards, Tensor]) -> Likeness:
    """``data.duplicates.likeness`` of rows to train on and held-out ones, each ``(shards, [rows] bool)``.

    Where both are of the same shards, parted by their keys, none can be in both.
    """
    (shards, mine), (others, held) = ours, theirs
    places = mine.nonzero()[:, 0]
    again, first = _repeats(shards.keys[places])
    repeats = [(shards.origin(int(places[a])), shards.origin(int(places[b]))) for a, b in first]
    new = mine.clone()
    new[places[again]] = False
    leaked = torch.empty(0, dtype=torch.int64)
    if others is not shards:
        leaked = _among(others.keys, shards.keys[places].sort().values).nonzero()[:, 0]
        held = held.clone()
        held[leaked] = False
    named = [others.origin(int(place)) for place in leaked[:LISTED]]
    count = int(theirs[1].sum())
    return compared(
        Head(len(again), repeats), Head(len(leaked), named), shards.sketched(new),
        others.sketched(held) if count else ([], Sketches()), rows=len(places), held_out=count,
    )  # fmt: skip


def _repeats(keys: Tensor) -> tuple[Tensor, list[tuple[int, int]]]:
    """The places of keys that were there before, and the first of them with the place of the first of its kind."""
    ordered = keys.sort().values
    same = ordered[1:] == ordered[:-1]
    begins = same.clone()
    begins[1:] &= ~same[:-1]
    twice = ordered[1:][begins]  # each key that is there more than once
    del ordered, same
    candidates = _among(keys, twice).nonzero()[:, 0]
    kinds = torch.searchsorted(twice, keys[candidates])
    earliest = torch.full((len(twice),), len(keys), dtype=torch.int64)
    earliest.scatter_reduce_(0, kinds, candidates, "amin")
    is_again = earliest[kinds] != candidates
    again = candidates[is_again]
    return again, list(zip(again[:LISTED].tolist(), earliest[kinds[is_again][:LISTED]].tolist(), strict=True))


def _among(keys: Tensor, known: Tensor) -> Tensor:
    """[n] bool: which keys are in ``known``, which is sorted."""
    found = torch.zeros(len(keys), dtype=torch.bool)
    if len(known):
        for start in range(0, len(keys), _STRETCH):
            part = keys[start : start + _STRETCH]
            found[start : start + _STRETCH] = known[torch.searchsorted(known, part).clamp_(max=len(known) - 1)] == part
    return found


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
