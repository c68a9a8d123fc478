"""LoRA files of loralib, litgpt and lit-llama, against what their own layers compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

import truetune as tt
from families import FAMILIES, distance, logits
from method_checks import CLOSE
from truetune.adapters import files, foreign
from truetune.adapters.foreign_layers import of_loralib
from truetune.adapters.inject import trainable
from truetune.errors import AdapterError

ALPHA = 6.0


def draws(*shape: int, seed: int) -> Tensor:
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check(model: PreTrainedModel, deltas: dict[str, Tensor], path: Path, **settings: Any) -> PreTrainedModel:
    """A model with the file on it answers as one whose weights were changed by hand; deltas are [out, in]."""
    name = type(model).__name__
    family = {"LlamaForCausalLM": "llama", "GPT2LMHeadModel": "gpt2", "BloomForCausalLM": "bloom"}[name]
    expected = FAMILIES[family].make()
    with torch.no_grad():
        for layer, delta in deltas.items():
            weight: Any = expected.get_submodule(layer).weight
            weight += delta.T if weight.shape != delta.shape or family == "gpt2" else delta
    before = logits(model)
    foreign.load(model, path, **settings)
    assert distance(logits(model), logits(expected)) <= CLOSE
    assert distance(logits(model), before) > 0.01
    return model


# --- loralib ------------------------------------------------------------------------------------------------------


def loralib_linear(model: nn.Module, names: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """``lora_state_dict`` of a model with ``lora.Linear`` in place of these, and what each adds to W."""
    state, deltas = {}, {}
    for i, (path, layer) in enumerate(model.named_modules()):
        if path.endswith(names):
            out, inner = layer.weight.shape  # type: ignore[union-attr,misc]
            a, b = draws(3, inner, seed=i), draws(out, 3, seed=i + 1000)
            state |= {f"{path}.lora_A": a, f"{path}.lora_B": b}
            deltas[path] = ALPHA / 3 * b @ a
    return state, deltas


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_state_of_loralib_is_read(suffix: str, tmp_path: Path) -> None:
    model = FAMILIES["llama"].make()
    state, deltas = loralib_linear(model, ("q_proj", "v_proj"))
    path = tmp_path / f"lora.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(state, path)  # type: ignore[operator]
    check(model, deltas, path, alpha=ALPHA)
    assert sum(trainable(model).values()) == sum(t.numel() for t in state.values())


def test_a_table_of_loralib_is_read(tmp_path: Path) -> None:
    model = FAMILIES["llama"].make()
    a, b = draws(3, 128, seed=1), draws(32, 3, seed=2)
    torch.save({"model.embed_tokens.lora_A": a, "model.embed_tokens.lora_B": b}, tmp_path / "lora.pt")
    check(model, {"model.embed_tokens": ALPHA / 3 * (b @ a).T}, tmp_path / "lora.pt", alpha=ALPHA)


@pytest.mark.parametrize("enabled", [[True, False, True], [False, True, False], [True, True, True]], ids=str)
@pytest.mark.parametrize(("family", "leaf"), [("gpt2", "attn.c_attn"), ("bloom", "query_key_value")])
def test_merged_linear_is_read_by_its_thirds(family: str, leaf: str, enabled: list[bool], tmp_path: Path) -> None:
    """As loralib computes it: a convolution of width 1 in groups, spread over the enabled thirds of the rows."""
    model, state, deltas, count = FAMILIES[family].make(), {}, {}, sum(enabled)
    for i, (path, _) in enumerate(model.named_modules()):
        if path.endswith(leaf):
            a, b = draws(2 * count, 32, seed=i), draws(32 * count, 2, seed=i + 1000)
            state |= {f"{path}.lora_A": a, f"{path}.lora_B": b}
            rows = torch.zeros(96, dtype=torch.bool).view(3, -1)
            rows[enabled] = True
            deltas[path] = torch.zeros(96, 32)
            deltas[path][rows.flatten()] = ALPHA / 2 * F.conv1d(a[None], b[..., None], groups=count)[0]
    torch.save(state, tmp_path / "lora.pt")
    check(model, deltas, tmp_path / "lora.pt", alpha=ALPHA, enable_lora=enabled)
    files.save(model, tmp_path / "ours", base=None)  # and may go on as an adapter of ours
    again = FAMILIES[family].make()
    files.load(again, files.read(tmp_path / "ours"))
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("k", [1, 3])
def test_a_square_kernel_of_loralib_is_one_of_a_larger_rank(k: int) -> None:
    conv, r = nn.Conv2d(4, 6, k), 2
    a, b = draws(r * k, 4 * k, seed=1), draws(6 * k, r * k, seed=2)
    (found,) = of_loralib({"0": (a, b)}, nn.Sequential(conv), None)
    assert (found.rank, found.widened) == (r * k * k, k * k)
    layer = tt.nn.LoRAConv2d.from_base(conv, rank=found.rank, alpha=ALPHA * found.widened)
    with torch.no_grad():
        layer.lora_a.copy_(found.a)
        layer.lora_b.copy_(found.b)
    expected = conv.weight + (b @ a).view(conv.weight.shape) * ALPHA / r
    torch.testing.assert_close(layer.merged_weight(), expected)
    x = torch.randn(2, 4, 7, 7)
    torch.testing.assert_close(layer(x), F.conv2d(x, expected, conv.bias), rtol=1e-4, atol=1e-5)


def test_biases_that_loralib_trained_come_along_when_they_are_all(tmp_path: Path) -> None:
    model = FAMILIES["gpt2"].make()
    paths = [path for path, _ in model.named_modules() if path.endswith("attn.c_proj")]
    state = {f"{path}.lora_A": draws(2, 32, seed=1) for path in paths}
    state |= {f"{path}.lora_B": draws(32, 2, seed=2) for path in paths}
    biases = {name: draws(*p.shape, seed=3) for name, p in model.named_parameters() if name.endswith(".bias")}
    torch.save(state | biases, tmp_path / "all.pt")
    foreign.load(model, tmp_path / "all.pt", alpha=ALPHA)
    found = {name.replace(".base.", "."): p for name, p in model.named_parameters()}
    assert all(torch.equal(found[name], bias) for name, bias in biases.items())

    torch.save(state | {f"{paths[0]}.bias": draws(32, seed=3)}, tmp_path / "lora_only.pt")
    with pytest.raises(AdapterError, match=r"holds 1 biases(.|\n)*bias='lora_only' is not implemented"):
        foreign.load(FAMILIES["gpt2"].make(), tmp_path / "lora_only.pt", alpha=ALPHA)


# --- litgpt and lit-llama -----------------------------------------------------------------------------------------


def lit(model: Any, enabled: tuple[bool, bool, bool], name: str, *, others: bool) -> tuple[dict[str, Tensor], Any]:
    """A state as litgpt saves it, and what each of transformers' layers gets: rows of B in the order q, k, v."""
    state: dict[str, Tensor] = {}
    deltas: dict[str, Tensor] = {}

    def add(path: str, ours: tuple[str, ...], seed: int) -> None:
        sizes = [model.get_submodule(one).out_features for one in ours]
        inner = model.get_submodule(ours[0]).in_features
        a, b = draws(2 * len(ours), inner, seed=seed), draws(sum(sizes), 2, seed=seed + 1000)
        state[f"{path}.lora_A"], state[f"{path}.lora_B"] = a, b
        for one, own, beside in zip(ours, a.split(2), b.split(sizes), strict=True):
            deltas[one] = ALPHA / 2 * beside @ own

    for n in range(2):
        layer, there = f"model.layers.{n}", f"transformer.h.{n}"
        heads = [f"{layer}.self_attn.{part}_proj" for part, on in zip("qkv", enabled, strict=True) if on]
        add(f"{there}.attn.{name}", tuple(heads), n)
        if others:
            add(f"{there}.attn.proj", (f"{layer}.self_attn.o_proj",), n + 10)
            for i, (own, theirs) in enumerate((("fc_1", "gate_proj"), ("fc_2", "up_proj"), ("proj", "down_proj"))):
                add(f"{there}.mlp.{own}", (f"{layer}.mlp.{theirs}",), n + 20 + 10 * i)
    if others:
        add("lm_head", ("lm_head",), 77)
    return state, deltas


