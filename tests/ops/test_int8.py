"""LLM.int8(): codes to the bit, products against the definition in float64, and bitsandbytes beside them."""

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from reference.closeness import assert_no_worse
from truetune.errors import ConfigError, QuantizationError
from truetune.ops import dispatch, int8

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 1, 1), (1, 70, 33), (2, 64, 64), (33, 65, 31), (40, 100, 330), (5, 7, 3), (50, 576, 40)]  # n, in, out


def draws(n: int, inner: int, outer: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, all below 5 in size; codes and scale of a weight; bias."""
    draw = torch.Generator().manual_seed(n * 1000 + inner)
    x = torch.randn(n, inner, generator=draw).clamp(-4.9, 4.9)
    weight = torch.randn(outer, inner, generator=draw) * torch.rand(outer, 1, generator=draw)
    return x.to(dtype), *int8.quantize_rows(weight), torch.randn(outer, generator=draw)


def dense(codes: Tensor, scale: Tensor) -> Tensor:
    """W in float64."""
    return codes.double() * scale.double()[:, None] / 127


def quantised(x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and outlying columns of x, as bitsandbytes computes them."""
    x = x.float()
    big = (x.abs() >= threshold) & (threshold > 0)
    scale = x.masked_fill(big, 0).abs().amax(1)
    codes = (x * (127.0 / scale)[:, None]).nan_to_num(0).round()
    codes[big.any(0).expand_as(codes)] = 0
    return codes.to(torch.int8), scale, big.any(0).nonzero()[:, 0]


def definition(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, threshold: float, wide: torch.dtype = torch.float64
) -> Tensor:
    """The paper's product, from exact sums of the same codes; everything else in ``wide``."""
    left, left_scale, columns = quantised(x, threshold)
    sums = (left.double() @ codes.double().T).to(wide)
    y = sums * left_scale.to(wide)[:, None] * scale.to(wide) / 127**2
    y = y + x[:, columns].to(wide) @ dense(codes, scale)[:, columns].T.to(wide)
    return y if bias is None else y + bias.to(wide)


def assert_is_the_product(
    y: Tensor, x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, threshold: float = 6.0
) -> None:
    plain = definition(x, codes, scale, bias, threshold, torch.float32).to(x.dtype)
    assert_no_worse(y, plain, definition(x, codes, scale, bias, threshold))


def with_outliers(x: Tensor, columns: list[int]) -> Tensor:
    """A copy of x with an outlier in one row of each of these columns."""
    x = x.clone()
    for count, column in enumerate(columns):
        x[count % len(x), column] = 60.5 * (-1) ** count + count
    return x


def test_codes_of_a_weight_are_the_golden_ones(tier: str) -> None:
    weight = torch.tensor(
        [[1.0, -2.0, 0.5, 0.25, 3e-3], [0.0, 0, 0, 0, 0], [127, 0.5, 1.5, -2.5, -127], [65504.0, -300, 257.5, 0, 1]]
    )
    codes, scale = int8.quantize_rows(weight)
    assert codes.tolist() == [[64, -127, 32, 16, 0], [0, 0, 0, 0, 0], [127, 0, 2, -2, -127], [127, -1, 0, 0, 0]]
    assert scale.tolist() == [2.0, 0.0, 127.0, 65504.0]
    assert (codes.dtype, scale.dtype) == (torch.int8, torch.float32)


def test_codes_of_an_activation_are_the_golden_ones(tier: str) -> None:
    x = torch.tensor([[1.0, 6.0, -0.5, 0.0], [-3.0, 2.0, 1.0, 5.99], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    a = int8.quantize_activation(x)
    assert a.codes.tolist() == [[127, 0, -64, 0], [-64, 0, 21, 127], [0, 0, 0, 0], [0, 0, 0, 0]]
    torch.testing.assert_close(a.scale, torch.tensor([1.0, 5.99, 1.0, 0.0]), rtol=0, atol=0)
    assert a.columns.tolist() == [1]
    assert a.values.tolist() == [[6.0], [2.0], [1.0], [0.0]]
    plain = int8.quantize_activation(x, 0.0)
    assert plain.codes[0].tolist() == [21, 127, -11, 0]
    assert plain.columns.tolist() == []


def test_ties_go_to_the_even_code_and_none_is_rounded_twice(tier: str) -> None:
    draw = torch.Generator().manual_seed(0)
    halves = torch.randint(-253, 254, (40, 200), generator=draw) / 2
    halves[:, 0] = 127
    spread = torch.rand(40, 1, generator=draw) + 0.1
    a_hair = 1 + torch.randint(-1, 2, halves.shape, generator=draw) * 2.0**-23
    for x in (halves, halves / spread, halves / 127 * spread * a_hair):
        for dtype in DTYPES:
            expected, scale, _ = quantised(x.to(dtype), 0)
            a = int8.quantize_activation(x.to(dtype), 0)
            assert torch.equal(a.codes, expected)
            assert torch.equal(a.scale, scale)
        expected, scale, _ = quantised(x.half(), 0)
        assert all(map(torch.equal, int8.quantize_rows(x), (expected, scale)))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (40, 64), (33, 130)], ids=str)
def test_dequantised_is_the_quotient_rounded_once(tier: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    codes, scale = int8.quantize_rows(torch.randn(*shape, generator=torch.Generator().manual_seed(1)))
    out = torch.empty(shape, dtype=dtype)
    assert int8.dequantize_rows(codes, scale, dtype=dtype, out=out) is out
    assert torch.equal(out, dense(codes, scale).to(dtype))
    assert torch.equal(int8.dequantize_rows(codes, scale, dtype=dtype), out)


def test_a_weight_in_pieces_has_the_codes_of_the_whole(tier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(50, 40, generator=torch.Generator().manual_seed(2))
    whole = int8.quantize_rows(weight)
    monkeypatch.setattr(int8, "_CHUNK", 300)
    assert all(map(torch.equal, int8.quantize_rows(weight), whole))
    assert torch.equal(int8.dequantize_rows(*whole, dtype=torch.float32), dense(*whole).float())


@pytest.mark.parametrize("outliers", ["none", "one", "many", "all"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_product_is_the_definition(
    tier: str, shape: tuple[int, int, int], dtype: torch.dtype, outliers: str
) -> None:
    x, codes, scale, bias = draws(*shape, dtype)
    every = {"none": shape[1] + 1, "one": shape[1], "many": 3, "all": 1}[outliers]
    x = with_outliers(x, list(range(shape[1] - 1, -1, -every)) if every <= shape[1] else [])
    for threshold in (6.0, 0.0):
        for b in (None, bias, bias.bfloat16()):
            y = int8.linear(x, codes, scale, b, threshold=threshold)
            assert_is_the_product(y, x, codes, scale, b, threshold)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outliers", [0, 700])
def test_a_product_of_many_blocks_is_the_definition(tier: str, dtype: torch.dtype, outliers: int) -> None:
    x, codes, scale, bias = draws(800, 1300, 400, dtype)
    x = with_outliers(x, list(range(outliers)))
    assert_is_the_product(int8.linear(x, codes, scale, bias), x, codes, scale, bias)


@pytest.mark.parametrize("outliers", [[], [3, 63, 64]])
def test_products_in_float32_and_of_whole_numbers_agree(
    tier: str, outliers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, codes, scale, bias = draws(33, 70, 31)
    x = with_outliers(x, outliers)
    found = []
    for fast in (True, False):
        monkeypatch.setattr(int8, "_has_int8_dot_products", lambda fast=fast: fast)
        found.append(int8.linear(x, codes, scale, bias))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_float64_and_float16_are_taken_too() -> None:
    x, codes, scale, bias = draws(9, 70, 31)
    x = with_outliers(x.half(), [5])
    truth = definition(x, codes, scale, bias, 6.0)
    torch.testing.assert_close(int8.linear(x.double(), codes, scale, bias), truth, atol=1e-6, rtol=0)  # float32 scales
    assert_is_the_product(int8.linear(x, codes, scale, bias), x, codes, scale, bias)


def test_rows_of_zeros_have_the_bias_alone(tier: str) -> None:
    x, codes, scale, bias = draws(5, 70, 31)
    x[2], codes[7], scale[7] = 0, 0, 0
    y = int8.linear(x, codes, scale, bias)
    assert torch.equal(y[2], bias)
    assert torch.equal(y[:, 7], bias[7].expand(5))
    assert torch.equal(int8.linear_t(torch.zeros(5, 31), codes, scale), torch.zeros(5, 70))


def test_sizes_too_small_to_divide_by_count_as_none(tier: str) -> None:
    x = torch.tensor([[1e-38, -1e-39], [1.0, 1e-38]])
    assert int8.quantize_activation(x).codes.tolist() == [[0, 0], [127, 0]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows_give_none(tier: str, dtype: torch.dtype) -> None:
    _, codes, scale, bias = draws(1, 70, 31)
    assert int8.linear(torch.empty(0, 70, dtype=dtype), codes, scale, bias).shape == (0, 31)
    assert int8.linear_t(torch.empty(0, 31, dtype=dtype), codes, scale).shape == (0, 70)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [6.0, 0.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_never_hidden_and_touches_no_other_row(
    tier: str, bad: float, threshold: float, dtype: torch.dtype
) -> None:
    x, codes, scale, _ = draws(5, 70, 31, dtype)
    x = with_outliers(x, [9])
    clean = int8.linear(x, codes, scale, threshold=threshold)
    x[3, 40] = bad
    y = int8.linear(x, codes, scale, threshold=threshold)
    assert not y[3].isfinite().any()
    others = [0, 1, 2, 4]
    if threshold and bad == bad:  # its column is now an outlying one, for all
        torch.testing.assert_close(y[others].float(), clean[others].float(), atol=0.2, rtol=0)
    else:
        assert torch.equal(y[others], clean[others])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (70, 340, 1200), (2400, 40, 33)], ids=str)
def test_the_gradient_is_that_of_the_dense_weight(tier: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    n, inner, outer = shape
    _, codes, scale, _ = draws(*shape)
    draw = torch.Generator().manual_seed(3)
    g, start = (torch.randn(n, k, generator=draw).to(dtype) for k in (outer, inner))
    weight = dense(codes, scale)
    x = torch.zeros(n, inner, dtype=torch.float64, requires_grad=True)
    (truth,) = torch.autograd.grad(x @ weight.T, x, g.double())
    plain = g @ weight.to(dtype)
    assert_no_worse(int8.linear_t(g, codes, scale), plain, truth)
    into = start.clone()
    assert int8.linear_t(g, codes, scale, into=into) is into
    assert_no_worse(into, torch.addmm(start, g, weight.to(dtype)), start.double() + truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_never_hidden(tier: str, bad: float, dtype: torch.dtype) -> None:
    _, codes, scale, _ = draws(5, 70, 31)
    g = torch.ones(5, 31, dtype=dtype)
    g[3, 4] = bad
    dx = int8.linear_t(g, codes, scale)
    assert not dx[3].isfinite().any()
    assert dx[[0, 1, 2, 4]].isfinite().all()


def test_memory_that_is_not_dense_is_taken_too(tier: str) -> None:
    x, codes, scale, bias = draws(20, 70, 31)
    g, start = torch.randn(20, 31), torch.randn(20, 70)
    turned, g_turned = x.T.contiguous().T, g.T.contiguous().T
    assert torch.equal(int8.linear(turned, codes, scale, bias), int8.linear(x, codes, scale, bias))
    assert torch.equal(int8.linear_t(g_turned, codes, scale), int8.linear_t(g, codes, scale))
    into = torch.zeros(20, 100)[:, :70].copy_(start)
    dx = int8.linear_t(g, codes, scale, into=into)
    torch.testing.assert_close(dx, int8.linear_t(g, codes, scale, into=start), atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_no_bit(tier: str, dtype: torch.dtype) -> None:
    x, codes, scale, bias = draws(70, 330, 400, dtype)
    x, g = with_outliers(x, [1, 100]), torch.randn(70, 400).to(dtype)

    def everything() -> tuple[Tensor, ...]:
        a = int8.quantize_activation(x)
        return a.codes, a.scale, int8.linear(a, codes, scale, bias), int8.linear_t(g, codes, scale)

    two = everything()
    torch.set_num_threads(1)
    assert all(map(torch.equal, two, everything()))


@pytest.mark.parametrize("outliers", [[], [3, 63, 64]])
def test_an_activation_of_one_tier_is_read_by_the_others(tiers: list[str], tier: str, outliers: list[int]) -> None:
    x, codes, scale, bias = draws(33, 70, 31)
    a = int8.quantize_activation(with_outliers(x, outliers))
    y = int8.linear(a, codes, scale, bias)
    for other in tiers:
        with dispatch.forced(other):
            torch.testing.assert_close(int8.linear(a, codes, scale, bias), y, rtol=1e-5, atol=1e-5)
            b = int8.quantize_activation(with_outliers(x, outliers))
            pairs = ((a.codes, b.codes), (a.scale, b.scale), (a.columns, b.columns), (a.values, b.values))
            assert all(torch.equal(*pair) for pair in pairs)


class TestMemo:
    """One input of several projections is quantised once, and never when it should be again."""

    @pytest.fixture(autouse=True)
    def _empty(self) -> Iterator[None]:
        int8._memo._entry = None
        yield
        assert int8._memo._entry is None  # it holds nothing beyond its tensor

    def test_the_same_tensor_is_quantised_once(self, tier: str) -> None:
        x = torch.randn(4, 10)
        first = int8._memo.activation(x, 6.0)
        assert int8._memo.activation(x, 6.0) is first
        assert int8._memo.activation(x, 0.0) is not first
        assert int8._memo.activation(x.clone(), 6.0) is not first

    def test_a_tensor_that_changed_is_quantised_again(self, tier: str) -> None:
        x, codes, scale, _ = draws(4, 10, 3)
        before = int8.linear(x, codes, scale)
        x.mul_(-1)
        assert torch.equal(int8.linear(x, codes, scale), -before)
        x[2] = 0
        assert torch.equal(int8.linear(x, codes, scale)[2], torch.zeros(3))
        x.data = torch.zeros(4, 10)
        assert torch.equal(int8.linear(x, codes, scale), torch.zeros(4, 3))

    def test_another_tensor_in_the_same_memory_is_quantised_again(self, tier: str) -> None:
        x, codes, scale, _ = draws(4, 10, 3)
        y = int8.linear(x, codes, scale)
        assert torch.equal(int8.linear(x.flip(0).clone(), codes, scale), y.flip(0))
        assert torch.equal(int8.linear(x[:2], codes, scale), y[:2])

    def test_another_tier_quantises_again(self, tier: str) -> None:
        x = torch.randn(4, 10)
        first = int8._memo.activation(x, 6.0)
        with dispatch.forced("reference"):
            assert (int8._memo.activation(x, 6.0) is first) == (tier == "reference")

    def test_it_is_gone_with_its_tensor(self, tier: str) -> None:
        x = torch.randn(4, 10)
        int8._memo.activation(x, 6.0)
        assert int8._memo._entry is not None
        del x
        gc.collect()
        assert int8._memo._entry is None

    def test_inference_tensors_have_no_version_and_are_never_remembered(self, tier: str) -> None:
        _, codes, scale, _ = draws(4, 10, 3)
        with torch.inference_mode():
            x = torch.randn(4, 10)
            y = int8.linear(x, codes, scale)
            assert torch.equal(int8.linear(x.neg_(), codes, scale), -y)


@pytest.mark.parametrize(
    ("value", "named"), [(float("nan"), "nan"), (float("inf"), "inf"), (-float("inf"), "-inf"), (70000.0, "70000")]
)
def test_a_weight_with_what_float16_does_not_hold_is_refused(tier: str, value: float, named: str) -> None:
    weight = torch.zeros(9, 8)
    weight[7, 3] = value
    with pytest.raises(QuantizationError, match=f"^row 7 holds {named}: .*65,504"):
        int8.quantize_rows(weight)


def test_a_threshold_below_0_is_refused() -> None:
    for threshold in (-1.0, float("nan")):
        with pytest.raises(ConfigError, match="expected 0"):
            int8.quantize_activation(torch.zeros(1, 1), threshold)


class TestPeer:
    """bitsandbytes 0.45 and later, its plain version: the codes are its own, the products but for its constant."""

    @pytest.fixture
    def bnb(self) -> Any:
        pytest.importorskip("bitsandbytes")
        return torch.ops.bitsandbytes

    def test_codes_of_weights_and_activations_are_equal(self, tier: str, bnb: Any) -> None:
        draw = torch.Generator().manual_seed(4)
        for scale in (1.0, 1e-3, 30.0):
            x = (torch.randn(40, 130, generator=draw) * scale).half()
            codes, stats, _ = bnb.int8_vectorwise_quant(x.clone(), 0.0)
            assert all(map(torch.equal, int8.quantize_rows(x), (codes, stats)))
            codes, stats, columns = bnb.int8_vectorwise_quant(x.clone(), 6.0)
            a = int8.quantize_activation(x.float())
            assert torch.equal(a.codes, codes)
            assert torch.equal(a.scale, stats)
            assert torch.equal(a.columns, columns if columns is not None else a.columns[:0])

    def test_a_product_is_equal_but_for_the_constant(self, tier: str, bnb: Any) -> None:
        x, codes, scale, bias = draws(33, 70, 31)
        x = with_outliers(x, [3, 64]).half().float()
        left, left_scale, columns = bnb.int8_vectorwise_quant(x.clone(), 6.0)
        theirs, _ = bnb.int8_mixed_scaled_mm(x, left, codes, left_scale, scale, outlier_cols=columns, bias=bias)
        # 6.200124e-5 in place of 1 / 127², and a weight that is rounded before the product
        torch.testing.assert_close(int8.linear(x, codes, scale, bias), theirs, rtol=3e-5, atol=1e-4)
