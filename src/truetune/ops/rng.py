"""Randomness as a function of counters.

Order, dropout and initial values derive from (seed, what it is for, step, …) and never from a generator that has run
for a while: a resumed run needs a step number and nothing else to see the same numbers.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def derive_seed(seed: int, *parts: str | int) -> int:
    """A 63-bit seed for one purpose; the same on every platform and Python version."""
    text = "/".join([str(seed), *(str(part) for part in parts)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, *parts: str | int) -> torch.Generator:
    """A fresh CPU generator for one purpose."""
    return torch.Generator().manual_seed(derive_seed(seed, *parts))


def permutation(count: int, seed: int, *parts: str | int) -> Tensor:
    """[count] int64: a shuffled range."""
    return torch.randperm(count, generator=generator(seed, *parts))
