"""How a base is quantised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import field_validator, model_validator
from typing_extensions import Self

from truetune.config.options import Options, option

QuantKind = Literal["int8", "nf4", "fp4"]


@dataclass(frozen=True, kw_only=True)
class QuantRecipe:
    """What a base's linear layers are stored as.

    Attributes:
        kind: ``int8`` is LLM.int8() (arXiv:2208.07339); ``nf4`` and ``fp4`` are QLoRA's (arXiv:2305.14314).
        double: the scales of 4-bit blocks are quantised too.
        skip: layers to leave as they are beside the output head, or what holds them: whole parts of their paths.
        blocksize: values per scale, 4-bit.
        threshold: activations from here on are outliers, which int8 leaves in floating point; 0 for none.
        of_checkpoint: how stored weights are, and not what somebody asks for: ``skip`` is then the whole list, which
            may also name what is no linear layer.
        experts: stacks of experts' matrices are packed as well; they were not before there was this field.
    """

    kind: QuantKind
    double: bool = False
    skip: tuple[str, ...] = ()
    blocksize: int = 64
    threshold: float = 6.0
    of_checkpoint: bool = False
    experts: bool = False

    def __str__(self) -> str:
        return f"{self.kind}, double quantised" if self.double else self.kind


class QuantGroup(Options):
    """Whether and how the base is quantised while it is loaded."""

    quant: Literal["none", "int8", "nf4", "fp4"] = option(
        "none",
        help="store the base's linear layers in 8 bits (int8) or 4 (nf4, fp4), quantised while they are read; a "
        "checkpoint that is quantised already needs no --quant",
        group="base",
        alias=("quant_method",),
    )
    double_quant: bool = option(
        False, help="quantise the 4-bit blocks' scales as well: 0.4 bits per weight less", group="base"
    )
    quant_skip: tuple[str, ...] = option(
        (), help="layers to leave unquantised, by parts of their names (down_proj, layers.0, experts); the head always "
        "is",
        group="base",
    )  # fmt: skip

    @field_validator("quant_skip")
    @classmethod
    def _names_between_commas(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        """``o_proj,layers.0`` is two names."""
        return tuple(name for item in value for part in item.split(",") if (name := part.strip()))

    @model_validator(mode="after")
    def _consistent_quant(self) -> Self:
        if self.double_quant and self.quant not in ("nf4", "fp4"):
            raise ValueError(f"--double-quant goes with --quant nf4 or fp4, and --quant is {self.quant}")
        if self.quant_skip and self.quant == "none":
            raise ValueError("--quant-skip goes with --quant int8, nf4 or fp4")
        return self

    def recipe(self) -> QuantRecipe | None:
        """The settings as the layers take them; None for no quantisation."""
        if self.quant == "none":
            return None
        return QuantRecipe(kind=self.quant, double=self.double_quant, skip=self.quant_skip, experts=True)
