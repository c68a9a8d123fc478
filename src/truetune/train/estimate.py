"""What a run will need, before it starts: parameters, memory, time.

Memory is the sum of what is known exactly (weights, adapter, gradients, optimizer state) and of the activations of one
micro-batch, counted per token from the layer's shapes as transformers' modelling code keeps them for the backward pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# What the interpreter, torch and transformers occupy before a model is loaded.
PROCESS_MB = 420.0
# What oneDNN keeps of the kernels it compiles for low-precision products on a CPU, one per size it meets.
KERNELS_MB = 350.0


@dataclass(frozen=True)
class Estimate:
    """All in MB (10^6 bytes)."""

    weights: float
    trained: float  # parameters, gradients and AdamW's two moments, float32
    activations: float
    total: float


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """``(all, trained)``; a shared tensor counts once."""
    parameters = {id(p): p for p in model.parameters()}.values()
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


def estimate_memory(
    model: nn.Module, config: Any, *, storage: torch.dtype, micro_tokens: int, trained_share: float
) -> Estimate:
    """Peak memory of training ``model`` (which may be on the meta device).

    Args:
        storage: dtype of the frozen weights.
        micro_tokens: tokens of the largest micro-batch.
        trained_share: share of its tokens that carry a loss, and so need logits.
    """
    everything, trained = count_parameters(model)
    width = storage.itemsize
    weights = (everything - trained) * width / 1e6
    state = trained * 16 / 1e6
    shape = text_shape(config)
    per_token = shape["layers"] * (shape["hidden"] * 14 + shape["inner"] * 5) * width
    # float32 logits, their softmax, and the gradients of both, beside the logits in the storage's dtype
    logits = trained_share * shape["vocab"] * (3 * 4 + width)
    activations = micro_tokens * (per_token + logits) / 1e6
    kernels = KERNELS_MB if width < 4 and not torch.cuda.is_available() else 0.0
    return Estimate(weights, state, activations, PROCESS_MB + kernels + weights + state + activations)


def text_shape(config: Any) -> Mapping[str, int]:
    """Layers, hidden size, MLP size and vocabulary, by whichever names a family's config uses."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config

    def first(*names: str, default: int) -> int:
        return next((v for n in names if isinstance(v := getattr(text, n, None), int) and v > 0), default)

    hidden = first("hidden_size", "n_embd", "d_model", default=1)
    return {
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
