"""What each tuning method wants of the training loop beside the gradient of its loss."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch

from truetune.adapters.adalora import AdaLoRALinear
from truetune.adapters.inject import adapters
from truetune.adapters.partial import LayerDraws
from truetune.adapters.rank_allocation import RankAllocation, SVDLayer
from truetune.config.adapter import AdapterConfig
from truetune.config.lora import AdaLoRA
from truetune.config.other_methods import Lisa
from truetune.train.hooks import Hooks


def method_hooks(
    model: Any, config: AdapterConfig, optimizer: torch.optim.Optimizer, *, seed: int, steps: int
) -> Hooks:
    """The hooks of a run; made before its state is restored, because they say what that state is."""
    if isinstance(config, Lisa):
        return Hooks(around=partial(LayerDraws(model, config, seed=seed).at, optimizer=optimizer))
    if isinstance(config, AdaLoRA) and not config.trained.kept:  # else its ranks are final
        layers = {path: cast(SVDLayer, layer) for path, layer in adapters(model) if isinstance(layer, AdaLoRALinear)}
        allocation = RankAllocation(layers, config, steps)
        return Hooks(penalty=allocation.penalty if config.orthogonality else None, after_update=allocation.after_update)
    return Hooks()
