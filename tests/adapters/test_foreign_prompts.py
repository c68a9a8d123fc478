"""LLaMA-Adapter files of litgpt, against its formula written out."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import truetune as tt
from families import FAMILIES, distance, logits, perturb, token_rows
from truetune.adapters import files, foreign, tensors
from truetune.adapters.inject import attachment
from truetune.adapters.rotary import turned
from truetune.config.other_methods import LlamaAdapter
from truetune.errors import AdapterError

LENGTH, HEADS, DIM = 5, 4, 8


def state(layers: tuple[int, ...] = (1,), shape: tuple[int, ...] = (1, 1, HEADS, 1)) -> dict[str, Tensor]:
    """As litgpt writes it; lit-llama's gates are [1, heads, 1, 1], and one number in its first version."""
    draw = torch.Generator().manual_seed(4)
    made = {}
    for layer in layers:
        made[f"transformer.h.{layer}.attn.adapter_wte.weight"] = torch.randn(LENGTH, HEADS * DIM, generator=draw)
        made[f"transformer.h.{layer}.attn.gating_factor"] = torch.randn(shape, generator=draw)
    return made


def beside(attention: Any, x: Tensor, rotary: tuple[Tensor, Tensor], prompt: Tensor, gate: Tensor) -> Tensor:
    """litgpt's attention to the prompts: gate · sdpa(q, k(P), v(P)) by heads, through the last map."""
    rows, count, _ = x.shape
    q = attention.q_proj(x).view(rows, count, HEADS, DIM)
    q = turned(q, *(t.unsqueeze(-2) for t in rotary)).transpose(1, 2)
    k, v = (m(prompt).view(LENGTH, -1, DIM).repeat_interleave(2, dim=1).transpose(0, 1)
            for m in (attention.k_proj, attention.v_proj))  # fmt: skip
    y = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(DIM), dim=-1) @ v
    gated: Tensor = gate.reshape(1, -1, 1, 1) * y
    return F.linear(gated.transpose(1, 2).flatten(2), attention.o_proj.weight)


