"""VeRA: one random pair for all layers, and trained vectors that scale it.  Kopiczko et al. 2023, arXiv:2310.11454.

    y = W x + b + λ_b ∘ (B (λ_d ∘ (A x)))        (equation 2)

A [r, in] and B [out, r] are frozen, drawn once from a seed, and as large as the largest layer needs; a layer takes the
first columns and rows of them. λ_d [r] starts at a small constant, λ_b [out] at zero, so an untrained adapter changes
nothing. Neither A nor B gets a gradient, so a layer needs nothing of x for its backward.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from truetune.adapters.base import Adapter, Change, LowRankUpdate
from truetune.adapters.input_dropout import dropped_input
from truetune.adapters.linear_sites import check_linear, linear_sites
from truetune.adapters.methods import Site
from truetune.adapters.peft_fields import Fields, layers_of, targets_of
from truetune.adapters.targets import shortest_names, targeted
from truetune.config.lora import VeRA
from truetune.ops import lowrank
from truetune.ops.frozen import frozen_weight, is_conv1d, is_linear

CHANGES_TABLE = False
TRAINS: tuple[str, ...] = ()
PEFT_LACKS = ("ensure_weight_tying",)

_WITHOUT_EFFECT = ("fan_in_fan_out", "init_weights")


class SharedPair:
    """A [r, in] and B [out, r] of all layers, in float32; in other dtypes and on other devices on demand.

    Args:
        seed: PEFT's ``projection_prng_key``; the same numbers come of it. Uniform in ±sqrt(6 / fan-in) (He et al. 2015,
            arXiv:1502.01852).
        saved: it is part of the adapter's file.
    """

    def __init__(self, rank: int, in_features: int, out_features: int, *, seed: int, saved: bool) -> None:
        draws = torch.Generator().manual_seed(seed)
        self.a = _uniform((rank, in_features), draws)
        self.b = _uniform((out_features, rank), draws)
        self.saved = saved
        self._casts: dict[tuple[torch.dtype, torch.device], tuple[int, Tensor, Tensor]] = {}

    def like(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both in the dtype of ``x`` and where it is; cast once, not once per layer and step."""
        version, key = self.a._version + self.b._version, (x.dtype, x.device)
        if key not in self._casts or self._casts[key][0] != version:
            self._casts[key] = (version, self.a.to(x), self.b.to(x))
        return self._casts[key][1:]


def _uniform(shape: tuple[int, int], draws: torch.Generator) -> Tensor:
    bound = math.sqrt(6 / shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=draws)


