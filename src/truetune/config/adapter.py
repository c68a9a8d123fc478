"""What the settings of every tuning method have in common."""

from __future__ import annotations

import re
from typing import ClassVar, Literal

from pydantic import field_validator

from truetune.config.options import Options, option

Trainable = Literal["bias", "norm", "embedding", "head"]


class AdapterConfig(Options):
    """Settings of one method; each method has a class of its own."""

    kind: ClassVar[str]
    """What ``--method`` calls it."""

    trainable: tuple[Trainable, ...] = option(
        (), help="parts of the base trained in full beside the adapter", group="tuning"
    )
    token_rows: tuple[int, ...] = option(
        (),
        help="ids of tokens whose rows of the embedding table, and of the head, are trained beside the adapter",
        group="tuning",
        alias=("trainable_token_indices",),
    )

    @field_validator("token_rows")
    @classmethod
    def _ids(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(number < 0 for number in value):
            raise ValueError("numbers of tokens, from 0 on")
        return tuple(dict.fromkeys(value))


class Targeted(AdapterConfig):
    """Settings of a method that is put beside chosen layers."""

    targets: tuple[str, ...] = option(
        ("all-linear",),
        help="layers that get an adapter: all-linear, names, or regular expressions",
        group="tuning",
        alias=("target_modules", "lora_target"),
        min_length=1,
    )
    exclude: tuple[str, ...] = option(
        (),
        help="layers that --targets matches and that get none: names or expressions",
        group="tuning",
        alias=("exclude_modules",),
    )
    layers: tuple[int, ...] = option(
        (),
        help="numbers of the decoder layers that get an adapter (default: all)",
        group="tuning",
        alias=("layers_to_transform",),
    )

    @field_validator("targets", "exclude")
    @classmethod
    def _names_between_commas(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        """``q_proj,v_proj`` is two names; a comma inside an expression is left alone."""
        plain = re.compile(r"[\w.,\- ]+")
        names: list[str] = []
        for item in value:
            parts = [part.strip() for part in item.split(",") if part.strip()] if plain.fullmatch(item) else []
            names += parts if "," in item and parts else [item]
        return tuple(names)
