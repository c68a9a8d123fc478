"""Settings of the low-rank methods; ``truetune.LoRA`` and so on in the Python API."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from pydantic import PrivateAttr, ValidationInfo, field_validator
from typing_extensions import Self

from truetune.config.adapter import Targeted
from truetune.config.options import option


class LoRA(Targeted):
    """Low-rank adapters beside frozen layers (Hu et al. 2021, arXiv:2106.09685)."""

    kind: ClassVar[str] = "lora"

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
    use_rslora: bool = option(
        False, help="scale by alpha / sqrt(rank) (arXiv:2312.03732)", group="tuning", alias=("rslora",)
    )
    init: Literal["kaiming", "gaussian", "orthogonal", "pissa", "loftq", "zero"] = option(
        "kaiming",
        help="start of A (B is zero), as in loralib or Gaussian; orthogonal: of both, with B A = 0; zero: A is zero "
        "and B is not (arXiv:2406.08447); pissa starts both from the base's largest singular directions, which are "
        "taken off the base (arXiv:2404.02948), loftq from what quantising the base took away (arXiv:2310.08659)",
        group="tuning",
        alias=("init_lora_weights",),
    )
    rank_pattern: tuple[str, ...] = option(
        (), help="other ranks by layer: NAME=RANK, the first that matches counts", group="tuning"
    )
    alpha_pattern: tuple[str, ...] = option(
        (), help="other alphas by layer: NAME=ALPHA, the first that matches counts", group="tuning"
    )
    lora_bias: bool = option(False, help="train a bias beside B", group="tuning")
    slices: tuple[str, ...] = option(
        (),
        help="parts of a fused layer that are updated, each with an A of its own: NAME=PART,PART such as qkv=q,v; or "
        "by number, c_attn=1/3,3/3",
        group="tuning",
    )

    target_parameters: tuple[str, ...] = option(
        (),
        help="experts that are one parameter and no layers, in every decoder layer: experts.gate_up_proj and so on "
        "(with --targets none: these alone)",
        group="tuning",
    )

    @field_validator("target_parameters")
    @classmethod
    def _parameters(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name.strip() for item in value for name in item.split(",") if name.strip()))

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _pairs(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        whole = info.field_name == "rank_pattern"
        for item in value:
            name, _, number = item.rpartition("=")
            if not (name and _is_number(number) and float(number) > 0 and (float(number).is_integer() or not whole)):
                kind = "a whole number" if whole else "a number"
                raise ValueError(f"NAME=NUMBER with {kind} above 0, such as q_proj=8")
        return value

    @field_validator("slices")
    @classmethod
    def _parts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for item in value:
            name, _, parts = item.rpartition("=")
            if not name or not re.fullmatch(r"(q|k|v|gate|up|\d+/\d+)(,(q|k|v|gate|up|\d+/\d+))*", parts):
                raise ValueError("NAME=PART,PART with parts q, k, v, gate, up or 1/3")
        return value

    @property
    def ranks(self) -> dict[str, int]:
        """``rank_pattern`` by name."""
        return {name: int(float(number)) for name, _, number in (item.rpartition("=") for item in self.rank_pattern)}

    @property
    def alphas(self) -> dict[str, float]:
        """``alpha_pattern`` by name."""
        return {name: float(number) for name, _, number in (item.rpartition("=") for item in self.alpha_pattern)}

    _start_in_file: bool = PrivateAttr(default=False)

    @property
    def start_in_file(self) -> bool:
        """Whether an adapter that was read holds what its start took off the base."""
        return self._start_in_file

    def with_start_in_file(self) -> Self:
        """The same settings, of an adapter whose file holds what its start took off the base."""
        copy = self.model_copy(update={"init": "pissa"})
        copy._start_in_file = True
        return copy

    @property
    def parts(self) -> dict[str, tuple[str, ...]]:
        """``slices`` by name."""
        return {name: tuple(found.split(",")) for name, _, found in (item.rpartition("=") for item in self.slices)}


class DoRA(LoRA):
    """LoRA on the direction of each row of W, with its magnitude trained apart (Liu et al. 2024, arXiv:2402.09353)."""

    kind: ClassVar[str] = "dora"

    dora_dropout: Literal["compatible", "low-rank"] = option(
        "compatible",
        help="what --dropout drops: the input of all that is beside the base, as PEFT has it, which costs a second "
        "product with the base; or of the low-rank path alone",
        group="tuning",
    )


@dataclass(frozen=True)
class AdaLoRATrained:
    """What is known of an AdaLoRA adapter only once it is trained.

    Attributes:
        steps: of the run; None where that is not known.
        kept: path of a layer -> for each rank it started with, whether it still has it; all of them where it is not
            among these.
    """

    steps: int | None = None
    kept: Mapping[str, tuple[bool, ...]] = field(default_factory=dict)


class AdaLoRA(Targeted):
    """LoRA as an SVD whose rank is spent where it matters most (Zhang et al. 2023, arXiv:2303.10512)."""

    kind: ClassVar[str] = "adalora"

    rank: int = option(12, help="rank each layer starts with", group="tuning", alias=("init_r",), gt=0)
    alpha: float = option(
        32.0,
        help="scale of the adapter: its update is multiplied by alpha / rank, the rank it starts with",
        group="tuning",
        alias=("lora_alpha",),
        gt=0,
    )
    dropout: float = option(
        0.0, help="dropout on the adapter's input", group="tuning", alias=("lora_dropout",), ge=0.0, lt=1.0
    )
    target_rank: int = option(8, help="average rank at the end", group="tuning", alias=("target_r",), gt=0)
    prune_from: float = option(
        0.1, help="share of the steps before ranks are first taken away", group="tuning", ge=0, lt=1
    )
    prune_until: float = option(
        0.7, help="share of the steps after which ranks stay as they are", group="tuning", gt=0, le=1
    )
    prune_every: int = option(10, help="steps between two decisions on ranks", group="tuning", alias=("deltaT",), gt=0)
    orthogonality: float = option(
        0.5, help="weight of the penalty that keeps A and B orthogonal", group="tuning", alias=("orth_reg_weight",),
        ge=0,
    )  # fmt: skip

    _trained: AdaLoRATrained = PrivateAttr(default_factory=AdaLoRATrained)

    @property
    def trained(self) -> AdaLoRATrained:
        """What training added, for an adapter that was read from a file."""
        return self._trained

    def after(self, trained: AdaLoRATrained) -> Self:
        """The same settings, of an adapter that was trained."""
        copy = self.model_copy()
        copy._trained = trained
        return copy


class VeRA(Targeted):
    """One random pair of matrices for all layers, and trained vectors that scale it (arXiv:2310.11454)."""

    kind: ClassVar[str] = "vera"

    rank: int = option(256, help="rank of the shared matrices", group="tuning", alias=("r",), gt=0)
    dropout: float = option(0.0, help="dropout on the adapter's input", group="tuning", ge=0.0, lt=1.0)
    d_initial: float = option(0.1, help="start of the vector on the rank's side", group="tuning")
    projection_seed: int = option(
        0, help="seed of the shared matrices", group="tuning", alias=("projection_prng_key",), ge=0
    )
    save_projection: bool = option(
        True, help="write the shared matrices into the adapter's file, rather than draw them again from their seed",
        group="tuning",
    )  # fmt: skip


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def enabled_slices(enabled: Sequence[bool] | None, targets: Sequence[str]) -> tuple[str, ...]:
    """``slices`` for ``enable_lora`` of PEFT before 0.3: which of so many equal parts of a fused layer are updated."""
    if not enabled:
        return ()
    parts = ",".join(f"{i + 1}/{len(enabled)}" for i, on in enumerate(enabled) if on)
    return tuple(f"{target}={parts}" for target in targets)
