"""Packed linear layers: their formula, what casting, copying and saving leave alone, and what they refuse."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from packed import KINDS, linear, values
from reference.norms import distance
from truetune.config.quant import QuantRecipe
from truetune.errors import QuantizationError
from truetune.ops.blockwise_4bit import dequantize_4bit, quantize_4bit
from truetune.quant.base import QuantLinear
from truetune.quant.linear4bit import Linear4bit
from truetune.quant.linear8bit import Linear8bit
from truetune.quant.replace import quantised

FOUR = [kind for kind in KINDS if kind != "int8"]
# Of the output, relative: 4-bit products are those of the dense weight; int8 rounds each input to 8 bits as well.
FORWARD = {"nf4": 1e-6, "nf4-double": 1e-6, "fp4": 1e-6, "int8": 1e-2}


def packed(kind: str, base: nn.Module, *, dtype: torch.dtype = torch.float32, path: str = "a.b") -> QuantLinear:
    return quantised(base, KINDS[kind], path, dtype=dtype)


def gradients(layer: nn.Module, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """``(y, dx)`` for the gradient ``g`` of y."""
    x = x.clone().requires_grad_()
    y = layer(x)
    (dx,) = torch.autograd.grad(y, x, g)
    return y.detach(), dx


# --- products -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [(1,), (7,), (2, 3), (0,)], ids=["one", "some", "batch", "none"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_the_dense_weight(kind: str, bias: bool, rows: tuple[int, ...]) -> None:
    layer = packed(kind, linear(20, 12, bias=bias))
    x, g = values(*rows, 20, seed=1), values(*rows, 12, seed=2)
    y, dx = gradients(layer, x, g)
    dense = layer.dense().double()
    assert (y.shape, dx.shape, y.dtype) == ((*rows, 12), x.shape, torch.float32)
    assert layer.bias is None or distance(layer(x * 0), layer.bias.expand(*rows, 12)) == 0
    if rows != (0,):
        expected = F.linear(x.double(), dense, None if layer.bias is None else layer.bias.double())
        assert distance(y.double(), expected) < FORWARD[kind]
        assert distance(dx.double(), g.double() @ dense) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_the_slope_of_the_formula(kind: str) -> None:
    """Along any direction, by central differences of the dense formula in float64."""
    layer = packed(kind, linear(9, 5))
    x, g, along = values(4, 9, seed=1), values(4, 5, seed=2), values(4, 9, seed=3).double()
    _, dx = gradients(layer, x, g)
    dense, step = layer.dense().double(), 1e-3
    ahead, behind = (((x.double() + s * along) @ dense.T * g.double()).sum() for s in (step, -step))
    assert float((dx.double() * along).sum()) == pytest.approx(float((ahead - behind) / (2 * step)), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_products_err_no_more_than_a_dense_bf16_layer_does(kind: str) -> None:
    layer = packed(kind, linear(96, 40, dtype=torch.bfloat16), dtype=torch.bfloat16)
    x, g = values(64, 96, seed=1, dtype=torch.bfloat16), values(64, 40, seed=2, dtype=torch.bfloat16)
    y, dx = gradients(layer, x, g)
    exact = layer.dense().double(), layer.bias
    assert (y.dtype, dx.dtype) == (torch.bfloat16, torch.bfloat16)
    assert isinstance(exact[1], Tensor)
    assert distance(y.double(), F.linear(x.double(), exact[0], exact[1].double())) < max(4e-3, 1.5 * FORWARD[kind])
    assert distance(dx.double(), g.double() @ exact[0]) < 4e-3


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_of_another_dtype_are_cast_there_and_back(kind: str) -> None:
    layer = packed(kind, linear(16, 8), dtype=torch.bfloat16)
    x = values(3, 16)
    y, dx = gradients(layer, x, values(3, 8))
    assert (y.dtype, dx.dtype) == (torch.float32, torch.float32)
    assert torch.equal(y, layer(x.bfloat16()).float())


def test_int8_leaves_columns_with_an_outlier_in_floating_point() -> None:
    """An outlier would take all the other values' precision: the largest of a row sets what one step of it is."""
    base, x = linear(64, 16, bias=False), values(5, 64, seed=1)
    x[2, 7] = 300.0
    split, whole = (
        quantised(base, QuantRecipe(kind="int8", threshold=t), "a", dtype=torch.float32) for t in (6.0, 0.0)
    )
    exact = x.double() @ split.dense().double().T
    assert distance(split(x).double(), exact) < 3e-3
    assert distance(whole(x)[2].double(), exact[2]) > 1e-3
    assert distance(split(x)[2].double(), exact[2]) < 5e-4


