"""Optimizer steps on states of 8 and 32 bits: the same bits in every tier, and the nearest codes."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from truetune.ops import blockwise_8bit, codebooks, dispatch
from truetune.ops.moment_codes import encode_, moment_map, nearest_entries
from truetune.ops.optim8bit import Moment, square_sums, step
from truetune.ops.update_rule import SIGNED, Rule

CPU = torch.device("cpu")
RULES = {
    "adam": Rule("adam", 1e-3, 0.9, 0.1, 0.999, 0.001, eps=1e-8, decay=0.9999),
    "ademamix": Rule("ademamix", 1e-3, 0.9, 0.1, 0.999, 0.001, 0.9999, 0.0001, mix=5.0, eps=1e-8, decay=0.9999),
    "momentum": Rule("momentum", 1e-3, 0.9, l2=0.013, scale=0.7),
    "lion": Rule("lion", 1e-4, 0.9, 0.1, 0.99, 0.01, decay=0.999, scale=0.7),
    "rms": Rule("rms", 1e-3, keep2=0.99, add2=0.01, eps=1e-8, l2=0.013),
}
SIZES = (1, 5, 255, 256, 257, 70_001)  # within a vector, around a block, over several tasks and chunks


def made(n: int, kind: str, bits: int, dtype: torch.dtype, blocksize: int) -> tuple[Tensor, list[Moment]]:
    """A parameter and its moments before the first step."""
    draw = torch.Generator().manual_seed(n)
    p = torch.randn(n, generator=draw).to(dtype)
    signs = SIGNED[RULES[kind].kind]
    if bits == 32:
        return p, [Moment(torch.zeros(n), None, signed) for signed in signs]
    blocks = -(-n // blocksize)
    return p, [Moment(torch.zeros(n, dtype=torch.uint8), torch.zeros(blocks), signed) for signed in signs]


def gradients(n: int, steps: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Of magnitudes from 1e-9 to 1e-1, each element at another one; some are zero."""
    draw = torch.Generator().manual_seed(n + 1)
    size = 10 ** (torch.rand(n, generator=draw) * 8 - 9)
    found = [torch.randn(n, generator=draw) * size for _ in range(steps)]
    for g in found:
        g[::7] = 0.0
    return [g.to(dtype) for g in found]


def stepped(kind: str, bits: int, n: int, found: list[Tensor], **given: object) -> list[Tensor]:
    """Parameter and state after some steps."""
    dtype, blocksize = given.get("dtype", torch.float32), given.get("blocksize", 256)
    assert isinstance(dtype, torch.dtype)
    assert isinstance(blocksize, int)
    p, moments = made(n, kind, bits, dtype, blocksize)
    for g in found:
        step(RULES[kind], p, g, moments, blocksize=blocksize)
    return [p, *(m.values for m in moments), *(m.absmax for m in moments if m.absmax is not None)]


def in_reference(kind: str, bits: int, n: int, found: list[Tensor], **given: object) -> list[Tensor]:
    with dispatch.forced("reference"):
        return stepped(kind, bits, n, found, **given)


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("kind", RULES)
def test_every_tier_leaves_the_same_bits(tier: str, kind: str, bits: int, dtype: torch.dtype) -> None:
    for n in SIZES:
        found = gradients(n, 3, dtype)
        assert same(stepped(kind, bits, n, found, dtype=dtype), in_reference(kind, bits, n, found, dtype=dtype))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 1500), st.sampled_from((64, 256, 1024, 4096)), st.sampled_from(sorted(RULES)))
def test_ragged_sizes_and_all_blocksizes_too(n: int, blocksize: int, kind: str) -> None:
    found = gradients(n, 2)
    ours = stepped(kind, 8, n, found, blocksize=blocksize)
    assert same(ours, in_reference(kind, 8, n, found, blocksize=blocksize))


@pytest.mark.parametrize("kind", RULES)
def test_gradients_of_another_type_are_widened(tier: str, kind: str) -> None:
    found = gradients(700, 2, torch.bfloat16)
    assert same(stepped(kind, 8, 700, found), stepped(kind, 8, 700, [g.float() for g in found]))


@pytest.mark.usefixtures("two_threads")
def test_threads_change_no_bit(tier: str) -> None:
    found = gradients(150_000, 2)
    two = stepped("adam", 8, 150_000, found)
    torch.set_num_threads(1)
    assert same(stepped("adam", 8, 150_000, found), two)


