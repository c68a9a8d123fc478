"""What this machine's matrix units really do: measured once per process, used to choose a precision."""

from __future__ import annotations

import time
from functools import cache

import torch
from torch.nn import functional as F


@cache
def float32_prefers_onednn() -> bool:
    """Whether float32 products on this CPU go through oneDNN rather than through what torch was built with (MKL).

    MKL is not at its best on AMD's processors: 5 to 20 % behind on Zen 4. Told by the vendor, not by a measurement,
    which could turn out otherwise when a run is resumed and change its last bits.
    """
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            return any(line.split()[-1] == "AuthenticAMD" for line in file if line.startswith("vendor_id"))
    except OSError:
        return False


@cache
def gemm_rate(dtype: torch.dtype, device: str) -> float:
    """GFLOP/s of ``F.linear`` at 256 x 1024 x 1024 in ``dtype``.

    The best run within about 50 ms, and of at least six: other processes only ever make a run slower.
    """
    x = torch.randn(256, 1024, device=device).to(dtype)
    w = torch.randn(1024, 1024, device=device).to(dtype)
    best, began, runs = float("inf"), time.perf_counter(), 0
    while runs < 6 or time.perf_counter() - began < 0.05:
        start = time.perf_counter()
        F.linear(x, w)
        if device != "cpu":
            torch.cuda.synchronize()
        best, runs = min(best, time.perf_counter() - start), runs + 1
    return 2 * 256 * 1024 * 1024 / best / 1e9
