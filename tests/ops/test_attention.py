"""Attention over packed segments against loops in float64."""

import pytest
import torch
from torch import Tensor

from reference.attention import slow_attention
from truetune.ops.attention import segment_attention

LENGTHS = [5, 1, 9, 3]
KINDS = [{}, {"window": 4}, {"window": 1}, {"softcap": 2.0}, {"window": 3, "softcap": 2.0}, {"window": 100}]


def heads(query: int, shared: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    total = sum(LENGTHS)
    return tuple(torch.randn(1, n, total, 8, generator=draw).to(dtype) for n in (query, shared, shared))  # type: ignore[return-value]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("query", "shared"), [(4, 4), (4, 2), (3, 1)])
def test_every_kind_gives_the_loops_in_float64(kind: dict[str, float], query: int, shared: int) -> None:
    q, k, v = heads(query, shared)
    # float32 rounding of sums over at most 9 keys; one key too many or too few is off by 0.1 and more
    found = segment_attention(q, k, v, LENGTHS, **kind).double()  # type: ignore[arg-type]
    truth = slow_attention(q, k, v, LENGTHS, **kind)  # type: ignore[arg-type]
    torch.testing.assert_close(found, truth, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS[:5], ids=str)
def test_the_gradient_is_the_derivative(kind: dict[str, float]) -> None:
    q, k, v = (t.requires_grad_() for t in heads(2, 1, torch.float64))
    assert torch.autograd.gradcheck(lambda *qkv: segment_attention(*qkv, LENGTHS, **kind), (q, k, v))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_segment_does_not_see_another(kind: dict[str, float]) -> None:
    q, k, v = heads(4, 2)
    before = segment_attention(q, k, v, LENGTHS, **kind)  # type: ignore[arg-type]
    for t in (q, k, v):
        t[:, :, 6:15] = 1e3
    after = segment_attention(q, k, v, LENGTHS, **kind)  # type: ignore[arg-type]
    assert torch.equal(before[:, :, :6], after[:, :, :6])
    assert torch.equal(before[:, :, 15:], after[:, :, 15:])
    assert not torch.equal(before[:, :, 6:15], after[:, :, 6:15])


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
def test_bfloat16_stays_bfloat16(softcap: float | None) -> None:
    q, k, v = heads(4, 2, torch.bfloat16)
    out = segment_attention(q, k, v, LENGTHS, softcap=softcap)
    assert out.dtype == torch.bfloat16
    # bf16 has 8 bits: inputs are the same, so what is left is rounding of weights and sums
    torch.testing.assert_close(out.double(), slow_attention(q, k, v, LENGTHS, softcap=softcap), atol=2e-2, rtol=2e-2)
