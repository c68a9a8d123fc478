"""The decoder layer that most families share, and where each keeps its parts.

    x + O(attention(rotate(Q n), rotate(K n), V n)),  n = norm(x);   then   x + D(act(G m) · U m),  m = norm(x)

Llama, Mistral, Qwen 2 and 3, SmolLM, Gemma, and whatever else is built and named like them. A layer that looks so and
computes something else is found out by trying it (``models.survey``), and runs as its own code says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from truetune.adapters.projecting import projection_group
from truetune.ops.source import Normed

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


@dataclass(frozen=True)
class DecoderParts:
    """The modules of one such layer; q, k, v can be one node, and so can o, gate with up, and down."""

    attention: nn.Module
    input_norm: Normed
    q: nn.Module
    k: nn.Module
    v: nn.Module
    o: nn.Module
    q_norm: nn.Module | None  # of each head (Qwen 3)
    k_norm: nn.Module | None
    mlp_norm: Normed
    gate: nn.Module
    up: nn.Module
    down: nn.Module
    activation: str
    head_dim: int


def decoder_parts(layer: nn.Module) -> DecoderParts | None:
    """The parts of a layer that is built like this; None for any other."""
    attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    if attention is None or mlp is None or not all(hasattr(attention, name) for name in names):
        return None
    if not all(hasattr(mlp, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        return None
    if {name for name, _ in layer.named_children()} - {
        "self_attn", "mlp", "input_layernorm", "post_attention_layernorm"
    }:  # fmt: skip
        return None
    input_norm = normed(getattr(layer, "input_layernorm", None))
    mlp_norm = normed(getattr(layer, "post_attention_layernorm", None))
    activation = _activation(mlp.act_fn)
    head_dim = getattr(attention, "head_dim", None)
    if not (input_norm and mlp_norm and activation and isinstance(head_dim, int)):
        return None
    q, k, v, o = (getattr(attention, name) for name in names)
    q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    parts = DecoderParts(
        attention, input_norm, q, k, v, o, q_norm, k_norm, mlp_norm, mlp.gate_proj, mlp.up_proj, mlp.down_proj,
        activation, head_dim,
    )  # fmt: skip
    together = ((q, k, v), (o,), (parts.gate, parts.up), (parts.down,))
    return parts if all(projection_group(modules, tokens=1) for modules in together) else None


def normed(module: nn.Module | None) -> Normed | None:
    """An RMSNorm with a frozen weight, as a formula; the module itself tells which of the usual two it is.

    Without weights, on the meta device, it is taken for the first.
    """
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if module is None or weight is None or weight.requires_grad or weight.ndim != 1 or not isinstance(eps, float):
        return None
    if weight.is_meta:
        return Normed(weight, eps)
    x = torch.linspace(-1.0, 2.0, len(weight), device=weight.device).to(weight.dtype)[None]
    with torch.no_grad():
        found = module(x).float()
        normal = F.rms_norm(x.float(), (len(weight),), None, eps)
        for offset in (0.0, 1.0):
            if torch.allclose(found, normal * (offset + weight.float()), rtol=2e-2, atol=1e-5):
                return Normed(weight, eps, offset)
    return None


def _activation(function: Callable[[Tensor], Tensor]) -> str | None:
    x = torch.linspace(-4.0, 4.0, 33)
    with torch.no_grad():
        return next((name for name, f in _ACTIVATIONS.items() if torch.allclose(function(x), f(x), atol=1e-6)), None)
