"""What of an adapter's surroundings may differ from those it was trained in, by name."""

from __future__ import annotations

from typing import Literal

from pydantic import field_validator

from truetune.config.options import Options, option

Mismatch = Literal["base", "template", "tokenizer"]


class MismatchGroup(Options):
    """Differences that are meant."""

    allow_mismatch: tuple[Mismatch, ...] = option(
        (), help="what may differ from what the adapter was trained with: base, template, tokenizer", group="base"
    )
    allow_other_base: bool = option(False, help="the same as --allow-mismatch base", group="base")

    @field_validator("allow_mismatch", mode="before")
    @classmethod
    def _between_commas(cls, value: object) -> object:
        """``base,template`` is two of them."""
        items = (value,) if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            return value
        return tuple(part.strip() for item in items for part in str(item).split(",") if part.strip())

    @property
    def allowed(self) -> frozenset[Mismatch]:
        """The differences that were named, in either spelling."""
        return frozenset(self.allow_mismatch) | (frozenset({"base"}) if self.allow_other_base else frozenset())
