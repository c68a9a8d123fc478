"""``adapter_config.json``: PEFT's settings to ours and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from truetune.adapters.inject import Attachment
from truetune.adapters.targets import shortest_names
from truetune.config.lora import LoRA, Trainable
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
    "qalora_group_size", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "monteclora_config",
    "layers_pattern",
}  # fmt: skip


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
    """Our settings for PEFT's.

    Raises:
        AdapterError: another method than LoRA, or a field that is set and not implemented.
    """
    if config.get("peft_type") != "LORA":
        found = config.get("peft_type", "no peft_type")
        raise AdapterError(f"{folder}: found {found}, expected a LORA adapter")
    unknown = [n for n, v in config.items() if n not in _READ | _WITHOUT_EFFECT and not any(v == off for off in _OFF)]
    if unknown:
        listing = "\n".join(f"{name} = {config[name]!r}" for name in sorted(unknown))
        raise AdapterError(f"{folder}: this adapter uses what this version does not implement", ("fields", listing))
    if config.get("bias", "none") not in ("none", "all"):
        raise AdapterError(f"{folder}: bias = {config['bias']!r} is not implemented", ("known", "none, all"))
    targets = config.get("target_modules") or ()
    return LoRA(
        rank=config["r"],
        alpha=config["lora_alpha"],
        dropout=config.get("lora_dropout") or 0.0,
        targets=(targets,) if isinstance(targets, str) else tuple(targets),
        use_rslora=bool(config.get("use_rslora")),
        trainable=_trainable(config, folder),
    )


def _trainable(config: Mapping[str, Any], folder: Path) -> tuple[Trainable, ...]:
    """``bias`` and ``modules_to_save`` as parts of the base."""
    parts: dict[Trainable, None] = {"bias": None} if config.get("bias") == "all" else {}
    for name in config.get("modules_to_save") or ():
        leaf = name.rsplit(".", 1)[-1]
        if leaf in ("lm_head", "embed_out"):
            parts["head"] = None
        elif leaf in ("embed_tokens", "wte", "word_embeddings", "embed_in"):
            parts["embedding"] = None
        elif "norm" in leaf or leaf.startswith("ln_"):
            parts["norm"] = None
        else:
            raise AdapterError(
                f"{folder}: modules_to_save holds '{name}', which this version can't place",
                ("known", "output heads, embedding tables and norms"),
            )
    return tuple(parts)
