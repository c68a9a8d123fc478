"""Counter-based dropout: the same mask everywhere, and as random as a coin."""

import pytest
import torch
from torch import Tensor

from truetune.errors import ConfigError
from truetune.ops import dispatch
from truetune.ops.dropout import dropout, dropped, lanes
from truetune.ops.rng import derive_seed

DTYPES = [torch.float32, torch.bfloat16]


def keys(n: int, seed: int = 0) -> Tensor:
    return torch.tensor([derive_seed(seed, "row", row) for row in range(n)], dtype=torch.int64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (1, 17), (3, 3), (3, 64), (100, 577)], ids=str)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.999, 1.0])
def test_kept_elements_are_scaled_and_the_mask_is_the_definition(
    tier: str, p: float, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    x = (torch.randn(*shape, generator=torch.Generator().manual_seed(0)) + 10).to(dtype)
    y = dropout(x, p, keys(shape[0]), 3)
    kept = lanes(keys(shape[0]), 3, shape[1]) >= round(p * 65536)
    assert torch.equal(y != 0, kept)
    expected = (x.float() * torch.tensor(1 / (1 - p) if p < 1 else 0.0)).to(dtype)
    assert torch.equal(y, torch.where(kept, expected, 0))


def test_a_lane_is_what_it_always_was() -> None:
    found = lanes(torch.tensor([0, -1, 2**62 + 12345]), 7, 5)
    assert found.tolist() == [
        [11875, 2681, 6112, 3960, 38745],
        [44897, 19289, 59801, 29099, 11096],
        [29797, 19134, 47068, 13622, 12181],
    ]


def test_lanes_are_those_of_whole_numbers_in_python() -> None:
    def mixed(x: int, amid: int = 0) -> int:
        x = ((x ^ (x >> 16)) * 0x7FEB352D + amid) % 2**32
        x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
        return x ^ (x >> 16)

    def lane(key: int, site: int, column: int) -> int:
        low, high = key % 2**32, (key >> 32) % 2**32
        first = mixed((mixed((mixed(site) + low) % 2**32) + high) % 2**32)
        second = mixed((mixed((mixed(site ^ 0xFFFFFFFF) + high) % 2**32) + low) % 2**32)
        return mixed((first + column // 2) % 2**32, second) >> 16 * (column % 2) & 0xFFFF

    some = keys(20) * torch.tensor([1, -1]).repeat(10)
    truth = [[lane(key, 2**32 - 5, column) for column in range(31)] for key in some.tolist()]
    assert lanes(some, 2**32 - 5, 31).tolist() == truth


def test_the_mask_does_not_depend_on_how_rows_are_cut_and_ordered(tier: str) -> None:
    x, k = torch.ones(30, 100), keys(30)
    whole, order = dropout(x, 0.3, k, 1), torch.arange(30) * 7 % 30
    assert torch.equal(torch.cat([dropout(x[rows], 0.3, k[rows], 1) for rows in order.split(8)]), whole[order])
    assert torch.equal(dropout(x[:, :37], 0.3, k, 1), whole[:, :37])


def test_a_gradient_has_the_mask_of_its_forward(tier: str) -> None:
    x = torch.randn(6, 50).requires_grad_()
    y = dropped(x, 0.4, keys(6), 2)
    (g,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(g != 0, y != 0)
    assert torch.equal(g, dropout(torch.ones(6, 50), 0.4, keys(6), 2))


def test_the_gradient_is_the_derivative() -> None:
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: dropped(t, 0.4, keys(3), 2), (x,))


def test_nothing_dropped_is_the_tensor_itself(tier: str) -> None:
    x = torch.randn(3, 5)
    assert dropout(x, 0.0, keys(3), 0) is x
    assert dropped(x, 0.0, keys(3), 0) is x


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_never_hidden(tier: str, bad: float) -> None:
    x = torch.ones(4, 40)
    x[:, 5] = bad
    y = dropout(x, 0.5, keys(4), 0)
    assert not y[:, 5].isfinite().any()
    assert y[:, :5].isfinite().all()


@pytest.mark.usefixtures("two_threads")
def test_threads_change_no_bit(tier: str) -> None:
    x, k = torch.randn(300, 333), keys(300)
    two = dropout(x, 0.3, k, 1)
    torch.set_num_threads(1)
    assert torch.equal(dropout(x, 0.3, k, 1), two)


def test_rows_that_are_not_dense_are_taken_too(tier: str) -> None:
    x, k = torch.randn(20, 30), keys(40)
    y = dropout(x, 0.3, k[::2].contiguous(), 1)
    assert torch.equal(dropout(x.T.contiguous().T, 0.3, k[::2], 1), y)


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5])
def test_the_share_that_is_kept_is_one_less_p(p: float) -> None:
    kept = (lanes(keys(1000), 0, 1000) >= round(p * 65536)).double()
    deviation = (p * (1 - p)) ** 0.5
    assert abs(kept.mean() - (1 - p)) < 5 * deviation / 1000  # five standard errors of a million draws
    for shares in (kept.mean(0), kept.mean(1)):  # 1000 means of 1000: their spread is that of independent draws
        assert 0.9 < shares.std() / (deviation / 1000**0.5) < 1.1  # of a standard error of 2 %


def test_lanes_are_uniform() -> None:
    counts = torch.bincount(lanes(keys(1000), 5, 1024).flatten() // 256, minlength=256).double()
    expected = counts.mean()
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert 255 - 5 * 22.6 < chi_square < 255 + 5 * 22.6  # mean 255, deviation sqrt(2 · 255)


def correlation(a: Tensor, b: Tensor) -> float:
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    return float((a * b).mean() / (a.std() * b.std()))


def test_neighbours_do_not_know_each_other() -> None:
    rows, columns, n = 500, 512, 500 * 512
    here = lanes(keys(rows), 5, columns)
    plain = lanes(torch.arange(rows), 5, columns)  # keys as poor as can be
    for drawn in (here, plain):
        for step in (1, 2, 3, 16):
            assert abs(correlation(drawn[:, :-step], drawn[:, step:])) < 5 / n**0.5
            assert abs(correlation(drawn[:-step], drawn[step:])) < 5 / n**0.5
    for other in (
        lanes(keys(rows), 6, columns),
        lanes(keys(rows), 5 + 2**16, columns),
        lanes(keys(rows, 1), 5, columns),
    ):
        assert abs(correlation(here, other)) < 5 / n**0.5
    for bit in (32, 62):  # the upper word of a key counts too
        assert abs(correlation(plain, lanes(torch.arange(rows) + 2**bit, 5, columns))) < 5 / n**0.5


def test_every_tier_and_device_has_the_same_mask(tier: str) -> None:
    x, k = torch.ones(50, 999), keys(50)
    with dispatch.forced("reference"):
        expected = dropout(x, 0.25, k, 2**31 + 9)
    assert torch.equal(dropout(x, 0.25, k, 2**31 + 9), expected)
    assert torch.equal(dropout(x.double(), 0.25, k, 2**31 + 9) != 0, expected != 0)


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_a_share_beyond_0_to_1_is_refused(p: float) -> None:
    with pytest.raises(ConfigError, match="expected 0 to 1"):
        dropout(torch.ones(1, 1), p, keys(1), 0)
