"""A file as blocks of rows, one after another: so that a file larger than memory can be read, by several processes.

Where a block ends is a function of the file's content alone, so the same file always has the same blocks. Lines of a
plain file are not even read by whoever cuts them: a block then says where in the file its lines are.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

from truetune.data.compressed import PACKINGS, kind_of, opened, packing_of
from truetune.data.read_csv import parse_csv
from truetune.data.read_document import document_rows
from truetune.data.read_json import BOM, holds_lines, not_utf8, parse_lines
from truetune.data.rejects import excerpt
from truetune.data.schema import Origin, RawRow, Reject
from truetune.data.sources import suffix_of
from truetune.data.standard_input import path_of
from truetune.errors import DataError

Parts = tuple[list[RawRow], list[Reject]]

SIZE = 1 << 20  # bytes of text in a block, about: some thousand rows, of which a process holds one block at a time
_TABLES = {".parquet": "Parquet", ".arrow": "Arrow", ".feather": "Feather"}
_PARTED_BY = {".csv": ",", ".tsv": "\t"}
_ROWS = 4096  # in a block of a format whose rows have no size before they are read


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive rows of one file: lines to be read or parsed still, or rows that are read already.

    Attributes:
        file: as ``Origin.file`` has it.
        size: how many bytes of the file it stands for; 0 where that is not known.
        first, offset: the number of its first line, and where that begins.
        lines: those lines; None where they are still in the file.
        parts: the rows, where they can't be told without reading them.
        lines_or_rows: how many there are at most.
        path: where the file can be read.
    """

    file: str
    size: int
    first: int = 1
    offset: int = 0
    lines: bytes | None = None
    parts: Parts | None = None
    lines_or_rows: int = 1
    path: str = ""

    def read(self) -> Parts:
        """The rows and the rejects of this block.

        Raises:
            DataError: the file has become shorter or can't be read any more.
        """
        if self.parts is not None:
            return self.parts
        lines = self.lines
        if lines is None:
            with _readable(self.file), open(self.path, "rb") as stream:
                stream.seek(self.offset)
                lines = stream.read(self.size)
            if len(lines) < self.size:
                raise DataError(f"{self.file}: the file became shorter while it was read")
        return parse_lines(self.file, io.BytesIO(lines), first=self.first, offset=self.offset)


def blocks_of(name: str) -> Iterator[Block]:
    """The blocks of one data file, in order.

    Raises:
        DataError: the file is empty or can't be read as a whole. That it has no rows is for the caller to see.
    """
    path = path_of(name)
    suffix = suffix_of(path)
    with _readable(name):
        if os.path.getsize(path) == 0:
            raise DataError(f"{name}: no rows: the file is empty")
        packing = packing_of(suffix)
        with opened(path, packing) as stream:
            for block in _blocks(name, suffix.removesuffix(packing), stream, packed=bool(packing)):
                yield replace(block, path=path)


def no_rows(name: str) -> DataError:
    """The error for a file that holds none."""
    return DataError(f"{name}: no rows: the file holds blanks, an empty list or a bare header, and nothing else")


