"""LoRA on a model: which layers, and PEFT's fields for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from truetune.adapters.base import Adapter
from truetune.adapters.lora import LoRALinear
from truetune.adapters.lora_embedding import LoRAEmbedding
from truetune.adapters.methods import Site
from truetune.adapters.peft_fields import Fields, plain_number, targets_of
from truetune.adapters.targets import shortest_names, targeted
from truetune.config.lora import LoRA
from truetune.ops.frozen import is_conv1d

CHANGES_TABLE = True
TRAINS: tuple[str, ...] = ()

# These do not change what a trained adapter computes: how it was started, how PEFT found it.
_WITHOUT_EFFECT = (
    "init_lora_weights", "fan_in_fan_out", "megatron_core", "qalora_group_size", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config",
)  # fmt: skip
# These rewrite the base's weights when PEFT loads the adapter; on the base as it is on disk, A and B mean nothing.
_INITS_THAT_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def sites(model: nn.Module, config: LoRA) -> list[str]:
    """Paths of the layers that the targets name."""
    return targeted(model, config)


def wrap(layer: nn.Module, config: LoRA, site: Site) -> Adapter:
    """The layer with its adapter."""
    if isinstance(layer, nn.Embedding):
        return LoRAEmbedding.from_base(layer, config, generator=site.generator("lora"))
    adapter = LoRALinear.from_base(layer, config, generator=site.generator("lora"))
    adapter.site = site.mask
    return adapter


def to_peft(model: nn.Module, config: LoRA, sites: Sequence[str]) -> dict[str, Any]:
    """The method's own fields of ``adapter_config.json``."""
    return {
        "r": config.rank,
        "lora_alpha": plain_number(config.alpha),
        "lora_dropout": config.dropout,
        "target_modules": shortest_names(model, sites),
        "fan_in_fan_out": any(is_conv1d(module) for module in model.modules()),
        "use_rslora": config.use_rslora,
        "init_lora_weights": True,
    }


def from_peft(config: Mapping[str, Any], folder: Path) -> LoRA:
    """The settings in our terms."""
    fields = Fields(config, folder, without_effect=_WITHOUT_EFFECT)
    if str(config.get("init_lora_weights")).lower().startswith(_INITS_THAT_CHANGE_THE_BASE):
        fields.refuse("init_lora_weights")
    return fields.build(
        LoRA,
        rank=("r", fields.take("r", 8)),  # PEFT's own defaults, for a file that leaves them out
        alpha=("lora_alpha", fields.take("lora_alpha", 8)),
        dropout=("lora_dropout", fields.take("lora_dropout") or 0.0),
        targets=("target_modules", targets_of(fields)),
        use_rslora=("use_rslora", bool(fields.take("use_rslora"))),
    )
