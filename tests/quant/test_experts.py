"""Stacks of experts in 8 and 4 bits: each matrix is packed as a linear layer of its own would be."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GptOssConfig, MixtralConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from packed import KINDS, values
from reference.norms import distance
from truetune.checkpoint import mapped
from truetune.checkpoint.header import read_header
from truetune.config.quant import QuantRecipe
from truetune.errors import QuantizationError
from truetune.ops.experts import frozen_expert
from truetune.ops.frozen import FrozenLinear
from truetune.quant.experts import QuantExperts, stacks_of
from truetune.quant.form import quantised
from truetune.quant.linear8bit import unrounded
from truetune.quant.stack import stack_of

HIDDEN, INNER, EXPERTS, TOKENS = 40, 24, 3, 11
_CLASSES: dict[str, Any] = {
    "mixtral": (MixtralExperts, MixtralConfig(hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=EXPERTS)),
    "gpt-oss": (GptOssExperts, GptOssConfig(hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=EXPERTS)),
}


def dense(family: str) -> nn.Module:
    cls, config = _CLASSES[family]
    module: nn.Module = cls(config)
    for seed, parameter in enumerate(module.parameters()):
        parameter.data = values(*parameter.shape, seed=seed) / 4
    return module.requires_grad_(False)


def packed(family: str, kind: str, base: nn.Module | None = None) -> QuantExperts:
    base = base or dense(family)
    return QuantExperts(base, stacks_of(base), KINDS[kind], dtype=torch.float32, path="layers.0.experts")


def matrix(base: nn.Module, name: str, e: int) -> Tensor:
    """[out, in]."""
    one: Tensor = getattr(base, name)[e]
    return one.T if base.is_transposed else one


def routed() -> tuple[Tensor, Tensor, Tensor]:
    """What a router hands on; the last expert gets nothing."""
    chosen = torch.stack([torch.arange(TOKENS) % 2, torch.ones(TOKENS, dtype=torch.long)], dim=1)
    chosen[:, 1] -= chosen[:, 0]
    return values(TOKENS, HIDDEN), chosen, values(TOKENS, 2, seed=1).softmax(-1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", _CLASSES)
def test_codes_are_those_of_a_linear_layer_of_the_slice(family: str, kind: str) -> None:
    base, name = dense(family), "gate_up_proj"
    parts = packed(family, kind, base).packed_stack(name)
    for e in range(EXPERTS):
        layer = nn.Linear(HIDDEN, 2 * INNER, bias=False)
        layer.weight.data = matrix(base, name, e).contiguous()
        alone = quantised(layer, KINDS[kind], "a", dtype=torch.float32).packed()
        assert parts.keys() == alone.keys()
        assert all(torch.equal(parts[part][e].view_as(tensor), tensor) for part, tensor in alone.items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", _CLASSES)
def test_it_computes_what_the_model_does_with_the_dequantised_stacks(family: str, kind: str) -> None:
    """The model's own code, on the dense weights that the codes stand for: outputs and gradients of the input."""
    ours, theirs = packed(family, kind), dense(family)
    for name in ours.names:
        getattr(theirs, name).data = ours.dense(name)
    (hidden, chosen, shares), g = routed(), values(TOKENS, HIDDEN, seed=3)
    found = []
    for module in (ours, theirs):
        x, p = hidden.clone().requires_grad_(), shares.clone().requires_grad_()
        with unrounded():
            y = module(x, chosen, p)
        found.append([y.detach(), *torch.autograd.grad(y, (x, p), g)])
    for one, other in zip(*found, strict=True):
        assert distance(one, other) < 1e-5


