"""DoRA: the formula with its norm taken for a constant, PEFT's files, and a norm formed no more often than it must."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import truetune
from families import FAMILIES, distance, logits, perturb
from method_checks import CLOSE, EACH, check
from packed import KINDS
from peft_peer import read_by_peft, saved_by_peft, theirs
from truetune.adapters import files
from truetune.adapters.dora import DoRAConv, DoRAEmbedding, DoRALinear
from truetune.adapters.inject import attach
from truetune.config.lora import DoRA, LoRA
from truetune.errors import AdapterError
from truetune.ops import lowrank
from truetune.ops.frozen import frozen_weight
from truetune.quant.replace import quantised

SMALL: dict[str, Any] = {"rank": 4, "alpha": 8.0}


@pytest.mark.parametrize(("name", "form"), EACH)
def test_it_learns_is_read_back_and_merges(name: str, form: str, tmp_path: Path) -> None:
    check(name, form, DoRA(rank=8), tmp_path, lr=1e-2)


# --- the layer ----------------------------------------------------------------------------------------------------


def make(kind: str = "linear", *, trained: bool = True, **settings: Any) -> Any:
    """A layer of 24 -> 40, away from where it starts."""
    torch.manual_seed(0)
    bases: dict[str, nn.Module] = {
        "linear": nn.Linear(24, 40), "conv1d": Conv1D(40, 24), "bare": nn.Linear(24, 40, bias=False),
    }  # fmt: skip
    layer = DoRALinear.from_base(bases[kind], **{**SMALL, **settings})
    if trained:
        perturb(layer)
    return layer


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(1)).to(dtype)


def truth(layer: Any, x: Tensor) -> Tensor:
    """m ∘ V / |V| x + b with V = W + s B A, written out in float64."""
    whole = frozen_weight(layer.base).dense().double() + layer.scale * layer.lora_b.double() @ layer.lora_a.double()
    weight = layer.lora_magnitude.double()[:, None] * whole / whole.norm(dim=1, keepdim=True)
    y = x.double() @ weight.T
    return y if layer.bias is None else y + layer.bias.double()


@pytest.mark.parametrize("kind", ["linear", "conv1d", "bare"])
def test_a_layer_computes_the_equation(kind: str) -> None:
    layer, x = make(kind), inputs()
    assert (layer(x) - truth(layer, x)).abs().max() < 1e-5  # sums of 24 in float32; without m it is off by 0.1


@pytest.mark.parametrize("kind", ["linear", "conv1d", "bare"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_untrained_it_changes_no_bit(kind: str, dtype: torch.dtype) -> None:
    base = make(kind, trained=False).base.to(dtype)
    x = inputs(dtype)
    if kind == "bare":
        assert torch.equal(DoRALinear.from_base(base, **SMALL)(x), base(x))
    else:  # the bias is added last, and not within the product
        y = x.flatten(0, 1) @ frozen_weight(base).dense().T
        assert torch.equal(DoRALinear.from_base(base, **SMALL)(x).flatten(0, 1), y + base.bias)


@pytest.mark.parametrize("how", ["one node", "composed"])
def test_gradients_are_the_formulas_with_a_constant_norm(how: str) -> None:
    layer, x = make(), inputs()
    reference = make()
    if how == "composed":  # a base that is trained takes no part in a node
        layer.base.bias.requires_grad_(True)
    layer(x).square().sum().backward()
    whole = reference.base.weight + reference.scale * reference.lora_b @ reference.lora_a
    weight = (reference.lora_magnitude / whole.norm(dim=1).detach())[:, None] * whole
    F.linear(x, weight, reference.base.bias).square().sum().backward()
    for name in ("lora_a", "lora_b", "lora_magnitude"):
        torch.testing.assert_close(getattr(layer, name).grad, getattr(reference, name).grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_the_merged_weight_is_the_live_layer(kind: str) -> None:
    layer, x = make(kind).double(), inputs(torch.float64)
    live, base = layer(x), layer.base
    weight = layer.merged_weight()
    assert weight.shape == base.weight.shape
    merged = F.linear(x, weight.T if kind == "conv1d" else weight, base.bias)
    assert (live - merged).abs().max() < 1e-12


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_on_a_packed_base_the_norm_is_that_of_what_the_codes_stand_for(form: str) -> None:
    base = quantised(nn.Linear(64, 40), KINDS[form], "a", dtype=torch.float32)
    base.weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    layer = DoRALinear.from_base(base, **SMALL)
    perturb(layer)
    whole = base.dense() + layer.scale * layer.lora_b @ layer.lora_a
    torch.testing.assert_close(layer._norm(), whole.norm(dim=1).detach())


def test_a_row_of_zeros_stays_zeros_where_a_division_would_give_nan() -> None:
    base = nn.Linear(24, 40, bias=False)
    base.weight.data[3] = 0
    layer = DoRALinear.from_base(base, **SMALL)
    y = layer(inputs())
    y.square().sum().backward()
    assert not y[..., 3].any()
    assert all(p.grad.isfinite().all() for p in (layer.lora_a, layer.lora_b, layer.lora_magnitude))


# --- dropout ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["compatible", "low-rank"])
def test_dropout_is_of_all_that_is_beside_the_base_or_of_the_low_rank_path(how: str) -> None:
    layer, x = make(dropout=0.5, dora_dropout=how).train(), inputs()
    torch.manual_seed(4)
    found = layer(x)
    torch.manual_seed(4)
    low = layer._dropped(x)
    g = layer.magnitude()
    of_base = F.linear(low if how == "compatible" else x, layer.base.weight)
    update = layer.scale * (low @ layer.lora_a.T @ layer.lora_b.T)
    expected = layer.base(x) + (g - 1) * of_base + g * update
    torch.testing.assert_close(found, expected)
    layer.base.bias.requires_grad_(True)  # composed, not one node
    torch.manual_seed(4)
    torch.testing.assert_close(layer(x), expected)


def test_dropout_of_pefts_layer_is_the_same_function_of_the_dropped_input() -> None:
    """PEFT's own layer, given the input that ours drops to."""
    layer, x = make(dropout=0.5).train(), inputs()
    config = peft.LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=["0"], lora_dropout=0.5)
    holder = nn.Sequential(nn.Linear(24, 40))
    holder[0].load_state_dict(layer.base.state_dict())
    foreign: Any = peft.get_peft_model(holder, config).base_model.model[0]
    with torch.no_grad():
        foreign.lora_A["default"].weight.copy_(layer.lora_a)
        foreign.lora_B["default"].weight.copy_(layer.lora_b)
        foreign.lora_magnitude_vector["default"].weight.copy_(layer.lora_magnitude)
    torch.manual_seed(4)
    ours = layer(x)
    torch.manual_seed(4)
    foreign.lora_dropout["default"].forward = lambda given: layer._dropped(given)
    torch.testing.assert_close(ours, foreign.train()(x))