@pytest.mark.parametrize("kind", KINDS)
def test_conv1d_is_the_linear_layer_with_its_weight_turned(kind: str) -> None:
    plain = linear(12, 20)
    conv = Conv1D(20, 12)
    conv.weight.data, conv.bias.data = plain.weight.data.T.clone(), plain.bias.data.clone()
    ours, theirs = packed(kind, plain), packed(kind, conv)
    assert (theirs.in_features, theirs.out_features, theirs.transposed) == (12, 20, True)
    assert torch.equal(ours.weight, theirs.weight)
    x = values(3, 12)
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("kind", KINDS)
def test_evaluating_in_between_changes_no_gradient(kind: str) -> None:
    """Nothing is repacked, cast or kept behind ``eval()``: rows of any number, and one by one as in generation."""
    layer = packed(kind, linear(32, 48))
    x, g = values(6, 32, seed=1), values(6, 48, seed=2)
    before = [tensor.clone() for tensor in layer.packed().values()]
    first = gradients(layer.train(), x, g)
    layer.eval()
    with torch.no_grad():
        for rows in (1, 2, 40):
            layer(values(rows, 32, seed=rows))
            layer(values(rows, 32, seed=rows).bfloat16())
    layer.state_dict()
    again = gradients(layer.train(), x, g)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(before, layer.packed().values(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_bias_that_is_trained_gets_its_gradient(kind: str) -> None:
    layer = packed(kind, linear(8, 6))
    assert layer.bias is not None
    layer.bias.requires_grad_(True)
    g = values(3, 6, seed=2)
    layer(values(3, 8)).backward(g)
    assert layer.bias.grad is not None
    torch.testing.assert_close(layer.bias.grad, g.sum(0))
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"bias"}


# --- what a layer holds -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FOUR)
def test_four_bit_codes_are_those_of_the_flat_weight(kind: str) -> None:
    base, recipe = linear(7, 3, bias=False), KINDS[kind]
    layer = packed(kind, base)
    expected = quantize_4bit(base.weight, recipe.kind, double=recipe.double)  # type: ignore[arg-type]
    assert torch.equal(layer.weight.view(-1), expected.codes)
    assert torch.equal(layer.dense(), dequantize_4bit(expected))
    assert layer.weight.shape == (11, 1)  # 21 values


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros(kind: str) -> None:
    base = linear(64, 3, bias=False)
    base.weight.data[1] = 0
    assert torch.equal(packed(kind, base).dense()[1], torch.zeros(64))
    base.weight.data.zero_()
    layer = packed(kind, base)
    assert torch.equal(layer.dense(), torch.zeros(3, 64))
    assert torch.equal(layer(values(2, 64)), torch.zeros(2, 3))


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 13), (2, 64), (1, 65), (9, 100)])
@pytest.mark.parametrize("kind", KINDS)
def test_odd_sizes_and_partial_last_blocks_are_packed_saved_and_filled(kind: str, shape: tuple[int, int]) -> None:
    layer = packed(kind, linear(shape[1], shape[0], bias=False))
    other = packed(kind, nn.Linear(shape[1], shape[0], bias=False, device="meta"))
    other.fill(layer.packed())
    assert torch.equal(other.dense(), layer.dense())
    assert distance(layer.dense(), linear(shape[1], shape[0]).weight.detach()) < (0.02 if kind == "int8" else 0.35)


@pytest.mark.parametrize("kind", KINDS)
def test_strided_weights_are_packed_as_their_contiguous_copies(kind: str) -> None:
    wide = values(40, 24)
    layer = packed(kind, nn.Linear(24, 20, bias=False, device="meta"))
    layer.weight = nn.Parameter(wide[::2])
    other = packed(kind, nn.Linear(24, 20, bias=False, device="meta"))
    other.pack(wide[::2].contiguous())
    assert torch.equal(layer.dense(), other.dense())
    turned = packed(kind, nn.Linear(20, 24, bias=False, device="meta"))
    turned.pack(wide[::2].T)
    other = packed(kind, nn.Linear(20, 24, bias=False, device="meta"))
    other.pack(wide[::2].T.contiguous())
    assert torch.equal(turned.dense(), other.dense())


