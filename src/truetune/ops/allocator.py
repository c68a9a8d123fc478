"""How the C library keeps freed memory: one choice for training, the other for streaming."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> bool:
    """Ask glibc to reuse large blocks instead of handing each back to the system and faulting it in again.

    A training step frees and takes the same few hundred megabytes over and over; on the machine this was measured on,
    page faults were a third of the step. The peak does not grow.

    Returns:
        Whether the C library took the advice; only glibc does.
    """
    return _mallopt(mmap_threshold=1 << 30, trim_threshold=(1 << 31) - 1)


def trim() -> None:
    """Hand back once what is free by now: reading and planning leave holes that training would not fill."""
    if sys.platform.startswith("linux") and (give_back := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        give_back(0)


def return_freed_memory() -> bool:
    """Ask glibc to hand each large block back to the system as soon as it is freed; undone by the other one.

    By default glibc raises its own threshold (to 32 MiB) once a large block was freed, and keeps later ones in a heap
    with holes: a merge that holds 50 MB at a time was seen to take 50 MB in one run and 135 MB in the next.

    Returns:
        Whether the C library took the advice; only glibc does.
    """
    return _mallopt(mmap_threshold=4 << 20, trim_threshold=4 << 20)


def _mallopt(*, mmap_threshold: int, trim_threshold: int) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, mmap_threshold)) and bool(mallopt(_M_TRIM_THRESHOLD, trim_threshold))
