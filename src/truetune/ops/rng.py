"""Randomness as a function of counters.

Order, dropout and initial values derive from (seed, what it is for, step, …) and never from a generator that has run
for a while: a resumed run needs a step number and nothing else to see the same numbers.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

# The counters of the tokens that are being computed: what drops part of them is far below whoever knows the rows.
_keys: ContextVar[Tensor | None] = ContextVar("token_keys", default=None)
_STRIDE = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 / golden ratio: keys of neighbouring positions share no bits


def token_keys(seed: int, step: int, examples: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """[sum of lengths] int64: a counter for every token, of (seed, step, example, position) and of nothing else."""
    return torch.cat(
        [
            derive_seed(seed, "dropout", step, example) + torch.arange(length) * _STRIDE
            for example, length in zip(examples, lengths, strict=True)
        ]
    )


@contextlib.contextmanager
def keyed(keys: Tensor | None) -> Iterator[None]:
    """Compute with these counters, one per token, in the order of the tokens."""
    token = _keys.set(keys)
    try:
        yield
    finally:
        _keys.reset(token)


def keys_in_force() -> Tensor | None:
    """The tokens' counters, for who computes something a second time."""
    return _keys.get()


def current_keys(count: int, device: torch.device | None = None) -> Tensor:
    """[count] int64: the tokens' counters, or drawn ones where what is computed is not one row per token."""
    keys = _keys.get()
    return (keys if keys is not None and len(keys) == count else torch.randint(1 << 62, (count,))).to(device=device)


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


# Up to here an order is drawn as a list, which costs 8 bytes a row; beyond, each place is computed when asked for.
# The border is part of the order: moving it would move the rows of every run between.
LISTED = 1 << 20
_ROUNDS = 8
_WORD = (1 << 64) - 1


@dataclass(frozen=True)
class Shuffle:
    """A permutation of ``range(count)`` that is never written down.

    A Feistel network on the least even number of bits that holds ``count`` (Luby, Rackoff 1988), walked along its cycle
    until it falls below ``count`` (Black, Rogaway 2002): less than four walks on average. It is as random as a shuffle
    of training rows has to be, and no cipher.
    """

    count: int
    keys: tuple[int, ...]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self.count:
            raise IndexError(index)
        half = max(1, ((self.count - 1).bit_length() + 1) // 2)
        low = (1 << half) - 1
        while True:
            left, right = index >> half, index & low
            for key in self.keys:
                left, right = right, left ^ (_mixed(right + key & _WORD) & low)
            index = left << half | right
            if index < self.count:
                return index


def order(count: int, seed: int, *parts: str | int) -> Shuffle | Tensor:
    """``range(count)`` shuffled, to be asked place by place: a list of all where that is short, else a ``Shuffle``."""
    if count <= LISTED:
        return permutation(count, seed, *parts)
    return Shuffle(count, tuple(derive_seed(seed, *parts, "round", n) for n in range(_ROUNDS)))


def _mixed(value: int) -> int:
    """64 bits in which each bit depends on all of ``value`` (the finaliser of SplitMix64, Steele et al. 2014)."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _WORD
    return value ^ value >> 31
