"""The C kernels of decoding, on tensors: one token of each of a few texts, on the CPU, float32 or bfloat16 weights.

What does not change from step to step (a layer's weights) is laid out for C once, in a ``Layers``. C trusts sizes and
addresses, so they are asserted here, and whoever holds a ``Layers`` holds the tensors that it points into.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from truetune.ops.native.elementwise import KINDS
from truetune.ops.native.library import Library

MOST_RANK = 1024  # SKINNY_RANK of skinny.h
MAPS = ("q", "k", "v", "o", "gate", "up", "down")
NORMS = ("input", "mlp", "q", "k")
_CODE = {torch.float32: 0, torch.bfloat16: 1}  # TT_FLOAT32 and TT_BFLOAT16 of simd.h
_P, _I64, _I32, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float
_TERM_TENSORS = ("a", "b", "shift", "magnitude", "of_input", "of_output")


class _Term(ctypes.Structure):
    """skinny_term of skinny.h."""

    _fields_ = (*((name, _P) for name in _TERM_TENSORS), ("first", _I64), ("end", _I64), ("rank", _I64))


class _Map(ctypes.Structure):
    """skinny_map of skinny.h."""

    _fields_ = (("weight", _P), ("bias", _P), ("terms", _P), ("inner", _I64), ("outer", _I64), ("count", _I64))


class _Layer(ctypes.Structure):
    """decode_layer of decode.h."""

    _fields_ = (
        ("norm", _P * 4), ("eps", _F * 4), ("offset", _F * 4), *((name, _Map) for name in MAPS),
        ("keys", _P), ("values", _P), ("scale", _F), ("softcap", _F), ("window", _I64),
    )  # fmt: skip


class _Step(ctypes.Structure):
    """decode_step of decode.h."""

    _fields_ = (
        ("layers", _P), ("x", _P), ("cos", _P), ("sin", _P), ("positions", _P), ("pages", _P), ("edges", _P),
        *((n, _I64) for n in ("count", "rows", "hidden", "inner", "heads", "kv_heads", "dim", "rotary", "page")),
        ("dtype", _I32), ("kind", _I32),
    )  # fmt: skip


@dataclass(frozen=True)
class NormPart:
    """An RMS norm: weight [n] of the products' dtype, as ``ops.norm.rms_norm`` takes it."""

    weight: Tensor
    eps: float
    offset: float


@dataclass(frozen=True)
class LayerParts:
    """What a layer computes with; see decode.h.

    Attributes:
        maps: weight [out, in] and bias [out] or None, dense, by the names in ``MAPS``.
        norms: by the names in ``NORMS``; those of heads may be missing.
        keys, values: [pages, page, kv_heads, dim].
    """

    maps: Mapping[str, tuple[Tensor, Tensor | None]]
    norms: Mapping[str, NormPart]
    keys: Tensor
    values: Tensor
    scale: float
    softcap: float
    window: int


@dataclass(frozen=True)
class RowTerm:
    """What one adapter adds at one map, for rows ``first`` … ``end - 1``; see skinny.h for the tensors."""

    first: int
    end: int
    a: Tensor | None = None  # [r, in]
    b: Tensor | None = None  # [r, out]
    shift: Tensor | None = None
    magnitude: Tensor | None = None
    of_input: Tensor | None = None
    of_output: Tensor | None = None


