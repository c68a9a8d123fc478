"""Attention over packed segments against loops and masks in float64."""

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from reference.attention import slow_attention
from reference.closeness import assert_no_worse
from truetune.ops import buffers, dispatch
from truetune.ops.attention import rotary_segment_attention, segment_attention, turned

LENGTHS = [5, 1, 9, 3]
KINDS = [{}, {"window": 4}, {"window": 1}, {"softcap": 2.0}, {"window": 3, "softcap": 2.0}, {"window": 100}]
DTYPES = [torch.float32, torch.bfloat16]
ODD_LENGTHS = (1, 2, 17, 63, 64, 65, 129, 300)  # around the sizes of vectors, tiles and tasks


@dataclass(frozen=True)
class Case:
    """One shape of attention; ``rotary`` is how many dimensions are turned."""

    heads: int
    kv_heads: int
    dim: int
    rotary: int = 0
    lengths: tuple[int, ...] = ODD_LENGTHS
    kind: dict[str, Any] = field(default_factory=dict, hash=False)

    def tensors(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """q, k, v as slices of one fused projection; the gradient of the output."""
        draw = torch.Generator().manual_seed(self.dim)
        sizes = [self.heads * self.dim, self.kv_heads * self.dim, self.kv_heads * self.dim]
        fused = torch.randn(sum(self.lengths), sum(sizes), generator=draw).to(dtype)
        dout = torch.randn(sum(self.lengths), self.heads, self.dim, generator=draw).to(dtype)
        return *(t.unflatten(1, (-1, self.dim)) for t in fused.split(sizes, dim=1)), dout  # type: ignore[no-untyped-call]

    def angles(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """cos and sin as transformers makes them, positions starting anew in each segment."""
        if not self.rotary:
            return {}
        positions = torch.cat([torch.arange(length) for length in self.lengths])
        angles = positions[:, None] * 10000.0 ** -(torch.arange(0, self.rotary, 2) / self.rotary)
        return {"cos": angles.cos().repeat(1, 2).to(dtype), "sin": angles.sin().repeat(1, 2).to(dtype)}


CASES = [
    Case(3, 3, 16),
    Case(9, 3, 64, 64),
    Case(4, 1, 80, 40, kind={"scale": 0.3}),
    Case(4, 1, 100, 100, kind={"window": 7}),
    Case(3, 1, 64, 64, kind={"window": 64, "softcap": 3.0}),
    Case(2, 1, 64, 32, kind={"window": 100}),
    Case(2, 2, 33, 2, kind={"window": 290}),
    Case(2, 1, 128, 128, lengths=(70, 130), kind={"softcap": 20.0}),
    Case(1, 1, 256, 0, lengths=(40,)),
    Case(4, 2, 1, 0, lengths=(33, 2)),
]


def heads(query: int, shared: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    total = sum(LENGTHS)
    return tuple(torch.randn(1, n, total, 8, generator=draw).to(dtype) for n in (query, shared, shared))  # type: ignore[return-value]


def masked_attention(case: Case, q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """[n, heads, d] by one big mask, everything in the dtype of ``q``."""
    if cos is not None and sin is not None:
        q, k = (torch.cat([rotated(t[..., : case.rotary], cos, sin), t[..., case.rotary :]], -1) for t in (q, k))
    k, v = (t.repeat_interleave(case.heads // case.kv_heads, 1) for t in (k, v))
    segment = torch.arange(len(case.lengths)).repeat_interleave(torch.tensor(case.lengths))
    ago = torch.arange(len(q))[:, None] - torch.arange(len(q))
    seen = (segment[:, None] == segment) & (ago >= 0) & (ago < case.kind.get("window", len(q)))
    scores = torch.einsum("ihd,jhd->hij", q, k) * case.kind.get("scale", case.dim**-0.5)
    if cap := case.kind.get("softcap"):
        scores = cap * torch.tanh(scores / cap)
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-high, low], -1) * sin[:, None]


@cache
def expected(case: Case, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients by the mask, in ``dtype`` and in float64."""
    both = []
    for wide in (dtype, torch.float64):
        *leaves, dout = (t.to(wide).requires_grad_() for t in case.tensors(dtype))
        angles = {name: t.to(wide) for name, t in case.angles(dtype).items()}
        out = masked_attention(case, *leaves, angles.get("cos"), angles.get("sin"))
        both.append([out.detach(), *torch.autograd.grad(out, leaves, dout)])
    return both[0], both[1]


def found(case: Case, dtype: torch.dtype, scale_q: float = 1.0) -> list[Tensor]:
    """Output and gradients by what is tested."""
    q, k, v, dout = case.tensors(dtype)
    q, k, v = (t.detach().requires_grad_() for t in (q * scale_q if scale_q != 1 else q, k, v))
    out = rotary_segment_attention(q, k, v, case.lengths, **case.angles(dtype), **case.kind)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradients_are_no_worse_than_torch(tier: str, case: Case, dtype: torch.dtype) -> None:
    out, *grads = found(case, dtype)
    (plain_out, *plain_grads), (true_out, *true_grads) = expected(case, dtype)
    assert_no_worse(out, plain_out, true_out)
    for ours, plain, truth in zip(grads, plain_grads, true_grads, strict=True):
        # The weights are computed a second time, from a rounded sum: that may double the error, in torch's kernel too.
        assert_no_worse(ours, (2 * plain.double() - truth).to(dtype), truth)


@pytest.mark.parametrize("kind", range(len(KINDS)))
@pytest.mark.parametrize(("query", "shared"), [(4, 4), (4, 2), (3, 1)])
def test_every_kind_gives_the_loops_in_float64(tier: str, kind: int, query: int, shared: int) -> None:
    # float32 rounding of sums over at most 9 keys; one key too many or too few is off by 0.1 and more
    out = segment_attention(*heads(query, shared), LENGTHS, **KINDS[kind]).double()
    torch.testing.assert_close(out, by_loops(query, shared, kind), atol=1e-6, rtol=1e-5)


@cache
def by_loops(query: int, shared: int, kind: int) -> Tensor:
    return slow_attention(*heads(query, shared), LENGTHS, **KINDS[kind])


@pytest.mark.parametrize("kind", KINDS[:5], ids=str)
def test_the_gradient_is_the_derivative(kind: dict[str, Any]) -> None:
    leaves = [t[..., :6, :2].clone().requires_grad_() for t in heads(2, 1, torch.float64)]
    assert torch.autograd.gradcheck(lambda *qkv: segment_attention(*qkv, [5, 1], **kind), leaves)


def test_the_gradient_through_rotary_positions_is_the_derivative() -> None:
    case = Case(2, 1, 6, 4, lengths=(3, 1))
    leaves = [t.clone().requires_grad_() for t in case.tensors(torch.float64)[:3]]
    angles = case.angles(torch.float64)
    assert torch.autograd.gradcheck(lambda *qkv: rotary_segment_attention(*qkv, case.lengths, **angles), leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heads_first_and_tokens_first_are_the_same(tier: str, dtype: torch.dtype) -> None:
    case = Case(4, 2, 24, lengths=(40, 7))
    q, k, v, dout = case.tensors(dtype)
    leaves = [t.detach().transpose(0, 1)[None].clone().requires_grad_() for t in (q, k, v)]
    out = segment_attention(*leaves, case.lengths)
    grads = torch.autograd.grad(out, leaves, dout.transpose(0, 1)[None])
    for one, other in zip((out, *grads), found(case, dtype), strict=True):
        assert torch.equal(one[0].transpose(0, 1), other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_in_the_thousands_do_not_overflow(tier: str, dtype: torch.dtype) -> None:
    case = Case(2, 1, 64, lengths=(200, 65))
    out, *grads = found(case, dtype, scale_q=1000.0)
    q, k, v, _ = case.tensors(dtype)
    assert_no_worse(
        out, *(masked_attention(case, q.to(t) * 1000, k.to(t), v.to(t), None, None) for t in (dtype, torch.double))
    )
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [{}, {"window": 4, "softcap": 2.0}], ids=str)
def test_a_segment_does_not_see_another(tier: str, kind: dict[str, Any], dtype: torch.dtype) -> None:
    q, k, v = heads(4, 2, dtype)

    def run() -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        out = segment_attention(*leaves, LENGTHS, **kind)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]

    before = run()
    for t in (q, k, v):
        t[:, :, 6:15] = 1e3
    for one, other in zip(before, run(), strict=True):
        assert torch.equal(one[:, :, :6], other[:, :, :6])
        assert torch.equal(one[:, :, 15:], other[:, :, 15:])
    assert not torch.equal(before[0][:, :, 6:15], run()[0][:, :, 6:15])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_segment_gives_the_same_bits_alone(tier: str, dtype: torch.dtype) -> None:
    case = Case(6, 2, 64, 64)
    packed, start = found(case, dtype), 0
    *tensors, dout = case.tensors(dtype)
    for length in case.lengths:
        part = slice(start, start := start + length)
        leaves = [t[part].detach().requires_grad_() for t in tensors]
        angles = {name: t[part] for name, t in case.angles(dtype).items()}
        out = rotary_segment_attention(*leaves, [length], **angles)
        alone = [out, *torch.autograd.grad(out, leaves, dout[part])]
        assert all(torch.equal(one, other[part]) for one, other in zip(alone, packed, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [Case(9, 3, 64, 64), Case(4, 1, 40, kind={"window": 90})], ids=str)
def test_the_number_of_threads_changes_no_bit(
    tier: str, case: Case, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    if tier == "reference":
        pytest.skip("torch promises no such thing")
    one, again = found(case, dtype), found(case, dtype)
    request.getfixturevalue("two_threads")
    two = found(case, dtype)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_only_what_is_asked_for_gets_a_gradient(tier: str) -> None:
    case = Case(4, 2, 16, 16, lengths=(20, 3))
    wanted = found(case, torch.float32)
    *tensors, dout = case.tensors(torch.float32)
    for chosen in range(3):
        leaves = [t.detach().requires_grad_(i == chosen) for i, t in enumerate(tensors)]
        out = rotary_segment_attention(*leaves, case.lengths, **case.angles(torch.float32))
        out.backward(dout, retain_graph=True)
        out.backward(dout)  # a second time adds the same again
        grads = [leaf.grad for leaf in leaves]
        assert [grad is not None for grad in grads] == [i == chosen for i in range(3)]
        assert torch.equal(grads[chosen], 2 * wanted[1 + chosen])  # type: ignore[arg-type]


def test_without_gradients_the_output_is_the_same(tier: str) -> None:
    case = Case(4, 2, 16, 16, lengths=(20, 3))
    with torch.no_grad():
        q, k, v, _ = case.tensors(torch.bfloat16)
        out = rotary_segment_attention(q, k, v, case.lengths, **case.angles(torch.bfloat16))
    assert not out.requires_grad
    assert torch.equal(out, found(case, torch.bfloat16)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_nan_is_not_hidden(tier: str, which: int, dtype: torch.dtype) -> None:
    case = Case(2, 1, 32, lengths=(50, 40))
    tensors = [t.clone() for t in case.tensors(dtype)[:3]]
    tensors[which][20, 0, 5] = float("nan")
    out = rotary_segment_attention(*tensors, case.lengths)
    assert out[20, 0].isnan().any()
    assert out[50:].isfinite().all()


@pytest.mark.parametrize("angle_dtype", DTYPES, ids=str)
def test_angles_may_be_of_another_dtype(tier: str, angle_dtype: torch.dtype) -> None:
    case = Case(2, 1, 32, 32, lengths=(70,))
    q, k, v, _ = case.tensors(torch.bfloat16)
    angles = case.angles(angle_dtype)
    ready = [turned(t.float(), **angles) for t in (q, k)]
    truth = rotary_segment_attention(ready[0].double(), ready[1].double(), v.double(), case.lengths)
    out = rotary_segment_attention(q, k, v, case.lengths, **angles)
    # bf16 has 8 bits; angles that were missing, or taken from another token, are off by 0.5
    torch.testing.assert_close(out.double(), truth, atol=2e-2, rtol=2e-2)


def test_a_head_wider_than_the_kernel_takes_is_left_to_torch(tier: str) -> None:
    case = Case(2, 1, 300, lengths=(9, 4))
    assert_no_worse(found(case, torch.float32)[0], *(both[0] for both in expected(case, torch.float32)))


@pytest.mark.parametrize("lengths", [[9, 3], [12, 7], [20, -2]])
def test_lengths_that_do_not_add_up_are_refused(tier: str, lengths: list[int]) -> None:
    q, k, v = heads(4, 2)
    with pytest.raises(ValueError, match="18"):
        segment_attention(q, k, v, lengths)


@pytest.mark.parametrize("shape", [(18, 9), (1, 8), (18, 10), (8,)], ids=str)
def test_angles_that_do_not_fit_are_refused(tier: str, shape: tuple[int, ...]) -> None:
    q, k, v = (t[0].transpose(0, 1) for t in heads(4, 2))
    with pytest.raises(ValueError, match="cos and sin"):
        rotary_segment_attention(q, k, v, LENGTHS, cos=torch.ones(shape), sin=torch.ones(shape))
    with pytest.raises(ValueError, match="cos and sin"):
        rotary_segment_attention(q, k, v, LENGTHS, cos=torch.ones(18, 8))


@pytest.mark.parametrize("part", [(slice(None), slice(0, 17)), (slice(0, 3),)], ids=["tokens", "heads"])
def test_shapes_that_do_not_fit_reach_torch_which_refuses_them(tier: str, part: tuple[slice, ...]) -> None:
    q, k, v = heads(4, 4)
    with pytest.raises(RuntimeError):
        segment_attention(q, k[0][part][None], v[0][part][None], LENGTHS)


def test_values_may_be_of_another_width(tier: str) -> None:
    q, k, v = heads(4, 2)
    out = segment_attention(q, k, v[..., :3], LENGTHS)
    torch.testing.assert_close(out, segment_attention(q, k, v, LENGTHS)[..., :3], atol=1e-6, rtol=1e-5)


def test_no_window_and_no_cap_may_be_written_as_zero(tier: str) -> None:
    q, k, v = heads(4, 2)
    assert torch.equal(segment_attention(q, k, v, LENGTHS, window=0, softcap=0.0), segment_attention(q, k, v, LENGTHS))


def test_the_kernels_output_lies_in_a_block_that_a_projection_may_have_next(tiers: list[str]) -> None:
    case = CASES[1]
    for native in tiers[1:]:
        buffers.release()
        with dispatch.forced(native):
            out = found(case, torch.float32)[0]
        place, shape = out.data_ptr(), (len(out), case.heads * case.dim)
        del out
        blocks = [buffers.empty(*shape, torch.float32, torch.device("cpu")) for _ in range(2)]  # of the output, of dq
        assert place in {block.data_ptr() for block in blocks}


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_dropout_scales_what_it_keeps(softcap: float | None) -> None:
    q, k, v = heads(4, 4)
    v = torch.ones_like(v)  # every row of weights sums to one, so every output is the kept share over 1 - p
    torch.manual_seed(0)
    runs = [segment_attention(q, k, v, LENGTHS, dropout=0.5, softcap=softcap) for _ in range(400)]
    mean = torch.stack(runs).mean()
    assert abs(float(mean) - 1) < 0.02  # 400 x 72 rows of spread <= 1: four standard errors
    assert not torch.equal(runs[0], runs[1])


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_bfloat16_stays_bfloat16(tier: str, softcap: float | None) -> None:
    q, k, v = heads(4, 2, torch.bfloat16)
    out = segment_attention(q, k, v, LENGTHS, softcap=softcap)
    assert out.dtype == torch.bfloat16
    # bf16 has 8 bits: inputs are the same, so what is left is rounding of weights and sums
    torch.testing.assert_close(out.double(), slow_attention(q, k, v, LENGTHS, softcap=softcap), atol=2e-2, rtol=2e-2)
