"""Where A and B of a low-rank update start, so that the layer computes at first what its base does.

The usual starts have B A = 0. PiSSA (Meng et al. 2024, arXiv:2404.02948) starts at the base's largest singular
directions, and what they make up is taken off the base; LoftQ (Li et al. 2023, arXiv:2310.08659, one round of it)
starts at what quantising took away, so that base and update together are near the weight as it was.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from truetune.errors import AdapterError, ConfigError
from truetune.ops import lowrank
from truetune.ops.frozen import FrozenWeight

FROM_WEIGHTS = ("pissa", "loftq")
"""Starts that look at the base."""


@dataclass(frozen=True)
class Start:
    """A [r, in] and B [out, r] in float32.

    Attributes:
        taken_off: the base counts without s B A of the start.
    """

    a: Tensor
    b: Tensor
    taken_off: bool = False


def start(
    kind: str,
    base: FrozenWeight,
    rank: int,
    *,
    scale: float = 1.0,
    generator: torch.Generator | None = None,
    original: Tensor | None = None,
) -> Start:
    """A start by the name of ``--init``.

    Args:
        base: what the update stands beside. On the meta device nothing is drawn.
        scale: s, which the singular values are divided by.
        generator: draws what is random; the default is torch's global one.
        original: [out, in], the base's weight before it was quantised; for ``loftq``.
    Raises:
        AdapterError: a rank that the weight has not; or ``loftq`` without a quantised base, or without its original.
    """
    out, inner = base.out_features, base.in_features
    if base.device.type == "meta":
        empty = torch.empty(rank, inner, device="meta"), torch.empty(out, rank, device="meta")
        return Start(*empty, taken_off=kind == "pissa")
    if kind in FROM_WEIGHTS:
        if rank > min(out, inner):
            raise AdapterError(f"--init {kind}: a weight of {out} x {inner} has no {rank} singular directions",
                               ("way out", f"--rank {min(out, inner)} or less"))  # fmt: skip
        matrix = base.dense().float()
        b, a = lowrank.best(matrix if kind == "pissa" else _lost(original, matrix), rank, generator)
        made = Start(a / math.sqrt(scale), b / math.sqrt(scale), taken_off=kind == "pissa")
    else:
        made = _random(kind, out, inner, rank, generator)
    return Start(made.a.to(base.device), made.b.to(base.device), made.taken_off)


def _random(kind: str, out: int, inner: int, rank: int, generator: torch.Generator | None) -> Start:
    a, b = torch.zeros(rank, inner), torch.zeros(out, rank)
    if kind == "kaiming":
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)  # U(±1/sqrt(in)), as nn.Linear
    elif kind == "gaussian":
        nn.init.normal_(a, std=1 / rank, generator=generator)
    elif kind == "zero":
        nn.init.kaiming_uniform_(b, a=math.sqrt(5), generator=generator)
    else:
        a, b = _orthogonal(out, inner, rank, generator)
    return Start(a, b)


def _orthogonal(out: int, inner: int, rank: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Neither is zero and B A is: A's columns lie in the span of half of an orthogonal basis, B's rows in the other's.

    As PEFT has it (https://datta0.github.io/posts/rethink-lora-init).
    """
    if rank % 2:
        raise ConfigError(f"--init orthogonal: found rank {rank}, expected an even one")
    basis = torch.linalg.qr(torch.randn(rank, rank, generator=generator)).Q
    a = basis[0::2].T @ torch.randn(rank // 2, inner, generator=generator) / 10
    return a, torch.randn(out, rank // 2, generator=generator) @ basis[1::2] / 10


def _lost(original: Tensor | None, packed: Tensor) -> Tensor:
    """What quantising took away, [out, in]."""
    if original is None:
        raise AdapterError(
            "--init loftq: it starts from what quantising took away, and here the weight is as it was",
            ("way out", "--quant nf4, fp4 or int8, on a base that is not quantised on disk"),
        )
    return original.float().to(packed.device) - packed
