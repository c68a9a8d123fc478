"""Bytes on their way to disk: what is hashed is what is written, however the pieces fall."""

from __future__ import annotations

import ctypes
import hashlib
import io
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from truetune.checkpoint.bodies import BUFFERS, PIECE_BYTES, Body, Digest, Hashing


@pytest.fixture
def hashing() -> Iterator[Hashing]:
    made = Hashing()
    yield made
    made.close()


@pytest.mark.parametrize("unit", [1, 1000, PIECE_BYTES, 2 * PIECE_BYTES + 6])
@pytest.mark.parametrize("units", [0, 1, 11])
def test_what_is_filled_is_written_and_hashed_in_whole_units(
    unit: int, units: int, hashing: Hashing, tmp_path: Path
) -> None:
    total = unit * units if unit > 1 else units * (PIECE_BYTES + 1)
    content, at = os.urandom(total), 0
    sizes: list[int] = []

    def fill(into: memoryview) -> None:
        nonlocal at
        into[:] = content[at : at + len(into)]
        at += len(into)
        sizes.append(len(into))

    digest = Digest()
    with (tmp_path / "file").open("xb", buffering=0) as file:
        body = Body(file, 0, hashing, digest)
        body.write(b"head")
        body.fill(total, fill, unit=unit)
        body.write(b"tail")
    expected = b"head" + content + b"tail"
    assert (tmp_path / "file").read_bytes() == expected
    assert digest.of(tmp_path / "missing") == hashlib.sha256(expected).hexdigest()
    assert all(size % unit == 0 for size in sizes)
    assert all(size <= max(unit, PIECE_BYTES) for size in sizes)


def test_a_buffer_is_not_filled_again_before_it_is_hashed(hashing: Hashing, tmp_path: Path) -> None:
    """The hashing thread is held up; the pieces that could be made meanwhile are as many as there are buffers."""
    count = 2 * BUFFERS + 5
    gate, content = threading.Event(), [bytes([number]) * PIECE_BYTES for number in range(count)]

    class Held(Digest):
        def add(self, offset: int, data: memoryview | bytes) -> None:
            gate.wait(10)
            super().add(offset, data)

    digest, made = Held(), []

    def fill(into: memoryview) -> None:
        into[:] = content[len(made)]
        made.append(gate.is_set())
        if len(made) == BUFFERS:
            threading.Timer(0.05, gate.set).start()

    with (tmp_path / "file").open("xb", buffering=0) as file:
        Body(file, 0, hashing, digest).fill(count * PIECE_BYTES, fill)
    hashing.settle()
    assert made.index(True) == BUFFERS
    assert digest.of(tmp_path / "missing") == hashlib.sha256(b"".join(content)).hexdigest()


def test_what_is_not_hashed_goes_through_one_buffer(hashing: Hashing, tmp_path: Path) -> None:
    content, places, at = os.urandom(7 * PIECE_BYTES + 3), set(), 0

    def fill(into: memoryview) -> None:
        nonlocal at
        into[:] = content[at : at + len(into)]
        at += len(into)
        places.add(ctypes.addressof(ctypes.c_char.from_buffer(into)))

    with (tmp_path / "file").open("xb", buffering=0) as file:
        Body(file, 0, hashing, None).fill(len(content), fill)
    assert (tmp_path / "file").read_bytes() == content
    assert len(places) == 1


def test_a_thread_that_fails_is_heard_of(hashing: Hashing) -> None:
    class Broken(Digest):
        def add(self, offset: int, data: memoryview | bytes) -> None:
            raise MemoryError("no more")

    with pytest.raises(MemoryError, match="no more"):
        Body(io.BytesIO(), 0, hashing, Broken()).write(b"head")


def test_a_file_that_is_written_out_of_order_is_hashed_as_it_is(hashing: Hashing, tmp_path: Path) -> None:
    digest, path = Digest(), tmp_path / "file"
    with path.open("xb", buffering=0) as file:
        for offset, part in ((4, b"late"), (0, b"soon")):
            file.seek(offset)
            Body(file, offset, hashing, digest).write(part)
    assert digest.of(path) == hashlib.sha256(b"soonlate").hexdigest()


class Sluggish(io.BytesIO):
    """Takes less than is offered, as a disk does that gets full."""

    def write(self, data: Any) -> int:
        return super().write(memoryview(data)[:1000])


def test_a_write_that_takes_a_part_goes_on_with_the_rest(hashing: Hashing) -> None:
    content, file = os.urandom(10_500), Sluggish()
    Body(file, 0, hashing, None).write(content)
    assert file.getvalue() == content
