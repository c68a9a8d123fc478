"""PEFT's fields of a LoRA as settings of ours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from truetune.adapters.names import NONE
from truetune.adapters.peft_fields import Fields, excluded, layers_of, targets_of
from truetune.config.lora import LoRA, enabled_slices

# These do not change what a trained adapter computes: how it was started, how PEFT found it.
WITHOUT_EFFECT = (
    "init_lora_weights", "fan_in_fan_out", "megatron_core", "qalora_group_size", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "merge_weights",
)  # fmt: skip
# These rewrite the base's weights when PEFT loads the adapter; on the base as it is on disk, A and B mean nothing.
_INITS_THAT_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
START_IN_FILE = "pissa, with what was taken off the base in start_A and start_B"  # no start that PEFT would take

L = TypeVar("L", bound=LoRA)


def named(pattern: Mapping[str, Any] | None) -> tuple[str, ...]:
    """PEFT's pattern as a setting of ours."""
    return tuple(f"{name}={number}" for name, number in (pattern or {}).items())


def from_peft(config: Mapping[str, Any], folder: Path) -> LoRA:
    """The settings in our terms."""
    return settings_of(LoRA, Fields(config, folder, without_effect=WITHOUT_EFFECT))


def settings_of(kind: type[L], fields: Fields, **more: tuple[str, Any]) -> L:
    """The settings of LoRA and what derives from it; ``more`` as ``Fields.build`` takes it."""
    init = fields.config.get("init_lora_weights")
    if init != START_IN_FILE and str(init).lower().startswith(_INITS_THAT_CHANGE_THE_BASE):
        fields.refuse("init_lora_weights")
    parameters = tuple(fields.take("target_parameters") or ())
    if parameters and kind is not LoRA:
        fields.refuse("target_parameters")
    targets = (NONE,) if parameters and not fields.take("target_modules") else targets_of(fields)
    slices = tuple(fields.take("slices") or ()) or enabled_slices(fields.take("enable_lora"), targets)
    built = fields.build(
        kind,
        rank=("r", fields.take("r", 8)),  # PEFT's own defaults, for a file that leaves them out
        alpha=("lora_alpha", fields.take("lora_alpha", 8)),
        dropout=("lora_dropout", fields.take("lora_dropout") or 0.0),
        targets=("target_modules", targets),
        exclude=("exclude_modules", excluded(fields)),
        layers=("layers_to_transform", layers_of(fields)),
        use_rslora=("use_rslora", bool(fields.take("use_rslora"))),
        rank_pattern=("rank_pattern", named(fields.take("rank_pattern"))),
        alpha_pattern=("alpha_pattern", named(fields.take("alpha_pattern"))),
        lora_bias=("lora_bias", bool(fields.take("lora_bias"))),
        slices=("slices", slices),
        target_parameters=("target_parameters", parameters),
        **more,
    )
    return built.with_start_in_file() if init == START_IN_FILE else built
