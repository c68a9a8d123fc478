"""Adapted layers alone, in anyone's own model: merged on the spot and back, trained alone, saved alone."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import truetune as tt
from families import perturb
from packed import KINDS
from truetune.errors import AdapterError
from truetune.quant.replace import quantised

CONVOLUTIONS: dict[str, Any] = {
    "conv1d": nn.Conv1d(6, 8, 3, padding=1),
    "conv2d": nn.Conv2d(6, 8, 3, stride=2, padding=1),
    "conv2d-1x1": nn.Conv2d(6, 8, 1, bias=False),
    "conv2d-circular": nn.Conv2d(6, 8, (3, 5), padding=(1, 2), padding_mode="circular"),
    "conv3d": nn.Conv3d(6, 8, 3, padding="same"),
    "dilated": nn.Conv2d(6, 8, 3, dilation=2),
}


def made(kind: str, **settings: Any) -> tuple[Any, Tensor]:
    """A layer away from where it starts, and something for it to read."""
    torch.manual_seed(0)
    settings = {"rank": 4, "alpha": 8, **settings}
    dora = kind.startswith("dora-")
    what = kind.removeprefix("dora-")
    x: Tensor
    if what in CONVOLUTIONS:
        base = copy.deepcopy(CONVOLUTIONS[what])
        x = torch.randn(2, 6, *(9 for _ in base.kernel_size))
        layer = (tt.nn.DoRAConv if dora else tt.nn.LoRAConv).from_base(base, **settings)
    elif what == "embedding":
        layer = (tt.nn.DoRAEmbedding if dora else tt.nn.LoRAEmbedding).from_base(nn.Embedding(12, 6), **settings)
        x = torch.randint(0, 12, (3, 5))
    else:
        base = Conv1D(9, 6) if what == "transposed" else nn.Linear(6, 9)
        if what == "sliced":
            rows = [torch.arange(3), torch.arange(6, 9)]
            layer = tt.nn.SlicedLinear.from_base(base, rows=rows, **settings)
        else:
            layer = (tt.nn.DoRALinear if dora else tt.nn.LoRALinear).from_base(base, **settings)
        x = torch.randn(3, 5, 6)
    perturb(layer)
    return layer, x


LINEAR = ["linear", "transposed", "sliced", "dora-linear", "dora-transposed"]
ALL = [*LINEAR, "embedding", "dora-embedding", *CONVOLUTIONS, *(f"dora-{kind}" for kind in CONVOLUTIONS)]


# --- merge and unmerge --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL)
def test_merged_it_computes_the_same_and_unmerged_it_has_its_very_bits_again(kind: str) -> None:
    layer, x = made(kind)
    own, live = layer.base.weight.clone(), layer(x)
    layer.merge()
    assert layer.is_merged
    torch.testing.assert_close(layer.base(x), live, rtol=1e-4, atol=1e-5)
    assert torch.equal(layer(x), layer.base(x))
    assert torch.equal(layer.merged_weight(), layer.base.weight)
    layer.unmerge()
    assert torch.equal(layer.base.weight, own)
    assert torch.equal(layer(x), live)


@pytest.mark.parametrize("kind", ["linear", "dora-linear", "embedding", "conv2d"])
def test_a_bf16_weight_is_given_back_to_the_bit(kind: str) -> None:
    """Subtracting again what was added would lose most of its low bits."""
    layer, _ = made(kind)
    layer.base.bfloat16()
    own = layer.base.weight.clone()
    for _ in range(3):
        layer.merge()
        assert layer.base.weight.dtype == torch.bfloat16
        assert not torch.equal(layer.base.weight, own)
        layer.unmerge()
    assert torch.equal(layer.base.weight, own)


def test_merging_twice_and_unmerging_what_is_not_merged_are_errors() -> None:
    layer, _ = made("linear")
    with pytest.raises(AdapterError, match="is not merged"):
        layer.unmerge()
    layer.merge()
    with pytest.raises(AdapterError, match="is merged already"):
        layer.merge()


def test_neither_train_nor_eval_merges() -> None:
    layer, _ = made("linear")
    own = layer.base.weight.clone()
    layer.eval()
    layer.train()
    assert torch.equal(layer.base.weight, own)
    assert not layer.is_merged


def test_a_packed_base_is_not_merged_on_the_spot() -> None:
    base = quantised(nn.Linear(64, 64), KINDS["nf4"], "a", dtype=torch.float32)
    base.weight = torch.randn(64, 64)
    with pytest.raises(AdapterError, match=r"Linear4bit is packed(.|\n)*truetune merge"):
        tt.nn.LoRALinear.from_base(base, rank=2).merge()


# --- training and saving alone ------------------------------------------------------------------------------------


class Own(nn.Module):
    """A model of one's own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = tt.nn.LoRAEmbedding.from_base(nn.Embedding(12, 6), rank=2)
        self.first = tt.nn.LoRALinear.from_base(nn.Linear(6, 6), rank=2, init="pissa", lora_bias=True)
        self.norm = nn.LayerNorm(6)
        self.last = tt.nn.DoRALinear.from_base(nn.Linear(6, 12), rank=2)

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.last(self.norm(self.first(self.table(ids))))
        return found


