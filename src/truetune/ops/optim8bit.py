"""A step of an optimizer whose moments are kept in 8 bits, block by block (Dettmers et al. 2022, arXiv:2110.02861).

Moments are decoded, advanced in float32 and encoded again; the parameter takes its step from the new moments before
they are rounded to codes. A code is the exact nearest (``ops.blockwise_8bit``), so a zero stays zero, and no sign
turns: what is nearer to 0 than to the least code becomes 0.

Moments in float32 take the same path, which is how small tensors and the 32-bit optimizers step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from truetune.ops import dispatch
from truetune.ops.moment_codes import decoded, encode_
from truetune.ops.native import optim8bit as kernels
from truetune.ops.update_rule import SIGNED, Rule, apply_, direction_

_CHUNK = 1 << 16  # values that the reference has in hand at a time on a CPU: they stay in the cache
_CHUNK_ELSEWHERE = 1 << 24


@dataclass(frozen=True, eq=False)
class Moment:
    """A running mean, as it is kept.

    Attributes:
        values: float32, or uint8 codes; [n], contiguous.
        absmax: float32 [blocks], of codes.
        signed: whether codes are of the signed dynamic map, or of that of magnitudes.
    """

    values: Tensor
    absmax: Tensor | None
    signed: bool


def step(rule: Rule, p: Tensor, g: Tensor, moments: Sequence[Moment], *, blocksize: int = 256) -> None:
    """Make one step, in place.

    Args:
        p: [n], contiguous; float32, bfloat16 or float16. It is updated in float32 and rounded once.
        g: [n], contiguous; any of these types.
        moments: those of ``rule.kind``, in the order of ``SIGNED``.
        blocksize: values per absmax.
    """
    _check(rule, p, g, moments)
    if library := dispatch.native(p, g):
        kernels.step(library, rule, p, g, moments, blocksize=blocksize)
        torch.autograd.graph.increment_version(p)  # which torch does where it writes itself
        return
    for part in _parts(p, blocksize):
        wide, values = p[part].float(), [_decoded(m, part, blocksize) for m in moments]
        apply_(rule, wide, direction_(rule, wide, g[part].float(), values))
        p[part].copy_(wide)
        for moment, advanced in zip(moments, values, strict=True):
            _encode(moment, advanced, part, blocksize)


def square_sums(
    rule: Rule, p: Tensor, g: Tensor, moments: Sequence[Moment], *, blocksize: int = 256
) -> tuple[float, float]:
    """The sums of squares of the direction that ``step`` would take, and of the parameter. Nothing is changed.

    Args:
        rule, p, g, moments, blocksize: as for ``step``.
    Returns:
        Both sums; each tier adds up in an order of its own, so they agree to the last digits only.
    """
    _check(rule, p, g, moments)
    if library := dispatch.native(p, g):
        return kernels.square_sums(library, rule, p, g, moments, blocksize=blocksize)
    of_direction = of_parameter = 0.0
    for part in _parts(p, blocksize):
        wide, values = p[part].float(), [_decoded(m, part, blocksize) for m in moments]
        values = [v.clone() if m.absmax is None else v for m, v in zip(moments, values, strict=True)]
        u = direction_(rule, wide, g[part].float(), values).nan_to_num(nan=0.0)
        of_direction += float(u.square().sum())
        of_parameter += float(wide.square().sum())
    return of_direction, of_parameter


def _check(rule: Rule, p: Tensor, g: Tensor, moments: Sequence[Moment]) -> None:
    assert p.shape == g.shape == (p.numel(),)
    assert tuple(m.signed for m in moments) == SIGNED[rule.kind]
    assert all(m.values.shape == p.shape for m in moments)


def _parts(p: Tensor, blocksize: int) -> list[slice]:
    """Whole blocks, as many as the reference has in hand at a time."""
    chunk = _CHUNK if p.is_cpu else _CHUNK_ELSEWHERE
    each = max(chunk // blocksize, 1) * blocksize
    return [slice(start, min(start + each, len(p))) for start in range(0, len(p), each)]


def _decoded(moment: Moment, part: slice, blocksize: int) -> Tensor:
    """Float32 values; those of the moment itself where it is kept in float32."""
    values = moment.values[part]
    if moment.absmax is None:
        return values
    return decoded(values, moment.absmax[_blocks(part, blocksize)], signed=moment.signed, blocksize=blocksize)


def _encode(moment: Moment, values: Tensor, part: slice, blocksize: int) -> None:
    if moment.absmax is not None:
        absmax = moment.absmax[_blocks(part, blocksize)]
        encode_(moment.values[part], absmax, values, signed=moment.signed, blocksize=blocksize)


def _blocks(part: slice, blocksize: int) -> slice:
    return slice(part.start // blocksize, -(-part.stop // blocksize))
