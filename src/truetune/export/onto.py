"""Merging for a base that was quantised while the adapter was trained: onto which weights, and how far from the model.

The live model computes with W' + s B A, where W' is what the packed weight stands for. Merged onto W', the result says
the same up to rounding, and every packed layer is replaced, adapted or not; merged onto the original W, it keeps the
precision that packing took away, and differs from what was trained by just that.
"""

from __future__ import annotations

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

    def add(self, site: _Site, merged: Tensor, live: Tensor) -> None:
        """One weight, as its layer stores it; ``live`` in float32."""
        error, norm = squared(merged, live)
        self._squared, self._norm = self._squared + error, self._norm + norm
        if self.again:
            if site.path in self.paths:
                layer = quantised(site.layer, self.again, site.path, dtype=self.dtype)
                layer.pack(merged)
                merged = _as_stored(layer, site.layer)
            self._repacked += squared(merged, live)[0]

    @property
    def relative(self) -> float:
        """|merged - live| / |live|."""
        return (self._squared / self._norm) ** 0.5 if self._norm else 0.0

    @property
    def repacked(self) -> float | None:
        """The same of the weights as they are packed again."""
        return (self._repacked / (self._norm or 1.0)) ** 0.5 if self.again else None


@dataclass(frozen=True)
class _Site:
    """A packed layer of the base: its skeleton, and what the adapter does to its weight."""

    path: str
    layer: nn.Module
    change: Change | None

    def live(self, dense: Tensor) -> Tensor:
        """The weight the live model multiplies with, in float32, stored as the layer stores its own."""
        return self.change(dense.float()) if self.change else dense.float()


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
            raise ModelError(
                f"the base's files have no tensor {path}.weight, which was packed while the adapter was trained",
                ("likely", "transformers renames or joins this model's weights while loading, which merging tensor by "
                 "tensor can't follow"),
                ("way out", "--onto original"),
            )  # fmt: skip
        edit = edits.get(name)
        site = _Site(path, layer, edit.apply if isinstance(edit, Edit) else None)
        result[name] = Edit(name, _edit(site, recipe, onto, dtype, drift))
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
        edit = result.pop(name, None)
        site = _Site(path, layer, edit.apply if isinstance(edit, Edit) else None)
        stem = name.removesuffix("weight")
        own = {n.removeprefix(stem): e for n, e in entries.items() if n.startswith(stem) and n != f"{stem}bias"}
        drop += [stem + suffix for suffix in own]
        shape = tuple(layer.weight.shape)  # type: ignore[arg-type]
        result[name] = Addition(name, dtype, shape, lambda s=site, o=own: _dense(s, o, recipe, dtype, drift))  # type: ignore[misc]
    return result, drop


def stored_packed(entries: Mapping[str, TensorEntry]) -> bool:
    """Whether the files hold packed weights."""
    return bool(bnb_state.packed_weights(entries))


def _edit(site: _Site, recipe: QuantRecipe, onto: Onto, dtype: torch.dtype, drift: Drift) -> Change:
    def apply(weight: Tensor) -> Tensor:
        layer = quantised(site.layer, recipe, site.path, dtype=dtype)
        layer.pack(weight.to(dtype))
        live = site.live(_as_stored(layer, site.layer))
        if onto == "dequantized":
            merged = live.to(weight.dtype)
        else:
            merged = site.change(weight) if site.change else weight
        drift.add(site, merged, live)
        return merged

    return apply


def _dense(
    site: _Site, own: Mapping[str, TensorEntry], recipe: QuantRecipe, dtype: torch.dtype, drift: Drift
) -> Tensor:
    layer = quantised(site.layer, recipe, site.path, dtype=dtype)
    layer.fill({suffix: view(entry) for suffix, entry in own.items()})
    live = site.live(_as_stored(layer, site.layer))
    merged = live.to(dtype)
    drift.add(site, merged, live)
    return merged


def _as_stored(layer: QuantLinear, skeleton: nn.Module) -> Tensor:
    dense = layer.frozen_weight().dense()
    return dense.T.contiguous() if is_conv1d(skeleton) else dense.clone()


def recipe_of(card: Mapping[str, Any]) -> QuantRecipe | None:
    """How the base was packed while an adapter was trained, by its ``truetune.json``."""
    found = card.get("quantisation")
    return QuantRecipe(**{**found, "skip": tuple(found["skip"])}) if found else None
