"""Products with a rank: their formulas in float64, with and without a dropout mask, in every tier."""

import pytest
import torch
from torch import Tensor

from reference.closeness import assert_no_worse
from truetune.ops import thin
from truetune.ops.dropout import Mask, lanes
from truetune.ops.rng import derive_seed

SHAPES = [(1, 1, 1), (33, 70, 5), (200, 96, 16), (130, 50, 24), (64, 33, 70)]
MASKS = [None, 0.3, 1.0]


def factors(n: int, m: int, r: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    """[n, m], [n, r] and [m, r]."""
    draw = torch.Generator().manual_seed(n + m + r)
    wide, left, right = (torch.randn(*shape, generator=draw).to(dtype) for shape in ((n, m), (n, r), (m, r)))
    return wide, left, right


def mask_of(p: float | None, n: int) -> Mask | None:
    return None if p is None else Mask(p, torch.tensor([derive_seed(0, "row", row) for row in range(n)]), 5)


def truth_of(mask: Mask | None, x: Tensor) -> Tensor:
    """drop(x) in float64, from the definition of the lanes."""
    if mask is None:
        return x.double()
    return x.double() * (lanes(mask.keys, mask.site, x.shape[1]) >= mask.threshold) * mask.kept


def dropped(mask: Mask | None, x: Tensor) -> Tensor:
    """The same in plain torch, rounded as x is."""
    return x if mask is None else truth_of(mask, x).to(x.dtype)


def check(found: Tensor, plain: Tensor, truth: Tensor) -> None:
    """A sum that was kept in float32 is held to what torch rounds."""
    assert_no_worse(found.to(plain.dtype), plain, truth)


@pytest.mark.parametrize("p", MASKS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_adding_is_the_sum_of_three(tier: str, shape: tuple[int, int, int], p: float | None) -> None:
    y, h, b = factors(*shape)
    residual, mask = factors(*shape)[0].flip(0), mask_of(p, shape[0])
    low, plain = truth_of(mask, h.double() @ b.double().T), y + dropped(mask, h @ b.T)
    check(thin.add(y.clone(), h, b, mask=mask), plain, y.double() + low)
    found = y.clone()
    assert thin.add(found, h, b, residual=residual, mask=mask) is found
    check(found, plain + residual, y.double() + low + residual.double())


@pytest.mark.parametrize("p", MASKS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_down_and_across_read_the_dropped_matrix(tier: str, shape: tuple[int, int, int], p: float | None) -> None:
    x, h, right = factors(*shape)
    mask = mask_of(p, shape[0])
    seen, plain = truth_of(mask, x), dropped(mask, x)
    check(thin.down(x, right.T.contiguous(), mask), plain @ right, seen @ right.double())
    check(thin.across(h, x, mask), h.T @ plain, h.double().T @ seen)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_backward_takes_paths_of_different_sizes_side_by_side(tier: str, dtype: torch.dtype) -> None:
    sizes = [(100, 48, 8), (100, 33, 3), (100, 64, 40)]
    grads, h, b = zip(*(factors(*size, dtype) for size in sizes), strict=True)
    dh, of_b = thin.backward(grads, h, b, [2.0, 1.0, 0.5])
    assert dh.shape == (100, 51)
    for part, db, g, low, wide, scale in zip(dh.split([8, 3, 40], 1), of_b, grads, h, b, [2.0, 1.0, 0.5], strict=True):
        check(part, g @ wide, g.double() @ wide.double())
        check(db, scale * (g.T @ low), scale * g.double().T @ low.double())


def test_a_matrix_whose_rows_lie_apart_is_read_where_it_is(tier: str) -> None:
    wide, h, right = factors(40, 64, 8)
    part = torch.cat((wide, wide), dim=1)[:, :64]
    check(thin.down(part, right.T), wide @ right, wide.double() @ right.double())
    check(thin.across(h, part), h.T @ wide, h.double().T @ wide.double())


def test_threads_change_no_bit(tier: str) -> None:
    wide, h, right = factors(700, 96, 8)
    found, before = [], torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append((thin.backward([wide], [h], [right], [1.0])[1][0], thin.across(h, wide)))
    torch.set_num_threads(before)
    if tier != "reference":  # torch's own products promise no such thing
        assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
