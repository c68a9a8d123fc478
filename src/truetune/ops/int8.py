"""LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339): products of frozen weights and activations in 8 bits.

A row of the weight is kept as codes in [-127, 127] and one scale, its largest size: w = code · scale / 127. Rows of
activations are quantised in the same manner as they come, but for outliers: a column that holds a value of the
threshold's size or more is left to floating point, because it would take the resolution from all others. So

    y = (codes_x · codes_wᵀ · scale_x / 127 + x[:, outliers] · codes_w[:, outliers]ᵀ) · scale_w / 127 + bias,

with whole numbers in the first product, float32 everywhere else, and one rounding at the end. Codes and scales are
bitsandbytes' own. Two things differ from it: activations are quantised as they are, not cast to float16 first (equal
where float16 holds them), and the constant is 1 / 127², for which its version for CPUs has a slip of 2e-5.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from truetune.errors import ConfigError, QuantizationError
from truetune.ops import buffers, dispatch
from truetune.ops.frozen import FrozenLinear
from truetune.ops.native import int8 as native

THRESHOLD = 6.0  # section 3.1 of the paper
_CHUNK = 1 << 20  # elements of a weight that are worked on at a time
_NARROWEST = 256  # columns of a product that are worth a call


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight's codes, round(w · (1 / scale · 127)), ties to even, and scales, the largest size in each row of it.

    Args:
        weight: [out, in], any floating dtype; cast to float16 first, as the format has it.
    Returns:
        codes [out, in] int8 and scale [out] float32. A row of zeros has scale 0 and codes 0.
    Raises:
        QuantizationError: a value that is not finite, or (above 65,504) not in float16.
    """
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    for rows in _chunks(len(weight), weight.shape[1], 1):
        half = weight[rows].detach().to(_wide(weight.dtype)).to(torch.float16)  # twice as fast as at once
        codes[rows], scale[rows], _ = _quantized(half.float(), math.inf)
        if not bool(scale[rows].isfinite().all()):
            bad = ~half.isfinite()
            row, value = int(bad.any(1).nonzero()[0]) + rows.start, float(weight[rows][bad][0])
            raise QuantizationError(
                f"row {row} holds {value:g}: int8 keeps finite values up to 65,504, the largest of float16",
                ("way out", "mend the weight, or leave this layer unquantised"),
            )
    return codes, scale


def dequantize_rows(codes: Tensor, scale: Tensor, *, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """codes · scale / 127, rounded once.

    Args:
        codes: [out, in] int8.
        scale: [out] float32.
        dtype: of the result.
        out: where to put it, [out, in] of that dtype.
    """
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device) if out is None else out
    library = dispatch.native(out, scale)
    if library and out.is_contiguous():
        native.dequantize(library, codes.contiguous(), scale.contiguous(), out)
        return out
    for rows in _chunks(len(codes), codes.shape[1], 1):
        wide = _wide(dtype)
        out[rows] = codes[rows].to(wide).mul_(scale[rows, None].to(wide)).div_(127)
    return out


@dataclass(frozen=True)
class Activation:
    """Rows of activations in 8 bits, and their outliers beside them; made by ``quantize_activation``.

    Attributes:
        stored: int8, the codes as the products of this machine read them.
        scale: [n] float32. NaN for a row with a value that is no number, so that no product hides it.
        columns: [r] int64, rising: those that hold an outlier. Their codes are 0.
        values: [n, r], these columns as they were, in the dtype of the products.
        features: columns in all.
        blocked: ``stored`` is laid out for the tile unit.
    """

    stored: Tensor
    scale: Tensor
    columns: Tensor
    values: Tensor
    features: int
    blocked: bool

    @property
    def codes(self) -> Tensor:
        """[n, in] int8."""
        if not self.blocked:
            return self.stored
        padded = native.unblocked(self.stored).reshape(self.stored.shape)
        return padded[: len(self.scale), : self.features]


def quantize_activation(x: Tensor, threshold: float = THRESHOLD) -> Activation:
    """Each row's codes, round(x · (1 / scale · 127)), ties to even, with its largest size without outliers as scale.

    Args:
        x: [n, in].
        threshold: sizes from here on are outliers; 0 for none. An infinite value that is none makes its row NaN.
    Raises:
        ConfigError: a threshold below 0.
    """
    if not threshold >= 0:
        raise ConfigError(f"outlier threshold of {threshold:g}: expected 0 (no outliers) or more")
    x = x.detach()
    blocked = _runs_on_tiles(x)
    stored, scale, columns = _quantized(x, threshold or math.inf, blocked=blocked)
    if columns is None:
        none = torch.empty(0, dtype=torch.int64, device=x.device)
        return Activation(stored, scale, none, x.new_empty(len(x), 0), x.shape[1], blocked)
    if library := dispatch.native(x):
        values = native.set_apart(library, x.contiguous(), stored, columns, blocked=blocked)
    else:
        values = x[:, columns]
        stored[:, columns] = 0
    return Activation(stored, scale, columns, values, x.shape[1], blocked)