TRAINED = {"table.lora_a", "table.lora_b", "first.lora_a", "first.lora_b", "first.lora_bias",
           "last.lora_a", "last.lora_b", "last.lora_magnitude"}  # fmt: skip


@pytest.mark.parametrize(
    ("bias", "more"),
    [
        ("none", set()),
        ("adapted", {"first.base.bias", "last.base.bias"}),
        ("all", {"first.base.bias", "last.base.bias", "norm.bias"}),
    ],
)
def test_only_adapters_train_and_biases_on_demand(bias: Any, more: set[str]) -> None:
    model = Own()
    trained = tt.nn.only_adapters_trainable(model, bias=bias)
    assert set(trained) == {name for name, p in model.named_parameters() if p.requires_grad} == TRAINED | more
    assert trained["last.lora_magnitude"] == 12


def test_an_own_loop_learns() -> None:
    model, ids = Own(), torch.arange(12)
    tt.nn.only_adapters_trainable(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, fused=True)
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(model(ids), (ids + 1) % 12)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == TRAINED


def test_the_adapters_state_goes_into_a_model_that_is_wrapped_alike() -> None:
    model, other, ids = Own(), Own(), torch.arange(12)
    for one in (model, other):
        tt.nn.only_adapters_trainable(one, bias="adapted")
    perturb(model)
    state = tt.nn.adapter_state_dict(model)
    assert set(state) == TRAINED | {"first.start_a", "first.start_b", "first.base.bias", "last.base.bias"}
    assert set(state) < set(model.state_dict())
    assert not torch.equal(model(ids), other(ids))
    tt.nn.load_adapter_state_dict(other, state)
    assert torch.equal(model(ids), other(ids))


def test_a_state_that_does_not_fit_is_refused_whole() -> None:
    model = Own()
    tt.nn.only_adapters_trainable(model)
    before = model.table.lora_a.clone()
    state = {name: tensor.clone() + 1 for name, tensor in tt.nn.adapter_state_dict(model).items()}
    state["last.lora_a"] = torch.zeros(3, 6)
    state["other"] = state.pop("first.lora_b")
    with pytest.raises(
        AdapterError, match=r"missing +first.lora_b\n(.|\n)*extra +other\n(.|\n)*misshaped +last.lora_a"
    ):
        tt.nn.load_adapter_state_dict(model, state)
    assert torch.equal(model.table.lora_a, before)


def test_a_module_without_adapters_has_nothing_to_train() -> None:
    with pytest.raises(AdapterError, match="Linear holds no adapter"):
        tt.nn.only_adapters_trainable(nn.Linear(2, 2))


# --- convolutions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["conv1d", "conv2d", "conv2d-1x1", "conv3d"])
def test_a_convolution_is_pefts(kind: str) -> None:
    layer, x = made(kind)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"])
    foreign: Any = peft.get_peft_model(nn.Sequential(layer.base), config).base_model.model[0]
    shapes = foreign.lora_A["default"].weight.shape, foreign.lora_B["default"].weight.shape
    assert shapes == (layer.lora_a.shape, layer.lora_b.shape)
    with torch.no_grad():
        foreign.lora_A["default"].weight.copy_(layer.lora_a)
        foreign.lora_B["default"].weight.copy_(layer.lora_b)
    torch.testing.assert_close(layer(x), foreign(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_an_untrained_convolution_is_its_base_and_only_the_low_rank_path_learns(kind: str) -> None:
    layer, x = made(kind)
    fresh = tt.nn.LoRAConv2d.from_base(layer.base, rank=4)
    assert torch.equal(fresh(x), layer.base(x))
    layer(x).square().sum().backward()
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == {"lora_a", "lora_b"}


def test_dropout_of_a_convolution_acts_in_training_only() -> None:
    layer, x = made("conv2d", dropout=0.5)
    assert torch.equal(layer.eval()(x), layer(x))
    assert not torch.equal(layer.train()(x), layer(x))


@pytest.mark.parametrize(
    ("base", "settings", "message"),
    [
        (nn.Conv1d(6, 6, 3, groups=6), {}, "with 6 groups takes no low-rank path"),
        (nn.Conv2d(6, 8, 3), {"lora_bias": True}, "--lora-bias: for linear layers"),
        (nn.Conv2d(6, 8, 3), {"init": "pissa"}, "--init pissa: for linear layers"),
    ],
)
def test_what_a_convolution_can_not_is_refused(base: nn.Module, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        tt.nn.LoRAConv.from_base(base, rank=2, **settings)  # type: ignore[arg-type]
