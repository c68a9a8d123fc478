"""Block-wise quantisation: the bytes that bitsandbytes defines, in every tier, and nothing hidden."""

import hashlib
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from truetune.errors import QuantizationError
from truetune.ops import codebooks, dispatch
from truetune.ops.blockwise_4bit import BLOCKSIZES, Packed4, dequantize_4bit, quantize_4bit
from truetune.ops.blockwise_8bit import dequantize_8bit, quantize_8bit
from truetune.ops.codebooks import Kind4

GOLDEN = json.loads((Path(__file__).parent / "golden" / "blockwise.json").read_text(encoding="utf-8"))
KINDS: list[Kind4] = ["nf4", "fp4"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ANY_SIZE = st.integers(1, 700) | st.integers(4000, 4200)
PIVOTS = (0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def sample(n: int) -> Tensor:
    """What the golden bytes were made of: by whole numbers alone, so no generator can change it."""
    i = torch.arange(n)
    x = ((i * i * 7919 + i * 104729 + 1) % 65521 - 32760) / 32768
    x[x.abs() < 1 / 128] = 0
    x = x * 2.0 ** (i // 64 % 7 - 3)
    x[64:128] = 0
    return x


def sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.view(torch.uint8).numpy().tobytes()).hexdigest()


def by_blocks(x: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Scaled values [n] and absmax [blocks], by the definition."""
    flat = x.reshape(-1).float()
    absmax = torch.stack([block.abs().max() for block in flat.split(blocksize)])
    return flat * (1.0 / absmax.clamp_min(1e-38)).repeat_interleave(blocksize)[: len(flat)], absmax


def codes_by_definition(scaled: Tensor, kind: Kind4) -> Tensor:
    if kind == "nf4":
        values = codebooks.four_bit("nf4")
        return (scaled[:, None] > (values[1:] + values[:-1]) / 2).sum(1)
    rank = (scaled.abs()[:, None] > torch.tensor(PIVOTS)).sum(1)
    return torch.tensor([0, 1, 6, 7, 4, 5, 2, 3])[rank] + 8 * (scaled < 0)


def nibbles(packed: Packed4) -> Tensor:
    """The codes one by one, the padding of an odd number too."""
    return torch.stack([packed.codes >> 4, packed.codes & 15], 1).view(-1).long()


def by_formula(packed: Packed4, dtype: torch.dtype) -> Tensor:
    """What codes stand for, as one would write it down."""
    n = math.prod(packed.shape)
    values = codebooks.four_bit(packed.kind)[nibbles(packed)[:n]]
    return (values * packed.scales().repeat_interleave(packed.blocksize)[:n]).to(dtype).view(packed.shape)


@pytest.mark.parametrize("case", GOLDEN["four_bit"], ids=lambda c: "{kind}-{dtype}-{n}-{blocksize}".format(**c))
def test_four_bit_bytes_are_golden(tier: str, case: dict[str, Any]) -> None:
    packed = quantize_4bit(
        sample(case["n"]).to(getattr(torch, case["dtype"])), case["kind"], blocksize=case["blocksize"]
    )
    assert packed.absmax is not None
    assert sha256(packed.codes) == case["codes"]
    assert sha256(packed.absmax) == case["absmax"]
    for name in ("float32", "bfloat16", "float16"):
        assert sha256(dequantize_4bit(packed, dtype=getattr(torch, name))) == case[name]


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_bytes_are_golden(tier: str, kind: Kind4) -> None:
    assert quantize_4bit(sample(203), kind).codes.numpy().tobytes().hex() == GOLDEN["first_codes"][kind]


def test_double_quantised_scales_are_golden(tier: str) -> None:
    golden = GOLDEN["nested"]
    packed = quantize_4bit(sample(golden["n"]), double=True)
    assert packed.absmax is None
    assert packed.nested is not None
    assert packed.nested.offset.item() == float.fromhex(golden["offset"])
    assert sha256(packed.nested.codes) == golden["codes"]
    assert sha256(packed.nested.absmax) == golden["absmax"]
    assert sha256(packed.scales()) == golden["scales"]


@pytest.mark.parametrize("case", GOLDEN["eight_bit"], ids=lambda c: "signed" if c["signed"] else "unsigned")
def test_eight_bit_bytes_are_golden(tier: str, case: dict[str, Any]) -> None:
    code = codebooks.dynamic(signed=case["signed"])
    x = sample(case["n"]) if case["signed"] else sample(case["n"]).abs()
    codes, absmax = quantize_8bit(x, code)
    assert sha256(codes) == case["codes"]
    assert sha256(absmax) == case["absmax"]
    assert sha256(dequantize_8bit(codes, absmax, code)) == case["values"]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=ANY_SIZE, kind=st.sampled_from(KINDS), blocksize=st.sampled_from(BLOCKSIZES), dtype=st.sampled_from(DTYPES),
    wanted=st.sampled_from(DTYPES), double=st.booleans(), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_codes_and_values_are_the_definition(
    tier: str, n: int, kind: Kind4, blocksize: int, dtype: torch.dtype, wanted: torch.dtype, double: bool, seed: int
) -> None:
    x = draw(n, seed=seed, dtype=dtype)
    packed = quantize_4bit(x, kind, blocksize=blocksize, double=double)
    scaled, absmax = by_blocks(x, blocksize)
    assert torch.equal(nibbles(packed)[:n], codes_by_definition(scaled, kind))
    if not double:
        assert torch.equal(packed.scales(), absmax)
    found = dequantize_4bit(packed, dtype=wanted)
    assert found.dtype == wanted
    assert torch.equal(found, by_formula(packed, wanted))


@pytest.mark.parametrize("kind", KINDS)
def test_a_tie_takes_the_lower_code_and_in_fp4_the_one_nearer_to_zero(tier: str, kind: Kind4) -> None:
    if kind == "nf4":
        values = codebooks.four_bit("nf4")
        ties, lower = (values[1:] + values[:-1]) / 2, torch.arange(15)
        steps = [(-1, 0), (0, 0), (1, 1)]
    else:
        ties = torch.tensor(PIVOTS)
        lower = torch.tensor([0, 1, 6, 7, 4, 5, 2])
        steps = [(-1, 0), (0, 0)]
    for sign, (step, up) in itertools.product((1, -1) if kind == "fp4" else (1,), steps):
        x = torch.zeros(32)  # with an absmax of 1, values are the scaled values
        x[: len(ties)] = sign * (ties.nextafter(ties + step) if step else ties)
        x[31] = 1.0
        expected = lower + up + (8 if sign < 0 else 0)
        assert torch.equal(nibbles(quantize_4bit(x, kind, blocksize=32))[: len(ties)], expected)


@pytest.mark.parametrize("n", [64, 256, 1000, 63])
@pytest.mark.parametrize(("kind", "byte"), [("nf4", 0x77), ("fp4", 0x00)])
def test_blocks_of_zeros_stay_zero(tier: str, kind: Kind4, byte: int, n: int) -> None:
    packed = quantize_4bit(torch.zeros(n), kind)
    assert packed.codes.eq(byte).all()
    assert packed.scales().eq(0).all()
    assert dequantize_4bit(packed).eq(0).all()


@pytest.mark.parametrize(("kind", "padding"), [("nf4", 7), ("fp4", 0)])
def test_an_odd_number_is_padded_with_the_code_of_zero(tier: str, kind: Kind4, padding: int) -> None:
    packed = quantize_4bit(draw(3, 77), kind)
    assert len(packed.codes) == 116
    assert packed.codes[-1] & 15 == padding


@pytest.mark.parametrize("scale", [1e-44, 3e-39, 1e-38, 2e-38, 1e-30, 1e30, 3.4e38])
@pytest.mark.parametrize("kind", KINDS)
def test_every_tier_has_the_same_bits_at_the_ends_of_the_range(tier: str, kind: Kind4, scale: float) -> None:
    x = torch.cat([draw(64, seed=1).clamp(-1, 1) * scale, torch.tensor([scale] * 32)])
    with dispatch.forced("reference"):
        expected = quantize_4bit(x, kind)
        values = {dtype: dequantize_4bit(expected, dtype=dtype) for dtype in DTYPES}
    packed = quantize_4bit(x, kind)
    assert torch.equal(packed.codes, expected.codes)
    assert torch.equal(packed.scales(), expected.scales())
    for dtype, value in values.items():  # bfloat16 has subnormal values too
        assert torch.equal(dequantize_4bit(packed, dtype=dtype), value)
    code = codebooks.dynamic()
    with dispatch.forced("reference"):
        eight = quantize_8bit(x, code)
        value = dequantize_8bit(*eight, code, dtype=torch.bfloat16)
    assert all(map(torch.equal, quantize_8bit(x, code), eight))
    assert torch.equal(dequantize_8bit(*eight, code, dtype=torch.bfloat16), value)


@pytest.mark.parametrize(
    ("kind", "absolute", "relative"),
    [("nf4", 0.072798, 0.2033), ("fp4", 0.096543, 0.2601)],
)
def test_the_error_on_normal_values_is_the_published_one(kind: Kind4, absolute: float, relative: float) -> None:
    x = draw(1 << 20)
    error = (dequantize_4bit(quantize_4bit(x, kind)) - x).abs()
    assert error.mean().item() == pytest.approx(absolute, rel=2e-3)  # a standard error of 1e-3 of a million
    assert (error / (x.abs() + 1e-8)).mean().item() == pytest.approx(relative, rel=5e-3)


def test_the_error_of_eight_bits_on_uniform_values_is_the_published_one() -> None:
    x, code = torch.rand(1 << 20, generator=torch.Generator().manual_seed(0)), codebooks.dynamic()
    error = (dequantize_8bit(*quantize_8bit(x, code), code) - x).abs()
    assert error.mean() < 0.0036
    assert (error / (x + 1e-8)).mean() < 0.015


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize(("shape", "bad"), [((100,), 1), ((300, 501), 3)], ids=str)
def test_values_that_are_not_finite_are_counted_and_refused(
    tier: str, shape: tuple[int, ...], bad: int, dtype: torch.dtype
) -> None:
    x = draw(*shape, dtype=dtype)
    spoilers = torch.tensor([math.nan, math.inf, -math.inf], dtype=dtype)[:bad]
    x.view(-1)[torch.linspace(7, x.numel() - 1, bad).long()] = spoilers
    expected = f"^{bad} of {x.numel():,} values are not finite"
    with pytest.raises(QuantizationError, match=expected):
        quantize_4bit(x)
    with pytest.raises(QuantizationError, match=expected):
        quantize_8bit(x, codebooks.dynamic())


def test_what_overflows_float32_is_not_finite(tier: str) -> None:
    with pytest.raises(QuantizationError, match="2 of 64 values"):
        quantize_4bit(torch.tensor([1e300, -1e39] + [1.0] * 62, dtype=torch.float64))


def test_a_tensor_without_values_is_refused() -> None:
    with pytest.raises(QuantizationError, match="meta device"):
        quantize_4bit(torch.empty(64, 64, device="meta"))
    with pytest.raises(QuantizationError, match="values of type int64"):
        quantize_8bit(torch.arange(5), codebooks.dynamic())


@pytest.mark.parametrize("blocksize", [0, 16, 48, 8192])
def test_another_blocksize_is_refused(blocksize: int) -> None:
    with pytest.raises(ValueError, match=f"blocksize {blocksize}: expected one of 32, 64"):
        quantize_4bit(torch.ones(64), blocksize=blocksize)


def test_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="kind 'int4': expected nf4 or fp4"):
        quantize_4bit(torch.ones(64), "int4")  # type: ignore[arg-type]


STRIDED = {
    "transposed": draw(300, 700).T,
    "every other": draw(5000)[::2],
    "columns": draw(500, 700)[:, 3:500],
    "swapped": draw(7, 30, 1000).permute(1, 2, 0),
    "few long rows": draw(300_000, 2).T,
    "one long row": draw(1, 3, 50_000).transpose(1, 2),
    "expanded": draw(1, 33).expand(40, 33),
    "empty": torch.empty(3, 0).T,
    "scalar": torch.tensor(-3.0),
}


@pytest.mark.parametrize("name", STRIDED)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_strides_and_shapes_do_not_matter(tier: str, name: str, dtype: torch.dtype) -> None:
    x = STRIDED[name].to(dtype)
    for double in (False, True):
        packed = quantize_4bit(x, double=double)
        dense = quantize_4bit(x.contiguous().float(), double=double)
        assert packed.shape == x.shape
        assert packed.dtype == dtype
        assert torch.equal(packed.codes, dense.codes)
        assert torch.equal(packed.scales(), dense.scales())
        assert dequantize_4bit(packed).dtype == dtype
        assert dequantize_4bit(packed).shape == x.shape
    codes, absmax = quantize_8bit(x, codebooks.dynamic())
    assert codes.shape == x.shape
    assert len(absmax) == -(-x.numel() // 256)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", [(9, 7), (9, 64), (9, 33, 5), (40, 1201)], ids=str)
def test_a_range_of_rows_is_what_the_whole_has_there(tier: str, shape: tuple[int, ...], double: bool) -> None:
    packed = quantize_4bit(draw(*shape), blocksize=32, double=double)
    whole = dequantize_4bit(packed)
    for rows in (slice(0, 1), slice(1, 2), slice(3, 8), slice(None, 5), slice(-2, None), slice(0, 99), slice(4, 4)):
        assert torch.equal(dequantize_4bit(packed, rows=rows), whole[rows])
        for dtype in DTYPES[1:]:
            assert torch.equal(dequantize_4bit(packed, rows=rows, dtype=dtype), whole[rows].to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("columns", [77, 128])
def test_a_buffer_is_filled_and_nothing_beside_it(tier: str, columns: int, offset: int, dtype: torch.dtype) -> None:
    packed, n = quantize_4bit(draw(5, columns)), 5 * columns
    room = torch.full((n + 10,), 123.0, dtype=dtype)
    out = room[offset : offset + n].view(5, columns)
    assert dequantize_4bit(packed, out=out) is out
    assert torch.equal(out, by_formula(packed, dtype))
    assert room[offset + n :].eq(123).all()
    assert room[:offset].eq(123).all()
    some = room[: 2 * columns].view(2, columns)
    assert torch.equal(dequantize_4bit(packed, out=some, rows=slice(1, 3)), by_formula(packed, dtype)[1:3])


@pytest.mark.usefixtures("two_threads")
def test_threads_change_no_bit(tier: str) -> None:
    x = draw(40, 70_001)
    two = quantize_4bit(x, double=True)
    values = dequantize_4bit(two)
    torch.set_num_threads(1)
    one = quantize_4bit(x, double=True)
    assert one.nested is not None
    assert two.nested is not None
    assert torch.equal(one.codes, two.codes)
    assert torch.equal(one.nested.codes, two.nested.codes)
    assert torch.equal(one.nested.offset, two.nested.offset)
    assert torch.equal(dequantize_4bit(one), values)


def test_a_weight_takes_the_bits_that_the_paper_counts() -> None:
    x = draw(64 * 256, 8)
    assert quantize_4bit(x).nbytes * 8 / x.numel() == 4.5
    nested = quantize_4bit(x, double=True).nbytes - 4  # the offset
    assert nested * 8 / x.numel() == pytest.approx(4.127, abs=5e-4)


def test_double_quantised_scales_are_map_times_scale_plus_offset(tier: str) -> None:
    packed = quantize_4bit(draw(1000, 77), double=True)
    nested = packed.nested
    assert nested is not None
    scaled, absmax = by_blocks(by_blocks(draw(1000, 77), 64)[1] - nested.offset, 256)
    midpoints = (codebooks.dynamic()[1:] + codebooks.dynamic()[:-1]) / 2
    assert torch.equal(nested.codes.int(), torch.bucketize(scaled, midpoints, out_int32=True))
    assert torch.equal(nested.absmax, absmax)
    # Two roundings, not one of a fused multiply-add.
    product = codebooks.dynamic()[nested.codes.long()] * absmax.repeat_interleave(256)[: len(nested.codes)]
    assert torch.equal(packed.scales(), product + nested.offset)
    assert torch.equal(dequantize_4bit(packed), by_formula(packed, torch.float32))


MAPS = {
    "signed": codebooks.dynamic(),
    "unsigned": codebooks.dynamic(signed=False),
    "linear": codebooks.linear(),
    "quantiles": codebooks.quantile(draw(5000)),
    "crowded": torch.cat([torch.full((100,), -1.0), torch.linspace(0.5, 0.5001, 155), torch.ones(1)]),
}


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=ANY_SIZE, name=st.sampled_from(sorted(MAPS)), blocksize=st.sampled_from([32, 100, 256, 2048]),
    dtype=st.sampled_from(DTYPES), power=st.integers(1, 5), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_eight_bit_codes_are_what_bucketize_finds(
    tier: str, n: int, name: str, blocksize: int, dtype: torch.dtype, power: int, seed: int
) -> None:
    code, x = MAPS[name], (draw(n, seed=seed) ** power).to(dtype)
    codes, absmax = quantize_8bit(x, code, blocksize=blocksize)
    scaled, expected = by_blocks(x, blocksize)
    midpoints = (code[1:] + code[:-1]) / 2
    assert torch.equal(codes.int(), torch.bucketize(scaled, midpoints, out_int32=True))
    assert torch.equal(absmax, expected)
    values = code[codes.long()] * absmax.repeat_interleave(blocksize)[:n]
    for wanted in DTYPES:
        found = dequantize_8bit(codes, absmax, code, blocksize=blocksize, dtype=wanted)
        assert torch.equal(found, values.to(wanted))


@pytest.mark.parametrize("name", ["signed", "unsigned", "linear", "quantiles"])
def test_a_zero_stays_exactly_zero(tier: str, name: str) -> None:
    x = draw(3000).abs()
    x[::3] = 0
    codes, absmax = quantize_8bit(x, MAPS[name])
    assert dequantize_8bit(codes, absmax, MAPS[name])[::3].eq(0).all()


def test_eight_bit_values_go_where_they_shall(tier: str) -> None:
    codes, absmax = quantize_8bit(draw(20, 30), codebooks.dynamic())
    out = torch.empty(20, 30, dtype=torch.bfloat16)
    assert dequantize_8bit(codes, absmax, codebooks.dynamic(), dtype=torch.bfloat16, out=out) is out
    assert torch.equal(out, dequantize_8bit(codes, absmax, codebooks.dynamic()).bfloat16())


class Largest(TorchDispatchMode):
    """Watches how large a tensor any operation makes."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [t for t in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(t, Tensor)]
        given = [t for t in (*args, *(kwargs or {}).values()) if isinstance(t, Tensor)]
        known = {t.untyped_storage().data_ptr() for t in given}
        fresh = [t.untyped_storage().nbytes() for t in made if t.untyped_storage().data_ptr() not in known]
        Largest.nbytes = max([Largest.nbytes, *fresh])
        return result


@pytest.mark.parametrize("x", [draw(1500, 2000).T, draw(2000, 1500, dtype=torch.float16)], ids=["strided", "half"])
def test_no_copy_of_the_whole_is_made(tier: str, x: Tensor) -> None:
    Largest.nbytes = 0
    out = torch.empty(x.shape, dtype=x.dtype)
    with Largest():
        packed = quantize_4bit(x, double=True)
        dequantize_4bit(packed, out=out)
    assert packed.codes.nbytes == 1_500_000  # the largest of all that stays
    assert Largest.nbytes <= 1_500_000


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocksize", [32, 64, 1024, 4096])
def test_bytes_are_those_of_bitsandbytes(tier: str, blocksize: int, dtype: torch.dtype) -> None:
    peer = pytest.importorskip("bitsandbytes.functional")
    x = draw(96, 514, dtype=dtype)
    codes, state = peer.quantize_4bit(x, quant_type="nf4", blocksize=blocksize)
    packed = quantize_4bit(x, blocksize=blocksize)
    assert torch.equal(packed.codes, codes.view(-1))
    assert torch.equal(packed.scales()[:-1], state.absmax[:-1])
    assert packed.scales()[-1] == state.absmax[-1]
    if blocksize < 2048:  # beyond, it compiles a slow path of its own
        assert torch.equal(dequantize_4bit(packed), peer.dequantize_4bit(codes, state))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bitsandbytes_reads_what_was_double_quantised_here(tier: str, kind: Kind4, dtype: torch.dtype) -> None:
    peer = pytest.importorskip("bitsandbytes.functional")
    packed = quantize_4bit(draw(320, 512, dtype=dtype), kind, double=True)
    nested = packed.nested
    assert nested is not None
    state = peer.QuantState(
        absmax=nested.codes, shape=torch.Size(packed.shape), dtype=dtype, blocksize=64, quant_type=kind,
        code=codebooks.four_bit(kind), offset=nested.offset,
        state2=peer.QuantState(absmax=nested.absmax, blocksize=256, code=codebooks.dynamic(), dtype=torch.float32),
    )  # fmt: skip
    assert torch.equal(dequantize_4bit(packed), peer.dequantize_4bit(packed.codes.view(-1, 1), state))