def test_only_experts_that_got_tokens_are_made_dense() -> None:
    ours = packed("mixtral", "nf4")
    hidden, chosen, shares = routed()
    before = ours(hidden, chosen, shares)
    for name in ours.names:
        ours._weights[name][EXPERTS - 1] = FrozenLinear(torch.full((1, 1), torch.nan), transposed=False)
    assert torch.equal(ours(hidden, chosen, shares), before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_comes_back_to_the_bit(kind: str) -> None:
    ours, empty = packed("gpt-oss", kind), packed("gpt-oss", kind, dense("gpt-oss").to("meta"))
    assert all(getattr(empty, name).is_meta for name in empty.names)
    state = copy.deepcopy(ours.state_dict())
    assert "gate_up_proj_bias" in state
    assert ("gate_up_proj.SCB" if kind == "int8" else "gate_up_proj.absmax") in state
    empty.gate_up_proj_bias = nn.Parameter(torch.zeros(EXPERTS, 2 * INNER))
    empty.down_proj_bias = nn.Parameter(torch.zeros(EXPERTS, HIDDEN))
    empty.load_state_dict(state)
    assert torch.equal(empty(*routed()), ours(*routed()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_is_copied_unless_it_is_to_be_assigned(kind: str) -> None:
    ours = packed("gpt-oss", kind)
    state = ours.state_dict()
    theirs = {tensor.data_ptr() for tensor in (*state.values(), *ours.stored())}
    copied, assigned = packed("gpt-oss", kind), packed("gpt-oss", kind)
    copied.load_state_dict(state)
    assert not theirs & {tensor.data_ptr() for tensor in copied.stored()}
    assert not theirs & {weight.data_ptr() for weight in copied.parameters()}
    assigned.load_state_dict(state, assign=True)
    assert {getattr(assigned, name).data_ptr() for name in ours.names} <= theirs
    assert torch.equal(copied(*routed()), ours(*routed()))


def test_what_a_state_lacks_is_named_and_dense_stacks_are_packed() -> None:
    ours, base = packed("gpt-oss", "nf4"), dense("gpt-oss")
    state = ours.state_dict()
    less = {name: tensor for name, tensor in state.items() if not name.startswith("down_proj")}
    said = ours.load_state_dict(less | {"up_proj": torch.zeros(1)}, strict=False)
    assert (sorted(said.missing_keys), said.unexpected_keys) == (["down_proj", "down_proj_bias"], ["up_proj"])
    with pytest.raises(QuantizationError, match=r"down_proj, expert 0: not a whole 4-bit weight"):
        ours.load_state_dict({name: t for name, t in state.items() if name != "down_proj"})
    again = packed("gpt-oss", "nf4", dense("gpt-oss").to("meta"))
    again.load_state_dict(base.state_dict(), assign=True)
    assert torch.equal(again(*routed()), ours(*routed()))


def test_a_state_in_pages_of_a_file_is_not_written_to(tmp_path: Path) -> None:
    """Each page that is written to would be in memory twice."""
    ours = packed("mixtral", "nf4")
    save_file(ours.state_dict(), tmp_path / "state.safetensors")
    held = {name: mapped.view(entry) for name, entry in read_header(tmp_path / "state.safetensors").items()}
    versions = {name: tensor._version for name, tensor in held.items()}
    empty = packed("mixtral", "nf4", dense("mixtral").to("meta"))
    empty.load_state_dict(held)
    assert {name: tensor._version for name, tensor in held.items()} == versions
    assert torch.equal(empty(*routed()), ours(*routed()))


def test_dense_weights_are_packed_as_they_are_assigned() -> None:
    base, whole = dense("mixtral"), packed("mixtral", "nf4")
    ours = packed("mixtral", "nf4", dense("mixtral").to("meta"))
    expected = sum(ours.nbytes_by_parameter.values())
    for name in ours.names:
        setattr(ours, name, nn.Parameter(getattr(base, name).clone(), requires_grad=False))
    assert torch.equal(ours(*routed()), whole(*routed()))
    assert sum(tensor.nbytes for tensor in ours.stored()) == expected


@pytest.mark.parametrize("family", _CLASSES)
def test_no_tokens_give_no_rows(family: str) -> None:
    hidden, chosen, shares = (tensor[:0] for tensor in routed())
    y = packed(family, "nf4")(hidden.bfloat16(), chosen, shares)
    assert (y.shape, y.dtype) == ((0, HIDDEN), torch.bfloat16)


def test_a_parameter_that_is_no_packed_stack_is_seen_as_in_the_base() -> None:
    base = dense("gpt-oss")
    ours = QuantExperts(base, ("gate_up_proj",), KINDS["nf4"], dtype=torch.float32)
    for name in ("gate_up_proj_bias", "down_proj_bias", "down_proj"):
        for e in range(EXPERTS):
            assert torch.equal(frozen_expert(ours, name, e).dense(), frozen_expert(base, name, e).dense())
    assert frozen_expert(ours, "gate_up_proj_bias", 0).dense().shape == (EXPERTS, 2 * INNER)
    assert frozen_expert(ours, "gate_up_proj", 1).dense().shape == (2 * INNER, HIDDEN)
    unfilled = packed("gpt-oss", "nf4", dense("gpt-oss").to("meta"))
    assert frozen_expert(unfilled, "gate_up_proj", 1).out_features == 2 * INNER


def test_a_cast_leaves_the_scales_alone() -> None:
    ours = packed("mixtral", "nf4-double")
    before = ours.dense("down_proj")
    ours.bfloat16()
    assert torch.equal(ours.dense("down_proj"), before.bfloat16())
    hidden, chosen, shares = routed()
    assert ours(hidden.bfloat16(), chosen, shares.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_that_is_not_finite_is_named_by_stack_and_expert(kind: str) -> None:
    base = dense("mixtral")
    base.down_proj.data[1, 0, 0] = torch.nan
    with pytest.raises(QuantizationError, match=r"^layers\.0\.experts\.down_proj, expert 1: "):
        packed("mixtral", kind, base)


def test_parts_that_fit_no_stack_are_refused() -> None:
    ours = packed("mixtral", "nf4")
    parts = ours.packed_stack("down_proj")
    with pytest.raises(QuantizationError, match="not a stack of 3 packed matrices"):
        ours.fill("down_proj", {part: tensor[:2] for part, tensor in parts.items()})
    with pytest.raises(QuantizationError, match="expert 0"):
        ours.fill("down_proj", {"weight": parts["weight"]})
    with pytest.raises(QuantizationError, match=r"found \[2, 40, 24\], expected \[3, 40, 24\]"):
        ours.pack("down_proj", torch.zeros(2, HIDDEN, INNER))


@pytest.mark.parametrize("count", [EXPERTS - 1, EXPERTS + 2])
def test_matrices_that_are_not_one_per_expert_are_refused(count: int) -> None:
    base = dense("mixtral")
    stack = stack_of(base, "down_proj", KINDS["nf4"], dtype=torch.float32, path="layers.0.experts.down_proj")
    with pytest.raises(QuantizationError, match=rf"^layers\.0\.experts\.down_proj: found {count} .*expected {EXPERTS}"):
        stack.pack(base.down_proj[0] for _ in range(count))


def test_other_modules_have_no_stacks() -> None:
    assert stacks_of(nn.Conv1d(2, 3, 4)) == ()
    assert stacks_of(packed("mixtral", "nf4")) == ()
    assert not QuantRecipe(kind="nf4").experts  # as the cards of runs before there were any are read
