"""Optimizers by the names of ``--optim``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.nn import Parameter

from truetune.errors import ConfigError, nearest
from truetune.ops.update_rule import SIGNED
from truetune.optim.adam import LAMB, Adam, Adam8bit, AdamW8bit, AdEMAMix, AdEMAMix8bit, LAMB8bit
from truetune.optim.adamw import adamw
from truetune.optim.blockwise import Settings
from truetune.optim.groups import parameter_groups
from truetune.optim.momentum import LARS, SGD, LARS8bit, Lion, Lion8bit, SGD8bit
from truetune.optim.rms import Adagrad, Adagrad8bit, RMSprop, RMSprop8bit

CLASSES: dict[str, Any] = {
    known.__name__.lower(): known
    for known in (
        *(AdamW8bit, Adam, Adam8bit, Lion, Lion8bit, AdEMAMix, AdEMAMix8bit, RMSprop, RMSprop8bit),
        *(Adagrad, Adagrad8bit, SGD, SGD8bit, LAMB, LAMB8bit, LARS, LARS8bit),
    )
}
"""All but ``adamw``, which is torch's own."""


def optimizer(
    name: str,
    parameters: Mapping[str, Parameter],
    *,
    lr: float,
    weight_decay: float,
    steps: int,
    lora_plus_ratio: float = 1.0,
) -> torch.optim.Optimizer:
    """The optimizer of a run, with its usual settings; decay and the faster B of LoRA+ as in ``parameter_groups``.

    Args:
        name: ``adamw``, or a key of ``CLASSES``.
        steps: of the whole run, over which AdEMAMix lets its slow mean come in.
    Raises:
        ConfigError: another name.
    """
    if name == "adamw":
        return adamw(parameters, lr=lr, weight_decay=weight_decay, lora_plus_ratio=lora_plus_ratio)
    chosen = _class(name)
    extra = {"t_alpha": steps, "t_beta3": steps} if name.startswith("ademamix") else {}
    groups = parameter_groups(parameters, weight_decay=weight_decay, lora_plus_ratio=lora_plus_ratio)
    made: torch.optim.Optimizer = chosen(groups, lr=lr, **extra)
    return made


def state_bytes(name: str, sizes: Iterable[int]) -> int:
    """What the state of parameters with these numbers of elements takes.

    Raises:
        ConfigError: another name.
    """
    if name == "adamw":
        return sum(8 * size for size in sizes)
    chosen, settings = _class(name), Settings()
    moments = len(SIGNED[chosen.kind])

    def each(size: int) -> int:
        if chosen.bits == 32 or size < settings.min_8bit_size:
            return 4 * size
        return size + 4 * -(-size // settings.blocksize)

    return sum(moments * each(size) for size in sizes)


def _class(name: str) -> Any:
    if name not in CLASSES:
        close = nearest(name, ["adamw", *CLASSES])
        raise ConfigError(f"optimizer: found {name!r}, expected adamw, {', '.join(CLASSES)}", ("did you mean", close))
    return CLASSES[name]
