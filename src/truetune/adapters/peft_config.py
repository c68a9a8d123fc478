"""``adapter_config.json``: PEFT's settings to ours and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from truetune.adapters.inject import Attachment
from truetune.adapters.targets import shortest_names
from truetune.config.lora import LoRA
from truetune.config.wording import InvalidOptionsError
from truetune.errors import AdapterError
from truetune.ops.frozen import is_conv1d

# What PEFT writes when a feature is off. A field that is neither here nor read below is refused by name.
_OFF: tuple[Any, ...] = (None, False, {}, [], "")
_READ = {
    "peft_type", "task_type", "base_model_name_or_path", "revision", "r", "lora_alpha", "lora_dropout",
    "target_modules", "bias", "use_rslora", "modules_to_save", "ensure_weight_tying",
}  # fmt: skip
# These do not change what a trained adapter computes: how it was started, how PEFT found it, who wrote it.
_WITHOUT_EFFECT = {
    "init_lora_weights", "inference_mode", "auto_mapping", "peft_version", "fan_in_fan_out", "megatron_core",
    "qalora_group_size", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "layers_pattern",
}  # fmt: skip
# These rewrite the base's weights when PEFT loads the adapter; on the base as it is on disk, A and B mean nothing.
_INITS_THAT_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_PEFT_NAMES = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "targets": "target_modules"}


def to_peft(model: nn.Module, attached: Attachment, *, base: str | None) -> dict[str, Any]:
    """The settings as PEFT reads them."""
    lora = attached.config
    sites = [path for path in attached.sites if path not in attached.tied] + [
        path for path in attached.tied if set(attached.tied) & set(attached.sites)
    ]
    full = shortest_names(model, attached.full_modules) if attached.full_modules else None
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": shortest_names(model, sites),
        "bias": "all" if "bias" in lora.trainable else "none",
        "fan_in_fan_out": any(is_conv1d(module) for module in model.modules()),
        "use_rslora": lora.use_rslora,
        "modules_to_save": full,
        "ensure_weight_tying": bool(attached.tied),
        "init_lora_weights": True,
    }


def from_peft(config: Mapping[str, Any], folder: Path) -> LoRA:
    """Our settings for PEFT's. ``modules_to_save`` is not among them: it names modules, see ``saved_modules``.

    Raises:
        AdapterError: another method than LoRA, or a field that is set and not implemented.
    """
    if config.get("peft_type") != "LORA":
        found = config.get("peft_type", "no peft_type")
        raise AdapterError(f"{folder}: found {found}, expected a LORA adapter")
    known = _READ | _WITHOUT_EFFECT
    unknown = {n: v for n, v in config.items() if n not in known and not any(v == off for off in _OFF)}
    if str(config.get("init_lora_weights")).lower().startswith(_INITS_THAT_CHANGE_THE_BASE):
        unknown["init_lora_weights"] = config["init_lora_weights"]
    if config.get("bias", "none") not in ("none", "all"):
        unknown["bias"] = config["bias"]
    if not config.get("target_modules"):  # PEFT would choose by the architecture
        unknown["target_modules"] = config.get("target_modules")
    if unknown:
        listing = "\n".join(f"{name} = {value!r}" for name, value in sorted(unknown.items()))
        raise AdapterError(f"{folder}: this adapter uses what this version does not implement", ("fields", listing))
    targets = config["target_modules"]
    try:
        return LoRA(
            rank=config.get("r", 8),  # PEFT's own defaults, for a file that leaves them out
            alpha=config.get("lora_alpha", 8),
            dropout=config.get("lora_dropout") or 0.0,
            targets=(targets,) if isinstance(targets, str) else tuple(targets),
            use_rslora=bool(config.get("use_rslora")),
            trainable=("bias",) if config.get("bias") == "all" else (),
        )
    except (InvalidOptionsError, TypeError) as error:
        raise AdapterError(f"{folder}: adapter_config.json holds a value that can't be", *_faults(error)) from None


def _faults(error: InvalidOptionsError | TypeError) -> list[tuple[str, str]]:
    """One note per field, by PEFT's name of it."""
    if isinstance(error, TypeError):
        return [("target_modules", str(error))]
    faults = error.validation.errors()
    return [(_PEFT_NAMES[str(fault["loc"][0])], f"found {fault['input']!r}: {fault['msg']}") for fault in faults]


def saved_modules(model: nn.Module, config: Mapping[str, Any]) -> list[str]:
    """Paths of the modules that ``modules_to_save`` names, by PEFT's rule: a path that ends in the name."""
    names = config.get("modules_to_save") or ()
    endings = (names,) if isinstance(names, str) else tuple(names)
    return [path for path, _ in model.named_modules() if path.endswith(endings)] if endings else []