@pytest.mark.parametrize("kind", RULES)
def test_the_parameter_uses_the_moments_before_they_are_rounded(tier: str, kind: str) -> None:
    """So a first step, from zeros, is that of 32 bits; a later one starts from codes, and differs."""
    (first,) = gradients(1000, 1)
    eight, wide = stepped(kind, 8, 1000, [first]), stepped(kind, 32, 1000, [first])
    assert torch.equal(eight[0], wide[0])
    again = [first, first.flip(0)]
    assert not torch.equal(stepped(kind, 8, 1000, again)[0], stepped(kind, 32, 1000, again)[0])


@pytest.mark.parametrize("kind", RULES)
def test_codes_are_the_nearest(tier: str, kind: str) -> None:
    n, signs = 1111, SIGNED[RULES[kind].kind]
    eight, wide = stepped(kind, 8, n, gradients(n, 1)), stepped(kind, 32, n, gradients(n, 1))
    for index, signed in enumerate(signs, 1):
        codes, absmax = blockwise_8bit.quantize_8bit(wide[index], codebooks.dynamic(signed=signed))
        assert torch.equal(eight[index], codes)
        assert torch.equal(eight[index + len(signs)], absmax)


@pytest.mark.parametrize("signed", [True, False])
def test_one_lookup_finds_what_counting_thresholds_does(signed: bool) -> None:
    values = codebooks.dynamic(signed=signed)
    middles = (values[:-1] + values[1:]) / 2
    around = [torch.nextafter(middles, torch.tensor(side)) for side in (-9.0, 9.0)]
    draw = torch.Generator().manual_seed(0)
    spread = torch.randn(20_000, generator=draw) * 10 ** (-7 * torch.rand(20_000, generator=draw))
    x = torch.cat([values, middles, *around, spread.clamp(-1, 1), torch.tensor([0.0, -0.0, 1e-40, -1e-40])])
    x = x if signed else x.abs()
    padded = torch.cat([x, x.new_ones(-len(x) % 64)]).view(-1, 64)
    padded[:, 0] = 1.0  # every block's scale is 1
    codes, absmax = torch.empty(padded.numel(), dtype=torch.uint8), torch.empty(len(padded))
    encode_(codes, absmax, padded.view(-1), signed=signed, blocksize=64)
    assert torch.equal(absmax, torch.ones(len(padded)))
    assert torch.equal(codes.long(), torch.bucketize(padded.view(-1), middles))


@pytest.mark.parametrize("signed", [True, False])
def test_the_table_serves_every_float_between_the_ends(signed: bool) -> None:
    """Both ends of what each entry is for, where the float is one between -1 and 1."""
    values = codebooks.dynamic(signed=signed)
    upper = torch.arange(1 << 16) << 16
    ends = torch.cat([upper, upper | 0xFFFF]).to(torch.int32)
    x = ends.view(torch.float32)
    inside = (x.abs() <= 1) if signed else (x <= 1) & (ends >= 0)
    y = (ends ^ (ends >> 31)).long()
    found = (nearest_entries(signed, CPU).long().repeat(2) + y) >> 16
    assert torch.equal(found[inside], torch.bucketize(x[inside], (values[:-1] + values[1:]) / 2))
    assert found[inside].unique().tolist() == list(range(256))


@pytest.mark.parametrize("kind", RULES)
def test_zero_stays_exactly_zero(tier: str, kind: str) -> None:
    """Beside elements that move, in the same block; and in a block of nothing else."""
    n = 600
    draw = torch.Generator().manual_seed(0)
    found = [torch.randn(n, generator=draw) for _ in range(4)]
    still = (torch.arange(n) % 3 == 0) | (torch.arange(n) >= 512)
    for g in found:
        g[still] = 0.0
    p, moments = made(n, kind, 8, torch.float32, 256)
    before = p.clone()
    for g in found:
        step(replace(RULES[kind], decay=1.0, l2=0.0), p, g, moments)
    assert torch.equal(p[still], before[still])
    assert (p != before)[~still].float().mean() > 0.5  # of Lion, two steps there and two back cancel
    for moment in moments:
        assert (moment.values[still] == (127 if moment.signed else 0)).all()
        assert moment_map(moment.signed, CPU)[127 if moment.signed else 0] == 0


