"""Merging for a base that was quantised while the adapter was trained: onto which weights, and how far from the model.

The live model computes with W' + s B A, where W' is what the packed weight stands for. Merged onto W', the result says
the same up to rounding, and every packed layer is replaced, adapted or not; merged onto the original W, it keeps the
precision that packing took away, and differs from what was trained by just that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from truetune.adapters.base import Change
from truetune.checkpoint.header import TensorEntry
from truetune.checkpoint.mapped import view
from truetune.checkpoint.tensors import name_in_checkpoint
from truetune.config.quant import QuantRecipe
from truetune.errors import ModelError
from truetune.export.difference import squared
from truetune.export.merge import Addition, Edit
from truetune.ops.frozen import is_conv1d
from truetune.quant import bnb_state
from truetune.quant.base import QuantLinear
from truetune.quant.replace import quantised

Onto = Literal["original", "dequantized"]


@dataclass
class Drift:
    """How far merged weights are from the live model's, relative to these (Frobenius, over all packed layers).

    Attributes:
        again: what the merged weights are packed to afterwards, if they are.
        paths: the layers that this packs.
        dtype: that it packs them from.
    """

    again: QuantRecipe | None = None
    paths: Collection[str] = ()
    dtype: torch.dtype = torch.float32
    _squared: float = 0.0
    _repacked: float = 0.0
    _norm: float = 0.0

    def add(self, site: Site, merged: Tensor, live: Tensor) -> None:
        """One weight, as its layer stores it; ``live`` in float32."""
        error, norm = squared(merged, live)
        self._squared, self._norm = self._squared + error, self._norm + norm
        if self.again:
            if site.path in self.paths:
                merged = site.through(self.again, merged, self.dtype)
            self._repacked += squared(merged, live)[0]

    @property
    def relative(self) -> float:
        """|merged - live| / |live|."""
        return (self._squared / self._norm) ** 0.5 if self._norm else 0.0

    @property
    def repacked(self) -> float | None:
        """The same of the weights as they are packed again."""
        return (self._repacked / (self._norm or 1.0)) ** 0.5 if self.again else None


@dataclass(kw_only=True)
class Site(ABC):
    """A packed weight of the base, and what the adapter does to it.

    Attributes:
        path: of the layer, or of the parameter where there is none.
        change: None where the adapter leaves it alone.
    """

    path: str
    change: Change | None

    @abstractmethod
    def through(self, recipe: QuantRecipe, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """What a dense weight becomes when it is packed, as the base stores it."""

    def live(self, dense: Tensor) -> Tensor:
        """The weight the live model multiplies with, in float32, from what the packed one stands for."""
        return self.change(dense.float()) if self.change else dense.float()

    def edit(self, recipe: QuantRecipe, onto: Onto, dtype: torch.dtype, drift: Drift) -> Change:
        """What a merge makes of the original weight."""

        def apply(weight: Tensor) -> Tensor:
            live = self.live(self.through(recipe, weight.to(dtype), dtype))
            if onto == "dequantized":
                merged = live.to(weight.dtype)
            else:
                merged = self.change(weight) if self.change else weight
            drift.add(self, merged, live)
            return merged

        return apply

    def unpacked(self, dense: Tensor, dtype: torch.dtype, drift: Drift) -> Tensor:
        """What a merge makes of what a packed weight stands for."""
        live = self.live(dense)
        merged = live.to(dtype)
        drift.add(self, merged, live)
        return merged


@dataclass(kw_only=True)
class _LayerSite(Site):
    layer: nn.Module

    def through(self, recipe: QuantRecipe, weight: Tensor, dtype: torch.dtype) -> Tensor:
        layer = quantised(self.layer, recipe, self.path, dtype=dtype)
        layer.pack(weight)
        return _as_stored(layer, self.layer)


def change_of(edit: Edit | Addition | None) -> Change | None:
    """What an adapter does to a tensor that is there."""
    return edit.apply if isinstance(edit, Edit) else None


def on_quantised(
    edits: Mapping[str, Edit | Addition],
    paths: Mapping[str, nn.Module],
    entries: Mapping[str, TensorEntry],
    recipe: QuantRecipe,
    *,
    onto: Onto,
    dtype: torch.dtype,
    prefix: str,
    drift: Drift,
) -> dict[str, Edit | Addition]:
    """The edits of a merge, for a dense base that the adapter saw packed.

    Args:
        edits: those of the adapter, by name in the files.
        paths: path → skeleton of each layer that was packed.
        dtype: that the packed layers computed in.
        drift: filled in while the edits are applied.
    Raises:
        ModelError: the files don't have a packed layer's weight under its name.
    """
    result = dict(edits)
    for path, layer in paths.items():
        name = name_in_checkpoint(f"{path}.weight", entries, prefix)
        if name is None:
            if onto == "original":
                continue
            raise not_in_files(f"{path}.weight")
        site = _LayerSite(path=path, layer=layer, change=change_of(edits.get(name)))
        result[name] = Edit(name, site.edit(recipe, onto, dtype, drift))
    return result


def unpacked(
    edits: Mapping[str, Edit | Addition],
    paths: Mapping[str, nn.Module],
    entries: Mapping[str, TensorEntry],
    recipe: QuantRecipe,
    *,
    dtype: torch.dtype,
    prefix: str,
    drift: Drift,
) -> tuple[dict[str, Edit | Addition], list[str]]:
    """The edits of a merge into a packed base, and the tensors to leave out: its weights become dense."""
    result, packed = dict(edits), bnb_state.packed_weights(entries)
    drop: list[str] = []
    for path, layer in paths.items():
        name = name_in_checkpoint(f"{path}.weight", entries, prefix)
        if name not in packed:
            continue
        site = _LayerSite(path=path, layer=layer, change=change_of(result.pop(name, None)))
        parts = bnb_state.parts_of(name, entries)
        drop += parts.values()
        own = {part: entries[key] for part, key in parts.items()}
        shape = tuple(layer.weight.shape)  # type: ignore[arg-type]
        result[name] = Addition(name, dtype, shape, lambda s=site, o=own: _dense(s, o, recipe, dtype, drift))  # type: ignore[misc]
    return result, drop


def not_in_files(name: str) -> ModelError:
    """For a weight that the dequantised one can't be written for."""
    return ModelError(
        f"the base's files have no tensor {name}, which was packed while the adapter was trained",
        ("likely", "transformers renames or joins this model's weights while loading, which merging tensor by tensor "
         "can't follow"),
        ("way out", "--onto original"),
    )  # fmt: skip


def stored_packed(entries: Mapping[str, TensorEntry]) -> bool:
    """Whether the files hold packed weights."""
    return bool(bnb_state.packed_weights(entries))


def _dense(
    site: _LayerSite, own: Mapping[str, TensorEntry], recipe: QuantRecipe, dtype: torch.dtype, drift: Drift
) -> Tensor:
    layer = quantised(site.layer, recipe, site.path, dtype=dtype)
    layer.fill({suffix: view(entry) for suffix, entry in own.items()})
    return site.unpacked(_as_stored(layer, site.layer), dtype, drift)


def _as_stored(layer: QuantLinear, skeleton: nn.Module) -> Tensor:
    dense = layer.frozen_weight().dense()
    return dense.T.contiguous() if is_conv1d(skeleton) else dense.clone()


def recipe_of(card: Mapping[str, Any]) -> QuantRecipe | None:
    """How the base was packed while an adapter was trained, by its ``truetune.json``."""
    found = card.get("quantisation")
    return QuantRecipe(**{**found, "skip": tuple(found["skip"])}) if found else None
