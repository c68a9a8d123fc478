"""LLaMA-Adapter files of litgpt and lit-llama: prompts and gates of the top layers.

    transformer.h.N.attn.adapter_wte.weight [length, hidden]     transformer.h.N.attn.gating_factor, one number per head

The prompts' keys are at no position, so the order in which a library turns the entries of a head makes no difference.
The second version has a bias and a scale behind every linear map, the head's too, and all norms beside them:

    transformer.h.N.attn.qkv.adapter_bias [out]     lm_head.adapter_scale [vocab]     transformer.h.N.norm_1.weight
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from truetune.adapters.foreign_layers import FUSED, WITHIN, by_halves
from truetune.adapters.names import ROOT
from truetune.adapters.targets import output_head
from truetune.errors import AdapterError
from truetune.ops.frozen import frozen_weight, is_linear

_PROMPT = re.compile(r"transformer\.h\.(\d+)\.attn\.adapter_wte\.weight")
_GATE = re.compile(r"transformer\.h\.(\d+)\.attn\.gating_factor")
_SECOND = ("adapter_bias", "adapter_scale")  # of every linear layer, arXiv:2304.15010
_BEHIND = re.compile(rf"(?:transformer\.h\.(\d+)\.(.+)|lm_head)\.({'|'.join(_SECOND)})")
_NORM = re.compile(r"transformer\.(?:h\.(\d+)\.(norm_1|norm_2|rms_1|rms_2)|ln_f)\.(weight|bias|scale)")
_NORMS = {"1": "input_layernorm", "2": "post_attention_layernorm"}
_ALL_NORMS = [*_NORMS.values(), "model.norm"]
_WITHIN = WITHIN | {  # lit-llama's names
    "attn.c_proj": "self_attn.o_proj", "mlp.c_fc1": "mlp.gate_proj", "mlp.c_fc2": "mlp.up_proj",
    "mlp.c_proj": "mlp.down_proj",
}  # fmt: skip
_OWN_TYPE = "TRUETUNE_LLAMA_ADAPTER"

_FUSED_NAMES = ("attn.qkv", "attn.attn", "attn.c_attn")  # litgpt's, its older one, lit-llama's

_Found = Iterator[tuple[str, Tensor]]


def has_prompts(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a file holds a LLaMA-Adapter, of the first version or the second."""
    return any(_PROMPT.fullmatch(name) or name.endswith(_SECOND) for name in tensors)


def of_lit_prompts(
    tensors: Mapping[str, Tensor], model: nn.Module, path: Path, *, mixed_maps: bool | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and tensors as PEFT's file has them, or ours of the second version.

    Args:
        model: whose layers are named like Llama's.
        mixed_maps: whether it is of litgpt 0.5, which reads the prompts' keys and values off the wrong rows as soon as
            there is more than one head of them; None for what its names tell, which the first version's do not.
    Raises:
        AdapterError: a prompt without a gate, a model of another kind, or anything else in the file.
    """
    prompts = {int(m[1]): t for name, t in tensors.items() if (m := _PROMPT.fullmatch(name))}
    gates = {int(m[1]): t for name, t in tensors.items() if (m := _GATE.fullmatch(name))}
    rest = {name: t for name, t in tensors.items() if not (_PROMPT.fullmatch(name) or _GATE.fullmatch(name))}
    is_second = any(name.endswith(_SECOND) for name in rest)
    odd = [name for name in rest if not (is_second and (_BEHIND.fullmatch(name) or _NORM.fullmatch(name)))]
    if odd or not prompts or prompts.keys() != gates.keys() or len({tuple(t.shape) for t in prompts.values()}) > 1:
        named = odd or [f"prompts of layers {sorted(prompts)}, gates of {sorted(gates)}"]
        raise AdapterError(f"{path} is no LLaMA-Adapter of litgpt", ("found", "\n".join(named[:8])))
    by_head = next(iter(gates.values())).numel() > 1
    config = {
        "peft_type": "ADAPTION_PROMPT",
        "adapter_len": len(next(iter(prompts.values()))),
        "adapter_layers": len(prompts),
        "gates": "head" if by_head else "layer",
    }
    of_now = any(".attn.qkv." in name for name in rest)  # older files say attn.attn, or c_attn
    if of_now if mixed_maps is None else mixed_maps:
        config |= {"peft_type": _OWN_TYPE, "mixed_maps": True}
    held = {}
    for number, prompt in prompts.items():
        attention = f"{ROOT}model.layers.{number}.self_attn"
        held[f"{attention}.adaption_prompt"] = prompt[None]
        held[f"{attention}.adaption_gate"] = gates[number].reshape(-1, 1) if by_head else gates[number].reshape(1)
    if is_second:
        held |= {ROOT + name: tensor for name, tensor in _second(rest, model)}
        config |= {"peft_type": _OWN_TYPE, "llama_adapter_v2": True, "modules_to_save": _ALL_NORMS,
                   "scaled_head": any(name.startswith("lm_head.") for name in rest)}  # fmt: skip
    return config, held


def _second(rest: Mapping[str, Tensor], model: nn.Module) -> _Found:
    """``(name, tensor)`` of what the second version has beside the prompts."""
    for name, tensor in rest.items():
        if norm := _NORM.fullmatch(name):
            owner = f"model.layers.{norm[1]}.{_NORMS[norm[2][-1]]}" if norm[1] else "model.norm"
            yield f"{owner}.{'bias' if norm[3] == 'bias' else 'weight'}", tensor
        elif behind := _BEHIND.fullmatch(name):
            yield from _behind(behind[1], behind[2], behind[3], tensor, model)


def _behind(number: str | None, within: str | None, kind: str, tensor: Tensor, model: nn.Module) -> _Found:
    """The bias or the scale of one of their maps, as those of ours."""
    if number is None or within is None:
        head = output_head(model)
        path = next((own for own, module in model.named_modules() if module is head), "lm_head")
        rows = len(tensor) if head is None else min(len(tensor), frozen_weight(head).out_features)
        yield f"{path}.{kind}", tensor[:rows]  # theirs is padded, and no token is behind the rest
        return
    layer = f"model.layers.{number}"
    if within in _WITHIN:
        yield f"{layer}.{_WITHIN[within]}.{kind}", tensor
        return
    parts = [f"{layer}.self_attn.{part}" for part in FUSED] if within in _FUSED_NAMES else []
    known = dict(model.named_modules())
    sizes = [frozen_weight(known[part]).out_features for part in parts if part in known and is_linear(known[part])]
    if len(sizes) < len(FUSED) or sum(sizes) != len(tensor):
        raise AdapterError(
            f"transformer.h.{number}.{within}.{kind} [{len(tensor)}] is none of this model",
            ("expected", "a model whose layers are named like Llama's, of the file's own sizes"),
        )
    if within == "attn.attn":  # each group's queries, key and value side by side
        dim: int = known[f"{layer}.self_attn"].head_dim
        groups = tensor.view(sizes[1] // dim, -1, dim)
        tensor = torch.cat([groups[:, :-2].flatten(), groups[:, -2].flatten(), groups[:, -1].flatten()])
    for part, own in zip(parts, torch.split(tensor, sizes), strict=True):
        turned = within == "attn.c_attn" and not part.endswith(FUSED[-1])
        yield f"{part}.{kind}", by_halves(own[:, None], part, model)[:, 0] if turned else own
