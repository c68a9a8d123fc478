"""LLaMA-Adapter files of litgpt and lit-llama: prompts and gates of the top layers.

    transformer.h.N.attn.adapter_wte.weight [length, hidden]     transformer.h.N.attn.gating_factor, one number per head

The prompts' keys are at no position, so the order in which a library turns the entries of a head makes no difference.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from truetune.errors import AdapterError

_PROMPT = re.compile(r"transformer\.h\.(\d+)\.attn\.adapter_wte\.weight")
_GATE = re.compile(r"transformer\.h\.(\d+)\.attn\.gating_factor")
_SECOND = ("adapter_bias", "adapter_scale")  # of every linear layer, arXiv:2304.15010


def has_prompts(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a file holds a LLaMA-Adapter, of the first version or the second."""
    return any(_PROMPT.fullmatch(name) or name.endswith(_SECOND) for name in tensors)


def of_lit_prompts(tensors: Mapping[str, Tensor], path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and tensors as PEFT's file has them, for a model whose layers are named like Llama's.

    Raises:
        AdapterError: tensors of the second version, a prompt without a gate, or anything else in the file.
    """
    if second := sorted(name for name in tensors if name.endswith(_SECOND)):
        raise AdapterError(
            f"{path} is a LLaMA-Adapter of the second version: litgpt's layout of it, with queries, keys and "
            "values in one layer and a head that is scaled as well, is not read (--llama-adapter-v2 trains one)",
            ("found", "\n".join(second[:4]) + (f"\n… and {len(second) - 4} more" if len(second) > 4 else "")),
        )
    prompts = {int(m[1]): t for name, t in tensors.items() if (m := _PROMPT.fullmatch(name))}
    gates = {int(m[1]): t for name, t in tensors.items() if (m := _GATE.fullmatch(name))}
    odd = [name for name in tensors if not (_PROMPT.fullmatch(name) or _GATE.fullmatch(name))]
    if odd or prompts.keys() != gates.keys() or len({tuple(t.shape) for t in prompts.values()}) > 1:
        named = odd or [f"prompts of layers {sorted(prompts)}, gates of {sorted(gates)}"]
        raise AdapterError(f"{path} is no LLaMA-Adapter of litgpt", ("found", "\n".join(named[:8])))
    by_head = next(iter(gates.values())).numel() > 1
    config = {
        "peft_type": "ADAPTION_PROMPT",
        "adapter_len": len(next(iter(prompts.values()))),
        "adapter_layers": len(prompts),
        "gates": "head" if by_head else "layer",
    }
    held = {}
    for number, prompt in prompts.items():
        attention = f"base_model.model.model.layers.{number}.self_attn"
        held[f"{attention}.adaption_prompt"] = prompt[None]
        held[f"{attention}.adaption_gate"] = gates[number].reshape(-1, 1) if by_head else gates[number].reshape(1)
    return config, held
