"""How a setting is declared: its default, its help line, its group and its other spellings, in one place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

_KINDS = {int: "a whole number", float: "a number", str: "a text"}


class Options(BaseModel):
    """Base of every command's settings: frozen, and unknown keys are refused.

    Raises:
        truetune.errors.ConfigError: on construction, naming every setting that is missing, unknown or wrong.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    command: ClassVar[str] = ""
    """The command these are the settings of, as it is typed."""

    positional: ClassVar[tuple[str, ...]] = ()
    """Fields that may be given without their flag, in this order."""

    passes_over: ClassVar[type[Options] | None] = None
    """A command whose keys may stand in a config file too; those that this one lacks are passed over."""

    @classmethod
    def heading(cls, field: str) -> str:
        """What a field stands under in ``--help``: its group, or a heading in words."""
        return group_of(cls.model_fields[field])

    if not TYPE_CHECKING:  # a type checker should see the fields, not **values

        def __init__(self, **values: Any) -> None:
            try:
                super().__init__(**values)
            except ValidationError as error:
                from truetune.config.wording import InvalidOptionsError

                raise InvalidOptionsError(error, type(self)) from None

    @field_validator("*", mode="before")
    @classmethod
    def _as_declared(cls, value: Any, info: ValidationInfo) -> Any:
        """One text where a list is declared is a list of one; true and false are no numbers."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, str) and get_origin(annotation) is tuple:
            return (value,)
        kinds = [kind for kind in (annotation, *get_args(annotation)) if kind in _KINDS]
        if isinstance(value, bool) and kinds:
            raise ValueError(_KINDS[kinds[0]])
        return value


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


def spellings(config_class: type[Options]) -> dict[str, str]:
    """Every accepted key in snake case → the field it means."""
    names = {name: name for name in config_class.model_fields}
    for name, info in config_class.model_fields.items():
        names |= dict.fromkeys(aliases_of(info), name)
    return names
