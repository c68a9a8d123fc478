"""LoRA on experts that are one parameter: PEFT's ``target_parameters``, both ways, and what it leaves alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import GptOssConfig, MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig

import truetune
from families import Family, perturb
from peft_peer import trained_by, unwarned
from truetune.adapters import files
from truetune.adapters.expert_lora import ExpertsLoRA, pairs_of, stacked
from truetune.adapters.inject import adapters, attachment
from truetune.adapters.tensors import changes, to_file
from truetune.config.lora import LoRA
from truetune.errors import AdapterError

_SMALL: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "num_experts_per_tok": 2,
}  # fmt: skip
MIXTURES = {
    "mixtral": Family(MixtralConfig, _SMALL | {"num_local_experts": 4}, ("q_proj",)),
    "qwen3-moe": Family(Qwen3MoeConfig, _SMALL | {"moe_intermediate_size": 12, "num_experts": 4}, ("q_proj",)),
    "gpt-oss": Family(GptOssConfig, _SMALL | {"num_local_experts": 4, "sliding_window": 8}, ("q_proj",)),
}
BOTH = ("experts.gate_up_proj", "experts.down_proj")
IDS = torch.arange(20).view(2, 10) % 128

mixtures = pytest.mark.parametrize("family", MIXTURES)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def adapted(family: str, **settings: Any) -> Any:
    model = MIXTURES[family].make()
    truetune.attach(model, LoRA(**({"rank": 3, "targets": ("q_proj",), "target_parameters": BOTH} | settings)))
    perturb(model)
    return model


def by_peft(family: str, **settings: Any) -> Any:
    with unwarned():
        config = peft.LoraConfig(**({"r": 3, "lora_alpha": 32, "target_modules": ["q_proj"]} | settings))
        return peft.get_peft_model(MIXTURES[family].make(), config)


@mixtures
@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys:RuntimeWarning")  # which PEFT does apply
@pytest.mark.parametrize(
    "settings",
    [
        {"target_parameters": [*BOTH]},
        {"target_parameters": ["mlp.experts.down_proj"], "target_modules": [], "use_rslora": True},
        {"target_parameters": [*BOTH], "rank_pattern": {"experts.down_proj": 2}, "alpha_pattern": {"down_proj": 5}},
    ],
    ids=["both", "one alone", "ranks by parameter"],
)
def test_a_file_of_peft_computes_what_it_does_there(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    theirs = by_peft(family, **settings)
    perturb(theirs)
    with unwarned():
        theirs.save_pretrained(str(tmp_path))
    ours = MIXTURES[family].make()
    before = logits(ours)
    files.load(ours, files.read(tmp_path))
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-5)
    assert (logits(ours) - before).abs().max() > 0.01
    assert sum(truetune.trainable(ours).values()) == trained_by(theirs)


@mixtures
@pytest.mark.parametrize("settings", [{}, {"targets": ("none",), "target_parameters": BOTH[:1], "use_rslora": True}])
def test_peft_reads_our_file(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    ours = adapted(family, **settings)
    files.save(ours, tmp_path, base=None)
    with unwarned():
        theirs = peft.PeftModel.from_pretrained(MIXTURES[family].make(), str(tmp_path))
    torch.testing.assert_close(logits(theirs), logits(ours), atol=1e-5, rtol=1e-5)
    again = MIXTURES[family].make()
    files.load(again, files.read(tmp_path))
    assert torch.equal(logits(again), logits(ours))


@mixtures
def test_gradients_are_those_of_the_sum(family: str) -> None:
    """Of the routed products, and of W + s B A taken as a whole."""
    model, grads = adapted(family), []
    for is_routed in (True, False):
        for _, layer in adapters(model):
            if isinstance(layer, ExpertsLoRA):
                assert layer.is_routed or grads
                layer.is_routed = is_routed
        model.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
    assert any("experts" in name for name in grads[0])
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], atol=1e-6, rtol=1e-4)
        assert grad.abs().max() > 0, name


@mixtures
def test_an_untrained_adapter_changes_nothing_and_leaves_no_trace(family: str) -> None:
    model = MIXTURES[family].make()
    before = logits(model)
    truetune.attach(model, LoRA(rank=2, target_parameters=BOTH))
    torch.testing.assert_close(logits(model), before, atol=1e-6, rtol=1e-6)
    truetune.detach(model)
    assert torch.equal(logits(model), before)


@mixtures
def test_merged_experts_compute_the_same(family: str) -> None:
    model = adapted(family)
    wanted, folded = logits(model), changes(model, to_file(model))
    truetune.detach(model)
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name, change in folded.items():
            named[name].copy_(change(named[name].clone()))
    assert sum("experts" in name for name in folded) == 4
    torch.testing.assert_close(logits(model), wanted, atol=1e-5, rtol=1e-5)


def test_no_product_of_all_experts_is_formed() -> None:
    """The largest tensor that a forward and its backward make is smaller than one stack of experts."""
    model = adapted("mixtral", targets=("none",))
    layer = next(layer for _, layer in adapters(model) if isinstance(layer, ExpertsLoRA))
    whole = layer.base.gate_up_proj.numel()
    largest = 0

    class Watched(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            made = func(*args, **(kwargs or {}))
            if isinstance(made, Tensor) and made.untyped_storage().data_ptr() != layer.base.gate_up_proj.data_ptr():
                largest = max(largest, made.numel() if func._schema.name not in VIEWS else 0)
            return made

    x = torch.randn(3, 16, requires_grad=True)
    with Watched():
        layer(x, torch.tensor([[0, 1], [1, 2], [0, 2]]), torch.rand(3, 2)).sum().backward()
    assert 0 < largest < whole


VIEWS = {"aten::view", "aten::detach", "aten::alias", "aten::t", "aten::transpose", "aten::select"}


def test_pairs_and_stacks_are_each_others_inverse() -> None:
    a, b = torch.randn(6, 5), torch.randn(7, 6)
    again = stacked(pairs_of(a, b, 2))
    assert torch.equal(again[0], a)
    assert torch.equal(again[1], b)
    assert torch.equal(pairs_of(a, b, 2)[1][1], b[:, [1, 4]])  # as PEFT: the expert changes fastest


def test_parameters_of_other_modules_get_the_sum() -> None:
    """A router is a matrix, whose module takes one argument."""
    model = adapted("mixtral", target_parameters=("mlp.gate.weight",), targets=("none",))
    wanted = logits(model)
    path, layer = next(iter(adapters(model)))
    assert path.endswith("mlp.gate")
    assert not layer.is_routed
    folded = changes(model, to_file(model))
    truetune.detach(model)
    for name, change in folded.items():
        parameter = dict(model.named_parameters())[name]
        parameter.data = change(parameter.data)
    torch.testing.assert_close(logits(model), wanted, atol=1e-5, rtol=1e-5)


def test_training_lowers_the_loss_and_the_base_stays() -> None:
    model = MIXTURES["qwen3-moe"].make()
    before = {name: p.clone() for name, p in model.named_parameters()}
    truetune.attach(model, LoRA(rank=4, targets=("none",), target_parameters=BOTH))
    own = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(own, lr=0.02), []
    for _ in range(12):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    truetune.detach(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe", "gpt-oss"])
def test_all_linear_leaves_experts_and_routers_alone(family: str) -> None:
    model = MIXTURES[family].make()
    truetune.attach(model, LoRA(rank=2))
    attached = attachment(model)
    assert attached is not None
    assert {path.rpartition(".")[2] for path in attached.sites} == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_all_linear_leaves_a_router_that_is_a_layer_alone() -> None:
    shape = _SMALL | {"moe_intermediate_size": 12, "num_experts": 4, "shared_expert_intermediate_size": 12}
    model = Family(Qwen2MoeConfig, shape, ()).make()
    assert isinstance(model.model.layers[0].mlp.shared_expert_gate, nn.Linear)
    truetune.attach(model, LoRA(rank=2))
    attached = attachment(model)
    assert attached is not None
    assert not [path for path in attached.sites if path.endswith("gate")]
    assert [path for path in attached.sites if path.endswith("shared_expert.gate_proj")]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"target_parameters": ("experts.gate_up",)}, "no parameter called 'experts.gate_up'"),
        ({"target_parameters": ("q_proj.weight",)}, "belongs to a Linear, which is a layer"),
        ({"target_parameters": ("input_layernorm.weight",)}, "has 1 dimension"),
        ({"dropout": 0.1}, "--dropout 0.1: not beside --target-parameters"),
        ({"lora_bias": True}, "--lora-bias: not beside"),
        ({"init": "pissa"}, "--init pissa: not beside"),
        ({"rank_pattern": ("experts=4",)}, "--rank-pattern: 'experts' is none"),
    ],
)
def test_what_can_not_be_is_refused_and_nothing_is_changed(settings: dict[str, Any], words: str) -> None:
    model = MIXTURES["mixtral"].make()
    with pytest.raises(AdapterError, match=words):
        truetune.attach(model, LoRA(**({"target_parameters": BOTH} | settings)))
    assert not list(adapters(model))
    with pytest.raises(AdapterError, match="--method dora: not beside"):
        truetune.attach(model, truetune.DoRA(target_parameters=BOTH))


def test_a_model_without_such_parameters_says_so() -> None:
    from families import FAMILIES

    with pytest.raises(AdapterError, match="no parameter that is no layer's"):
        truetune.attach(FAMILIES["llama"].make(), LoRA(target_parameters=BOTH))
