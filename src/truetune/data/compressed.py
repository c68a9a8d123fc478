"""A file that is packed by itself (.gz, .bz2, .xz, .zst) is read as what is inside it; an archive of several is not."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import lzma
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO, cast

from truetune.errors import DataError

PACKINGS = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}
UNPACKERS = {
    ".zip": "unzip", ".tar": "tar xf", ".tar.gz": "tar xzf", ".tgz": "tar xzf", ".tar.bz2": "tar xjf",
    ".tar.xz": "tar xJf", ".tar.zst": "tar --zstd -xf", ".7z": "7z x", ".rar": "unrar x",
}  # fmt: skip
# What files begin with, by the suffix that they should have.
_STARTS = {
    ".gz": b"\x1f\x8b\x08", ".bz2": b"BZh91AY&SY", ".xz": b"\xfd7zXZ\x00", ".zst": b"(\xb5/\xfd", ".zip": b"PK\x03\x04",
    ".parquet": b"PAR1\x15", ".arrow": b"ARROW1\x00",
}  # fmt: skip
DAMAGE = (gzip.BadGzipFile, lzma.LZMAError, EOFError, zlib.error)


def unpacker_of(path: str) -> str:
    """The command that unpacks an archive, or ``""`` where ``path`` is none by its name."""
    lower = path.lower()
    return next((tool for suffix, tool in UNPACKERS.items() if lower.endswith(suffix)), "")


def kind_of(start: bytes) -> str:
    """The suffix that fits the first ten bytes of a file, or ``""`` where they may be text."""
    return next((suffix for suffix, magic in _STARTS.items() if start.startswith(magic)), "")


def packing_of(suffix: str) -> str:
    """``.gz`` of ``.jsonl.gz``; ``""`` for a plain file."""
    return next((packing for packing in PACKINGS if suffix.endswith(packing)), "")


@contextlib.contextmanager
def opened(name: str, packing: str) -> Iterator[BinaryIO]:
    """The bytes inside a file.

    Raises:
        DataError: damaged, or packed in a way that needs a library which is not installed.
        OSError: it can't be opened or read.
    """
    openers = {"": open, ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    try:
        stream = _zstandard(name) if packing == ".zst" else openers[packing](name, "rb")  # type: ignore[operator]
        with stream as inside:
            yield cast(BinaryIO, inside)
    except DAMAGE as error:
        raise DataError(f"{name}: damaged, or no {PACKINGS.get(packing, 'plain')} file: {error}") from error


def _zstandard(name: str) -> BinaryIO:
    try:
        import pyarrow  # an extra, and slow to load
    except ImportError as error:
        message = f"{name}: reading .zst files needs pyarrow, which is not installed"
        raise DataError(message, ("way out", "pip install 'truetune[data]', or unpack it: zstd -d FILE")) from error
    # Unpacked to the disk: readers look at the start twice, and this stream can't go back.
    unpacked = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115 - whoever asked for it closes it
    try:
        with pyarrow.input_stream(name, compression="zstd") as stream:
            shutil.copyfileobj(stream, unpacked)
        unpacked.seek(0)
    except BaseException:
        unpacked.close()
        raise
    return unpacked