@pytest.mark.parametrize("name", ["qkv", "attn"])
@pytest.mark.parametrize("others", [False, True], ids=["attention", "all"])
@pytest.mark.parametrize("enabled", [(True, False, True), (True, True, True), (False, True, True)], ids=str)
def test_a_state_of_litgpt_is_read_with_what_stands_beside_it(
    enabled: tuple[bool, bool, bool], others: bool, name: str, tmp_path: Path
) -> None:
    """Two query heads share a key and a value, so the parts have different sizes."""
    model = FAMILIES["llama"].make()
    state, deltas = lit(model, enabled, name, others=others)
    torch.save({"model": state}, tmp_path / "lit_model.pth.lora")
    known = {f"lora_{part}": on for part, on in zip(("query", "key", "value"), enabled, strict=True)}
    (tmp_path / "hyperparameters.yaml").write_text(yaml.safe_dump({"lora_alpha": int(ALPHA), "lora_r": 2, **known}))
    check(model, deltas, tmp_path / "lit_model.pth.lora")


def test_a_state_of_lit_llama_is_turned_to_transformers_order_of_a_heads_rows(tmp_path: Path) -> None:
    """Meta's rotary positions turn neighbours, transformers' the two halves: scores of both must be the same."""
    model = FAMILIES["llama"].make(num_key_value_heads=4)
    state, _ = lit(model, (True, False, True), "c_attn", others=False)
    torch.save(state, tmp_path / "lit-llama-lora-finetuned.pth")
    foreign.load(model, tmp_path / "lit-llama-lora-finetuned.pth", alpha=ALPHA)
    for n in range(2):
        a, b = state[f"transformer.h.{n}.attn.c_attn.lora_A"], state[f"transformer.h.{n}.attn.c_attn.lora_B"]
        q, v = (model.get_submodule(f"model.layers.{n}.self_attn.{part}_proj") for part in "qv")
        assert torch.equal(v.lora_b, b[32:])
        x, angles = draws(5, 32, seed=3), torch.randn(5, 4)
        theirs = (x @ a[:2].T @ b[:32].T).view(5, 4, 4, 2)  # [token, head, pair, 2]
        turned = torch.view_as_real(torch.view_as_complex(theirs) * torch.polar(torch.ones(5, 1, 4), angles[:, None]))
        first, second = (x @ q.lora_a.T @ q.lora_b.T).view(5, 4, 2, 4).unbind(2)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        halves = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1)
        torch.testing.assert_close(halves, turned)


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "settings", "message"),
    [
        ({"x.lora_A": (2, 4), "x.lora_B": (4, 2)}, {"alpha": 1.0}, "the model lacks 1 of the 1 adapted layers"),
        ({"x.lora_A": (2, 4)}, {"alpha": 1.0}, "is no LoRA of loralib or litgpt"),
        ({"x.weight": (2, 4)}, {"alpha": 1.0}, "is no LoRA of loralib or litgpt"),
        ({"lm_head.lora_A": (2, 32), "lm_head.lora_B": (128, 2)}, {}, r"does not say its alpha(.|\n)*alpha="),
        ({"lm_head.lora_A": (4, 32), "lm_head.lora_B": (64, 2)}, {"alpha": 1.0}, r"in parts(.|\n)*enable_lora="),
        (
            {"lm_head.lora_A": (4, 32), "lm_head.lora_B": (64, 2)},
            {"alpha": 1.0, "enable_lora": [True, False]},
            "are not those of 1 of 2 parts",
        ),
        (
            {"transformer.h.0.attn.qkv.lora_A": (2, 32), "transformer.h.0.attn.qkv.lora_B": (32, 2)},
            {"alpha": 1.0},
            r"adapted in one part(.|\n)*enable_lora=\[True, False, False\]",
        ),
        (
            {"transformer.h.0.attn.qkv.lora_A": (4, 32), "transformer.h.0.attn.qkv.lora_B": (64, 2)},
            {"alpha": 1.0},
            r"do not fit .*q_proj, .*v_proj",
        ),
    ],
)  # fmt: skip
def test_what_it_cant_read_is_refused(
    state: dict[str, tuple[int, ...]], settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    torch.save({name: torch.zeros(shape) for name, shape in state.items()}, tmp_path / "x.pt")
    with pytest.raises(AdapterError, match=message):
        foreign.load(FAMILIES["llama"].make(), tmp_path / "x.pt", **settings)


def test_litgpts_layers_on_another_family_are_refused(tmp_path: Path) -> None:
    state, _ = lit(FAMILIES["llama"].make(), (True, False, True), "qkv", others=False)
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(AdapterError, match="models whose layers are named like Llama's"):
        foreign.load(FAMILIES["bloom"].make(), tmp_path / "x.pth", alpha=1.0)


def test_a_pickle_of_more_than_tensors_is_not_unpickled(tmp_path: Path) -> None:
    torch.save({"x.lora_A": Path("x")}, tmp_path / "x.pt")
    with pytest.raises(AdapterError, match=r"x.pt can't be read"):
        foreign.load(FAMILIES["llama"].make(), tmp_path / "x.pt", alpha=1.0)
