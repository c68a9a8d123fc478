"""One LoRA layer: what it computes, what it leaves alone, what learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import truetune
from families import FAMILIES, distance, logits, perturb, token_rows
from truetune.adapters.inject import adapters, attach, attachment, detach
from truetune.adapters.lora import LoRALinear, LoRAParams, merge
from truetune.adapters.lora_embedding import LoRAEmbedding, merge_table
from truetune.config.lora import LoRA
from truetune.errors import AdapterError, ConfigError

LAYERS = ["linear", "conv1d", "embedding"]


def make(kind: str, *, rank: int = 4, trained: bool = True, **settings: Any) -> Any:
    """A layer of 24 -> 40 with an adapter; with B = 0 most tests below would pass by accident."""
    torch.manual_seed(0)
    if kind == "embedding":
        layer: Any = LoRAEmbedding.from_base(nn.Embedding(24, 40), rank=rank, alpha=8, **settings)
    else:
        base = Conv1D(40, 24) if kind == "conv1d" else nn.Linear(24, 40)
        layer = LoRALinear.from_base(base, rank=rank, alpha=8, **settings)
    if trained:
        perturb(layer)
    return layer


def inputs(kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(1)
    return torch.randint(0, 24, (3, 5)) if kind == "embedding" else torch.randn(3, 5, 24, dtype=dtype)


def truth(layer: Any, x: Tensor) -> Tensor:
    """y = W x + b + (alpha / r) B A x, written out in float64."""
    a, b = layer.lora_a.double(), layer.lora_b.double()
    weight = layer.base.weight.double()
    if isinstance(layer, LoRAEmbedding):
        return weight[x] + layer.scale * torch.stack([b @ a[:, i] for i in x.flatten()]).view(*x.shape, -1)
    dense = weight.T if isinstance(layer.base, Conv1D) else weight
    return torch.einsum("oi,...i->...o", dense + layer.scale * b @ a, x.double()) + layer.base.bias.double()


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_computes_the_equation(kind: str, rank: int) -> None:
    layer, x = make(kind, rank=rank), inputs(kind)
    assert layer.scale == 8 / rank
    assert (layer(x) - truth(layer, x)).abs().max() < 1e-5  # float32 sums of 24; a wrong scale is off by 0.1


@pytest.mark.parametrize("kind", LAYERS)
def test_an_untrained_adapter_changes_nothing(kind: str) -> None:
    layer, x = make(kind, trained=False), inputs(kind)
    assert torch.equal(layer(x), layer.base(x))


def test_rank_stabilised_scale_is_alpha_over_the_root_of_the_rank() -> None:
    assert make("linear", use_rslora=True).scale == 4.0
    assert make("embedding", use_rslora=True).scale == 4.0


@pytest.mark.parametrize("kind", LAYERS)
def test_the_merged_weight_is_the_live_layer(kind: str) -> None:
    layer, x = make(kind).double(), inputs(kind, torch.float64)
    live = layer(x)
    weight = layer.merged_weight()
    assert weight.shape == layer.base.weight.shape
    if kind == "embedding":
        merged = F.embedding(x, weight)
    else:
        merged = F.linear(x, weight.T if kind == "conv1d" else weight, layer.base.bias)
    assert (live - merged).abs().max() < 1e-12  # all in float64


@pytest.mark.parametrize("kind", LAYERS)
def test_forward_backward_and_merge_leave_the_base_untouched(kind: str) -> None:
    layer = make(kind)
    before = layer.base.weight.clone()
    layer(inputs(kind)).sum().backward()
    layer.merged_weight()
    assert torch.equal(layer.base.weight, before)
    assert layer.base.weight.grad is None


@pytest.mark.parametrize("kind", LAYERS)
def test_only_the_low_rank_path_learns(kind: str) -> None:
    layer = make(kind)
    layer(inputs(kind)).square().sum().backward()
    assert {name for name, p in layer.named_parameters() if p.grad is not None and p.grad.any()} == {"lora_a", "lora_b"}


@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_are_those_of_finite_differences(kind: str) -> None:
    layer = make(kind, rank=2).double()
    x = inputs(kind, torch.float64)[:1, :2]
    x.requires_grad_(kind != "embedding")

    def run(a: Tensor, b: Tensor) -> Any:
        return torch.func.functional_call(layer, {"lora_a": a, "lora_b": b}, (x,))

    assert torch.autograd.gradcheck(run, (layer.lora_a, layer.lora_b))
    if kind != "embedding":
        assert torch.autograd.gradcheck(layer, (x,))


def test_merging_rounds_once() -> None:
    """In bf16 an update of a thousandth of the weight is lost when it is rounded before it is added."""
    torch.manual_seed(0)
    weight = torch.randn(64, 64).bfloat16()
    params = LoRAParams(a=torch.randn(4, 64) * 0.03, b=torch.randn(64, 4) * 0.03, scale=2.0)
    merged, _ = merge(weight, None, params)
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, (weight.float() + 2.0 * (params.b @ params.a)).bfloat16())
    table = merge_table(weight, LoRAParams(a=params.a, b=params.b, scale=2.0))
    assert torch.equal(table, (weight.float() + 2.0 * (params.b @ params.a).T).bfloat16())


def test_dropout_acts_in_training_only() -> None:
    layer, x = make("linear", dropout=0.5), inputs("linear")
    assert torch.equal(layer.eval()(x), layer(x))
    torch.manual_seed(0)
    first = layer.train()(x)
    assert not torch.equal(first, layer(x))
    torch.manual_seed(0)
    assert torch.equal(layer(x), first)


def test_dropout_leaves_the_base_path_alone() -> None:
    layer, x = make("linear", dropout=0.5, trained=False), inputs("linear")
    assert torch.equal(layer.train()(x), layer.base(x))


@pytest.mark.parametrize("kind", LAYERS)
def test_adapters_stay_in_float32_on_a_bf16_base(kind: str) -> None:
    torch.manual_seed(0)
    base: nn.Module = {"linear": nn.Linear(24, 40), "conv1d": Conv1D(40, 24), "embedding": nn.Embedding(24, 40)}[kind]
    wrap: Any = LoRAEmbedding if kind == "embedding" else LoRALinear
    layer = wrap.from_base(base.bfloat16(), rank=4)
    perturb(layer)
    x = inputs(kind, torch.bfloat16)
    assert {p.dtype for _, p in layer.adapter_parameters()} == {torch.float32}
    assert layer(x).dtype == torch.bfloat16
    layer(x).float().square().sum().backward()
    assert layer.lora_a.grad.dtype == torch.float32


# --- on a model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_an_untrained_adapter_leaves_every_logit_of_a_model(family: str) -> None:
    model = FAMILIES[family].make()
    before = logits(model)
    truetune.attach(model, LoRA(targets=("all-linear", FAMILIES[family].table)))
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("family", ["llama-tied", "gpt2"])
def test_detaching_gives_the_base_back(family: str) -> None:
    model = FAMILIES[family].make()
    before, names = logits(model), [name for name, _ in model.named_parameters()]
    truetune.attach(model, LoRA(targets=("all-linear", FAMILIES[family].table)))
    perturb(model)
    assert distance(logits(model), before) > 0.01
    truetune.detach(model)
    assert torch.equal(logits(model), before)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == names
    assert attachment(model) is None
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_a_second_adapter_is_refused_until_the_first_is_detached() -> None:
    model = FAMILIES["llama"].make()
    truetune.attach(model, LoRA(rank=2))
    with pytest.raises(AdapterError, match=r"already carries an adapter(.|\n)*detach"):
        truetune.attach(model, LoRA(rank=2))
    truetune.detach(model)
    truetune.attach(model, LoRA(rank=2))


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        (
            "llama",
            LoRA(targets=("lm_head",), trainable=("head",)),
            "lm_head would be trained in full and get an adapter",
        ),
        ("llama-tied", LoRA(targets=("lm_head",), trainable=("embedding",)), "trained in full and get an adapter"),
        ("llama", LoRA(trainable=("bias",)), "this model has no bias"),
        ("llama", LoRA(targets=("q_proj", "nope")), "no layer called 'nope'"),
    ],
    ids=["both", "both, tied", "no bias", "no target"],
)
def test_an_attachment_that_is_refused_changes_nothing(family: str, settings: LoRA, message: str) -> None:
    model = FAMILIES[family].make()
    with pytest.raises(AdapterError, match=message):
        attach(model, settings)
    assert list(adapters(model)) == []
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("part", ["bias", "norm", "embedding", "head"])
def test_parts_trained_in_full_learn_and_nothing_else_of_the_base(part: Any) -> None:
    model = FAMILIES["phi"].make()
    attach(model, LoRA(rank=2, targets=("q_proj",), trainable=(part,)))
    model(input_ids=token_rows()).logits.square().mean().backward()
    learned = {name for name, p in model.named_parameters() if p.grad is not None and ".lora_" not in name}
    marks = {"bias": "bias", "norm": "layernorm", "embedding": "embed_tokens", "head": "lm_head"}
    assert learned
    assert all(marks[part] in name for name in learned)


def test_the_start_of_a_layer_depends_on_the_seed_and_on_no_other_layer() -> None:
    def start(seed: int, *targets: str) -> Tensor:
        model = FAMILIES["llama"].make()
        attach(model, LoRA(rank=2, targets=targets), seed=seed)
        return model.model.layers[1].self_attn.v_proj.lora_a

    assert torch.equal(start(1, "v_proj"), start(1, "q_proj", "v_proj"))
    assert not torch.equal(start(1, "v_proj"), start(2, "v_proj"))


def test_a_detached_model_can_be_taken_apart_and_put_together_in_any_order() -> None:
    model = FAMILIES["llama-tied"].make()
    attach(model, LoRA(targets=("lm_head",)), tie=False)
    detach(model)
    attach(model, LoRA(targets=("embed_tokens",)))
    assert attachment(model).tied == ("model.embed_tokens", "lm_head")  # type: ignore[union-attr]


@pytest.mark.parametrize("settings", [{"rank": 0}, {"rank_stabilised": True}, {"dropout": 1.5}])
def test_a_layer_made_alone_refuses_what_the_settings_refuse(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        LoRALinear.from_base(torch.nn.Linear(4, 4), **settings)


def test_a_layer_made_alone_takes_the_short_spelling_of_the_rank() -> None:
    assert LoRALinear.from_base(torch.nn.Linear(4, 4), rank=2).lora_a.shape == (2, 4)
