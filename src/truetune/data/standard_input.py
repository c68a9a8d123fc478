"""``--data -``: rows from standard input, kept in a file while the program runs, so that they can be read twice."""

from __future__ import annotations

import functools
import sys
import tempfile
from pathlib import Path

from truetune.errors import DataError

NAME = "-"  # as the user names it
SHOWN = "stdin"  # as its rows are named; no data file is called so, for want of a suffix
_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []  # kept until the program ends, which removes them


def is_meant(path: str) -> bool:
    """Whether a source is standard input: as the user names it, or as its rows do once it was read."""
    return path == NAME or (path == SHOWN and spooled.cache_info().currsize > 0)


def path_of(name: str) -> str:
    """Where the data file ``name`` can be read: itself, but for standard input.

    Raises:
        DataError: as ``spooled``.
    """
    return spooled() if name == SHOWN else name


@functools.cache
def spooled() -> str:
    """The path of a file that holds all of standard input: ``stdin.jsonl``, or ``stdin.json`` where it is an array.

    Raises:
        DataError: it is a terminal, empty, or neither JSON nor JSON lines.
    """
    if sys.stdin is None or sys.stdin.isatty():
        raise DataError("--data -: standard input is a terminal", ("way out", "some-command | truetune … --data -"))
    stream = sys.stdin.buffer
    start = b""
    while not start.strip() and (chunk := stream.read(1 << 16)):
        start += chunk
    first = start.lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
    if not first:
        raise DataError("--data -: standard input is empty")
    if first not in (b"{", b"["):
        raise DataError(
            f"--data -: standard input begins with {start.strip()[:20].decode(errors='backslashreplace')!r}",
            ("expected", "JSON lines, or one JSON array"),
            ("or", "a file whose suffix says what it is"),
        )
    _FOLDERS.append(tempfile.TemporaryDirectory(prefix="truetune-"))
    path = Path(_FOLDERS[-1].name) / f"stdin.json{'l' if first == b'{' else ''}"
    with path.open("wb") as file:
        file.write(start)
        while chunk := stream.read(1 << 20):
            file.write(chunk)
    return str(path)
