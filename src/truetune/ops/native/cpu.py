"""What this CPU can run, by the system's own list, so that torch need not be imported to ask it."""

from __future__ import annotations

import os
from functools import cache

_LEVELS = {
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx2", "fma", "f16c"},
    "avx2": {"avx2", "fma", "f16c"},
}
_VARIABLE = "ATEN_CPU_CAPABILITY"  # torch's own: a lower level for tests, or where wide vectors slow the clock down


def level() -> str:
    """``avx512``, ``avx2`` or ``default``: the widest vectors, not above what ``ATEN_CPU_CAPABILITY`` allows."""
    found = [name for name, needs in _LEVELS.items() if has(*needs)]
    allowed = os.environ.get(_VARIABLE, "")
    if allowed == "default" or not found:
        return "default"
    return allowed if allowed in found else found[0]


def has(*features: str) -> bool:
    """Whether the CPU has all of these, named as Linux does; only those of x86 are known."""
    return _features().issuperset(features)


@cache
def _features() -> frozenset[str]:
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            line = next((line for line in file if line.startswith("flags")), "")
        return frozenset(line.partition(":")[2].split())
    except OSError:
        return _told_by_torch()


def _told_by_torch() -> frozenset[str]:
    """The same where there is no ``/proc``."""
    import torch

    found = _LEVELS.get(torch.backends.cpu.get_cpu_capability().lower(), set())
    more = ("avx512_bf16", "amx_tile")
    own = {name for name in more if getattr(torch.cpu, f"_is_{name}_supported", bool)()}
    return frozenset(found | own | ({"amx_bf16"} if "amx_tile" in own else set()))
