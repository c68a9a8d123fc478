"""``adapter_config.json``: PEFT's settings to ours and back, for every method that PEFT has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from truetune.adapters.inject import Attachment
from truetune.adapters.methods import module_of, trained_parts
from truetune.adapters.targets import shortest_names
from truetune.config.adapter import AdapterConfig
from truetune.config.methods import METHODS
from truetune.errors import AdapterError

# The type of an adapter of a method that PEFT does not have; PEFT refuses it by name.
_OWN = "TRUETUNE_"


def to_peft(model: nn.Module, attached: Attachment, *, base: str | None) -> dict[str, Any]:
    """The settings as PEFT reads them."""
    config = attached.config
    sites = [path for path in attached.sites if path not in attached.tied] + [
        path for path in attached.tied if set(attached.tied) & set(attached.sites)
    ]
    full = shortest_names(model, attached.full_modules) if attached.full_modules else None
    fields = {
        "peft_type": METHODS[config.kind].peft or _OWN + config.kind.upper().replace("-", "_"),
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "bias": "all" if "bias" in trained_parts(config) else "none",
        "modules_to_save": full,
        "ensure_weight_tying": bool(attached.tied),
        **module_of(config.kind).to_peft(model, config, sites),
    }
    # PEFT warns of a field that its class of this method does not have.
    lacks = getattr(module_of(config.kind), "PEFT_LACKS", ())
    return {name: value for name, value in fields.items() if name not in lacks or value not in (None, False, "none")}


def from_peft(config: Mapping[str, Any], folder: Path) -> AdapterConfig:
    """Our settings for PEFT's. ``modules_to_save`` is not among them: it names modules, see ``saved_modules``.

    Raises:
        AdapterError: a method that this version does not have, or a field that is set and not implemented.
    """
    return module_of(_method_of(config, folder)).from_peft(config, folder)


def _method_of(config: Mapping[str, Any], folder: Path) -> str:
    kind = config.get("peft_type", "no peft_type")
    if kind == "LORA" and config.get("use_dora"):
        return "dora"
    known = {method.peft or _OWN + name.upper().replace("-", "_"): name for name, method in reversed(METHODS.items())}
    if kind not in known or METHODS[known[kind]].result == "model":
        names = ", ".join(method.peft for method in dict.fromkeys(METHODS.values()) if method.peft)
        raise AdapterError(f"{folder}: found {kind}, expected one of {names}")
    return known[kind]


def saved_modules(model: nn.Module, config: Mapping[str, Any]) -> list[str]:
    """Paths of the modules that ``modules_to_save`` names, by PEFT's rule: a path that ends in the name."""
    names = config.get("modules_to_save") or ()
    endings = (names,) if isinstance(names, str) else tuple(names)
    return [path for path, _ in model.named_modules() if path.endswith(endings)] if endings else []
