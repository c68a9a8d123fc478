"""Low-rank updates as a LoRA on a model: what a sum of adapters is, however it was made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import cast

import torch
from torch import nn
from torch.nn import Parameter

from truetune.adapters.base import Adapter, LowRankUpdate
from truetune.adapters.beneath import own_path, updates_by_layer
from truetune.adapters.inject import Attachment
from truetune.adapters.lora import LoRALinear
from truetune.adapters.lora_conv import LoRAConv
from truetune.adapters.lora_embedding import LoRAEmbedding, TiedHead
from truetune.adapters.lora_start import Start
from truetune.config.lora import LoRA
from truetune.errors import AdapterError


def layers_of(
    bases: Mapping[str, nn.Module], updates: Mapping[str, LowRankUpdate], tied: tuple[str, ...] = ()
) -> dict[str, Adapter]:
    """Frozen layers with these updates beside them, by path; the tensors are the updates' own, without gradients.

    Args:
        bases: the layers themselves; of a tied table, the head's as well.
        updates: by path, a subset of ``bases``.
        tied: paths of (table, head) where the head takes the table's update.
    """
    shifted = any(update.shift is not None for update in updates.values())
    layers = {path: _layer(bases[path], update, shifted=shifted) for path, update in updates.items()}
    if tied:
        layers[tied[1]] = TiedHead(cast(nn.Linear, bases[tied[1]]), cast(LoRAEmbedding, layers[tied[0]]))
    return layers


def flattened(layers: Mapping[str, Adapter]) -> dict[str, Adapter] | None:
    """An adapter on top of another one as a single LoRA beside each layer; None where it is no low-rank update."""
    updates = updates_by_layer(layers)
    bases = {own_path(path): layer for path, layer in layers.items() if own_path(path) == path}
    if bases.keys() != updates.keys() or any(layer.update() is None for layer in layers.values()):
        return None
    return layers_of({path: _innermost(layer) for path, layer in bases.items()}, updates)


def _innermost(layer: nn.Module) -> nn.Module:
    while isinstance(layer, Adapter):
        layer = layer.base
    return layer


def attachment_of(updates: Mapping[str, LowRankUpdate], tied: tuple[str, ...] = ()) -> Attachment:
    """What ``attach`` would have returned for such layers: for saving them.

    Raises:
        AdapterError: there is no layer with an update; AdaLoRA may have left none a rank.
    """
    if not updates:
        raise AdapterError(
            "the adapters change no layer: nothing is left to make one of",
            ("likely", "AdaLoRA whose ranks are all 0"),
            ("way out", "train with a larger --target-rank"),
        )
    rank = Counter(len(update.a) for update in updates.values()).most_common(1)[0][0]
    shifted = any(update.shift is not None for update in updates.values())
    config = LoRA(rank=rank, alpha=float(rank), lora_bias=shifted, targets=tuple(updates))
    return Attachment(config, tuple(updates), tied=tied)


def _layer(base: nn.Module, update: LowRankUpdate, *, shifted: bool) -> Adapter:
    rank, alpha = len(update.a), len(update.a) * update.scale
    a, b = update.a.detach().float(), update.b.detach().float()
    layer: LoRALinear | LoRAEmbedding | LoRAConv
    if update.kind == "linear":
        layer = LoRALinear(base, rank=rank, alpha=alpha, bias=shifted, begun=Start(a, b))
        if update.shift is not None:
            layer.lora_bias = Parameter(update.shift.detach().float())
        elif shifted:
            layer.lora_bias = Parameter(torch.zeros(len(b), device=b.device))
    elif shifted:
        raise AdapterError("a bias beside B is for linear layers, and another adapter is on a table or a convolution")
    elif update.kind == "embedding":
        layer = LoRAEmbedding(cast(nn.Embedding, base), rank=rank, alpha=alpha)
        layer.lora_a, layer.lora_b = Parameter(a), Parameter(b)
    else:
        layer = LoRAConv(cast(nn.Conv1d, base), rank=rank, alpha=alpha, begun=Start(a, b))
    for _, parameter in layer.adapter_parameters():
        parameter.requires_grad_(False)
    return layer