# --- the norm, and how often it is formed -------------------------------------------------------------------------


def test_the_closed_form_is_the_norm_of_the_sum() -> None:
    draw = torch.Generator().manual_seed(0)
    weight, a, b = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((40, 24), (4, 24), (40, 4)))
    found = lowrank.row_norms(lowrank.squared_rows(weight), weight, a, b, 0.7)
    torch.testing.assert_close(found, (weight + 0.7 * b @ a).norm(dim=1), rtol=1e-12, atol=0)
    narrow = lowrank.row_norms(lowrank.squared_rows(weight.float()), weight.float(), a.float(), b.float(), 0.7)
    assert distance(narrow, found) < 1e-6


def test_squares_are_summed_in_float32_some_rows_at_a_time() -> None:
    weight = torch.randn(2500, 8).bfloat16()
    torch.testing.assert_close(lowrank.squared_rows(weight), weight.float().square().sum(1))


def forms(layer: Any, x: Tensor, times: int) -> int:
    """How often a norm is formed in so many steps of two micro-batches each."""
    formed: list[int] = []

    def counted() -> tuple[Tensor, Tensor]:
        formed.append(1)
        return layer.lora_a, layer.lora_b

    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=1e-3, fused=True)
    layer._norm = lambda: layer.norm.of(
        frozen_weight(layer.base).dense, layer.base, (layer.lora_a, layer.lora_b), counted, layer.scale
    )
    for _ in range(times):
        for _ in range(2):
            layer(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return len(formed)


def test_the_norm_is_formed_once_a_step() -> None:
    assert forms(make(), inputs(), 3) == 3


@pytest.mark.parametrize("change", ["lora_a", "lora_b", "base"])
def test_the_norm_follows_whatever_it_is_of(change: str) -> None:
    layer = make()
    layer(inputs())
    with torch.no_grad():
        (layer.base.weight if change == "base" else getattr(layer, change)).mul_(1.5)
    assert (layer(inputs()) - truth(layer, inputs())).abs().max() < 1e-5


def test_the_norm_follows_a_layer_that_is_cast_or_loaded() -> None:
    layer, other = make(), make(trained=False)
    layer(inputs())
    layer.load_state_dict(other.state_dict())
    assert (layer(inputs()) - truth(layer, inputs())).abs().max() < 1e-5
    assert (layer.double()(inputs().double()) - truth(layer, inputs())).abs().max() < 1e-12


def test_it_trains_after_it_was_asked_in_inference_mode() -> None:
    layer = make()
    with torch.inference_mode():
        layer(inputs())
    layer(inputs()).sum().backward()
    assert layer.lora_magnitude.grad is not None


# --- embeddings and convolutions ----------------------------------------------------------------------------------


def test_an_embedding_scales_the_columns_of_its_table() -> None:
    torch.manual_seed(0)
    layer = DoRAEmbedding.from_base(nn.Embedding(24, 16), **SMALL)
    ids = torch.randint(0, 24, (3, 5))
    assert torch.equal(layer(ids), layer.base(ids))
    perturb(layer)
    whole = layer.base.weight + layer.scale * (layer.lora_b @ layer.lora_a).T
    expected = (whole * layer.lora_magnitude / whole.norm(dim=0))[ids]
    torch.testing.assert_close(layer(ids), expected)
    torch.testing.assert_close(layer.merged_weight()[ids], expected)


CONVOLUTIONS = [nn.Conv1d, nn.Conv2d, nn.Conv3d]


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_convolution_is_pefts(kind: Any) -> None:
    torch.manual_seed(0)
    dims = CONVOLUTIONS.index(kind) + 1
    base = kind(6, 8, 3, stride=2, padding=1)
    holder = nn.Sequential(base)
    foreign: Any = peft.get_peft_model(
        holder, peft.LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=["0"], init_lora_weights=False)
    ).base_model.model[0]
    layer = DoRAConv.from_base(foreign.base_layer, **SMALL)
    with torch.no_grad():
        layer.lora_a.copy_(foreign.lora_A["default"].weight)
        layer.lora_b.copy_(foreign.lora_B["default"].weight)
        magnitude = foreign.lora_magnitude_vector["default"].weight.mul_(1.1)
        assert layer.lora_magnitude.shape == magnitude.shape
        layer.lora_magnitude.copy_(magnitude)
    x = torch.randn(2, 6, *(9 for _ in range(dims)))
    expected = foreign(x)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    layer.merge()
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


