"""Micro-batches: which examples share a row, and the tensors a model is given."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from truetune.data.token_set import TokenSet


@dataclass(frozen=True)
class Batch:
    """One micro-batch, packed (one row of whole examples end to end) or padded (one example a row).

    Attributes:
        input_ids: [B, T] int64.
        position_ids: [B, T] int64, starting at 0 in every example.
        attention_mask: [B, T] int64, 1 on real tokens; None when packed.
        lengths: tokens of each packed example; None when padded.
        columns: [c] int64, the positions along T whose logits are needed by any row.
        picks: [n] int64 into the flattened [B * c] logits, one per trained token.
        targets: [n] int64, the token to predict there.
        examples: which examples it holds.
        keys: [B * T] int64, the counters that dropout derives from; None where nothing is dropped.
        virtual: tokens in it that are no data.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    lengths: tuple[int, ...] | None
    columns: Tensor
    picks: Tensor
    targets: Tensor
    examples: tuple[int, ...]
    keys: Tensor | None = None
    virtual: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of the data: padding is not counted, nor are virtual tokens."""
        real = self.input_ids.numel() if self.attention_mask is None else int(self.attention_mask.sum())
        return real - self.virtual

    @property
    def trained(self) -> int:
        """Tokens that carry a loss."""
        return len(self.targets)


def group(lengths: Sequence[int], budget: int, *, packing: bool) -> list[list[int]]:
    """Cut the examples of one step into micro-batches of at most ``budget`` tokens, padding counted.

    Packed: best fit, longest first. Padded: neighbours in length, so that little is padded. An example over the budget
    stands alone.

    Returns:
        Positions into ``lengths``; every position once.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return _best_fit(lengths, order, budget) if packing else _neighbours(lengths, order, budget)


def _best_fit(lengths: Sequence[int], order: Sequence[int], budget: int) -> list[list[int]]:
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, bin), ascending
    for i in order:
        place = bisect_left(rooms, (lengths[i], 0))
        if place < len(rooms):
            room, best = rooms.pop(place)
            bins[best].append(i)
        else:
            room, best = budget, len(bins)
            bins.append([i])
        insort(rooms, (room - lengths[i], best))
    return bins


def bins_needed(rows: Sequence[tuple[int, int]], budget: int) -> int:
    """How many bins the best fit of ``group`` makes, told by the number of rows of each length alone.

    Rows of one length fill the bins of one room one after another, each as far as it goes: what is left of a bin that
    took one of them is tighter than any other that would hold the next.

    Args:
        rows: ``(length, rows of that length)``, no length twice, none above ``budget``.
    """
    made = 0
    bins: dict[int, int] = {}  # by the tokens that are left in them
    rooms: list[int] = []  # the same tokens, ascending

    def put(room: int, number: int) -> None:
        if number:
            if room not in bins:
                insort(rooms, room)
            bins[room] = bins.get(room, 0) + number

    for length, count in sorted(rows, reverse=True):
        while length and count:
            place = bisect_left(rooms, length)
            if place < len(rooms):
                room = rooms.pop(place)
                there = bins.pop(room)
            else:
                room, there = budget, -(-count // (budget // length))
                made += there
            most = room // length
            full, rest = divmod(min(count, there * most), most)
            put(room - most * length, full)
            put(room - rest * length, min(rest, 1))
            put(room, there - full - min(rest, 1))
            count -= full * most + rest
    return made


def _neighbours(lengths: Sequence[int], order: Sequence[int], budget: int) -> list[list[int]]:
    bins: list[list[int]] = []
    for i in order:
        if bins and lengths[bins[-1][0]] * (len(bins[-1]) + 1) <= budget:  # the first of a bin is its longest
            bins[-1].append(i)
        else:
            bins.append([i])
    return bins


def collate(data: TokenSet, examples: Sequence[int], *, packing: bool) -> Batch:
    """The tensors of one micro-batch."""
    items = [data.example(i) for i in examples]
    batch = _packed(items, tuple(examples)) if packing else _padded(items, tuple(examples))
    return replace(batch, virtual=data.virtual * len(items))


def _predicting(trained: Tensor) -> Tensor:
    """[m] int64: the positions whose next token is trained."""
    return trained[1:].nonzero()[:, 0]


def _packed(items: Sequence[tuple[Tensor, Tensor]], examples: tuple[int, ...]) -> Batch:
    lengths = tuple(len(tokens) for tokens, _ in items)
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    ids = torch.cat([tokens for tokens, _ in items]).long()
    columns = torch.cat([_predicting(flags) + start for (_, flags), start in zip(items, starts, strict=False)])
    return Batch(
        input_ids=ids[None],
        position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
        attention_mask=None,
        lengths=lengths,
        columns=columns,
        picks=torch.arange(len(columns)),
        targets=ids[columns + 1],
        examples=examples,
    )


def _padded(items: Sequence[tuple[Tensor, Tensor]], examples: tuple[int, ...]) -> Batch:
    width = max(len(tokens) for tokens, _ in items)
    ids = torch.zeros(len(items), width, dtype=torch.int64)
    mask = torch.zeros(len(items), width, dtype=torch.int64)
    for row, (tokens, _) in enumerate(items):
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
    wanted = [_predicting(flags) for _, flags in items]
    columns = torch.unique(torch.cat(wanted))
    picks = torch.cat([row * len(columns) + torch.searchsorted(columns, w) for row, w in enumerate(wanted)])
    targets = torch.cat([ids[row, w + 1] for row, w in enumerate(wanted)])
    positions = torch.arange(width).expand(len(items), width).contiguous()
    return Batch(ids, positions, mask, None, columns, picks, targets, examples)