def test_no_sign_turns(tier: str) -> None:
    """What is too small for a code becomes zero, on both sides of it."""
    n = 4096
    g = torch.linspace(-3e-6, 3e-6, n)
    g[0] = 1.0
    p, (moment,) = made(n, "momentum", 8, torch.float32, n)
    step(replace(RULES["momentum"], scale=1.0, l2=0.0), p, g, [moment], blocksize=n)
    kept = moment_map(True, CPU)[moment.values.long()].sign()
    assert ((kept == g.sign()) | (kept == 0)).all()
    assert (kept == 0).sum() == (g.abs() <= moment_map(True, CPU)[128] / 2).sum() > 100


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_where_a_gradient_is_not_finite_the_element_starts_anew(tier: str, kind: str, bits: int, bad: float) -> None:
    """To all others it is as if that gradient had been zero, and the element forgets what it was."""
    n, hit = 700, torch.tensor([0, 17, 256, 511, 699])
    one, two = gradients(n, 2)
    p, moments = made(n, kind, bits, torch.float32, 256)
    step(RULES[kind], p, one, moments)
    before = p.clone()
    two[hit] = bad
    step(RULES[kind], p, two, moments)
    assert torch.equal(p[hit], before[hit])
    assert p.isfinite().all()
    for moment in moments:
        if moment.absmax is None:
            assert (moment.values[hit] == 0).all()
        else:
            assert (moment.values[hit] == (127 if moment.signed else 0)).all()
            assert moment.absmax.isfinite().all()
    assert (p != before).sum() > n / 2


@pytest.mark.parametrize("kind", ["adam", "ademamix", "rms"])
def test_a_square_that_overflows_spoils_no_block(tier: str, kind: str) -> None:
    (g,) = gradients(300, 1)
    g[40] = 3e22
    p, moments = made(300, kind, 8, torch.float32, 256)
    before = p.clone()
    step(RULES[kind], p, g, moments)
    assert p[40] == before[40]
    assert all(m.absmax is not None and m.absmax.isfinite().all() and m.absmax[0] < 1 for m in moments)
    assert same([p], in_reference(kind, 8, 300, [g])[:1])


@pytest.mark.parametrize("scale", [1e-19, 1e-22])
def test_squares_below_the_normal_floats_are_kept(tier: str, scale: float) -> None:
    """Whether a block's largest value is 1e-41 or 0 must not make its scale infinite."""
    g = gradients(512, 1)[0] * scale
    found = stepped("adam", 8, 512, [g])
    assert all(t.isfinite().all() for t in found)
    assert same(found, in_reference("adam", 8, 512, [g]))


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("kind", RULES)
def test_square_sums_are_those_of_the_step_and_change_nothing(tier: str, kind: str, bits: int) -> None:
    n, rule = 70_001, replace(RULES[kind], decay=1.0)
    one, two = gradients(n, 2)
    p, moments = made(n, kind, bits, torch.float32, 256)
    step(rule, p, one, moments)
    kept = [t.clone() for m in moments for t in (m.values, m.absmax) if t is not None]
    before = p.clone()
    found = square_sums(rule, p, two, moments)
    assert torch.equal(p, before)
    assert same(kept, [t for m in moments for t in (m.values, m.absmax) if t is not None])
    p.zero_()  # so that the step can be read off without rounding; only L2 decay looks at the parameter
    step(replace(rule, size=-1.0, l2=0.0), p, two + before * rule.l2 / rule.scale, moments)
    assert found[0] == pytest.approx(float(p.double().square().sum()), rel=1e-4)
    assert found[1] == pytest.approx(float(before.double().square().sum()), rel=1e-5)


def test_what_is_not_finite_counts_nothing_in_the_sums(tier: str) -> None:
    p, moments = made(300, "adam", 8, torch.float32, 256)
    (g,) = gradients(300, 1)
    g[:5] = 0.0
    clean = square_sums(RULES["adam"], p, g, moments)
    g[:5] = float("nan")
    assert square_sums(RULES["adam"], p, g, moments) == clean


def test_half_precision_is_stepped_in_float32() -> None:
    found = gradients(700, 1)
    p, moments = made(700, "adam", 8, torch.float16, 256)
    wide = p.float()
    step(RULES["adam"], p, found[0].half(), moments)
    step(RULES["adam"], wide, found[0].half(), made(700, "adam", 8, torch.float32, 256)[1])
    assert torch.equal(p, wide.half())


def test_autograd_sees_that_the_parameter_changed(tier: str) -> None:
    p, moments = made(10, "adam", 32, torch.float32, 256)
    leaf = p.clone().requires_grad_()
    loss = (leaf * leaf).sum()
    step(RULES["adam"], leaf.detach(), torch.ones(10), moments)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # type: ignore[no-untyped-call]


def test_nothing_is_a_step_too(tier: str) -> None:
    assert all(t.numel() == 0 for t in stepped("adam", 8, 0, [torch.empty(0)]))