# --- PEFT's files -------------------------------------------------------------------------------------------------


def crossing(family: str, tmp_path: Path, settings: DoRA) -> None:
    """Ours, read by PEFT: the same logits, and not the base's."""
    live = FAMILIES[family].make()
    attach(live, settings, seed=3)
    perturb(live)
    truetune.save_adapter(live, str(tmp_path))
    assert distance(logits(live), logits(read_by_peft(family, tmp_path))) <= CLOSE
    assert distance(logits(live), logits(FAMILIES[family].make())) > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_reads_ours_and_we_read_pefts(family: str, tmp_path: Path) -> None:
    targets = FAMILIES[family].targets
    crossing(family, tmp_path / "ours", DoRA(**SMALL, targets=targets))
    settings = {"r": 4, "lora_alpha": 8, "use_dora": True, "task_type": "CAUSAL_LM", "fan_in_fan_out": family == "gpt2"}
    foreign = theirs(family, peft.LoraConfig(**settings, target_modules=list(targets)))
    live = FAMILIES[family].make()
    truetune.load_adapter(live, str(saved_by_peft(foreign, tmp_path / "theirs")))
    assert distance(logits(live), logits(foreign)) <= CLOSE
    assert sum(truetune.trainable(live).values()) == sum(p.numel() for p in foreign.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "settings",
    [{"use_rslora": True}, {"rank_pattern": ("q_proj=2",), "alpha_pattern": ("q_proj=3",)}, {"dropout": 0.1}],
    ids=str,
)
def test_peft_reads_each_setting(settings: dict[str, Any], tmp_path: Path) -> None:
    crossing("llama", tmp_path, DoRA(**SMALL, **settings, targets=("q_proj", "v_proj")))


