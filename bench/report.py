"""Ratios, the table for people, and the JSON line for machines."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from bench.measure import Outcome

OURS = "truetune"


def key_name(peer: str) -> str:
    """``ms-swift`` as a part of a key: ``ms_swift``."""
    return peer.replace("-", "_")


def figures(outcomes: Mapping[str, Outcome], peers: list[str], *, ceiling: float) -> dict[str, Any]:
    """Our own figures, and three ratios per peer: each above 1 where we are ahead, None where the peer did not run.

    Args:
        outcomes: system → its medians; ``truetune`` is among them.
        ceiling: tokens per second, if nothing but the least products were computed, at the machine's best rate.
    """
    ours = outcomes[OURS]
    found: dict[str, Any] = {
        "tok_s": round(ours.tok_s, 1),
        "peak_mb": round(ours.peak_mb, 1),
        "first_step_s": round(ours.first_step_s, 2),
        "gemm_share": round(ours.tok_s / ceiling, 3),
    }
    for peer in peers:
        theirs = outcomes.get(peer)
        found |= {
            f"speedup_vs_{key_name(peer)}": theirs and round(ours.tok_s / theirs.tok_s, 2),
            f"memory_ratio_vs_{key_name(peer)}": theirs and round(theirs.peak_mb / ours.peak_mb, 2),
            f"first_step_ratio_vs_{key_name(peer)}": theirs and round(theirs.first_step_s / ours.first_step_s, 2),
        }
    return found


def table(outcomes: Mapping[str, Outcome], *, ceiling: float) -> str:
    """One line per system, ours first; ``x ours`` is of the speed, ``ceiling`` as ``figures`` takes it."""
    ours = outcomes[OURS]
    lines = [
        f"{'system':<12}{'tok/s':>10}{'x ours':>9}{'of ceiling':>12}"
        f"{'peak MB':>10}{'first step s':>14}{'last loss':>11}"
    ]
    for name, one in outcomes.items():
        lines.append(
            f"{name:<12}{one.tok_s:>10,.1f}{one.tok_s / ours.tok_s:>9.2f}{one.tok_s / ceiling:>12.1%}"
            f"{one.peak_mb:>10,.0f}{one.first_step_s:>14.1f}{one.loss:>11.4f}"
        )
    return "\n".join(lines)


def rounded(outcome: Outcome) -> dict[str, float]:
    """An outcome as JSON has it."""
    return {name: round(getattr(outcome, name), 4) for name in Outcome.__dataclass_fields__}


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


def conditions() -> dict[str, Any]:
    """Where and when something was measured, beside what other load."""
    return {
        "load_average": [round(one, 2) for one in os.getloadavg()],
        "torch": importlib.metadata.version("torch"),
        "cpu": cpu_name(),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def cpu_name() -> str:
    """What the processor calls itself, as far as the system tells."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
