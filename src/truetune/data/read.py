"""Files into rows: JSON, JSON lines, CSV, Parquet and plain text, each row with its file and number.

Nothing is guessed and nothing is lost: what can't be read becomes a reject that names its row, and the rows after
it keep their numbers. What the columns mean is the affair of ``truetune.data.formats``.
"""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Sequence
from typing import BinaryIO, cast

from truetune.data.read_csv import parse_csv
from truetune.data.read_json import BOM, not_utf8, parse_document, parse_lines
from truetune.data.rejects import excerpt
from truetune.data.schema import Origin, RawRow, Reject
from truetune.data.sources import find_files, suffix_of
from truetune.errors import DataError

Parts = tuple[list[RawRow], list[Reject]]


def read_rows(paths: Sequence[str]) -> Parts:
    """Read files, folders and globs.

    Args:
        paths: as the user gave them; ``Origin.file`` of a row is such a path, or one joined from a folder or glob.
    Returns:
        The rows that could be read and those that could not, each in the order of files and rows.

    Raises:
        DataError: a path that does not exist, a file that can't be read as a whole or has no rows.
    """
    rows: list[RawRow] = []
    rejects: list[Reject] = []
    for name in find_files(paths):
        found, faulty = _read_file(name)
        rows += found
        rejects += faulty
    return rows, rejects


def _read_file(name: str) -> Parts:
    suffix = suffix_of(name)
    try:
        if os.path.getsize(name) == 0:
            raise DataError(f"{name}: no rows: the file is empty")
        with gzip.open(name, "rb") if suffix.endswith(".gz") else open(name, "rb") as stream:
            found, faulty = _parse(name, suffix.removesuffix(".gz"), cast(BinaryIO, stream))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{name}: damaged, or no gzip file: {error}") from error
    except OSError as error:
        raise DataError(f"{name}: can't be read: {error.strerror or error}") from error
    if not found and not faulty:
        raise DataError(f"{name}: no rows: the file holds blanks, an empty list or a bare header, and nothing else")
    return found, faulty


def _parse(name: str, suffix: str, stream: BinaryIO) -> Parts:
    if suffix == ".parquet":
        return _read_parquet(name, stream)
    if stream.read(2) in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{name}: UTF-16, not UTF-8", ("or", "iconv -f utf-16 -t utf-8 FILE > NEW"))
    stream.seek(0)
    if suffix == ".json":
        return parse_document(name, stream.read())
    if suffix == ".csv":
        return parse_csv(name, stream)
    if suffix == ".txt":
        return _read_text(name, stream.read())
    return parse_lines(name, stream)


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


def _read_parquet(name: str, stream: BinaryIO) -> Parts:
    try:
        import pyarrow  # imported here: it is an extra, and slow to load
        import pyarrow.parquet
    except ImportError as error:
        message = f"{name}: reading Parquet files needs pyarrow, which is not installed"
        raise DataError(message, ("or", "pip install 'truetune[data]'")) from error
    try:
        values = pyarrow.parquet.read_table(stream).to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{name}: not a readable Parquet file: {error}") from error
    return [RawRow(Origin(name, number), value) for number, value in enumerate(values, start=1)], []
