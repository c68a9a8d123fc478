"""The bytes of a weight file on their way to disk: hashed by one thread while another makes and writes them.

They go piece by piece through buffers that are used again at once, so that a piece is still in a core's own cache when
it is changed and written: memory that is fresh, or has left the cache, costs more than the arithmetic of a merge.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any, BinaryIO

from truetune.checkpoint.atomic import sha256

PIECE_BYTES = 1 << 18

BUFFERS = 3
"""One that is made and written, one that is hashed, and one between; all of them fit a core's own cache."""

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


_Piece = tuple[Digest, int, memoryview | bytes, bytearray | None]


class Hashing:
    """A thread that hashes, and the buffers it reads from.

    Pieces are handed over by queues written in C: a future and its locks for each would take as long as a piece's hash.
    """

    def __init__(self) -> None:
        self._work: SimpleQueue[_Piece | threading.Event | None] = SimpleQueue()
        self._free: list[bytearray] = []  # the last one in is the first one out: it is in the cache
        self._made, self._size = 0, 0  # buffers, and bytes of each
        self._thread: threading.Thread | None = None  # there is none before it has work
        self._failure: BaseException | None = None

    def add(self, digest: Digest, offset: int, data: memoryview | bytes, buffer: bytearray | None = None) -> None:
        """Have a piece hashed; its memory must stay as it is until ``settle``.

        Args:
            buffer: what ``buffer`` gave for it, which is free again as soon as it is hashed.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="hashing", daemon=True)
            self._thread.start()
        self._work.put((digest, offset, data, buffer))

    def settle(self) -> None:
        """Wait until all of it is hashed."""
        if self._thread is not None:
            done = threading.Event()
            self._work.put(done)
            done.wait()
        if self._failure is not None:
            raise self._failure

    def buffer(self, size: int) -> bytearray:
        """Memory of ``size`` bytes or more for the next piece, which nobody reads any more."""
        if size > self._size:
            self.settle()
            self._free, self._made, self._size = [], 0, max(size, PIECE_BYTES)
        if not self._free and self._made >= max(2, BUFFERS * PIECE_BYTES // self._size):
            self.settle()
        if self._free:
            return self._free.pop()
        self._made += 1
        return bytearray(self._size)

    def give_back(self, buffer: bytearray) -> None:
        """A buffer that nobody reads any more."""
        if len(buffer) == self._size:
            self._free.append(buffer)

    def close(self) -> None:
        """End the thread."""
        if self._thread is not None:
            self._work.put(None)
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            if isinstance(work, threading.Event):
                work.set()
                continue
            digest, offset, data, buffer = work
            try:
                digest.add(offset, data)
            except BaseException as error:  # told to the thread that waits for the digest
                self._failure = error
            if buffer is not None:
                self.give_back(buffer)


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
            piece = memoryview(buffer)[:size]
            fill(piece)
            self._piece(piece, buffer)
        self._begin(at_least=PIECE_BYTES)

    def _piece(self, piece: memoryview, buffer: bytearray | None = None) -> None:
        if self.digest is not None:
            self.hashing.add(self.digest, self.offset, piece, buffer)
        left = piece
        while left:  # unbuffered, a write may be a part of what was asked for: where a disk gets full, for one
            left = left[self.file.write(left) :]
        if self.digest is None and buffer is not None:
            self.hashing.give_back(buffer)
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