@pytest.mark.parametrize("kind", KINDS)
def test_what_packs_is_what_the_layer_computes_in(kind: str) -> None:
    """So a float32 checkpoint that is run in bf16 gives the codes of its bf16 copy."""
    base = linear(33, 10)
    narrow = packed(kind, base, dtype=torch.bfloat16)
    other = packed(kind, copy.deepcopy(base).bfloat16(), dtype=torch.bfloat16)
    assert torch.equal(narrow.dense(), other.dense())
    assert narrow.dense().dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_known_before_there_are_any(kind: str) -> None:
    waiting = packed(kind, nn.Linear(100, 9, bias=False, device="meta"))
    assert not waiting.is_filled
    assert (waiting.frozen_weight().in_features, waiting.frozen_weight().out_features) == (100, 9)
    announced = waiting.packed_bytes
    waiting.pack(values(9, 100))
    assert waiting.is_filled
    held = sum(tensor.nbytes for name, tensor in waiting.packed().items() if name != "weight_format")
    assert announced == waiting.packed_bytes == held


# --- casts, copies, state -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("kind", KINDS)
def test_casting_a_model_casts_its_products_and_no_scale(kind: str, bias: bool) -> None:
    model = nn.Sequential(packed(kind, linear(64, 32, bias=bias)), nn.LayerNorm(32))
    layer = model[0]
    assert isinstance(layer, QuantLinear)
    before = {name: tensor.clone() for name, tensor in layer.packed().items()}
    exact = layer.dense()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert model.to(dtype)(values(2, 64).to(dtype)).dtype == dtype
        assert (layer.dtype, layer.frozen_weight().dtype, layer.dense().dtype) == (dtype, dtype, dtype)
        assert {name: t.dtype for name, t in layer.packed().items()} == {name: t.dtype for name, t in before.items()}
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.packed().items())
    assert torch.equal(layer.dense(), exact)
    assert torch.equal(model.half().float()[0].dense(), exact)


