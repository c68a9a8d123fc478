"""Settings of a LoRA adapter; ``truetune.LoRA`` in the Python API."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import field_validator

from truetune.config.options import Options, option

Trainable = Literal["bias", "norm", "embedding", "head"]


class LoRA(Options):
    """Low-rank adapters beside frozen layers (Hu et al. 2021, arXiv:2106.09685)."""

    rank: int = option(16, help="rank of the adapter", group="tuning", alias=("r", "lora_rank", "lora_r"), gt=0)
    alpha: float = option(
        32.0,
        help="scale of the adapter: its update is multiplied by alpha / rank",
        group="tuning",
        alias=("lora_alpha",),
        gt=0,
    )
    dropout: float = option(
        0.0, help="dropout on the adapter's input", group="tuning", alias=("lora_dropout",), ge=0.0, lt=1.0
    )
    targets: tuple[str, ...] = option(
        ("all-linear",),
        help="layers that get an adapter: all-linear, names, or regular expressions",
        group="tuning",
        alias=("target_modules", "lora_target"),
        min_length=1,
    )
    use_rslora: bool = option(
        False, help="scale by alpha / sqrt(rank) (arXiv:2312.03732)", group="tuning", alias=("rslora",)
    )
    trainable: tuple[Trainable, ...] = option(
        (), help="parts of the base trained in full beside the adapter", group="tuning"
    )

    @field_validator("targets")
    @classmethod
    def _names_between_commas(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        """``q_proj,v_proj`` is two names; a comma inside an expression is left alone."""
        plain = re.compile(r"[\w.,\- ]+")
        names: list[str] = []
        for item in value:
            parts = [part.strip() for part in item.split(",") if part.strip()] if plain.fullmatch(item) else []
            names += parts if "," in item and parts else [item]
        return tuple(names)