class VeRALinear(Adapter):
    """A frozen linear layer with the shared pair beside it, scaled by vectors of its own.

    Args:
        base: the layer; its parameters stop requiring gradients.
        pair: at least as large as the layer.
        d_initial: where λ_d starts.
        dropout: applied to the pair's input while training.
    """

    files = {"lambda_b": "vera_lambda_b", "lambda_d": "vera_lambda_d"}  # noqa: RUF012 - ClassVar in the contract

    def __init__(self, base: nn.Module, pair: SharedPair, *, d_initial: float = 0.1, dropout: float = 0.0) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.pair, self.dropout = pair, dropout
        self.site = 0  # tells this layer's dropout masks from another's
        frozen = frozen_weight(base)
        self.in_features, self.out_features = frozen.in_features, frozen.out_features
        self.lambda_b = nn.Parameter(torch.zeros(self.out_features, device=frozen.device))
        self.lambda_d = nn.Parameter(torch.full((len(pair.a),), d_initial, device=frozen.device))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], in the dtype of the base's output."""
        a, b = self.pair.like(x)
        read = dropped_input(x, self.dropout, site=self.site, training=self.training)
        low = F.linear(read, a[:, : self.in_features]) * self.lambda_d.to(x.dtype)
        y: Tensor = self.base(x)
        return y + (F.linear(low, b[: self.out_features]) * self.lambda_b.to(x.dtype)).to(y.dtype)

    def shared_tensors(self) -> Mapping[str, Tensor]:
        """The pair, where it is saved."""
        return {"base_model.vera_A": self.pair.a, "base_model.vera_B": self.pair.b} if self.pair.saved else {}

    def update(self, own: Mapping[str, Tensor] | None = None) -> LowRankUpdate | None:
        """λ_d ∘ A and λ_b ∘ B, which each layer then has for itself."""
        held = dict(self.adapter_parameters()) if own is None else own
        return LowRankUpdate(*self._scaled_pair(held["vera_lambda_b"], held["vera_lambda_d"]), 1.0)

    def changes(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Change]:
        """W + (λ_b ∘ B)(λ_d ∘ A)."""
        return {"weight": lambda weight: self._folded(weight, tensors["vera_lambda_b"], tensors["vera_lambda_d"])}

    def merged_weight(self) -> Tensor:
        """The same, dense; as [in, out] where the base is a ``Conv1D``."""
        dense = frozen_weight(self.base).dense().detach()
        stored = dense.T if is_conv1d(self.base) else dense
        return self._folded(stored, self.lambda_b.detach(), self.lambda_d.detach())

    def _folded(self, weight: Tensor, lambda_b: Tensor, lambda_d: Tensor) -> Tensor:
        """Of a weight as the base stores it, to another."""
        transposed = is_conv1d(self.base)
        merged = lowrank.fold(weight.T if transposed else weight, *self._scaled_pair(lambda_b, lambda_d), 1.0)
        return merged.T.contiguous() if transposed else merged

    def _scaled_pair(self, lambda_b: Tensor, lambda_d: Tensor) -> tuple[Tensor, Tensor]:
        """λ_d ∘ A [r, in] and λ_b ∘ B [out, r]."""
        a, b = (t.to(lambda_b) for t in (self.pair.a[:, : self.in_features], self.pair.b[: self.out_features]))
        return lambda_d[:, None] * a, lambda_b[:, None] * b


def sites(model: nn.Module, config: VeRA) -> list[str]:
    """Paths of the linear layers that the targets name."""
    return linear_sites(model, config)


def wrap(layer: nn.Module, config: VeRA, site: Site) -> Adapter:
    """The layer with its vectors; the first one brings the pair that all share."""
    check_linear(layer, site.path, config)
    if "pair" not in site.shared:
        site.shared["pair"] = _pair_for(site.model, config)
    adapter = VeRALinear(layer, site.shared["pair"], d_initial=config.d_initial, dropout=config.dropout)
    adapter.site = site.mask
    return adapter


def _pair_for(model: nn.Module, config: VeRA) -> SharedPair:
    """As large as the largest of the layers that will be wrapped."""
    layers = (model.get_submodule(path) for path in targeted(model, config, all_must_match=False))
    weights = [frozen_weight(layer) for layer in layers if is_linear(layer)]
    inner, outer = max(w.in_features for w in weights), max(w.out_features for w in weights)
    return SharedPair(config.rank, inner, outer, seed=config.projection_seed, saved=config.save_projection)


def to_peft(model: nn.Module, config: VeRA, sites: Sequence[str]) -> dict[str, Any]:
    """The method's own fields of ``adapter_config.json``."""
    return {
        "r": config.rank,
        "vera_dropout": config.dropout,
        "d_initial": config.d_initial,
        "projection_prng_key": config.projection_seed,
        "save_projection": config.save_projection,
        "target_modules": shortest_names(model, sites),
        "fan_in_fan_out": any(is_conv1d(module) for module in model.modules()),
        "init_weights": True,
    }


def from_peft(config: Mapping[str, Any], folder: Path) -> VeRA:
    """The settings in our terms."""
    fields = Fields(config, folder, without_effect=_WITHOUT_EFFECT)
    return fields.build(
        VeRA,
        rank=("r", fields.take("r", 256)),  # PEFT's own defaults, for a file that leaves them out
        dropout=("vera_dropout", fields.take("vera_dropout") or 0.0),
        d_initial=("d_initial", fields.take("d_initial", 0.1)),
        projection_seed=("projection_prng_key", fields.take("projection_prng_key", 0)),
        save_projection=("save_projection", fields.take("save_projection", True)),
        targets=("target_modules", targets_of(fields)),
        layers=("layers_to_transform", layers_of(fields)),
    )
