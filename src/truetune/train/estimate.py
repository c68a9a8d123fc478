"""What a run will need, before it starts: parameters, memory, time.

Memory is the sum of what is known exactly (weights, adapter, gradients, optimizer state) and of the activations of one
micro-batch, counted per token from the layer's shapes as they are kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from truetune.models.layers import decoder_layers
from truetune.optim.choose import state_bytes
from truetune.quant.packed import Packed

# What oneDNN keeps of the kernels it compiles for low-precision products on a CPU, one per size it meets.
KERNELS_MB = 120.0
# Logits of a chunk and what its softmax needs beside them.
LOGITS_MB = 140.0


@dataclass(frozen=True)
class Estimate:
    """All in MB (10^6 bytes)."""

    process: float  # what the process holds before a model is loaded
    weights: float
    trained: float  # parameters and gradients in float32, and the optimizer's state
    activations: float  # kept for the backward, and in use at its busiest moment

    @property
    def total(self) -> float:
        """The peak."""
        return self.process + self.weights + self.trained + self.activations


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """``(all, trained)``; a shared tensor counts once."""
    parameters = {id(p): p for p in model.parameters()}.values()
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What a run takes to its steps, however it saves memory.

    Attributes:
        storage: dtype of the frozen weights.
        micro_tokens: tokens of the largest micro-batch.
        trained_share: share of its tokens that carry a loss, and so need logits.
        process: MB held before a model is loaded.
        fused: the layers are computed from fused parts.
        copied: MB of the base that have to be in memory even where it is streamed.
        optim: name of the optimizer.
    """

    storage: torch.dtype
    micro_tokens: int
    trained_share: float
    process: float
    fused: bool
    copied: float = 0.0
    optim: str = "adamw"


@dataclass(frozen=True, kw_only=True)
class Economy:
    """How a run saves memory.

    Attributes:
        recompute: ``none``, ``cheap`` or ``full``.
        full_layers: of the others the first so many layers are computed again whole.
        streamed: the base stays on disk, but for two layers at a time, or its largest other tensor.
    """

    recompute: Literal["none", "cheap", "full"]
    full_layers: int = 0
    streamed: bool = False


def estimate_memory(model: nn.Module, config: Any, demand: Demand, economy: Economy) -> Estimate:
    """Peak memory of training ``model`` (which may be on the meta device), whose config is ``config``."""
    _, trained = count_parameters(model)
    width = demand.storage.itemsize
    weights = _in_flight(model, width) + demand.copied * 1e6 if economy.streamed else _frozen_bytes(model, width)
    state = state_bytes(demand.optim, (p.numel() for p in model.parameters() if p.requires_grad))
    activations = _activations(model, text_shape(config), demand, economy)
    return Estimate(demand.process, weights / 1e6, (trained * 8 + state) / 1e6, activations)


def _activations(model: nn.Module, shape: Mapping[str, int], demand: Demand, economy: Economy) -> float:
    """MB that are kept for the backward of the largest micro-batch, and that its busiest moment needs beside them."""
    width, tokens = demand.storage.itemsize, demand.micro_tokens
    layer = _kept_by_layer(shape, fused=demand.fused, keeps_cheap=economy.recompute == "none") * width
    between = shape["hidden"] * width
    again = shape["layers"] if economy.recompute == "full" else min(economy.full_layers, shape["layers"])
    kept = again * between + max(shape["layers"] - again, min(again, 1)) * layer
    busiest = (4 * shape["inner"] + 4 * shape["hidden"]) * width
    logits = demand.trained_share * tokens * shape["vocab"] * width / 1e6
    found = tokens * (kept + busiest) / 1e6 + min(LOGITS_MB, 2 * logits)
    if width < 4 and not torch.cuda.is_available():
        found += KERNELS_MB
    if packed := [module for module in model.modules() if isinstance(module, Packed)]:
        # The largest is made dense for each of its products.
        found += max(module.dense_at_once for module in packed) * width / 1e6
    return found


def _frozen_bytes(module: nn.Module, width: int) -> float:
    everything, trained = count_parameters(module)
    packed = [part for part in module.modules() if isinstance(part, Packed)]
    dense = everything - trained - sum(part.dense_values for part in packed)
    return dense * width + sum(part.packed_bytes for part in packed)


def _in_flight(model: nn.Module, width: int) -> float:
    """Bytes of a streamed base that are in memory at a time: two layers, or a table or head."""
    layers = decoder_layers(model)
    inside = {id(p) for layer in layers for p in layer.parameters()}
    others = (p.numel() for p in model.parameters() if id(p) not in inside and not p.requires_grad)
    return max([2 * _frozen_bytes(layer, width) for layer in layers] + [size * width for size in others], default=0.0)


def _kept_by_layer(shape: Mapping[str, int], *, fused: bool, keeps_cheap: bool) -> int:
    """Values per token that a layer keeps for its backward."""
    hidden, inner = shape["hidden"], shape["inner"]
    if not fused:  # as transformers' modelling code: norms widened, both factors of every product
        return hidden * 14 + inner * 5
    queries, keys = shape["queries"], shape["keys"]
    kept = 2 * hidden + 2 * queries + 2 * keys + 2 * inner  # residual twice, q, k, v, attention's output, gate, up
    return kept + 2 * hidden + inner if keeps_cheap else kept


def text_shape(config: Any) -> Mapping[str, int]:
    """Layers, vocabulary and widths (residual stream, queries, keys, MLP), by whichever names a config uses."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config

    def first(*names: str, default: int) -> int:
        return next((v for n in names if isinstance(v := getattr(text, n, None), int) and v > 0), default)

    hidden = first("hidden_size", "n_embd", "d_model", default=1)
    heads = first("num_attention_heads", "n_head", default=1)
    head = first("head_dim", default=hidden // heads)
    return {
        "queries": heads * head,
        "keys": first("num_key_value_heads", default=heads) * head,
        "layers": first("num_hidden_layers", "n_layer", "num_layers", default=1),
        "hidden": hidden,
        "inner": first("intermediate_size", "n_inner", "ffn_dim", default=4 * hidden),
        "vocab": first("vocab_size", default=1),
    }


def flops_per_token(config: Any, body: int, *, trained_share: float, trains_base: bool) -> float:
    """Multiply-adds of one training token, times two: forward and input gradients, plus weight gradients if trained."""
    shape = text_shape(config)
    head = shape["hidden"] * shape["vocab"]
    return (6 if trains_base else 4) * (max(body - head, 0) + head * trained_share)
