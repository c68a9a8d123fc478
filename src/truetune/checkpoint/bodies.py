"""The bytes of a weight file on their way to disk: hashed by one thread while another makes and writes them.

They go piece by piece through a few buffers, small enough that a piece is still in the processor's cache when it is
hashed and written, and used again and again: fresh memory costs more than the arithmetic of a merge.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from truetune.checkpoint.atomic import sha256

PIECE_BYTES = 1 << 20
_BUFFERS = 4
_BEGUN = 32 << 20  # bytes that are begun to be brought to disk at once

Fill = Callable[[memoryview], None]
"""Fills the memory it is given with the next bytes of a body, from its front to its end."""


@dataclass
class Digest:
    """SHA-256 of a file while it is written from front to back; of one written in another order, once it is whole."""

    sha: Any = field(default_factory=hashlib.sha256)
    length: int = 0
    in_order: bool = True

    def add(self, offset: int, data: memoryview | bytes) -> None:
        """What is written at ``offset``."""
        self.in_order = self.in_order and offset == self.length
        if self.in_order:
            self.sha.update(data)
            self.length += len(data)

    def of(self, path: Path) -> str:
        """The digest of the finished file."""
        return str(self.sha.hexdigest()) if self.in_order else sha256(path)


class Hashing:
    """A thread that hashes, and the buffers it reads from."""

    def __init__(self) -> None:
        self._aside = ThreadPoolExecutor(1)  # starts no thread before it has work
        self._waiting: deque[Future[None]] = deque()
        self._buffers: list[bytearray] = []
        self._turn = 0

    def add(self, digest: Digest, offset: int, data: memoryview | bytes) -> None:
        """Have a piece hashed; its memory must stay as it is until ``settle``, or for as many pieces as buffers."""
        while len(self._waiting) >= _BUFFERS - 1:
            self._waiting.popleft().result()
        self._waiting.append(self._aside.submit(digest.add, offset, data))

    def settle(self) -> None:
        """Wait until all of it is hashed."""
        while self._waiting:
            self._waiting.popleft().result()

    def buffer(self, size: int) -> memoryview:
        """Memory for the next piece, which nobody reads any more."""
        if self._buffers and size > len(self._buffers[0]):
            self.settle()
            self._buffers, self._turn = [], 0
        if len(self._buffers) < _BUFFERS:
            self._buffers.append(bytearray(max(size, PIECE_BYTES, *map(len, self._buffers))))
            return memoryview(self._buffers[-1])[:size]
        found = self._buffers[self._turn]
        self._turn = (self._turn + 1) % _BUFFERS
        return memoryview(found)[:size]

    def close(self) -> None:
        """End the thread."""
        self._aside.shutdown()


@dataclass
class Body:
    """One stretch of a file: a header, or the body of a tensor.

    Attributes:
        file: stands at ``offset``.
        digest: where the hash is wanted.
    """

    file: BinaryIO
    offset: int
    hashing: Hashing
    digest: Digest | None
    _waiting: int = 0  # bytes that the system was not told to bring to disk

    def write(self, data: memoryview | bytes) -> None:
        """Write memory that may change as soon as this returns."""
        whole = memoryview(data)
        for start in range(0, len(whole), PIECE_BYTES):
            self._piece(whole[start : start + PIECE_BYTES])
        self._begin(at_least=PIECE_BYTES)
        self.hashing.settle()

    def fill(self, nbytes: int, fill: Fill, *, unit: int = 1) -> None:
        """Write what ``fill`` makes, in pieces that are multiples of ``unit`` bytes."""
        for size in _pieces(nbytes, unit):
            buffer = self.hashing.buffer(size)
            fill(buffer)
            self._piece(buffer)
        self._begin(at_least=PIECE_BYTES)

    def _piece(self, piece: memoryview) -> None:
        if self.digest is not None:
            self.hashing.add(self.digest, self.offset, piece)
        left = piece
        while left:  # unbuffered, a write may be a part of what was asked for: where a disk gets full, for one
            left = left[self.file.write(left) :]
        self.offset += len(piece)
        self._waiting += len(piece)
        self._begin(at_least=_BEGUN)

    def _begin(self, *, at_least: int) -> None:
        """Have the system bring to disk what was written so far, so that little is left to wait for at the end.

        The advice is meant to free cached pages; those that are not on disk yet are sent there, and stay.
        """
        if self._waiting < at_least:
            return
        if hasattr(os, "posix_fadvise"):
            start, advice = self.offset - self._waiting, os.POSIX_FADV_DONTNEED
            with contextlib.suppress(OSError):  # it is only advice
                os.posix_fadvise(self.file.fileno(), start, self._waiting, advice)
        self._waiting = 0


def _pieces(nbytes: int, unit: int) -> Iterator[int]:
    """Sizes that add up to ``nbytes``: as many whole units as fit a piece, at least one."""
    whole = max(1, PIECE_BYTES // unit) * unit
    yield from [whole] * (nbytes // whole)
    if nbytes % whole:
        yield nbytes % whole
