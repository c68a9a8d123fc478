"""How much memory the process has used at most, as the operating system counts it."""

from __future__ import annotations

import os
import sys


def peak_mb(device: str = "cpu") -> float:
    """Peak resident memory of this process in MB (10^6 bytes); on CUDA the device's, which is what runs out there."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 1e6
    try:  # not ru_maxrss where this exists: a process inherits its parent's mark across exec
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1024 / 1e6
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def resident_mb(device: str = "cpu") -> float:
    """What this process holds now, in MB; 0 on CUDA, where only the device's is scarce, and without ``/proc``."""
    if device == "cuda":
        return 0.0
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    except (OSError, AttributeError):
        return 0.0


def available_mb(device: str = "cpu") -> float | None:
    """Memory that can still be taken, in MB: the device's on CUDA, else what the system says is free or reclaimable.

    None where the system has no ``/proc`` to say it.
    """
    if device == "cuda":
        import torch

        return torch.cuda.mem_get_info()[0] / 1e6
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024 / 1e6
    except (OSError, KeyError, ValueError):
        return None
