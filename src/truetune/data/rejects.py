"""What becomes of the rows that are not used: counted, listed, written down, and an error when there are too many."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from truetune.data.schema import Reject
from truetune.errors import DataError

EXCERPT = 200  # characters of a faulty row that its report keeps
BY_CHOICE = ("sampled_out", "worse_answer")  # left out because the user said so: counted and listed, and no fault
LISTED = 20  # faulty rows that an error message lists one by one


def counts(rejects: Sequence[Reject]) -> dict[str, int]:
    """Rejected rows by reason, the most frequent reason first."""
    return dict(Counter(reject.reason for reject in rejects).most_common())


def faults(rejects: Sequence[Reject]) -> list[Reject]:
    """The rows that have something wrong with them."""
    return [reject for reject in rejects if reject.reason not in BY_CHOICE]


def excerpt(value: object) -> str:
    """The start of a row for ``Reject.raw``: text as it is, anything else as JSON; always encodable."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text[:EXCERPT].encode(errors="backslashreplace").decode()


def raise_if_too_many(rejects: Sequence[Reject], total: int, *, max_bad_rows: int) -> None:
    """Stop when more than ``max_bad_rows`` of ``total`` rows are faulty, or when no row is left.

    Raises:
        DataError: names every faulty row (the first 20 of many) and the flag that leaves them out.
    """
    total -= len(rejects)
    rejects = faults(rejects)
    bad = len(rejects)
    total += bad
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


def write_rejects(path: str | Path, rejects: Sequence[Reject]) -> None:
    """Write one JSON object per rejected row: file, row, reason, detail, raw (its start, as found)."""
    with open(path, "w", encoding="utf-8", newline="\n") as stream:
        for reject in rejects:
            record = {
                "file": reject.origin.file,
                "row": reject.origin.row,
                "reason": reject.reason,
                "detail": reject.detail,
                "raw": reject.raw,
            }
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")


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
