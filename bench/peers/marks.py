"""The marks that a process which loads a model leaves for whoever watches it; ours and a peer's alike."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

TOKENS = 16


def leave(load: Callable[[], Any], marks: str) -> None:
    """Load a model, send some tokens through it, and write down when what was done and how much memory it took."""
    imported = time.time()
    model = load()
    loaded, peak = time.time(), peak_mb()
    # In training mode: out of it, bitsandbytes packs its weights anew first.
    model.train()
    with torch.no_grad():
        model(torch.arange(2, TOKENS + 2)[None])
    found = {"imported": imported, "loaded": loaded, "answered": time.time(), "peak_mb": peak}
    Path(marks).write_text(json.dumps(found), encoding="utf-8")


def peak_mb() -> float:
    """Most resident memory of this process so far; 0 where the system does not tell."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return 0.0
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6
