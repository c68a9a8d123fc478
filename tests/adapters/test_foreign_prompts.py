"""LLaMA-Adapter files of litgpt, against its formula written out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import truetune as tt
from families import FAMILIES, distance, logits, token_rows
from truetune.adapters import files, foreign
from truetune.adapters.rotary import turned
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


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (state() | {"transformer.h.0.attn.proj.adapter_scale": torch.ones(3)}, "second version"),
        ({"lm_head.adapter_bias": torch.ones(3)}, "second version"),
        (state() | {"transformer.h.0.norm_1.weight": torch.ones(3)}, "no LLaMA-Adapter of litgpt"),
        ({k: t for k, t in state().items() if "gating" not in k}, "no LLaMA-Adapter of litgpt"),
        (state(layers=(0,)), "does not fit this model"),  # one layer, and not the last
        (state(shape=(3, 1)), "does not fit this model"),
    ],
    ids=["scales", "biases", "a norm", "no gate", "another layer", "other heads"],
)
def test_what_can_not_be_read_is_named(tensors: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    torch.save(tensors, tmp_path / "adapter.pt")
    with pytest.raises(AdapterError, match=message):
        foreign.load(FAMILIES["llama"].make(), tmp_path / "adapter.pt")
