"""Tensors that are views of their file: nothing is read before it is used, and the system may take the pages back.

``pages_of`` finds them among others, whoever mapped the file, so that their pages can be asked for and let go.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from truetune.checkpoint.header import TensorEntry, damaged
from truetune.errors import ModelError


class _Mapping(mmap.mmap):
    """A mapped file; a class of its own so that it can be referred to weakly."""


_Open = WeakValueDictionary[tuple[int, int, int, int], Any]  # device, inode, size, time
_for_all: _Open = WeakValueDictionary()  # of those who only read
_open: ContextVar[_Open] = ContextVar("mapped_files", default=_for_all)


@contextlib.contextmanager
def own_pages() -> Iterator[None]:
    """Inside, files are mapped anew, each once.

    For a model: what is trained in it, or loaded into it, is written to its tensors, and no other model of the same
    files may change by that. What neither writes to is in memory once all the same.
    """
    token = _open.set(WeakValueDictionary())
    try:
        yield
    finally:
        _open.reset(token)


def view(entry: TensorEntry) -> Tensor:
    """A tensor of a safetensors file in the file's own pages. Writing to it changes memory, never the file.

    Raises:
        ModelError: the file is gone, can't be mapped, or has become shorter.
    """
    if not entry.nbytes:
        return torch.empty(entry.shape, dtype=entry.dtype)
    pages = _mapped(entry.file)
    if entry.offset + entry.nbytes > len(pages):
        raise damaged(entry.file, f"ends inside {entry.name}", f"{entry.nbytes:,} bytes", f"{len(pages):,} in the file")
    flat = torch.frombuffer(pages, dtype=torch.uint8, count=entry.nbytes, offset=entry.offset)
    if entry.offset % entry.dtype.itemsize:
        flat = flat.clone()  # an odd header length leaves tensors between the marks of their dtype
    return flat.view(entry.dtype).view(entry.shape)


def _mapped(path: Path) -> _Mapping:
    try:
        stat = path.stat()
        key, mapped = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns), _open.get()
        found: _Mapping | None = mapped.get(key)
        if found is None:
            with path.open("rb") as file:
                found = mapped[key] = _Mapping(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return found
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: can't be mapped into memory: {error}") from error


Area = tuple[int, int]  # address of the first byte, and of the first one behind the last


@dataclass(frozen=True)
class Pages:
    """The memory pages that hold tensors of mapped files and nothing else.

    Attributes:
        areas: the pages, as many as lie behind one another.
        tensors: what lies there. Held, because the addresses of a file that is no longer mapped become other memory's.
    """

    areas: tuple[Area, ...] = ()
    tensors: tuple[Tensor, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors, those on shared pages too."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def fetch(self) -> None:
        """Have the system read them from disk, while this process goes on; pages that it holds cost nothing."""
        self._advise("MADV_WILLNEED")

    def drop(self) -> None:
        """Let them go from this process; the system keeps them as long as it has room, and the next use finds them.

        What was written to a tensor after it was mapped would be lost.
        """
        self._advise("MADV_DONTNEED")

    def _advise(self, advice: str) -> None:
        if not self.areas:
            return
        number, madvise = getattr(mmap, advice), ctypes.CDLL(None).madvise
        for first, last in self.areas:
            # It may be refused (of a locked page, say), and then nothing is lost but memory.
            madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), number)


def pages_of(tensors: Iterable[Tensor], mappings: Sequence[Area]) -> Pages:
    """The pages of those tensors that lie in files.

    Args:
        tensors: any; what is elsewhere, or not contiguous, is left out.
        mappings: as ``file_mappings`` finds them.
    """
    found = {_area(t): t for t in tensors if t.device.type == "cpu" and t.nbytes and t.is_contiguous()}
    inside = {a: t for a, t in found.items() if any(start <= a[0] and a[1] <= stop for start, stop in mappings)}
    size = mmap.PAGESIZE
    # A page at either end may hold a part of a neighbour, and that one may be trained.
    whole = ((-(-first // size) * size, last // size * size) for first, last in sorted(inside))
    return Pages(tuple(area for area in whole if area[0] < area[1]), tuple(inside.values()))


def file_mappings() -> list[Area]:
    """Where this process has files mapped that writing to memory does not change; none where Linux is not at hand."""
    if not sys.platform.startswith("linux"):
        return []
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as file:
            fields = [line.split(maxsplit=5) for line in file]
    except OSError:
        return []
    # Anonymous memory has no inode; what is in it would be lost.
    private = [f for f in fields if f[1].endswith("p") and f[4] != "0"]
    return [(int(first, 16), int(last, 16)) for first, last in (f[0].split("-") for f in private)]


def _area(tensor: Tensor) -> Area:
    return tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