@pytest.mark.parametrize("shape", [(1, 1, HEADS, 1), (1, HEADS, 1, 1), (1,)], ids=["litgpt", "lit-llama", "its first"])
def test_a_file_answers_by_its_formula(shape: tuple[int, ...], tmp_path: Path) -> None:
    tensors = state(shape=shape)
    torch.save({"model": tensors}, tmp_path / "lit_model_adapter_finetuned.bin")
    model, plain = FAMILIES["llama"].make(), FAMILIES["llama"].make()
    foreign.load(model, tmp_path / "lit_model_adapter_finetuned.bin")
    prompt, gate = tensors.values()

    def add(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        x = kwargs.get("hidden_states", args[0] if args else None)
        return (output[0] + beside(module, x, kwargs["position_embeddings"], prompt, gate), *output[1:])

    before = logits(plain)
    plain.model.layers[1].self_attn.register_forward_hook(add, with_kwargs=True)
    assert distance(logits(model), logits(plain)) <= 1e-5
    assert distance(logits(model), before) > 0.01
    tt.save_adapter(model, str(tmp_path / "saved"))
    again = FAMILIES["llama"].make()
    tt.load_adapter(again, str(tmp_path / "saved"))
    assert torch.equal(logits(again, token_rows()), logits(model, token_rows()))
    assert files.read(tmp_path / "saved").config.get("gates") == ("head" if len(shape) > 1 else None)


def second(model: Any, style: str) -> dict[str, Tensor]:
    """What litgpt 0.5, an older one or lit-llama would have written of a model with the second version on it."""
    held = {key.removeprefix("base_model.model."): tensor for key, tensor in tensors.to_file(model).items()}
    if style == "lit-llama":
        names = {"self_attn.o_proj": "attn.c_proj", "mlp.gate_proj": "mlp.c_fc1", "mlp.up_proj": "mlp.c_fc2",
                 "mlp.down_proj": "mlp.c_proj", "input_layernorm.weight": "rms_1.scale",
                 "post_attention_layernorm.weight": "rms_2.scale"}  # fmt: skip
    else:
        names = {
            "self_attn.o_proj": "attn.proj", "mlp.gate_proj": "mlp.fc_1", "mlp.up_proj": "mlp.fc_2",
            "mlp.down_proj": "mlp.proj", "input_layernorm": "norm_1", "post_attention_layernorm": "norm_2",
        }  # fmt: skip
    names |= {"self_attn.adaption_prompt": "attn.adapter_wte.weight", "self_attn.adaption_gate": "attn.gating_factor",
              "model.norm.weight": "transformer.ln_f." + ("scale" if style == "lit-llama" else "weight")}  # fmt: skip
    found = {}
    for key, tensor in held.items():
        if re.search(r"\.[qkv]_proj\.", key):
            continue
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        found[key.replace("model.layers.", "transformer.h.")] = tensor[0] if "wte" in key else tensor
    for layer, kind in itertools.product(range(2), ("adapter_bias", "adapter_scale")):
        q, k, v = (held[f"model.layers.{layer}.self_attn.{part}_proj.{kind}"] for part in "qkv")
        if style == "lit-llama":  # neighbours where transformers has halves
            q, k = (t.view(-1, 2, DIM // 2).transpose(1, 2).flatten() for t in (q, k))
        by_group = [torch.cat(each) for each in zip(*(t.chunk(2) for t in (q, k, v)), strict=True)]
        fused = {"litgpt": "qkv", "older litgpt": "attn", "lit-llama": "c_attn"}[style]
        found[f"transformer.h.{layer}.attn.{fused}.{kind}"] = torch.cat(
            by_group if style == "older litgpt" else [q, k, v]
        )
    return found


@pytest.mark.parametrize("style", ["litgpt", "older litgpt", "lit-llama"])
def test_the_second_version_is_read_whole(style: str, tmp_path: Path) -> None:
    settings = LlamaAdapter(
        adapter_length=LENGTH, adapter_layers=1, llama_adapter_v2=True, scaled_head=True, gates="head",
        mixed_maps=style == "litgpt",
    )  # fmt: skip
    model, again = FAMILIES["llama"].make(), FAMILIES["llama"].make()
    before = logits(model)
    tt.attach(model, settings)
    perturb(model)
    written = second(model, style)
    if style == "litgpt":  # whose vocabulary is padded
        written |= {name: torch.cat([t, torch.ones(8)]) for name, t in written.items() if name.startswith("lm_head")}
    torch.save({"model": written}, tmp_path / "lit_model.pth.adapter_v2")
    foreign.load(again, tmp_path / "lit_model.pth.adapter_v2")
    assert torch.equal(logits(again), logits(model))
    assert distance(logits(model), before) > 0.01
    assert files.from_peft(tensors_config(again), tmp_path) == settings


def tensors_config(model: Any) -> dict[str, Any]:
    """The settings as they would be written."""
    attached = attachment(model)
    assert attached is not None
    return files.to_peft(model, attached, base=None)


def test_mixed_maps_are_the_rows_that_litgpt_takes() -> None:
    """Its three maps' outputs stand one after the other, and it reads them as if by groups of heads."""
    model = FAMILIES["llama"].make()
    tt.attach(model, LlamaAdapter(adapter_length=LENGTH, adapter_layers=1, mixed_maps=True))
    perturb(model)
    attention = model.model.layers[1].self_attn
    base = attention.base
    with torch.no_grad():
        rows = torch.cat([m(attention.prompt[0]) for m in (base.q_proj, base.k_proj, base.v_proj)], -1)
        key, value = attention._keys_and_values(attention.prompt[0])
    for group, first in ((0, 0), (1, 4 * DIM)):  # two queries, a key and a value of each
        assert torch.equal(key[:, group], rows[:, first + 2 * DIM : first + 3 * DIM])
        assert torch.equal(value[:, group], rows[:, first + 3 * DIM : first + 4 * DIM])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (state() | {"transformer.h.0.attn.proj.adapter_scale": torch.ones(3)}, "does not fit this model"),
        (state() | {"transformer.h.0.attn.qkv.adapter_scale": torch.ones(3)}, "is none of this model"),
        (state() | {"transformer.h.0.other.adapter_scale": torch.ones(3)}, "is none of this model"),
        ({"lm_head.adapter_bias": torch.ones(3)}, "no LLaMA-Adapter of litgpt"),
        (state() | {"transformer.h.0.norm_1.weight": torch.ones(3)}, "no LLaMA-Adapter of litgpt"),
        ({k: t for k, t in state().items() if "gating" not in k}, "no LLaMA-Adapter of litgpt"),
        (state(layers=(0,)), "does not fit this model"),  # one layer, and not the last
        (state(shape=(3, 1)), "does not fit this model"),
    ],
    ids=["few scales", "sizes", "a map", "no prompts", "a norm", "no gate", "another layer", "other heads"],
)
def test_what_can_not_be_read_is_named(tensors: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    torch.save(tensors, tmp_path / "adapter.pt")
    with pytest.raises(AdapterError, match=message):
        foreign.load(FAMILIES["llama"].make(), tmp_path / "adapter.pt")
