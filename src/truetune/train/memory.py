"""How much memory the process has used at most, as the operating system counts it."""

from __future__ import annotations

import ctypes
import sys

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def peak_mb() -> float:
    """Peak resident memory of this process in MB (10^6 bytes); on CUDA the device's, which is what runs out there."""
    if torch.cuda.is_available() and torch.cuda.memory_allocated():
        return torch.cuda.max_memory_allocated() / 1e6
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def available_mb() -> float:
    """Memory that can still be taken, in MB: the device's on CUDA, else what the system says is free or reclaimable."""
    if torch.cuda.is_available() and torch.cuda.memory_allocated():
        return torch.cuda.mem_get_info()[0] / 1e6
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024 / 1e6
    except (OSError, KeyError, ValueError):
        return 8_000.0  # a system without /proc: assume a small laptop


def keep_freed_memory() -> bool:
    """Ask glibc to reuse large blocks instead of handing each back to the system and faulting it in again.

    A training step frees and takes the same few hundred megabytes over and over; on the machine this was measured on,
    page faults were a third of the step. The peak does not grow. Does nothing on another C library.

    Returns:
        Whether the library took the advice.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, 1 << 30)) and bool(mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1))