@pytest.mark.parametrize("kind", KINDS)
def test_state_goes_through_a_state_dict_strictly(kind: str) -> None:
    one = nn.ModuleDict({"a": packed(kind, linear(33, 10))})
    other = nn.ModuleDict({"a": packed(kind, linear(33, 10))})
    other["a"].pack(values(10, 33, seed=9))
    state = one.state_dict()
    prefix = "a.weight"
    assert {prefix, "a.bias"} <= state.keys()
    other.load_state_dict(state)
    x = values(4, 33)
    assert torch.equal(one["a"](x), other["a"](x))
    for missing in (prefix, "a.bias", "a.SCB" if kind == "int8" else "a.weight.absmax"):
        cut = {name: tensor for name, tensor in state.items() if name != missing}
        with pytest.raises((RuntimeError, QuantizationError), match=r"a\.b|a\.bias|a\.weight"):
            other.load_state_dict(cut)


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_is_copied_unless_it_is_to_be_assigned(kind: str) -> None:
    state = packed(kind, linear(20, 12)).state_dict()
    theirs = {tensor.data_ptr() for tensor in state.values()}
    copied, assigned = packed(kind, linear(20, 12)), packed(kind, linear(20, 12))
    copied.load_state_dict(state)
    assigned.load_state_dict(state, assign=True)
    own = {tensor.data_ptr() for name, tensor in copied.state_dict().items() if not name.endswith("quant_map")}
    assert not theirs & own
    assert {assigned.weight.data_ptr(), assigned.bias.data_ptr()} <= theirs  # type: ignore[union-attr]
    assert torch.equal(copied(values(3, 20)), assigned(values(3, 20)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_dense_state_dict_is_packed_as_it_is_loaded(kind: str) -> None:
    base = linear(33, 10)
    layer = packed(kind, nn.Linear(33, 10, device="meta"))
    layer.load_state_dict(base.state_dict())
    x = values(2, 33)
    assert torch.equal(layer(x), packed(kind, base)(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_is_equal_and_apart(kind: str, copied: Any) -> None:
    layer = packed(kind, linear(33, 10))
    other, x = copied(layer), values(2, 33)
    expected = layer(x)
    assert torch.equal(other(x), expected)
    other.pack(values(10, 33, seed=9))
    assert torch.equal(layer(x), expected)
    assert not torch.equal(other(x), expected)
    again = copied(layer)
    again.weight.data.zero_()
    assert torch.equal(layer(x), expected)


def test_a_layer_says_what_it_is() -> None:
    shown = repr(packed("nf4-double", linear(8, 4)))
    assert shown == "Linear4bit(in_features=8, out_features=4, bias=True, kind=nf4, double)"
    assert repr(packed("int8", linear(8, 4))).startswith("Linear8bit(in_features=8, out_features=4")


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_not_finite_are_refused_by_name(kind: str, bad: float) -> None:
    base = linear(33, 10)
    base.weight.data[3, 4] = bad
    with pytest.raises(QuantizationError, match=r"^model\.layers\.0\.q_proj: .*(not finite|holds -?(nan|inf))"):
        packed(kind, base, path="model.layers.0.q_proj")


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_of_another_shape_is_refused_by_name(kind: str) -> None:
    layer = packed(kind, nn.Linear(33, 10, device="meta"), path="q")
    with pytest.raises(QuantizationError, match=r"^q: found \[33, 10\], expected \[10, 33\]"):
        layer.weight = nn.Parameter(values(33, 10))
    with pytest.raises(QuantizationError, match="meta device"):
        layer.pack(torch.empty(10, 33, device="meta"))
    assert not layer.is_filled


STATE = "weight.quant_state.bitsandbytes__nf4"
FACTS = '{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [10, 33]}'


def text(content: str) -> Tensor:
    return torch.tensor(list(content.encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight.absmax": None}, "not a whole 4-bit weight"),
        ({"weight": None}, "not a whole 4-bit weight"),
        ({"weight.absmax": torch.ones(2)}, "2 scales"),
        ({"weight": torch.zeros(9, 1, dtype=torch.uint8)}, "9 bytes of codes"),
        ({"weight.quant_map": torch.linspace(-1, 1, 16)}, "other values than the standard ones"),
        ({STATE: text("{")}, "no JSON"),
        ({STATE: text("[]")}, "no JSON"),
        ({STATE: text('{"dtype": "x"}')}, "no JSON"),
        ({STATE: text(FACTS.replace("64", "0"))}, "no JSON"),
        ({STATE: text(FACTS.replace("33", '"33"'))}, "no JSON"),
        ({STATE: text(FACTS.replace("nf4", "fp4"))}, "quantised as 'fp4'"),
        ({STATE: text(FACTS.replace("[10, 33]", "[330]"))}, "codes"),
    ],
    ids=[
        "no absmax",
        "no codes",
        "few scales",
        "few codes",
        "another map",
        "cut",
        "a list",
        "another dtype",
        "empty blocks",
        "sizes in words",
        "another kind",
        "flat",
    ],
)
def test_parts_that_do_not_fit_are_refused_by_name(change: dict[str, Tensor | None], message: str) -> None:
    layer = packed("nf4", linear(33, 10, bias=False), path="model.q")
    parts = {**layer.packed(), **change}
    with pytest.raises(QuantizationError, match=rf"^model\.q: .*{message}"):
        layer.fill({name: tensor for name, tensor in parts.items() if tensor is not None})


def test_packed_weights_of_another_shape_are_refused_by_name() -> None:
    four, eight = (packed(kind, nn.Linear(20, 10, bias=False, device="meta"), path="q") for kind in ("nf4", "int8"))
    for layer, kind in ((four, "nf4"), (eight, "int8")):
        with pytest.raises(QuantizationError, match=r"^q: (.|\n)*\[10, 20\]"):
            layer.fill(packed(kind, linear(10, 20, bias=False)).packed())
    codes = packed("int8", linear(20, 10, bias=False)).packed()
    for parts, message in (
        ({**codes, "weight_format": torch.tensor(2)}, "layout 2"),
        ({"weight": codes["weight"]}, "not a whole int8 weight"),
        ({**codes, "weight": codes["weight"].float()}, "not a whole int8 weight"),
    ):
        with pytest.raises(QuantizationError, match=message):
            eight.fill(parts)


def test_codes_in_other_storage_are_the_same_bytes() -> None:
    """``bnb_4bit_quant_storage``: the codes seen as numbers of another dtype."""
    layer = packed("nf4", linear(32, 8, bias=False))
    parts = layer.packed()
    other = packed("nf4", nn.Linear(32, 8, bias=False, device="meta"))
    other.fill({**parts, "weight": parts["weight"].view(-1, 2).view(torch.bfloat16)})
    assert torch.equal(other.dense(), layer.dense())


def test_standalone_layers_need_no_recipe() -> None:
    base = linear(32, 8)
    four, eight = Linear4bit.from_base(base, kind="fp4", blocksize=32), Linear8bit.from_base(base, threshold=0.0)
    assert (four.kind, four.blocksize, four.dtype, eight.threshold) == ("fp4", 32, torch.float32, 0.0)
    assert base.weight.requires_grad
    assert isinstance(four(values(2, 32)), Tensor)
