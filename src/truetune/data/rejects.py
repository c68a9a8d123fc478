"""What becomes of the rows that are not used: counted, listed, written down, and an error when there are too many."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import overload

from truetune.data.schema import Reject
from truetune.errors import DataError

EXCERPT = 200  # characters of a faulty row that its report keeps
BY_CHOICE = ("sampled_out", "worse_answer")  # left out because the user said so: counted, and no fault
LISTED = 20  # faulty rows that an error message lists one by one


class Rejects(Sequence[Reject]):
    """The rows that are not used: one by one those with a fault, in numbers those left out by choice.

    A share of 0.1 leaves out nine rows in ten: kept one by one they would take more memory than the rows themselves.

    Attributes:
        left_out: how many rows were left out by choice, by (file, reason, detail).
    """

    def __init__(
        self, rejects: Iterable[Reject] = (), left_out: Mapping[tuple[str, str, str], int] | None = None
    ) -> None:
        self._faults: list[Reject] = []
        self.left_out = Counter(left_out or {})
        for reject in rejects:
            if reject.reason in BY_CHOICE:
                self.left_out[reject.origin.file, reject.reason, reject.detail] += 1
            else:
                self._faults.append(reject)
        if isinstance(rejects, Rejects):
            self.left_out.update(rejects.left_out)

    def __len__(self) -> int:
        return len(self._faults)

    @overload
    def __getitem__(self, index: int) -> Reject: ...
    @overload
    def __getitem__(self, index: slice) -> list[Reject]: ...
    def __getitem__(self, index: int | slice) -> Reject | list[Reject]:
        return self._faults[index]

    def __iter__(self) -> Iterator[Reject]:
        return iter(self._faults)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rejects) and (self._faults, self.left_out) == (other._faults, other.left_out)

    __hash__ = None  # type: ignore[assignment]

    def __add__(self, other: Iterable[Reject]) -> Rejects:
        more = other if isinstance(other, Rejects) else Rejects(other)
        return Rejects([*self, *more], self.left_out + more.left_out)

    @property
    def by_choice(self) -> int:
        """Rows that were left out by choice."""
        return self.left_out.total()

    def counts(self) -> dict[str, int]:
        """Rejected rows by reason, the most frequent reason first."""
        found = Counter(reject.reason for reject in self)
        for (_, reason, _), rows in self.left_out.items():
            found[reason] += rows
        return dict(found.most_common())


def counts(rejects: Iterable[Reject]) -> dict[str, int]:
    """Rejected rows by reason, the most frequent reason first."""
    return Rejects(rejects).counts()


def excerpt(value: object) -> str:
    """The start of a row for ``Reject.raw``: text as it is, anything else as JSON; always encodable."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text[:EXCERPT].encode(errors="backslashreplace").decode()


def raise_if_too_many(rejects: Iterable[Reject], total: int, *, max_bad_rows: int) -> None:
    """Stop when more than ``max_bad_rows`` of ``total`` rows are faulty, or when no row is left.

    Raises:
        DataError: names every faulty row (the first 20 of many) and the flag that leaves them out.
    """
    rejects = Rejects(rejects)
    total -= rejects.by_choice
    bad = len(rejects)
    if not bad or (bad <= max_bad_rows and bad < total):
        return
    if bad < total:
        row, them, are = ("the row", "it", "it is") if bad == 1 else ("the rows", "them", "they are")
        fine = f"{total - bad:,} of {total:,} rows {'is' if total - bad == 1 else 'are'} fine."
        leave = f"pass --max-bad-rows {bad} to leave {them} out ({are} then listed in OUT/data/rejects.jsonl)."
        way_out = f"{fine} Mend {row}, or {leave}"
    else:
        way_out = "No usable row is left."
    if bad == 1:
        raise DataError(f"{rejects[0].origin}: {rejects[0].detail}", ("", way_out))
    raise DataError(_headline(rejects, total), ("", _listing(rejects)), ("", way_out))


def write_rejects(path: str | Path, rejects: Iterable[Reject]) -> None:
    """Write one JSON object per rejected row: file, row, reason, detail, raw (its start, as found).

    Rows left out by choice are one object per file and reason, with ``rows`` (how many) in place of ``row``.
    """
    found = Rejects(rejects)
    with open(path, "w", encoding="utf-8", newline="\n") as stream:
        for record in itertools.chain(map(_record, found), _left_out(found)):
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")


def _record(reject: Reject) -> dict[str, object]:
    origin = {"file": reject.origin.file, "row": reject.origin.row}
    return {**origin, "reason": reject.reason, "detail": reject.detail, "raw": reject.raw}


def _left_out(rejects: Rejects) -> Iterator[dict[str, object]]:
    for (file, reason, detail), rows in rejects.left_out.items():
        yield {"file": file, "rows": rows, "reason": reason, "detail": detail}


def _headline(rejects: Sequence[Reject], total: int) -> str:
    by_file = Counter(reject.origin.file for reject in rejects)
    said = f"{len(rejects):,} of {total:,} rows can't be used"
    if len(by_file) == 1:
        return f"{rejects[0].origin.file}: {said}"
    return f"{said}: " + ", ".join(f"{n:,} in {file}" for file, n in by_file.items())


def _listing(rejects: Sequence[Reject]) -> str:
    one_file = len({reject.origin.file for reject in rejects}) == 1
    shown = rejects[:LISTED]
    lines = [f"{f'row {r.origin.row}' if one_file else r.origin}: {r.detail}" for r in shown]
    if len(rejects) > LISTED:
        lines.append(f"… and {len(rejects) - LISTED:,} more")
    return "\n".join(lines)
