"""A process that measures what it is asked: a request per line on its input, one line of JSON as the answer to each.

Ours and a peer's run at the same time and are asked by turns, each with its own packages; this file is all they share,
the numbers that they work on included.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LEAST_CALLS = 3


@dataclass(frozen=True)
class Job:
    """What is timed, and what to tell of its last result."""

    call: Callable[[], Any]
    facts: Callable[[Any], dict[str, Any]] = lambda _: {}


def serve(jobs: Mapping[str, Callable[..., Job]]) -> None:
    """Answer until the input ends: ``{"job": name, "of": its arguments, "seconds": how long to measure}``."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    kept: dict[str, tuple[dict[str, Any], Job]] = {}  # the last of each name: the next round asks again
    for line in sys.stdin:
        request = json.loads(line)
        name, of = request["job"], request["of"]
        if name not in kept or kept[name][0] != of:
            kept[name] = of, jobs[name](**of)
        answers.write(json.dumps(measured(kept[name][1], request["seconds"])) + "\n")


def measured(job: Job, seconds: float) -> dict[str, Any]:
    """The median time of a call, over at least so many seconds; one call before that is not counted.

    ``cpu_seconds`` is the processor's time of all threads: what other processes take is not in it.
    """
    job.call()
    taken: list[tuple[float, float]] = []
    until = time.perf_counter() + seconds
    while len(taken) < LEAST_CALLS or time.perf_counter() < until:
        began, cpu = time.perf_counter(), time.process_time()
        result = job.call()
        taken.append((time.perf_counter() - began, time.process_time() - cpu))
    wall, busy = (statistics.median(times) for times in zip(*taken, strict=True))
    return {"seconds": wall, "cpu_seconds": busy, "calls": len(taken), **job.facts(result)}


def peak_mb() -> float:
    """The most resident memory that this process has had, as the system kept it."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def weight(shape: Iterable[int], dtype: str) -> Tensor:
    """The same random weight for everyone."""
    draws = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=draws).mul_(0.02).to(getattr(torch, dtype))


def parameters(tensors: int, values: int) -> list[torch.nn.Parameter]:
    """``values`` float32 parameters in so many equal tensors, with gradients."""
    found = [torch.nn.Parameter(weight((values // tensors,), "float32")) for _ in range(tensors)]
    for parameter in found:
        parameter.grad = parameter.detach().flip(0)
    return found


def digest(tensor: Tensor) -> str:
    """Of the bytes."""
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()[:16]


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """What an optimizer keeps; maps that all tensors share are counted once."""
    held = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in held}.values())
