"""Buffers of activations on the CPU, used again as soon as the tensor that had one is gone.

A step takes and frees the same few hundred megabytes of activations over and over, a little more or less of it each
time. glibc's aligned allocation can't give a freed block to the next request of the same size, so its heap grew to
three times what was in use; handing memory back to the system instead costs a page fault per 4 KiB, a third of a step.
Here a block belongs to a number of columns and has room for the most rows seen, so every step fits into the last one's.

A block is free when nothing refers to its tensor any more, as with any other tensor: nothing is ever overwritten that
somebody still holds.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

_SMALLEST = 1 << 16  # bytes; below this the C library does well
_ALIGNMENT = 64
_NUMPY = {torch.float32: np.float32, torch.bfloat16: np.uint16}
_Key = tuple[int, torch.dtype]

_rows: dict[_Key, int] = defaultdict(int)  # room of the blocks of a kind
_scratch = threading.local()
_free: dict[_Key, list[np.ndarray[Any, Any]]] = defaultdict(list)


class _Lent(np.ndarray):
    """A block while a tensor has it; torch keeps the array alive exactly as long as the tensor's storage."""

    block: Any = None
    key: _Key

    def __del__(self) -> None:
        if self.block is not None and len(self.block) == _bytes(self.key):  # of the size that is in use now
            _free[self.key].append(self.block)


def empty(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[rows, columns], contiguous, with whatever the memory holds."""
    if device.type != "cpu" or dtype not in _NUMPY or rows * columns * dtype.itemsize < _SMALLEST:
        return torch.empty(rows, columns, dtype=dtype, device=device)
    key = (columns, dtype)
    if rows > _rows[key]:
        _rows[key] = rows
        _free[key].clear()
    block = _free[key].pop() if _free[key] else np.empty(_bytes(key), np.uint8)
    start = -block.ctypes.data % _ALIGNMENT
    lent = block[start : start + rows * columns * dtype.itemsize].view(_NUMPY[dtype]).view(_Lent)
    lent.block, lent.key = block, key
    return torch.from_numpy(lent).view(dtype).view(rows, columns)


def empty_like(x: Tensor) -> Tensor:
    """As ``x`` in shape (its last dimension are the columns), dtype and device."""
    return empty(x.shape[:-1].numel(), x.shape[-1], x.dtype, x.device).view(x.shape)


def scratch(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[rows, columns], contiguous: the same memory at every call from this thread, to be used up before the next.

    For weights that are made dense, multiplied with and forgotten: one buffer, as large as the largest.
    """
    if device.type != "cpu":
        return torch.empty(rows, columns, dtype=dtype, device=device)
    room = cast("dict[torch.dtype, Tensor]", _scratch.__dict__)
    count = rows * columns
    if dtype not in room or room[dtype].numel() < count:
        room[dtype] = torch.empty(0, dtype=dtype)  # the old one goes before the new one comes
        room[dtype] = torch.empty(count, dtype=dtype)
    return room[dtype][:count].view(rows, columns)


def release() -> None:
    """Give all free blocks back to the C library."""
    _free.clear()
    _rows.clear()
    _scratch.__dict__.clear()


def _bytes(key: _Key) -> int:
    columns, dtype = key
    return _rows[key] * columns * dtype.itemsize + _ALIGNMENT
