"""Where each method's adapters are made: one module per method, with the functions that ``MethodModule`` names."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import nn

from truetune.adapters.base import Adapter
from truetune.config.adapter import AdapterConfig
from truetune.ops.rng import derive_seed, generator

_MODULES = {
    "lora": "lora_sites",
    "dora": "dora",
    "adalora": "adalora",
    "vera": "vera",
    "ia3": "ia3",
    "bitfit": "bitfit",
    "prompt": "prompt",
    "ptuning": "ptuning",
    "prefix": "prefix",
    "llama-adapter": "llama_adapter",
    "bottleneck": "bottleneck",
}
# Layers of one parent that read the same input.
_SHARED_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True)
class Site:
    """Where an adapter goes.

    Attributes:
        path: the layer's.
        model: the whole, as it is before this layer is wrapped.
        seed: of the run.
        shared: one dictionary for all sites of an attachment, for what they own together.
    """

    path: str
    model: nn.Module
    seed: int
    shared: dict[str, Any] = field(default_factory=dict)

    def generator(self, method: str) -> torch.Generator:
        """A generator of the layer's own, so that its start does not depend on which others are wrapped."""
        return generator(self.seed, method, self.path)

    @property
    def mask(self) -> int:
        """What the layer's dropout masks go by: one for layers that read the same input, so it is dropped once."""
        parent, _, name = self.path.rpartition(".")
        name = next((names[0] for names in _SHARED_INPUT if name in names), name)
        return derive_seed(0, "site", f"{parent}.{name}")


class MethodModule(Protocol):
    """What a method's module has.

    Attributes:
        CHANGES_TABLE: it changes the embedding table as a matrix, so a head that is the same matrix must follow.
        TRAINS: parts of the base that it trains by itself, named as in ``--trainable``.
    """

    CHANGES_TABLE: bool
    TRAINS: tuple[str, ...]

    def sites(self, model: nn.Module, config: Any) -> list[str]:
        """Paths of the layers to wrap, in the model's order.

        Raises:
            AdapterError: what the config names is not there.
        """

    def wrap(self, layer: nn.Module, config: Any, site: Site) -> Adapter:
        """The layer with its adapter."""

    def to_peft(self, model: nn.Module, config: Any, sites: Sequence[str]) -> dict[str, Any]:
        """The method's own fields of ``adapter_config.json``."""

    def from_peft(self, config: Mapping[str, Any], folder: Path) -> AdapterConfig:
        """The settings in our terms.

        Raises:
            AdapterError: a field that is set and not implemented, by name.
        """


def module_of(method: str) -> MethodModule:
    """The module of a method that leaves an adapter."""
    return cast(MethodModule, importlib.import_module(f"truetune.adapters.{_MODULES[method]}"))


def trained_parts(config: AdapterConfig) -> tuple[str, ...]:
    """The parts of the base that a method trains by itself, and those that were asked for."""
    if config.kind not in _MODULES:
        return tuple(dict.fromkeys(config.trainable))
    module = module_of(config.kind)
    own = module.trains(config) if hasattr(module, "trains") else module.TRAINS
    return tuple(dict.fromkeys((*own, *config.trainable)))