@pytest.mark.parametrize(
    ("family", "targets"), [("llama", ["embed_tokens", "q_proj"]), ("llama-tied", ["embed_tokens"])]
)
def test_an_embedding_of_peft_is_read(family: str, targets: list[str], tmp_path: Path) -> None:
    """On a tied model without ``ensure_weight_tying`` the head stays as it was."""
    config = peft.LoraConfig(r=4, lora_alpha=8, use_dora=True, task_type="CAUSAL_LM", target_modules=targets)
    foreign = theirs(family, config)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*save_embedding_layers.*")
        saved_by_peft(foreign, tmp_path)
    live = FAMILIES[family].make()
    truetune.load_adapter(live, str(tmp_path))
    assert distance(logits(live), logits(foreign)) <= CLOSE


def test_an_adapter_of_dora_is_refused_as_one_of_lora_alone(tmp_path: Path) -> None:
    live = FAMILIES["llama"].make()
    attach(live, DoRA(**SMALL, targets=("q_proj",)))
    files.save(live, tmp_path, base=None)
    assert isinstance(files.read(tmp_path).settings, DoRA)
    config = dict(files.read(tmp_path).config) | {"use_dora": False}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match=r"extra +.*lora_magnitude_vector"):
        files.load(FAMILIES["llama"].make(), files.read(tmp_path))


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("llama", {"lora_bias": True}, "--lora-bias: no setting of --method dora"),
        ("gpt2", {"slices": ("qkv=q",), "targets": ("c_attn",)}, "--slices: no setting of --method dora"),
        ("llama-tied", {"targets": ("embed_tokens",)}, "embed_tokens: the head is the embedding table"),
        ("llama-tied", {"targets": ("lm_head",)}, "lm_head: the head is the embedding table"),
    ],
)
def test_what_it_has_no_meaning_for_is_refused(family: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        attach(FAMILIES[family].make(), DoRA(**settings))


def test_it_trains_as_many_as_lora_and_one_more_for_every_output() -> None:
    counts = []
    for settings in (LoRA(**SMALL), DoRA(**SMALL)):
        model = FAMILIES["llama"].make()
        attach(model, settings)
        counts.append(sum(truetune.trainable(model).values()))
    outputs = sum(m.out_features for m in FAMILIES["llama"].make().modules() if isinstance(m, nn.Linear))
    assert counts[1] - counts[0] == outputs - FAMILIES["llama"].make().lm_head.out_features
