"""CSV and TSV: a header row, then one row per record."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import BinaryIO

from truetune.data.rejects import excerpt
from truetune.data.schema import Origin, RawRow, Reject
from truetune.errors import DataError

MARKS = {",": "commas", "\t": "tabs"}


def parse_csv(name: str, stream: BinaryIO, *, mark: str = ",") -> Iterator[RawRow | Reject]:
    """Rows numbered by record from 1, the header not counted. All values are strings, as CSV knows no other type.

    Args:
        name: of the file, for reports.
        stream: its bytes.
        mark: what parts the columns, one of those in ``MARKS``.

    Raises:
        DataError: a header that can't be read, names a column twice, or is parted by something else than ``mark``.
    """
    limit = csv.field_size_limit(2**31 - 1)  # the default refuses fields over 128 KiB
    try:
        # surrogateescape keeps an invalid byte recognisable in its own record, so the others stay usable
        with io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="") as text:
            header, records = _records(name, text, mark)
            for number, (line, last, record) in enumerate(records, start=1):
                origin = Origin(name, number)
                if isinstance(record, csv.Error):
                    yield Reject(origin, "bad_csv", _broken(record, lines=(line, last)))
                elif fault := _fault(record, width=len(header), line=line):
                    yield Reject(origin, *fault, excerpt(record))
                else:
                    yield RawRow(origin, dict(zip(header, record, strict=True)))
    finally:
        csv.field_size_limit(limit)


def _records(
    name: str, text: io.TextIOWrapper, mark: str
) -> tuple[list[str], Iterator[tuple[int, int, list[str] | csv.Error]]]:
    # strict: otherwise a quote that is never closed swallows the rest of the file without a word
    reader = csv.reader(text, delimiter=mark, strict=True)
    try:
        header = next((record for record in reader if record), [])
    except csv.Error as error:
        raise DataError(f"{name}: the header can't be read: {error}") from error
    if len(header) == 1 and any(other in header[0] for other in ",;\t|"):
        tabs = "a file of columns parted by tabs is called .tsv" if "\t" in header[0] else ""
        raise DataError(
            f"{name}: one column called {header[0]!r}",
            ("expected", f"columns parted by {MARKS[mark]}"),
            ("way out", tabs),
        )
    if twice := sorted({column for column in header if header.count(column) > 1}):
        raise DataError(f"{name}: the header names a column twice: {', '.join(twice)}")

    def records() -> Iterator[tuple[int, int, list[str] | csv.Error]]:
        while True:
            line = reader.line_num + 1
            try:
                record = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield line, reader.line_num, error
                continue
            if record:  # a blank line is no record
                yield line, reader.line_num, record

    return header, records()


def _broken(error: csv.Error, *, lines: tuple[int, int]) -> str:
    line, last = lines
    unclosed = f"a quote is opened and never closed: the rest of the file, up to line {last}, is one field"
    words = unclosed if "end of data" in str(error) else str(error)
    return f"not valid CSV from line {line} on: {words}"


def _fault(record: list[str], *, width: int, line: int) -> tuple[str, str] | None:
    if len(record) != width:
        return "bad_csv", f"{len(record)} fields where the header has {width} (the record starts on line {line})"
    escaped = next((c for field in record for c in field if "\udc80" <= c <= "\udcff"), "")
    if escaped:
        return "not_utf8", f"not UTF-8: byte 0x{ord(escaped) - 0xDC00:02X} in the record that starts on line {line}"
    return None
