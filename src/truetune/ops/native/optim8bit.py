"""The C kernel of an optimizer's step, on tensors: on the CPU. C trusts sizes and types, so they are asserted here."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Protocol

import torch
from torch import Tensor

from truetune.ops.moment_codes import moment_map, nearest_entries
from truetune.ops.native.library import Library
from truetune.ops.update_rule import Rule

_CODE = {torch.float32: 0, torch.bfloat16: 1}  # TT_FLOAT32 and TT_BFLOAT16 of simd.h
_KINDS = ("adam", "ademamix", "momentum", "lion", "rms")  # in the order of the enum in optim8bit.h
# The fields of tt_rule.
_SCALARS = ("size", "keep1", "add1", "keep2", "add2", "keep3", "add3", "mix", "eps", "decay", "l2", "scale")
LARGEST_BLOCK = 4096  # TT_OPTIM_BLOCK

_P, _I64, _I32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
_Pointers = _P * 3


class Moment(Protocol):
    """What is read of ``ops.optim8bit.Moment``."""

    @property
    def values(self) -> Tensor: ...  # noqa: D102
    @property
    def absmax(self) -> Tensor | None: ...  # noqa: D102


def step(library: Library, rule: Rule, p: Tensor, g: Tensor, moments: Sequence[Moment], *, blocksize: int) -> None:
    """As ``ops.optim8bit.step``."""
    _call(library, rule, p, g, moments, None, blocksize)


def square_sums(
    library: Library, rule: Rule, p: Tensor, g: Tensor, moments: Sequence[Moment], *, blocksize: int
) -> tuple[float, float]:
    """As ``ops.optim8bit.square_sums``."""
    sums = (ctypes.c_double * 2)()
    _call(library, rule, p, g, moments, sums, blocksize)
    return sums[0], sums[1]


def _call(
    library: Library, rule: Rule, p: Tensor, g: Tensor, moments: Sequence[Moment], sums: object, blocksize: int
) -> None:
    assert 0 < blocksize <= LARGEST_BLOCK
    assert p.is_contiguous()
    assert g.is_contiguous()
    assert p.numel() == g.numel()
    values = _Pointers(*(_values(m, p.numel()) for m in moments))
    scales = _Pointers(*(_scales(m, p.numel(), blocksize) for m in moments))
    _function(library)(
        p.data_ptr(), g.data_ptr(), values, scales, _maps(), _scalars(rule), sums, p.numel(), blocksize,
        _CODE[p.dtype], _CODE[g.dtype], _KINDS.index(rule.kind),
    )  # fmt: skip


@cache
def _function(library: Library) -> ctypes._NamedFuncPointer:
    """The library's function with its argument types told, once."""
    function = library.functions.tt_optim_step
    function.argtypes = (_P, _P, _P, _P, _P, _P, _P, _I64, _I64, _I32, _I32, _I32)
    function.restype = None
    return function


@lru_cache(maxsize=64)
def _scalars(rule: Rule) -> ctypes.Array[ctypes.c_float]:
    return (ctypes.c_float * len(_SCALARS))(*(getattr(rule, name) for name in _SCALARS))


def _values(moment: Moment, n: int) -> int:
    values = moment.values
    assert values.dtype == (torch.float32 if moment.absmax is None else torch.uint8)
    assert values.is_cpu
    assert values.is_contiguous()
    assert values.numel() == n
    return values.data_ptr()


def _scales(moment: Moment, n: int, blocksize: int) -> int | None:
    absmax = moment.absmax
    if absmax is None:
        return None
    assert absmax.dtype == torch.float32
    assert absmax.is_cpu
    assert absmax.is_contiguous()
    assert absmax.numel() == -(-n // blocksize)
    return absmax.data_ptr()


@cache
def _maps() -> ctypes.Array[ctypes.c_void_p]:
    """Two of tt_map: the signed one, and that of magnitudes. What they point to stays cached too."""
    cpu = torch.device("cpu")
    tables = [table(signed, cpu) for signed in (True, False) for table in (moment_map, nearest_entries)]
    return (_P * 4)(*(table.data_ptr() for table in tables))
