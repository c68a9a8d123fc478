"""Reading ``adapter_config.json`` field by field: what is neither taken nor at the value for "off" is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from truetune.config.adapter import AdapterConfig
from truetune.config.wording import InvalidOptionsError
from truetune.errors import AdapterError

# What PEFT writes when a feature is off.
_OFF: tuple[Any, ...] = (None, False, {}, [], "")
# Read by ``peft_config`` for every method, or without effect on what a trained adapter computes.
_COMMON = {
    "peft_type", "task_type", "base_model_name_or_path", "revision", "bias", "modules_to_save", "ensure_weight_tying",
    "inference_mode", "auto_mapping", "peft_version", "trainable_token_indices",
}  # fmt: skip

C = TypeVar("C", bound=AdapterConfig)


class Fields:
    """The fields of one file, of which each must be taken, be off, or have no effect."""

    def __init__(self, config: Mapping[str, Any], folder: Path, *, without_effect: tuple[str, ...] = ()) -> None:
        self.config, self.folder = config, folder
        self._known = {*_COMMON, *without_effect}
        self._refused: set[str] = set()

    def take(self, name: str, default: Any = None) -> Any:
        """The value of a field that is implemented."""
        self._known.add(name)
        return self.config.get(name, default)

    def refuse(self, name: str) -> None:
        """Count a field among those that are not implemented, for its value."""
        self._refused.add(name)

    def build(self, config_class: type[C], **values: tuple[str, Any]) -> C:
        """The settings, from ``ours=(PEFT's name, value)``; ``bias`` and parts of the base are added.

        Raises:
            AdapterError: a field that is not implemented, or a value that can't be; all by PEFT's names.
        """
        bias = self.config.get("bias") or "none"
        if bias not in ("none", "all"):
            self.refuse("bias")
        unknown = {
            name: value
            for name, value in self.config.items()
            if name in self._refused or (name not in self._known and not any(value == off for off in _OFF))
        }
        unknown |= {name: None for name in self._refused if name not in self.config}
        if unknown:
            listing = "\n".join(f"{name} = {value!r}" for name, value in sorted(unknown.items()))
            raise AdapterError(
                f"{self.folder}: this adapter uses what this version does not implement", ("fields", listing)
            )
        names = {ours: theirs for ours, (theirs, _) in values.items()}
        given = {ours: value for ours, (_, value) in values.items()}
        try:
            rows = token_ids(self.config.get("trainable_token_indices"))
            return config_class(**given, trainable=("bias",) if bias == "all" else (), token_rows=rows)
        except (InvalidOptionsError, TypeError) as error:
            what = f"{self.folder}: adapter_config.json holds a value that can't be"
            raise AdapterError(what, *_faults(error, names)) from None


def token_ids(field: Any) -> tuple[int, ...]:
    """``trainable_token_indices``: ids, or those of each layer by its name; which layers is in ``saved_rows``."""
    lists = field.values() if isinstance(field, Mapping) else [field or ()]
    return tuple(dict.fromkeys(number for ids in lists for number in ids))


def targets_of(fields: Fields) -> tuple[str, ...]:
    """``target_modules``: names, or one expression. Without any, PEFT would choose by the architecture: refused."""
    found = fields.take("target_modules")
    if not found:
        fields.refuse("target_modules")
        return ("?",)
    if isinstance(found, str):
        return (found,)
    return tuple(found) if isinstance(found, list | tuple | set) else found


def excluded(fields: Fields) -> tuple[str, ...]:
    """``exclude_modules``: names, or one expression."""
    found = fields.take("exclude_modules") or ()
    return (found,) if isinstance(found, str) else tuple(found)


def layers_of(fields: Fields) -> tuple[int, ...]:
    """``layers_to_transform``: one number, or several; without any, all layers."""
    found = fields.take("layers_to_transform")
    return () if found is None else (found,) if isinstance(found, int) else tuple(found)


def plain_number(value: float) -> float | int:
    """32 for 32.0, as PEFT writes it."""
    return int(value) if value == int(value) else value


def _faults(error: InvalidOptionsError | TypeError, names: Mapping[str, str]) -> list[tuple[str, str]]:
    """One note per field, by PEFT's name of it."""
    if isinstance(error, TypeError):
        return [("target_modules", str(error))]
    faults = error.validation.errors()
    return [
        (names.get(str(fault["loc"][0]), str(fault["loc"][0])), f"found {fault['input']!r}: {fault['msg']}")
        for fault in faults
    ]
