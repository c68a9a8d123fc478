"""LoRA on a model: which layers, and PEFT's fields for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from truetune.adapters import expert_sites
from truetune.adapters.base import Adapter
from truetune.adapters.loftq import original_weight
from truetune.adapters.lora import LoRALinear
from truetune.adapters.lora_conv import CONVOLUTIONS, LoRAConv
from truetune.adapters.lora_embedding import LoRAEmbedding
from truetune.adapters.lora_patterns import at_layer, check_patterns, named_by, patterns_of
from truetune.adapters.lora_settings import START_IN_FILE
from truetune.adapters.lora_settings import WITHOUT_EFFECT as WITHOUT_EFFECT
from truetune.adapters.lora_settings import from_peft as from_peft
from truetune.adapters.lora_settings import settings_of as settings_of
from truetune.adapters.lora_slices import QKV, SlicedLinear, is_fused, rows_of
from truetune.adapters.lora_start import Start
from truetune.adapters.methods import Site
from truetune.adapters.targets import shortest_names, targeted
from truetune.config.lora import LoRA
from truetune.errors import AdapterError
from truetune.ops.frozen import frozen_weight, is_conv1d

CHANGES_TABLE = True
TRAINS: tuple[str, ...] = ()


def sites(model: nn.Module, config: LoRA) -> list[str]:
    """Paths of the layers that the targets name, and of the modules whose own parameters are adapted.

    Raises:
        AdapterError: a target, or a name in a pattern or in the slices, that matches nothing; or a setting that has no
            meaning beside ``target_parameters``.
    """
    expert_sites.check_settings(config)
    paths = targeted(model, config)
    check_patterns(config, expert_sites.expanded(model, config, paths))
    for name in config.parts:
        if not any(_has_slices(model, name, path) for path in paths):
            known = {path.rpartition(".")[2] for path in paths if is_fused(model, path)}
            raise AdapterError(
                f"--slices: '{name}' is none of the layers that get an adapter",
                ("it has", ", ".join(sorted(known)) or "no fused layer that is known"),
            )
    return paths


def wrap(layer: nn.Module, config: LoRA, site: Site) -> Adapter:
    """The layer with its adapter."""
    own, draw = at_layer(config, site.path), site.generator("lora")
    parts = next((p for name, p in config.parts.items() if _has_slices(site.model, name, site.path)), ())
    if experts := expert_sites.wrap_experts(layer, config, site):
        return experts
    if isinstance(layer, nn.Embedding):
        return LoRAEmbedding.from_base(layer, own, generator=draw)
    if isinstance(layer, CONVOLUTIONS):
        adapter: LoRALinear | LoRAConv = LoRAConv.from_base(layer, own, generator=draw)
    elif parts:
        rows = rows_of(parts, site.model, site.path)
        adapter = SlicedLinear.from_base(layer, own, rows=rows, generator=draw)
    else:
        adapter = LoRALinear.from_base(layer, own, generator=draw, **starting(layer, own, site))
    adapter.site = site.mask
    return adapter


def starting(layer: nn.Module, config: LoRA, site: Site) -> dict[str, Any]:
    """What the start of a linear layer's adapter takes beside the settings."""
    if config.start_in_file:  # which will fill it: nothing is computed twice
        frozen = frozen_weight(layer)
        a = torch.zeros(config.rank, frozen.in_features, device=frozen.device)
        return {"begun": Start(a, a.new_zeros(frozen.out_features, config.rank), taken_off=True)}
    packed = config.init == "loftq" and hasattr(layer, "frozen_weight")
    return {"original": original_weight(site.model, site.path) if packed else None}


def to_peft(model: nn.Module, config: LoRA, sites: Sequence[str]) -> dict[str, Any]:
    """The method's own fields of ``adapter_config.json``, as the layers are: training may have left other ranks."""
    layers = {path: model.get_submodule(path) for path in sites}
    taken_off = any(isinstance(layer, LoRALinear) and layer.start_a is not None for layer in layers.values())
    sliced = any(isinstance(layer, SlicedLinear) and layer.rows is not None for layer in layers.values())
    experts = expert_sites.to_peft(model, layers)
    return {
        **patterns_of(config, expert_sites.parts_by_path(layers)),
        "lora_dropout": config.dropout,
        "lora_bias": config.lora_bias,
        "target_modules": shortest_names(model, [path for path in sites if not expert_sites.is_experts(layers[path])]),
        **experts,
        "fan_in_fan_out": any(is_conv1d(module) for module in model.modules()),
        "use_rslora": config.use_rslora,
        "init_lora_weights": START_IN_FILE if taken_off else True,
        **({"slices": list(config.slices)} if sliced else {}),
    }


def _has_slices(model: nn.Module, name: str, path: str) -> bool:
    return is_fused(model, path) if name == QKV else named_by(name, path)
