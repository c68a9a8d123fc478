"""Packed embedding tables: rows as the dense table of the codes has them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from packed import values
from reference.norms import distance
from truetune.errors import QuantizationError
from truetune.ops import int8
from truetune.ops.blockwise_4bit import dequantize_4bit, quantize_4bit
from truetune.quant.embedding import Embedding4bit, Embedding8bit, QuantEmbedding

KINDS: dict[str, Callable[[nn.Embedding], QuantEmbedding]] = {
    "nf4": Embedding4bit.from_base,
    "fp4": lambda base: Embedding4bit.from_base(base, kind="fp4", blocksize=32),
    "int8": Embedding8bit.from_base,
}


def table(dtype: torch.dtype = torch.float32) -> nn.Embedding:
    base = nn.Embedding(30, 64, dtype=dtype)
    with torch.no_grad():
        base.weight.copy_(values(30, 64))
        base.weight[4] = 0
    return base


def dense(kind: str, weight: Tensor) -> Tensor:
    if kind == "int8":
        return int8.dequantize_rows(*int8.quantize_rows(weight), dtype=weight.dtype)
    return dequantize_4bit(
        quantize_4bit(weight, "nf4" if kind == "nf4" else "fp4", blocksize=64 if kind == "nf4" else 32)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_the_dense_table(kind: str, dtype: torch.dtype) -> None:
    base = table(dtype)
    packed, whole = KINDS[kind](base), dense(kind, base.weight.detach())
    for ids in (torch.tensor([[3, 0, 29], [3, 4, 4]]), torch.tensor(7), torch.zeros(2, 0, dtype=torch.int64)):
        rows = packed(ids)
        assert rows.dtype == dtype
        assert torch.equal(rows, whole[ids])
    assert distance(whole, base.weight.detach()) < (0.02 if kind == "int8" else 0.3)
    assert not any(p.requires_grad for p in packed.parameters())
    held = sum(t.nbytes for t in packed.state_dict().values())
    assert held < (1.1 if kind == "int8" else 0.7) * whole.numel()


@pytest.mark.parametrize("kind", KINDS)
def test_casting_changes_the_rows_dtype_and_no_scale(kind: str) -> None:
    packed, ids = KINDS[kind](table()), torch.arange(30)
    before, exact = {k: t.clone() for k, t in packed.state_dict().items()}, packed(ids)
    assert torch.equal(packed.to(torch.bfloat16)(ids), exact.bfloat16())
    assert torch.equal(packed.half().float()(ids), exact)
    after = packed.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], t) and after[k].dtype == t.dtype for k, t in before.items())


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_and_copies(kind: str) -> None:
    packed, ids = KINDS[kind](table()), torch.arange(30)
    other = copy.deepcopy(packed)
    for tensor in other.state_dict().values():
        tensor.zero_()
    assert not torch.equal(other(ids), packed(ids))
    other.load_state_dict(packed.state_dict())
    assert torch.equal(other(ids), packed(ids))


def test_refusals() -> None:
    with pytest.raises(QuantizationError, match=r"width 48 in blocks of 64(.|\n)*Embedding8bit"):
        Embedding4bit.from_base(nn.Embedding(5, 48))
    with pytest.raises(QuantizationError, match="more than look up rows"):
        Embedding8bit.from_base(nn.Embedding(5, 64, max_norm=1.0))
    bad = table()
    bad.weight.data[1, 2] = float("nan")
    for make in KINDS.values():
        with pytest.raises(QuantizationError):
            make(bad)
