"""``adapter_config.json``: PEFT's settings to ours and back, for every method that PEFT has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from truetune.adapters.inject import Attachment
from truetune.adapters.methods import module_of, trained_parts
from truetune.adapters.targets import shortest_names
from truetune.adapters.token_rows import FIELD
from truetune.adapters.token_rows import to_peft as rows_to_peft
from truetune.config.adapter import AdapterConfig
from truetune.config.methods import METHODS
from truetune.errors import AdapterError

# The type of an adapter that PEFT has no method for, or none that trains rows of tokens; PEFT refuses it by name.
_OWN = "TRUETUNE_"
_ON = "TRUETUNE_ON_ANOTHER_"  # on top of a frozen one, without which it would answer nonsense: PEFT refuses it too
_WITH_ROWS = ("LORA", "ADALORA")


def to_peft(model: nn.Module, attached: Attachment, *, base: str | None) -> dict[str, Any]:
    """The settings as PEFT reads them."""
    config = attached.config
    sites = [path for path in attached.sites if path not in attached.tied] + [
        path for path in attached.tied if set(attached.tied) & set(attached.sites)
    ]
    full = shortest_names(model, attached.full_modules) if attached.full_modules else None
    fields = {
        "peft_type": _type_of(config.kind, with_rows=bool(attached.rows)),
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "bias": "all" if "bias" in trained_parts(config) else "none",
        "modules_to_save": full,
        "ensure_weight_tying": bool(attached.tied),
        **({FIELD: rows_to_peft(model, attached.rows)} if attached.rows else {}),
        **module_of(config.kind).to_peft(model, config, sites),
        **({"peft_type": _on(config.kind)} if attached.beneath else {}),
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
    if is_on_another(config):
        return next((name for name, method in METHODS.items() if _on(name) == kind and method.result == "adapter"), "")
    if kind == "LORA" and config.get("use_dora"):
        return "dora"
    known = {_type_of(name, with_rows=rows): name for rows in (True, False) for name in reversed(METHODS)}
    if kind not in known or METHODS[known[kind]].result == "model":
        names = ", ".join(dict.fromkeys(method.peft for method in METHODS.values() if method.peft))
        raise AdapterError(f"{folder}: found {kind}, expected one of {names}")
    return known[kind]


def is_on_another(config: Mapping[str, Any]) -> bool:
    """Whether an adapter was trained on top of another one, which is frozen."""
    return str(config.get("peft_type")).startswith(_ON)


def _on(method: str) -> str:
    return _ON + method.upper().replace("-", "_")


def _type_of(method: str, *, with_rows: bool) -> str:
    """What PEFT would take for a smaller adapter, and load without its rows, is called by another name."""
    theirs = METHODS[method].peft
    return theirs if theirs and (not with_rows or theirs in _WITH_ROWS) else _OWN + method.upper().replace("-", "_")


def saved_modules(model: nn.Module, config: Mapping[str, Any]) -> list[str]:
    """Paths of the modules that ``modules_to_save`` names, by PEFT's rule: a path that ends in the name."""
    names = config.get("modules_to_save") or ()
    endings = (names,) if isinstance(names, str) else tuple(names)
    return [path for path, _ in model.named_modules() if path.endswith(endings)] if endings else []
