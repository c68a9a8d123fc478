"""The low-rank update of a linear map, y = W x + b + s B A x (Hu et al. 2021, arXiv:2106.09685, section 4)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from truetune.ops import dispatch
from truetune.ops.native import fold as native
from truetune.ops.scale import scale as scale
from truetune.ops.threads import one_thread

_ROWS = 1024  # of a weight that are wide at a time
_CACHED = 1 << 17  # values of a weight that are merged at a time: twice half a megabyte in float32
_EXACT, _SPARE, _ITERATIONS = 1024, 16, 8


def linear(x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """s B A x.

    Args:
        x: [..., in].
        a: [r, in], cast to the dtype of ``x``.
        b: [out, r], likewise.
    Returns:
        [..., out] in the dtype of ``x``.
    """
    return F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype)) * scale


def lookup(ids: Tensor, a: Tensor, b: Tensor, scale: float, *, dtype: torch.dtype) -> Tensor:
    """s B A[:, id]: the low-rank update of embedding rows.

    Args:
        ids: [...] int64.
        a: [r, vocab].
        b: [dim, r].
    Returns:
        [..., dim] in ``dtype``.
    """
    return F.linear(F.embedding(ids, a.T.to(dtype)), b.to(dtype)) * scale


def fold(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W + s B A, rounded once.

    Args:
        weight: [out, in], any floating dtype. Not modified.
        a: [r, in].
        b: [out, r].
    Returns:
        A new [out, in] tensor in the dtype of ``weight``. The sum is formed in float32 (float64 for float64): in bf16
        the update would be rounded twice and mostly lost.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    a, b = a.detach().to(wide), b.detach().to(wide)
    if (library := dispatch.native(weight)) is not None and a.is_cpu and b.is_cpu and weight.numel():
        merged = weight.detach().clone(memory_format=torch.contiguous_format)
        a, b = a.contiguous(), b.contiguous()
        rank, columns = a.shape
        factors = native.factors(
            library, a.data_ptr(), b.data_ptr(), rank=rank, columns=columns, scale=scale, dtype="float32"
        )
        dtype = str(weight.dtype).removeprefix("torch.")
        native.fold(library, merged.data_ptr(), len(merged), factors, dtype=dtype)
        return merged
    # Some rows at a time: they stay in the cache, and fresh pages for whole matrices cost more than the arithmetic.
    rows = max(1, _CACHED // max(1, weight.shape[1]))
    merged = torch.empty_like(weight, memory_format=torch.contiguous_format, requires_grad=False)
    sums = torch.empty(min(rows, len(weight)), weight.shape[1], dtype=wide, device=weight.device)
    update = torch.empty_like(sums)
    with one_thread():  # which is faster at pieces of this size than several that wait for each other
        for source, target, left in zip(*(torch.split(t, rows) for t in (weight.detach(), merged, b)), strict=True):
            part = torch.mm(left, a, out=update[: len(left)])
            target.copy_(sums[: len(left)].copy_(source).add_(part, alpha=scale))
    return merged


def squared_rows(weight: Tensor) -> Tensor:
    """[out, ...] -> [out]: the sum of the squares of each row, in float32 (float64 for float64).

    Some rows at a time, so that a bf16 weight is never whole in float32.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    parts = [rows.to(wide).square().flatten(1).sum(1) for rows in torch.split(weight, _ROWS)]
    return torch.cat(parts) if parts else weight.new_zeros(0, dtype=wide)


def row_norms(squares: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """|W + s B A| of every row, without forming the sum: |W|² + 2 s (W Aᵀ) · B + s² B (A Aᵀ) · B.

    The denominator of DoRA (Liu et al. 2024, arXiv:2402.09353, equation 5); never negative, and 0 for a row of zeros.

    Args:
        squares: [out], ``squared_rows(weight)``, which a frozen weight has once and for all.
        weight: [out, in], any floating dtype; its product with Aᵀ, [out, r], is in that dtype.
        a: [r, in], float32.
        b: [out, r], float32.
    Returns:
        [out] in the dtype of ``squares``.
    """
    wide = squares.dtype
    a, b = a.to(wide), b.to(wide)
    across = (weight @ a.T.to(weight.dtype)).to(wide)
    twice = torch.addmm(across, b, a @ a.T, beta=2 * scale, alpha=scale * scale)  # what B is multiplied with
    return twice.mul_(b).sum(1).add_(squares).clamp_min_(0).sqrt_()


def best(matrix: Tensor, rank: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """The nearest product of that rank, as B [out, r] and A [r, in] that share its singular values evenly.

    B A is the sum of the largest singular triples (Eckart & Young 1936); a large matrix's are found by iterating on a
    random subspace (Halko et al. 2011, arXiv:0909.4061, algorithm 4.4), exactly enough for a start to train from.

    Args:
        matrix: [out, in], any floating dtype.
        generator: draws the subspace.
    """
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    if min(wide.shape) <= _EXACT or 4 * rank > min(wide.shape):
        u, s, v = torch.linalg.svd(wide, full_matrices=False)
    else:
        u, s, v = _large_triples(wide, rank + _SPARE, generator)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * v[:rank]


def _large_triples(matrix: Tensor, count: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
    """U [out, count], S and Vᵀ [count, in] of about the largest singular triples."""
    draw = torch.randn(matrix.shape[1], count, generator=generator).to(matrix)
    basis = torch.linalg.qr(matrix @ draw).Q
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    u, s, v = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ u, s, v
