"""How a setting is declared: its default, its help line, its group and its other spellings, in one place."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined


class Options(BaseModel):
    """Base of every command's settings: frozen, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    positional: ClassVar[tuple[str, ...]] = ()
    """Fields that may be given without their flag, in this order."""


def option(
    default: Any = PydanticUndefined,
    *,
    help: str,
    group: str,
    alias: tuple[str, ...] = (),
    **bounds: Any,
) -> Any:
    """Declare a setting.

    Args:
        default: its value when nobody sets it; left out for a required one.
        help: one line for ``--help`` and the reference.
        group: the heading it stands under in ``--help``, and the key it may be nested under in YAML.
        alias: other spellings of the flag and key, without dashes in front, in snake case.
        **bounds: pydantic's constraints (``ge``, ``le``, ``gt``, ``lt``, ``min_length``).
    """
    return Field(default, description=help, json_schema_extra={"group": group, "alias": list(alias)}, **bounds)


def group_of(info: FieldInfo) -> str:
    """The group a field was declared in."""
    extra = info.json_schema_extra
    return str(extra["group"]) if isinstance(extra, dict) else ""


def aliases_of(info: FieldInfo) -> tuple[str, ...]:
    """The other spellings of a field."""
    extra = info.json_schema_extra
    names = extra.get("alias", []) if isinstance(extra, dict) else []
    return tuple(str(name) for name in names) if isinstance(names, list) else ()