@contextlib.contextmanager
def _readable(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{name}: can't be read: {error.strerror or error}") from error


def _blocks(name: str, suffix: str, stream: BinaryIO, *, packed: bool) -> Iterator[Block]:
    if suffix in _TABLES:
        yield from _in_blocks(name, _read_table(name, suffix, stream))
        return
    _refuse_other_kind(name, stream.read(10))
    stream.seek(0)
    if suffix in _PARTED_BY:
        yield from _in_blocks(name, parse_csv(name, stream, mark=_PARTED_BY[suffix]))
    elif suffix == ".txt":
        yield Block(name, 0, parts=_read_text(name, stream.read()))
    elif suffix == ".json" and not _starts_like_lines(stream):
        yield from _in_blocks(name, document_rows(name, stream))
    else:
        yield from _line_blocks(name, stream, packed=packed)


def _refuse_other_kind(name: str, start: bytes) -> None:
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{name}: UTF-16, not UTF-8", ("or", "iconv -f utf-16 -t utf-8 FILE > NEW"))
    if kind := kind_of(start):
        ending = suffix_of(name) + kind if kind in PACKINGS else kind
        way_out = f"unzip {name}" if kind == ".zip" else f"rename it to end in {ending}"
        raise DataError(f"{name}: begins as a {kind} file does, which its name doesn't say", ("way out", way_out))


def _starts_like_lines(stream: BinaryIO) -> bool:
    """Two objects on two lines tell; a first line may be long, so as much is read as it takes."""
    start = b""
    while chunk := stream.read(SIZE):
        start += chunk
        if start.removeprefix(BOM).lstrip()[:1] != b"{" or start.lstrip().count(b"\n") > 1:
            break
    stream.seek(0)
    return holds_lines(start)


def _line_blocks(name: str, stream: BinaryIO, *, packed: bool) -> Iterator[Block]:
    first, offset = 1, 0
    while lines := stream.read(SIZE):
        if not lines.endswith(b"\n"):
            lines += stream.readline()
        count = lines.count(b"\n")
        yield Block(name, len(lines), first, offset, lines if packed else None, lines_or_rows=count or 1)
        first, offset = first + count, offset + len(lines)


def _in_blocks(name: str, found: Iterable[RawRow | Reject]) -> Iterator[Block]:
    rows: list[RawRow] = []
    rejects: list[Reject] = []
    for item in found:
        if isinstance(item, RawRow):
            rows.append(item)
        else:
            rejects.append(item)
        if len(rows) + len(rejects) == _ROWS:
            yield Block(name, 0, parts=(rows, rejects), lines_or_rows=_ROWS)
            rows, rejects = [], []
    if rows or rejects:
        yield Block(name, 0, parts=(rows, rejects), lines_or_rows=len(rows) + len(rejects))


def _read_text(name: str, data: bytes) -> Parts:
    """One document per file, byte for byte (its line ends too)."""
    origin = Origin(name, 1)
    if not data.strip():
        return [], []
    try:
        return [RawRow(origin, {"text": data.removeprefix(BOM).decode()})], []
    except UnicodeDecodeError as error:
        position = error.start + len(data) - len(error.object)
        raw = data[:400].decode(errors="backslashreplace")
        return [], [Reject(origin, "not_utf8", not_utf8(data, position), excerpt(raw))]


def _read_table(name: str, suffix: str, stream: BinaryIO) -> Iterator[RawRow | Reject]:
    try:
        import pyarrow  # imported here: it is an extra, and slow to load
    except ImportError as error:
        message = f"{name}: reading {_TABLES[suffix]} files needs pyarrow, which is not installed"
        raise DataError(message, ("or", "pip install 'truetune[data]'")) from error
    number = 0
    try:
        for batch in _parquet(stream) if suffix == ".parquet" else _arrow(stream):
            for value in _values(batch):
                number += 1
                yield _table_row(Origin(name, number), value)
    except pyarrow.ArrowException as error:
        raise DataError(f"{name}: not a readable {_TABLES[suffix]} file: {error}") from error


def _values(batch: Any) -> list[Any]:
    """The rows as dictionaries; one with text that is no UTF-8, which writers do not check, as its error."""
    try:
        return list(batch.to_pylist())
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [error]
        return [value for number in range(batch.num_rows) for value in _values(batch.slice(number, 1))]


def _table_row(origin: Origin, value: Any) -> RawRow | Reject:
    if isinstance(value, UnicodeDecodeError):
        return Reject(origin, "not_utf8", f"not UTF-8: byte 0x{value.object[value.start]:02X} in a text of this row")
    return RawRow(origin, value)


def _parquet(stream: BinaryIO) -> Iterator[Any]:
    import pyarrow.parquet

    yield from pyarrow.parquet.ParquetFile(stream).iter_batches(batch_size=_ROWS)


def _arrow(stream: BinaryIO) -> Iterator[Any]:
    """The batches of either form: a file with its footer (Feather is one), or the bare stream that `datasets` keeps."""
    import pyarrow.ipc

    magic = stream.read(6)
    stream.seek(0)
    if magic != b"ARROW1":
        yield from pyarrow.ipc.open_stream(stream)
        return
    file = pyarrow.ipc.open_file(stream)
    yield from (file.get_batch(number) for number in range(file.num_record_batches))
