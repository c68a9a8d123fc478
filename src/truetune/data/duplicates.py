"""Rows that say the same thing twice, or nearly: worth a warning, no reason to leave one out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, overload

from truetune.data.near import LIMIT, THRESHOLD, Pairs, Sketches, near_repeats, near_shared
from truetune.data.schema import Origin, Row
from truetune.data.split import content_hash
from truetune.errors import counted

LISTED = 20  # pairs that a report keeps of each kind
_NAMED = 3  # pairs that a line on the screen names


Sketched = tuple[Sequence[Row], Sketches]
T = TypeVar("T")


class Head(Sequence[T]):
    """As many items as there are, of which the first are known: those that are named."""

    def __init__(self, count: int, head: list[T]) -> None:
        self._count, self._head = count, head

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        return self._head[index]


@dataclass(frozen=True)
class Alike:
    """A row that nearly says what another one says."""

    row: Origin
    other: Origin
    share: float  # of the word triples of both, those they have in common; estimated

    def __str__(self) -> str:
        much = "the same words" if self.share == 1 else f"{self.share:.0%}"
        return f"{self.row} and {_where(self.other, self.row)} ({much})"


@dataclass(frozen=True)
class Likeness:
    """What repeats what: among the rows to train on, and between them and the held-out ones.

    Attributes:
        repeats: (row, the first row that says the same to the letter).
        near: rows that nearly say what an earlier one says; repeats to the letter are not among them.
        leaked: held-out rows that are trained on too.
        near_leaked: held-out rows that nearly are.
        held_out: how many rows are held out.
        compared: how many rows took part in the search for near ones, of ``rows``.
    """

    repeats: Sequence[tuple[Origin, Origin]] = ()
    near: Sequence[Alike] = ()
    leaked: Sequence[Origin] = ()
    near_leaked: Sequence[Alike] = ()
    held_out: int = 0
    compared: int = 0
    rows: int = 0
    threshold: float = field(default=THRESHOLD)

    def warnings(self) -> list[str]:
        """A line for each kind that there is, naming its first rows."""
        lines = []
        if self.repeats:
            named = [f"{row} repeats {_where(first, row)}" for row, first in self.repeats[:_NAMED]]
            lines.append(f"{_rows(self.repeats)} what another row says already: {_listing(named, self.repeats)}")
        if self.near:
            named = [str(pair) for pair in self.near[:_NAMED]]
            lines.append(f"{_rows(self.near)} nearly what an earlier row says: {_listing(named, self.near)}")
        if self.leaked:
            named = [str(origin) for origin in self.leaked[:_NAMED]]
            lines.append(
                f"{len(self.leaked)} of {counted(self.held_out, 'row')} of --val-data {_are(self.leaked)} trained on "
                f"too, so the held-out loss flatters the result: {_listing(named, self.leaked)}"
            )
        if self.near_leaked:
            named = [str(pair) for pair in self.near_leaked[:_NAMED]]
            lines.append(
                f"{len(self.near_leaked)} of {counted(self.held_out, 'held-out row')} {_are(self.near_leaked)} nearly "
                f"trained on too, so the held-out loss may flatter the result: {_listing(named, self.near_leaked)}"
            )
        if self.compared < self.rows:
            lines.append(f"near repeats were looked for among the first {self.compared:,} of {self.rows:,} rows")
        return lines

    def facts(self) -> dict[str, Any]:
        """Counts and the first rows of each kind, for ``data/report.json``."""
        return {
            "exact": len(self.repeats),
            "near": len(self.near),
            "leaked": len(self.leaked),
            "near_leaked": len(self.near_leaked),
            "threshold": self.threshold,
            "compared": self.compared,
            "rows": {
                "exact": [[str(row), str(first), 1.0] for row, first in self.repeats[:LISTED]],
                "near": [_fact(pair) for pair in self.near[:LISTED]],
                "leaked": [str(origin) for origin in self.leaked[:LISTED]],
                "near_leaked": [_fact(pair) for pair in self.near_leaked[:LISTED]],
            },
        }


def likeness(rows: Sequence[Row], held_out: Sequence[Row] = (), *, limit: int = LIMIT) -> Likeness:
    """Compare all rows with each other and with the held-out ones.

    Args:
        limit: rows of each side that take part in the search for near ones; bounds its memory.
    """
    rows = list({row.origin: row for row in rows}.values())  # one that a weight of 2 reads twice is no repeat
    repeats, leaked = duplicates(rows), shared(rows, held_out)
    again, known = {row for row, _ in repeats}, set(leaked)
    once = [row for row in rows if row.origin not in again]
    new = [row for row in held_out if row.origin not in known]
    return compared(repeats, leaked, (once, _sketches(once, limit)), (new, _sketches(new, limit)), rows=len(rows),
                    held_out=len(held_out))  # fmt: skip


def compared(
    repeats: Sequence[tuple[Origin, Origin]], leaked: Sequence[Origin], ours: Sketched, theirs: Sketched, *, rows: int,
    held_out: int,
) -> Likeness:  # fmt: skip
    """``likeness`` of rows whose repeats to the letter are known.

    Args:
        ours, theirs: the other rows to train on and held out, and as many of their sketches as there are.
        rows, held_out: how many there are of each in all.
    """
    (once, known), (new, asked) = ours, theirs
    return Likeness(
        repeats,
        _alike(once, once, near_repeats(known)),
        leaked,
        _alike(new, once, near_shared(asked, known)),
        held_out=held_out,
        compared=len(known.matrix) + len(repeats),
        rows=rows,
    )


def duplicates(rows: Sequence[Row]) -> list[tuple[Origin, Origin]]:
    """Each row that repeats an earlier one, with the first row that said it.

    Two rows are the same when their turns, text and tools are; the order of keys in the file and columns that are
    not trained on (an id, a category) play no part.
    """
    first: dict[str, Origin] = {}  # by hash: a large set must not be held twice
    found: list[tuple[Origin, Origin]] = []
    for row in rows:
        seen = first.setdefault(content_hash(row), row.origin)
        if seen is not row.origin:
            found.append((row.origin, seen))
    return found


def shared(rows: Sequence[Row], held_out: Sequence[Row]) -> list[Origin]:
    """The held-out rows that are trained on too: a loss measured on them says nothing about new ones."""
    known = {content_hash(row) for row in rows} if held_out else set()
    return [row.origin for row in held_out if content_hash(row) in known]


def said(row: Row) -> str:
    """All the words of a row: its turns in their order, or its text."""
    return "\n".join(part for m in row.messages for part in (m.reasoning, m.content) if part) or row.text


def _sketches(rows: Sequence[Row], limit: int) -> Sketches:
    sketches = Sketches(limit)
    for start in range(0, len(rows), 1024):
        sketches.add([said(row) for row in rows[start : start + 1024]])
    return sketches


def _alike(rows: Sequence[Row], others: Sequence[Row], pairs: Pairs) -> Sequence[Alike]:
    named = [
        Alike(rows[a].origin, others[b].origin, round(share, 3))
        for a, b, share in zip(*(column[:LISTED].tolist() for column in pairs), strict=True)
    ]
    return Head(len(pairs[0]), named)


def _where(other: Origin, row: Origin) -> str:
    """``row 3``, with its file where that is another one."""
    return f"row {other.row}" if other.file == row.file else str(other)


def _rows(found: Sequence[object]) -> str:
    return counted(len(found), "row says", "rows say")


def _are(found: Sequence[object]) -> str:
    return "is" if len(found) == 1 else "are"


def _listing(named: Sequence[str], found: Sequence[object]) -> str:
    return "; ".join(named) + (f"; … {len(found) - len(named)} more" if len(found) > len(named) else "")


def _fact(pair: Alike) -> list[Any]:
    return [str(pair.row), str(pair.other), pair.share]
