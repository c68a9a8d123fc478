"""The C kernels for rows, on tensors: on the CPU, float32 or bfloat16. C trusts sizes, so they are asserted here."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from truetune.ops import buffers
from truetune.ops.native.library import Library

_CODE = {torch.float32: 0, torch.bfloat16: 1}  # TT_FLOAT32 and TT_BFLOAT16 of simd.h
KINDS = ("silu", "gelu", "gelu_tanh", "relu")  # in the order of the enum in gated.h

_P, _I64, _I32, _U32, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_uint32, ctypes.c_float
_ARGUMENTS = {
    "tt_norm_forward": (_P, _P, _P, _P, _I64, _I64, _I32, _I32, _F, _F),
    "tt_norm_backward": (_P, _P, _P, _P, _P, _I64, _I64, _I32, _I32, _F),
    "tt_gated_forward": (_P, _I64, _P, _I64, _P, _I64, _I64, _I64, _I32, _I32),
    "tt_gated_backward": (_P, _I64, _P, _I64, _P, _I64, _P, _I64, _P, _I64, _I64, _I64, _I32, _I32),
    "tt_dropout": (_P, _P, _P, _I64, _I64, _I32, _I32, _U32, _F),
    "tt_cross_entropy": (_P, _I64, _P, _P, _I64, _I64, _I32, _F, _F, _I32),
}


@cache
def _functions(library: Library) -> ctypes.CDLL:
    """The library's functions with their argument types told, once."""
    for name, types in _ARGUMENTS.items():
        function = getattr(library.functions, name)
        function.argtypes = types
        function.restype = _I64 if name == "tt_cross_entropy" else None
    return library.functions


def _weight(weight: Tensor | None, columns: int) -> tuple[Tensor | None, int | None, int]:
    """A norm's weight made dense, which has to live as long as its address; that; and the code of its elements."""
    if weight is None:
        return None, None, 0
    assert weight.shape == (columns,)
    weight = weight.contiguous()
    return weight, weight.data_ptr(), _CODE[weight.dtype]


def norm(library: Library, x: Tensor, weight: Tensor | None, eps: float, *, offset: float) -> tuple[Tensor, Tensor]:
    """(y, r) of x [..., h]."""
    x = x.contiguous()
    columns = x.shape[-1]
    rows = x.numel() // max(columns, 1)
    _kept, address, code = _weight(weight, columns)
    y, rstd = buffers.empty_like(x), torch.empty(rows, dtype=torch.float32, device=x.device)
    _functions(library).tt_norm_forward(
        x.data_ptr(), address, y.data_ptr(), rstd.data_ptr(), rows, columns, _CODE[x.dtype], code, eps, offset
    )
    return y, rstd


def norm_backward(
    library: Library, g: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, *, offset: float
) -> Tensor:
    """The gradient of x [..., h]."""
    g, x, rstd = g.contiguous(), x.contiguous(), rstd.contiguous()
    assert g.shape == x.shape
    assert rstd.numel() * x.shape[-1] == x.numel()
    assert rstd.dtype == torch.float32
    _kept, address, code = _weight(weight, x.shape[-1])
    dx = buffers.empty_like(x)
    _functions(library).tt_norm_backward(
        g.data_ptr(), x.data_ptr(), address, rstd.data_ptr(), dx.data_ptr(),
        rstd.numel(), x.shape[-1], _CODE[x.dtype], code, offset,
    )  # fmt: skip
    return dx


def gated(library: Library, gate: Tensor, up: Tensor, kind: str, out: Tensor) -> None:
    """act(gate) * up into ``out``; all [n, i] with dense rows."""
    _functions(library).tt_gated_forward(
        *_strided(gate), *_strided(up), *_strided(out), *gate.shape, _CODE[gate.dtype], KINDS.index(kind)
    )


def gated_backward(
    library: Library, g: Tensor, gate: Tensor, up: Tensor, kind: str, d_gate: Tensor, d_up: Tensor
) -> None:
    """The gradients of gate and up into ``d_gate`` and ``d_up``; all [n, i] with dense rows."""
    _functions(library).tt_gated_backward(
        *_strided(g), *_strided(gate), *_strided(up), *_strided(d_gate), *_strided(d_up),
        *gate.shape, _CODE[gate.dtype], KINDS.index(kind),
    )  # fmt: skip


def _strided(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.stride(0)


def dropout(library: Library, x: Tensor, keys: Tensor, *, threshold: int, site: int, scale: float) -> Tensor:
    """X [n, h] times its mask and ``scale``."""
    assert keys.shape == x.shape[:1]
    assert keys.dtype == torch.int64
    x, keys = x.contiguous(), keys.contiguous()
    out = buffers.empty_like(x)
    _functions(library).tt_dropout(
        x.data_ptr(), keys.data_ptr(), out.data_ptr(), *x.shape, _CODE[x.dtype], threshold, site, scale
    )
    return out


def cross_entropy_(
    library: Library, logits: Tensor, targets: Tensor, *, softcap: float, smoothing: float, grad: bool
) -> Tensor:
    """Losses [n] of logits [n, V] with dense rows, which become their gradient if ``grad``.

    Raises:
        IndexError: a target that is no index into V; nothing is written then.
    """
    assert targets.shape == logits.shape[:1]
    assert targets.dtype == torch.int64
    targets = targets.contiguous()
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    bad = _functions(library).tt_cross_entropy(
        logits.data_ptr(), logits.stride(0), targets.data_ptr(), losses.data_ptr(), *logits.shape,
        _CODE[logits.dtype], softcap, smoothing, grad,
    )  # fmt: skip
    if bad >= 0:
        raise IndexError(f"target {int(targets[bad])} in row {bad}: expected 0 to {logits.shape[1] - 1}")
    return losses
