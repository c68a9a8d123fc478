"""Low-rank adaptation of a linear map: y = W x + b + s B A x.  Hu et al. 2021, arXiv:2106.09685, section 4.

W [out, in] is frozen and may be stored in any form: this file only calls its layer.
A [r, in] starts random, B [out, r] starts at zero, so an untrained adapter changes nothing.
Both are kept in float32 and cast at use: bf16 has too few bits to add small updates to.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from typing_extensions import Self

from truetune.adapters.base import Change, LowRankUpdate
from truetune.adapters.lora_start import Start, start
from truetune.adapters.projecting import projection_group, projection_of
from truetune.adapters.standalone import Mergeable
from truetune.config.lora import LoRA
from truetune.errors import AdapterError
from truetune.ops import lowrank
from truetune.ops.dropout import dropped
from truetune.ops.frozen import frozen_weight, is_conv1d
from truetune.ops.projection import Projection, project
from truetune.ops.rng import current_keys

A, B, B_BIAS, START_A, START_B = (
    "lora_A.weight", "lora_B.weight", "lora_B.bias", "start_A.weight", "start_B.weight"
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LoRAParams:
    """The trained tensors of one site, as the adapter file holds them."""

    a: Tensor  # [r, in]
    b: Tensor  # [out, r]
    scale: float


def merge(weight: Tensor, bias: Tensor | None, params: LoRAParams) -> tuple[Tensor, Tensor | None]:
    """Fold the adapter into a dense weight: W + s B A, rounded once.

    Args:
        weight: [out, in], any floating dtype. Not modified.
        bias: [out] or None; LoRA leaves it alone.
    Returns:
        New (weight, bias) in the dtype of ``weight``.
    """
    return lowrank.fold(weight, params.a, params.b, params.scale), bias


class LoRALinear(Mergeable):
    """A frozen linear layer (``nn.Linear``, or GPT-2's ``Conv1D``) with a trained low-rank path beside it.

    Args:
        base: the layer; its parameters stop requiring gradients.
        rank: r.
        alpha: the update is multiplied by alpha / r.
        dropout: applied to the low-rank path's input while training.
        rank_stabilised: alpha / sqrt(r) instead.
        bias: train one beside B: y = W x + b + s (B A x + β).
        begun: where A and B start; the default draws A.
        generator: draws A; the default draws from torch's global one.
    """

    files = {"lora_a": A, "lora_b": B}  # noqa: RUF012 - ClassVar in the contract
    fixed = frozenset({START_A, START_B})
    settings: ClassVar[type[LoRA]] = LoRA
    drops_base = False
    """See ``ops.projection.Group``."""

    def __init__(
        self,
        base: nn.Module,
        *,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        rank_stabilised: bool = False,
        bias: bool = False,
        begun: Start | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.dropout = dropout
        self.site = 0  # tells this layer's dropout masks from another's
        self.rank, self.alpha, self.rank_stabilised = rank, alpha, rank_stabilised
        frozen = frozen_weight(base)
        begun = begun or start("kaiming", frozen, rank, generator=generator)
        self.lora_a, self.lora_b = Parameter(begun.a), Parameter(begun.b)
        self.start_a = Parameter(begun.a.clone(), requires_grad=False) if begun.taken_off else None
        self.start_b = Parameter(begun.b.clone(), requires_grad=False) if begun.taken_off else None
        self.lora_bias = Parameter(torch.zeros(frozen.out_features, device=frozen.device)) if bias else None

    @classmethod
    def from_base(
        cls,
        base: nn.Module,
        config: LoRA | None = None,
        *,
        generator: torch.Generator | None = None,
        original: Tensor | None = None,
        begun: Start | None = None,
        **settings: Any,
    ) -> Self:
        """Wrap a layer by the settings of a run, or by keywords: ``LoRALinear.from_base(linear, rank=8)``.

        Args:
            original: [out, in], the weight of a quantised base as it was before; for ``init="loftq"``.
            begun: where A and B start, whatever ``init`` says.
        Raises:
            ConfigError: a keyword that is no setting of ``LoRA``, or a value out of its range.
            AdapterError: a start that this base does not allow.
        """
        config = cls.settings(**{**(config or cls.settings()).model_dump(), **settings})
        if begun is None:
            scale = lowrank.scale(config.alpha, config.rank, rank_stabilised=config.use_rslora)
            begun = start(
                config.init, frozen_weight(base), config.rank, scale=scale, generator=generator, original=original
            )
        return cls(base, begun=begun, **cls.keywords(config))

    @classmethod
    def keywords(cls, config: Any) -> dict[str, Any]:
        """The arguments that come from the settings of a run."""
        return {
            "rank": config.rank,
            "alpha": config.alpha,
            "dropout": config.dropout,
            "rank_stabilised": config.use_rslora,
            "bias": config.lora_bias,
        }

    @property
    def scale(self) -> float:
        """s."""
        return lowrank.scale(self.alpha, self.rank, rank_stabilised=self.rank_stabilised)

    def adapter_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """A and B; the bias beside B, and where A and B started, where there are such."""
        yield from super().adapter_parameters()
        optional = ((B_BIAS, self.lora_bias), (START_A, self.start_a), (START_B, self.start_b))
        yield from ((suffix, parameter) for suffix, parameter in optional if parameter is not None)

    def low_rank(self, own: Mapping[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """A [R, in] and B [out, R] of all that stands beside W.

        Args:
            own: tensors to take in place of the layer's, by their suffixes in the file.
        """
        if own is None:
            if self.start_a is None or self.start_b is None:
                return self.lora_a, self.lora_b
            own = {A: self.lora_a, B: self.lora_b, START_A: self.start_a, START_B: self.start_b}
        if START_A not in own:
            return own[A], own[B]
        return torch.cat([own[A], own[START_A]]), torch.cat([own[B], -own[START_B]], dim=1)

    def update(self, own: Mapping[str, Tensor] | None = None) -> LowRankUpdate | None:
        """A and B of all that stands beside W, their scale, and the bias beside B."""
        shift = self.lora_bias if own is None else own.get(B_BIAS)
        return LowRankUpdate(*self.low_rank(own), self.scale, shift)

    def projection(self) -> Projection | None:
        """The layer as part of a node; None where its base is trained itself, or is of another kind."""
        frozen = projection_of(self.base)
        if frozen is None or self.is_merged:
            return frozen
        a, b = self.low_rank()
        shift = None if self.lora_bias is None else self.lora_bias * self.scale
        return Projection(frozen.weight, frozen.bias, a, b, self.scale, self.magnitude(), shift)

    def magnitude(self) -> Tensor | None:
        """[out], what W x + s B A x is multiplied by; None for nothing."""
        return None

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], in the dtype of the base's output."""
        rows = x.shape[:-1].numel()
        group = projection_group((self,), rows)
        if group is not None and x.dtype == group.dtype and not torch.is_autocast_enabled(x.device.type):
            (out,) = project(group, x.reshape(rows, x.shape[-1]))
            return out.view(*x.shape[:-1], out.shape[1])
        y: Tensor = self.base(x)
        return y if self.is_merged else self._beside(x, y).to(y.dtype)

    def _beside(self, x: Tensor, y: Tensor) -> Tensor:
        """The same as a composition: for trained bases and other dtypes than the base's.

        Args:
            x: [..., in].
            y: [..., out], what the base makes of it.
        """
        low = lowrank.linear(self._dropped(x), *self.low_rank(), self.scale)
        return y + (low if self.lora_bias is None else low + self.lora_bias * self.scale).to(y.dtype)

    def _dropped(self, x: Tensor) -> Tensor:
        if not (self.dropout and self.training):
            return x
        flat = x.reshape(-1, x.shape[-1])
        return dropped(flat, self.dropout, current_keys(len(flat), x.device), self.site).view_as(x)

    def changes(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Change]:
        """W + s B A, and b + s β.

        Raises:
            AdapterError: there is a β, and the base has no bias that it could be added to.
        """
        a, b = self.low_rank(tensors)
        transposed, scale = is_conv1d(self.base), self.scale

        def fold(weight: Tensor) -> Tensor:
            merged = self.folded(weight.T if transposed else weight, LoRAParams(a=a, b=b, scale=scale), tensors)
            return merged.T.contiguous() if transposed else merged

        if B_BIAS not in tensors:
            return {"weight": fold}
        if self.bias is None:
            raise AdapterError(
                "the adapter has a bias and this layer of the base has none: it does not fold into the base's weights",
                ("way out", "serve it beside the base, or train without --lora-bias"),
            )
        return {"weight": fold, "bias": lambda bias: torch.add(bias, tensors[B_BIAS], alpha=scale).to(bias.dtype)}

    def folded(self, weight: Tensor, params: LoRAParams, own: Mapping[str, Tensor]) -> Tensor:
        """The merged weight, [out, in], rounded once; ``own`` are all tensors of the adapter."""
        return merge(weight, None, params)[0]

    def params(self) -> LoRAParams:
        """What stands beside W, and its scale."""
        a, b = self.low_rank()
        return LoRAParams(a=a.detach(), b=b.detach(), scale=self.scale)

    def merged_weight(self) -> Tensor:
        """W + s B A, dense; as [in, out] where the base is a ``Conv1D``."""
        weight = frozen_weight(self.base).dense().detach()
        merged = weight.clone() if self.is_merged else self.folded(weight, self.params(), self._detached())
        return merged.T.contiguous() if is_conv1d(self.base) else merged

    def settle(self) -> None:
        """Let A and B be all that stands beside W, so that the file is a LoRA to everyone."""
        if self.start_a is not None:
            a, b = self.low_rank()
            self.lora_a, self.lora_b = Parameter(a.detach()), Parameter(b.detach())
            self.start_a = self.start_b = None
            self.grow(len(a))

    def grow(self, rank: int) -> None:
        """Call A and B of another rank, with the scale that they have."""
        more = rank / self.rank
        self.rank, self.alpha = rank, self.alpha * (math.sqrt(more) if self.rank_stabilised else more)

    def _detached(self) -> dict[str, Tensor]:
        return {suffix: tensor.detach() for suffix, tensor in self.own().items()}
