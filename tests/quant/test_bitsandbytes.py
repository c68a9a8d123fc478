"""Layers of bitsandbytes and ours, from the same tensors: equal codes, and each reads what the other wrote.

Widths are multiples of the block: its CPU kernels of 0.50 give other values where a row is no whole number of blocks.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from packed import KINDS, linear, values
from reference.norms import distance
from truetune.ops.blockwise_4bit import dequantize_4bit
from truetune.quant import bnb_state
from truetune.quant.linear8bit import Linear8bit
from truetune.quant.replace import quantised

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning"),
]
FOUR = [kind for kind in KINDS if kind != "int8"]


@pytest.fixture
def bnb() -> Any:
    return pytest.importorskip("bitsandbytes")


def theirs4(bnb: Any, kind: str, dtype: torch.dtype = torch.float32) -> Any:
    recipe, base = KINDS[kind], linear(128, 40, dtype=dtype)
    layer = bnb.nn.Linear4bit(
        128, 40, compute_dtype=dtype, compress_statistics=recipe.double, quant_type=recipe.kind, device="cpu"
    )
    layer.weight = bnb.nn.Params4bit(
        base.weight.detach(), requires_grad=False, quant_type=recipe.kind, compress_statistics=recipe.double
    )
    layer.bias = base.bias
    return layer.to("cpu").train()


def _parts(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("weight"): tensor for name, tensor in state.items() if name.startswith("weight")}


def facts(state: dict[str, Tensor]) -> dict[str, Any]:
    (blob,) = (tensor for name, tensor in state.items() if "quant_state" in name)
    return json.loads(bytes(blob.tolist()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", FOUR)
def test_four_bit_tensors_have_its_names_types_and_bits(kind: str, dtype: torch.dtype, bnb: Any) -> None:
    theirs = theirs4(bnb, kind, dtype).state_dict()
    ours = quantised(linear(128, 40, dtype=dtype), KINDS[kind], "a", dtype=dtype).state_dict()
    assert ours.keys() == theirs.keys()
    assert {n: t.dtype for n, t in ours.items()} == {n: t.dtype for n, t in theirs.items()}
    same = {n for n in ours if "quant_state" not in n and torch.equal(ours[n], theirs[n])}
    assert {"bias", "weight.quant_map"} <= same
    # Its CPU kernels know one of FP4's zeros only, and other middles; a nested scale they round to 65,536 steps first.
    assert "weight" in same or kind == "fp4"
    assert "weight.absmax" in same or kind == "nf4-double"
    dense = [dequantize_4bit(bnb_state.packed4_of(_parts(state), "a")) for state in (ours, theirs)]
    assert distance(*dense) <= (0.0 if kind == "nf4" else 1e-4 if kind == "nf4-double" else 2e-2)
    written, expected = facts(ours), facts(theirs)
    assert written.pop("nested_offset", 0.0) == pytest.approx(expected.pop("nested_offset", 0.0), rel=1e-5)
    assert written == expected


@pytest.mark.parametrize("kind", FOUR)
def test_we_read_its_four_bit_layers(kind: str, bnb: Any) -> None:
    theirs = theirs4(bnb, kind)
    ours = quantised(torch.nn.Linear(128, 40, device="meta"), KINDS[kind], "a", dtype=torch.float32)
    ours.load_state_dict(theirs.state_dict())
    x, g = values(6, 128), values(6, 40, seed=1)
    x1, x2 = (x.clone().requires_grad_() for _ in range(2))
    y1, y2 = ours(x1), theirs(x2)
    assert torch.equal(ours.dense(), bnb.functional.dequantize_4bit(theirs.weight.data, theirs.weight.quant_state))
    assert distance(y1.detach(), y2.detach()) < 1e-6
    (dx1,), (dx2,) = torch.autograd.grad(y1, x1, g), torch.autograd.grad(y2, x2, g)
    assert distance(dx1, dx2) < 1e-6


@pytest.mark.parametrize("kind", FOUR)
def test_it_reads_our_four_bit_layers(kind: str, bnb: Any) -> None:
    ours = quantised(linear(128, 40), KINDS[kind], "a", dtype=torch.float32)
    state = ours.state_dict()
    stats = {name: tensor for name, tensor in state.items() if name.startswith("weight.")}
    weight = bnb.nn.Params4bit.from_prequantized(state["weight"], stats, device="cpu")
    assert torch.equal(bnb.functional.dequantize_4bit(weight.data, weight.quant_state), ours.dense())


def theirs8(bnb: Any, threshold: float) -> Any:
    layer = bnb.nn.Linear8bitLt(128, 40, has_fp16_weights=False, threshold=threshold, device="cpu")
    layer.load_state_dict(linear(128, 40).state_dict())
    return layer.to("cpu")


def test_eight_bit_tensors_have_its_names_types_and_bits(bnb: Any) -> None:
    theirs = theirs8(bnb, 6.0)
    state = theirs.state_dict()
    ours = quantised(linear(128, 40), KINDS["int8"], "a", dtype=torch.float32).state_dict()
    assert ours.keys() == state.keys()
    assert all(torch.equal(ours[name], tensor) and ours[name].dtype == tensor.dtype for name, tensor in state.items())


@pytest.mark.parametrize("threshold", [0.0, 3.0, 6.0])
def test_eight_bit_products_are_near_its_own(threshold: float, bnb: Any) -> None:
    """It casts inputs to float16 first, and its constant is off in the fifth digit; codes are the same."""
    theirs = theirs8(bnb, threshold).eval()
    ours = Linear8bit(128, 40, threshold=threshold, bias=True, dtype=torch.float32)
    ours.load_state_dict(theirs.state_dict())
    x = values(6, 128).half().float()
    x[2, 5] = 20.0
    with torch.no_grad():
        assert distance(ours(x), theirs(x)) < 1e-3
    assert distance(ours(x), x @ ours.dense().T + linear(128, 40).bias.detach()) > 2e-3