def linear(
    x: Tensor | Activation,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    threshold: float = THRESHOLD,
) -> Tensor:
    """The product of the module's docstring: x Wᵀ + bias, both factors in 8 bits.

    Args:
        x: [n, in], or what ``quantize_activation`` made of it. A tensor that is given again, unchanged by torch in
            between, is not quantised again.
        codes, scale: [out, in] int8 and [out] float32.
        bias: [out].
        threshold: as in ``quantize_activation``, if x is a tensor.
    Returns:
        [n, out] in the dtype of ``x``.
    Raises:
        ConfigError: a threshold below 0.
    """
    a = x if isinstance(x, Activation) else _memo.activation(x, threshold)
    bias = None if bias is None else bias.detach().to(_wide(a.values.dtype))
    library = dispatch.native(a.values)
    if library and native.has_tiles(library) and a.blocked and len(a.scale):
        return native.forward(library, a.stored, a.scale, a.columns, a.values, codes, scale, bias)
    rows, columns, given = len(a.scale), len(codes), a.codes
    y = buffers.empty(rows, columns, a.values.dtype, codes.device)
    for part in _chunks(columns, a.features, _NARROWEST) if rows else ():
        sums = _whole_product(given, codes[part])
        apart = None
        if len(a.columns):
            apart = a.values.to(_wide(y.dtype)) @ codes[part][:, a.columns].T.to(_wide(y.dtype))
        _rescale(sums, a.scale, scale[part], apart, None if bias is None else bias[part], y[:, part])
    return y


def linear_t(g: Tensor, codes: Tensor, scale: Tensor, *, into: Tensor | None = None) -> Tensor:
    """g W, the gradient of ``linear``'s input, with W = codes · scale / 127 and no outliers set apart.

    Args:
        g: [n, out].
        codes, scale: [out, in] int8 and [out] float32.
        into: [n, in] in the dtype of ``g``, to be added to in place.
    Returns:
        [n, in] in the dtype of ``g``; ``into`` if that was given.
    """
    library = dispatch.native(g, g if into is None else into)
    if library and native.has_tiles(library) and len(g) and (into is None or into.is_contiguous()):
        return native.backward(library, g, codes, scale, into)
    weight = buffers.scratch(codes.shape[0], codes.shape[1], g.dtype, g.device)
    return FrozenLinear(dequantize_rows(codes, scale, dtype=g.dtype, out=weight), False).matmul_t(g, into)


class _Memo:
    """The activation that was quantised last, for as long as the tensor it was made of is there and unchanged.

    Projections of one input, such as q, k and v, come one after the other.
    """

    def __init__(self) -> None:
        self._entry: tuple[weakref.ref[Tensor], tuple[Any, ...], Activation] | None = None

    def activation(self, x: Tensor, threshold: float) -> Activation:
        """``quantize_activation``, or what that returned the last time."""
        if x.is_inference() or torch.compiler.is_compiling():  # no version tells whether it was changed
            return quantize_activation(x, threshold)
        key = (x._version, x.data_ptr(), x.shape, x.stride(), threshold, dispatch.native(x))
        entry = self._entry
        if entry is not None and entry[0]() is x and entry[1] == key:
            return entry[2]
        activation = quantize_activation(x, threshold)
        self._entry = weakref.ref(x, self._forget), key, activation
        return activation

    def _forget(self, gone: weakref.ref[Tensor]) -> None:
        entry = self._entry
        if entry is not None and entry[0] is gone:
            self._entry = None


_memo = _Memo()


def _quantized(x: Tensor, limit: float, *, blocked: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    """``(codes, scale, columns with a value of the limit or more, if it is finite and there are any)`` of x [n, in]."""
    if library := dispatch.native(x):
        return native.quantize(library, x, limit, apart=limit < math.inf, blocked=blocked)
    wide = x.to(_wide(x.dtype))
    size = wide.abs()
    inside = size < limit
    outlying = (size >= limit) & (limit < math.inf)
    scale = torch.where(inside, size, 0).amax(1).masked_fill((~inside & ~outlying).any(1), math.nan).float()
    factor = (scale.reciprocal() * 127).nan_to_num(0, posinf=0).to(wide.dtype)  # a size below 2⁻¹²¹ counts as none
    codes = torch.where(inside, wide * factor[:, None], 0).round().to(torch.int8)
    columns = outlying.any(0).nonzero()[:, 0]
    return codes, scale, columns if len(columns) else None


def _whole_product(x: Tensor, w: Tensor) -> Tensor:
    """Codes [n, in] times the transpose of codes [m, in], [n, m]: int32, or float32 where that is the faster.

    Both are exact, float32 as long as its sums stay below 2²⁴, and off by its roundings beyond.
    """
    (rows, inner), device = x.shape, x.device
    if device.type == "cuda" and rows > 16 and inner % 8 == 0 and len(w) % 8 == 0:
        return torch._int_mm(x, w.T)
    if device.type == "cpu" and _has_int8_dot_products():
        return torch._int_mm(x, w.T)
    return x.float() @ w.float().T


@cache
def _has_int8_dot_products() -> bool:
    """Whether this CPU multiplies int8 in vectors, so that torch's product of integers is not a scalar loop.

    Asked of the CPU, not measured: a resumed run has to choose the same.
    """
    names = ("_is_vnni_supported", "_is_avx512_vnni_supported")  # of torch before 2.14, and the other way to say it
    return any(getattr(torch.cpu, name, bool)() for name in names)


def _rescale(sums: Tensor, left: Tensor, right: Tensor, apart: Tensor | None, bias: Tensor | None, out: Tensor) -> None:
    """(sums · left / 127 + apart) · right / 127 + bias into ``out`` [n, m]."""
    wide = _wide(out.dtype)
    left, right = left.to(wide) * (1 / 127), right.to(wide) * (1 / 127)
    if library := dispatch.native(out):
        native.rescale(library, sums, left, right, apart, bias, out)
        return
    y = sums.to(wide).mul_(left[:, None])
    y = (y if apart is None else y.add_(apart)).mul_(right)
    out.copy_(y if bias is None else y.add_(bias))


def _runs_on_tiles(x: Tensor) -> bool:
    library = dispatch.native(x)
    return library is not None and native.has_tiles(library)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _chunks(count: int, length: int, least: int) -> list[slice]:
    """``count`` rows of some length, so many at a time that temporaries stay small."""
    size = max(least, _CHUNK // max(1, length))
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
