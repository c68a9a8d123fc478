"""What a merge will take, said before it starts: memory, disk, time."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from truetune.checkpoint.disk import existing, require_space, writing
from truetune.checkpoint.header import PlannedTensor, TensorEntry
from truetune.checkpoint.tensors import open_index
from truetune.export.merge import Addition, Change, RowEdit, becomes
from truetune.train.memory import resident_mb

_PROBE_BYTES = 32 << 20
_WORTH_A_PROBE = 2e9  # bytes of a model; below, the probe would take longer than what it foretells is worth
_USUAL_RATE = 0.6e9  # bytes per second read, hashed and written, where nothing was probed
_FOLD_RATE = 2.5e8  # values per second that a low-rank product is added to, one thread
_STREAMED = 16e6  # bytes that are held where rows are changed as they pass: buffers, and the factors of one layer


@dataclass(frozen=True)
class Forecast:
    """What a merge needs at most."""

    ram_mb: float  # of the whole process
    disk_mb: float
    seconds: float

    def __str__(self) -> str:
        return f"needs {_size(self.ram_mb)} of memory, {_size(self.disk_mb)} of disk, {_duration(self.seconds)}"


def forecast(base: Path, out: Path, edits: Mapping[str, Change], *, packed: bool) -> Forecast:
    """Foretell a merge.

    Args:
        packed: every edited tensor is also packed or unpacked on the way, which holds it in float32 as well.
    Raises:
        OutputError: the disk has too little space for it.
    """
    entries = open_index(base)
    total = sum(entry.nbytes for entry in entries.values()) + _growth(edits, entries)
    edited = [entries[name] for name in edits if name in entries]
    whole = [entry for entry in edited if not isinstance(edits[entry.name], RowEdit)]
    largest = max((entry.nbytes for entry in whole), default=0)
    widest = max((math.prod(entry.shape) for entry in whole), default=0)
    held = _STREAMED + 3 * largest + (8 * widest if packed else 0)
    require_space(out, total - _left_behind(out))
    seconds = total / _rate(out, total) + sum(math.prod(entry.shape) for entry in edited) / _FOLD_RATE
    return Forecast(resident_mb() + held / 1e6, total / 1e6, seconds)


def _left_behind(out: Path) -> int:
    """Bytes of attempts that were killed: a repeat goes on from them, or clears them away before it begins."""
    return sum(path.stat().st_size for path in out.parent.glob(f".{out.name}.*.partial/*") if path.is_file())


def _growth(edits: Mapping[str, Change], entries: Mapping[str, TensorEntry]) -> int:
    """Bytes that the merged model has more than its base: a layer that was packed is written dense."""
    after = 0
    for name, edit in edits.items():
        if isinstance(edit, Addition):
            planned = PlannedTensor(name, edit.dtype, edit.shape)
        else:
            planned = becomes(entries[name], edit)
        after += planned.nbytes - (entries[name].nbytes if name in entries else 0)
    return after


def _rate(out: Path, total: int) -> float:
    """Bytes per second of the disk that is written to, tried where the model is large enough for it to matter."""
    if total < _WORTH_A_PROBE:
        return _USUAL_RATE
    folder = existing(out)
    probe = folder / f".truetune-probe-{os.getpid()}"
    try:
        with writing(folder):
            began = time.perf_counter()
            with probe.open("wb", buffering=0) as file:
                file.write(bytes(_PROBE_BYTES))
                os.fsync(file.fileno())
            written = _PROBE_BYTES / max(time.perf_counter() - began, 1e-6)
    finally:
        probe.unlink(missing_ok=True)
    return 1 / (1 / written + 1 / _USUAL_RATE)


def _size(mb: float) -> str:
    return f"{mb / 1e3:,.1f} GB" if mb >= 1000 else f"{max(mb, 1):,.0f} MB"


def _duration(seconds: float) -> str:
    if seconds < 10:
        return "a few seconds"
    return f"about {seconds:.0f} s" if seconds < 90 else f"about {seconds / 60:.0f} min"