class Layers:
    """The layers of a decoder, laid out for C.

    Args:
        heads, dim, rotary: of the queries; the dimensions of a head, and how many of them turn.
        kind: of activation, as ``ops.gated`` names it.
    """

    def __init__(self, parts: Sequence[LayerParts], *, heads: int, dim: int, rotary: int, kind: str) -> None:
        self.parts, self._kind = tuple(parts), KINDS.index(kind)
        first = self.parts[0]
        self.dtype = first.keys.dtype
        self.heads, self.dim, self.rotary, self.kv_heads = heads, dim, rotary, first.keys.shape[2]
        self.inner, self.hidden = first.maps["gate"][0].shape
        self._array = (_Layer * len(parts))(*map(self._laid_out, self.parts))
        self._set: list[_Map] = []

    def _laid_out(self, parts: LayerParts) -> _Layer:
        widths = {"q": self.heads * self.dim, "k": self.kv_heads * self.dim, "v": self.kv_heads * self.dim}
        widths |= {"o": self.hidden, "gate": self.inner, "up": self.inner, "down": self.hidden}
        layer = _Layer(scale=parts.scale, softcap=parts.softcap, window=parts.window)
        for name, (weight, bias) in parts.maps.items():
            own = {"o": self.heads * self.dim, "down": self.inner}.get(name, self.hidden)
            assert weight.shape == (widths[name], own), name
            _assert_dense(self.dtype, weight, bias)
            assert bias is None or bias.shape == weight.shape[:1]
            setattr(layer, name, _Map(weight.data_ptr(), _address(bias), None, own, widths[name], 0))
        for number, name in enumerate(NORMS):
            if norm := parts.norms.get(name):
                _assert_dense(self.dtype, norm.weight)
                assert norm.weight.shape == (self.hidden if number < 2 else self.dim,)
                layer.norm[number] = norm.weight.data_ptr()
                layer.eps[number], layer.offset[number] = norm.eps, norm.offset
        for name in ("keys", "values"):
            tensor: Tensor = getattr(parts, name)
            _assert_dense(self.dtype, tensor)
            assert tensor.shape[2:] == (self.kv_heads, self.dim)
            setattr(layer, name, tensor.data_ptr())
        return layer

    def place(self, terms: Mapping[tuple[int, str], Sequence[RowTerm]]) -> None:
        """Put adapters beside the maps, by (layer, map), in place of those that stood there."""
        for own in self._set:
            own.terms, own.count = None, 0
        self._set, self._kept = [], list[Any]()
        for (number, name), rows in terms.items():
            own = getattr(self._array[number], name)
            array = (_Term * len(rows))(*(_term(row, own.inner, own.outer, self.dtype) for row in rows))
            own.terms, own.count = ctypes.cast(array, _P), len(rows)
            self._kept += [array, rows]
            self._set.append(own)

    def decode(
        self, library: Library, x: Tensor, angles: tuple[Tensor, Tensor], positions: Tensor, pages: Sequence[Tensor]
    ) -> None:
        """The new tokens' hidden states [n, hidden] float32, from the table's to the last layer's, in place.

        Args:
            angles: cosine and sine, [n, rotary] float32.
            positions: [n] int64.
            pages: [m] int64 of each row, with room for its new token: keys and values of it are written there.
        Raises:
            MemoryError: for the kernel's scratch space.
        """
        rows, cos, sin = len(x), *angles
        edges, held = _lined_up(pages)
        page = self.parts[0].keys.shape[1]
        _assert_dense(torch.float32, x, cos, sin)
        _assert_dense(torch.int64, positions, edges, held)
        assert x.shape == (rows, self.hidden)
        assert cos.shape == sin.shape == (rows, self.rotary)
        assert positions.shape == (rows,)
        assert len(pages) == rows
        assert bool((positions >= 0).all() and (positions // page < edges.diff()).all())
        assert bool((held >= 0).all() and (held < len(self.parts[0].keys)).all())
        assert (
            all(row.end <= rows for kept in self._kept if isinstance(kept, list) for row in kept) if self._set else True
        )
        step = _Step(
            ctypes.addressof(self._array), x.data_ptr(), cos.data_ptr(), sin.data_ptr(), positions.data_ptr(),
            held.data_ptr(), edges.data_ptr(), len(self.parts), rows, self.hidden, self.inner, self.heads,
            self.kv_heads, self.dim, self.rotary, page, _CODE[self.dtype], self._kind,
        )  # fmt: skip
        if _functions(library).tt_decode(ctypes.byref(step)):
            raise MemoryError("decoding: no memory for its scratch space")


def skinny(library: Library, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A few rows [n, in] float32 times the transpose of ``weight`` [out, in], plus ``bias``: [n, out] float32.

    Raises:
        MemoryError: for the kernel's scratch space.
    """
    _assert_dense(weight.dtype, weight, bias)
    _assert_dense(torch.float32, x)
    assert x.shape[1] == weight.shape[1]
    y = torch.empty(len(x), len(weight))
    own = _Map(weight.data_ptr(), _address(bias), None, weight.shape[1], weight.shape[0], 0)
    if _functions(library).tt_skinny(ctypes.byref(own), x.data_ptr(), y.data_ptr(), len(x), _CODE[weight.dtype]):
        raise MemoryError("a product: no memory for its scratch space")
    return y


@cache
def _functions(library: Library) -> ctypes.CDLL:
    functions = library.functions
    functions.tt_decode.argtypes, functions.tt_decode.restype = (_P,), _I32
    functions.tt_skinny.argtypes, functions.tt_skinny.restype = (_P, _P, _P, _I64, _I32), _I32
    return functions


def _term(row: RowTerm, inner: int, outer: int, dtype: torch.dtype) -> _Term:
    rank = 0 if row.a is None else len(row.a)
    shapes = {"a": (rank, inner), "b": (rank, outer), "shift": (outer,), "magnitude": (outer,), "of_input": (inner,),
              "of_output": (outer,)}  # fmt: skip
    term = _Term(first=row.first, end=row.end, rank=rank)
    assert 0 <= row.first < row.end
    assert rank <= MOST_RANK
    assert (row.a is None) == (row.b is None)
    for name in _TERM_TENSORS:
        tensor: Tensor | None = getattr(row, name)
        if tensor is not None:
            _assert_dense(dtype if name in ("a", "b", "shift") else torch.float32, tensor)
            assert tensor.shape == shapes[name], name
            setattr(term, name, tensor.data_ptr())
    return term


def _lined_up(pages: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    edges = torch.tensor([0, *(len(held) for held in pages)]).cumsum(0)
    return edges, torch.cat(list(pages))


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _assert_dense(dtype: torch.dtype, *tensors: Tensor | None) -> None:
    for tensor in tensors:
        assert tensor is None or (tensor.is_cpu and tensor.dtype == dtype and tensor.is_contiguous())
