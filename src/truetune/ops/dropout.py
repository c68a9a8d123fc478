"""Dropout (Srivastava et al. 2014) whose mask is a function of counters, not the state of a generator.

Whether an element is kept depends on its row's key, the site and its column, and on nothing else. So the mask does not
change when a batch is cut or packed differently, need not be saved for the backward, and is the same on every device
and in every tier, to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from truetune.errors import ConfigError
from truetune.ops import dispatch
from truetune.ops.native import elementwise

_WORD = 0xFFFFFFFF


@dataclass(frozen=True)
class Mask:
    """What decides on each element of an [n, h] matrix; the arguments of ``dropout``."""

    p: float
    keys: Tensor
    site: int

    @property
    def threshold(self) -> int:
        """An element is kept where its lane reaches this."""
        return round(self.p * 65536)

    @property
    def kept(self) -> float:
        """What an element that is kept is multiplied with."""
        return 1.0 / (1.0 - self.p) if self.p < 1.0 else 0.0

    @property
    def word(self) -> int:
        """The site, as the kernels take it."""
        return self.site & _WORD

    def on(self, x: Tensor) -> Tensor:
        """``dropout`` of x [n, h]."""
        return dropout(x, self.p, self.keys, self.site)


def dropout(x: Tensor, p: float, keys: Tensor, site: int) -> Tensor:
    """Computes x · mask / (1 - p). Of a gradient it gives the gradient: the map is its own transpose.

    Args:
        x: [n, h], any floating dtype.
        p: share that is dropped, rounded to a multiple of 2⁻¹⁶.
        keys: [n] int64, one per row; rows with equal keys have equal masks.
        site: where in the model this is; sites of one row are independent. Its low 32 bits count.
    Returns:
        [n, h] in the dtype of ``x``, rounded once; ``x`` itself where p = 0.
    Raises:
        ConfigError: p is not in [0, 1].
    """
    if not 0.0 <= p <= 1.0:
        raise ConfigError(f"dropout of {p:g}: expected 0 to 1")
    if p == 0.0:
        return x
    mask = Mask(p, keys, site)
    threshold, scale = mask.threshold, mask.kept
    if library := dispatch.native(x):
        return elementwise.dropout(library, x, keys, threshold=threshold, site=mask.word, scale=scale)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    # A product, so that a NaN stays one even where it is dropped.
    return (wide * ((lanes(keys, site, x.shape[1]) >= threshold) * wide.new_tensor(scale))).to(x.dtype)


def lanes(keys: Tensor, site: int, columns: int) -> Tensor:
    """[n, columns] int64 in [0, 2¹⁶): uniform, independent. An element is kept where its lane reaches p · 2¹⁶.

    Two columns share one 32-bit hash of (row, column // 2): the even one has its low half. A row enters as two words,
    one before and one amid the mixing, so that 64 bits tell rows apart.
    """
    low, high = keys & _WORD, (keys >> 32) & _WORD
    at = torch.full_like(keys, site & _WORD)
    first = _mixed((_mixed((_mixed(at) + low) & _WORD) + high) & _WORD)
    second = _mixed((_mixed((_mixed(at ^ _WORD) + high) & _WORD) + low) & _WORD)
    pairs = torch.arange((columns + 1) // 2, device=keys.device)
    hashed = _mixed((first[:, None] + pairs) & _WORD, second[:, None])
    return torch.stack((hashed & 0xFFFF, hashed >> 16), dim=-1).flatten(1)[:, :columns]


def _mixed(x: Tensor, amid: Tensor | int = 0) -> Tensor:
    """lowbias32 by C. Wellons ("Prospecting for hash functions", 2018), with a word added between its two rounds.

    32-bit words in int64: a product wraps at 2⁶⁴, which leaves its low half right.
    """
    x = ((x ^ (x >> 16)) * 0x7FEB352D + amid) & _WORD
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _WORD
    return x ^ (x >> 16)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, keys: Tensor, site: int) -> Tensor:
        ctx.save_for_backward(keys)
        ctx.p, ctx.site = p, site
        return dropout(x, p, keys, site)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (keys,) = ctx.saved_tensors
        return dropout(g, ctx.p, keys, ctx.site), None, None, None


def dropped(x: Tensor, p: float, keys: Tensor, site: int) -> Tensor:
    """``dropout`` for autograd."""
    if p == 0.0:
        return x
    y: Tensor = _Dropout.apply(x, p, keys, site)  # type: ignore[no-untyped-call]
    return y
