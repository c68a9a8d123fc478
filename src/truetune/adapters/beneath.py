"""An adapter that stays as it is beneath another: part of the frozen maps that the other one is put on.

    y = (W + s B A) x + b + s β        A, B, β of the first, all frozen

So whatever is trained on top, by any method, sees a frozen layer that has another weight, however W is stored. What the
first makes of a layer must be a low-rank update of a linear map: LoRA, AdaLoRA or VeRA.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from truetune.adapters.base import Adapter, Change, LowRankUpdate
from truetune.adapters.combine import Combination
from truetune.errors import AdapterError
from truetune.ops import lowrank
from truetune.ops.frozen import FrozenWeight, frozen_weight, is_conv1d


@dataclass(frozen=True)
class UpdatedWeight:
    """W + B A as a frozen weight: what W is stored in stays as it is.

    Attributes:
        base: W [out, in].
        a: [r, in], in any floating dtype.
        b: [out, r], with the scale in it, likewise.
    """

    base: FrozenWeight
    a: Tensor
    b: Tensor

    @property
    def out_features(self) -> int:
        """Rows of W."""
        return self.base.out_features

    @property
    def in_features(self) -> int:
        """Columns of W."""
        return self.base.in_features

    @property
    def dtype(self) -> torch.dtype:
        """Of the products."""
        return self.base.dtype

    @property
    def device(self) -> torch.device:
        """W's."""
        return self.base.device

    def dense(self) -> Tensor:
        """W + B A as [out, in], rounded once."""
        dense = self.base.dense()  # of a model without storage nobody reads it
        return dense if dense.is_meta else lowrank.fold(dense, self.a, self.b, 1.0)

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[n, in] -> [n, out]: x (W + B A)ᵀ + bias."""
        y = self.base.matmul(x, bias)
        return y.addmm_((x @ self.a.to(x.dtype).T).to(y.dtype), self.b.to(y.dtype).T)

    def matmul_t(self, g: Tensor, into: Tensor | None = None) -> Tensor:
        """[n, out] -> [n, in]: g (W + B A); with ``into`` [n, in], added to that in place."""
        sums = self.base.matmul_t(g, into)
        return sums.addmm_((g @ self.b.to(g.dtype)).to(sums.dtype), self.a.to(sums.dtype))


class Beneath(Adapter):
    """A frozen linear layer and a frozen update of it, as one frozen linear layer.

    Args:
        base: the layer, as the model has it.
        update: of a linear map.
    """

    files = {}  # noqa: RUF012 - ClassVar in the contract
    a: Tensor
    b: Tensor
    shift: Tensor | None

    def __init__(self, base: nn.Module, update: LowRankUpdate) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        device = frozen_weight(base).device
        # Real tensors on a model without storage as well: what it is merged into is computed from them.
        where = update.a.device if device.type == "meta" else device
        self.register_buffer("a", update.a.detach().float().to(where), persistent=False)
        self.register_buffer("b", (update.b.detach().float() * update.scale).to(where), persistent=False)
        shift = None if update.shift is None else (update.shift.detach().float() * update.scale).to(where)
        self.register_buffer("shift", shift, persistent=False)

    @property
    def bias(self) -> Tensor | None:
        """The base's, with the first adapter's; in the dtype of the products."""
        own = super().bias
        if self.shift is None:
            return own
        return (self.shift if own is None else own.float() + self.shift).to(frozen_weight(self.base).dtype)

    def frozen_weight(self) -> UpdatedWeight:
        """W + s B A, as the adapter on top sees it."""
        return UpdatedWeight(frozen_weight(self.base), self.a, self.b)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], in the dtype of the base's output."""
        y: Tensor = self.base(x)
        low = lowrank.linear(x, self.a, self.b, 1.0)
        return y + (low if self.shift is None else low + self.shift).to(y.dtype)

    def update(self, own: Mapping[str, Tensor] | None = None) -> LowRankUpdate:
        """What stands beside W; it has no tensors in the file of the adapter on top."""
        return LowRankUpdate(self.a, self.b, 1.0, self.shift)

    def changes(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Change]:
        """W + s B A, and b + s β.

        Raises:
            AdapterError: there is a β, and the base has no bias that it could be added to.
        """
        found: dict[str, Change] = {"weight": self._folded}
        if (shift := self.shift) is not None:
            if super().bias is None:
                raise AdapterError(
                    "the adapter beneath has a bias and this layer of the base has none: it does not fold into weights",
                    ("way out", "serve it beside the base"),
                )
            found["bias"] = lambda bias: (bias.float() + shift).to(bias.dtype)
        return found

    def _folded(self, weight: Tensor) -> Tensor:
        """Of a weight as the base stores it."""
        if is_conv1d(self.base):
            return lowrank.fold(weight.T, self.a, self.b, 1.0).T.contiguous()
        return lowrank.fold(weight, self.a, self.b, 1.0)

    def then(self, name: str, change: Change) -> Change:
        """What an adapter on top makes of a parameter after this one; rounded once.

        Args:
            name: of the base's parameter.
            change: for [out, in], as this layer shows its weight to what is on top.
        """
        first, turned = self.changes({}).get(name), name == "weight" and is_conv1d(self.base)

        def both(tensor: Tensor) -> Tensor:
            wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
            wide = wide if first is None else first(wide)
            changed = change(wide.T.contiguous()).T.contiguous() if turned else change(wide)
            return changed.to(tensor.dtype)

        return both

    def merged_weight(self) -> Tensor:
        """W + s B A, dense; as [in, out] where the base is a ``Conv1D``."""
        dense = frozen_weight(self.base).dense().detach()
        return self._folded(dense.T if is_conv1d(self.base) else dense)


def own_path(path: str) -> str:
    """The path of a layer as the model without adapters has it."""
    return re.sub(r"(\.base)+$", "", path)


def updates_by_layer(
    layers: Mapping[str, Adapter], own: Mapping[str, Mapping[str, Tensor]] | None = None
) -> dict[str, LowRankUpdate]:
    """Path of a layer of the model → all that stands beside it, of one adapter or of one on top of another.

    Args:
        layers: by path; those that are no low-rank update are left out.
        own: tensors to take in place of the layers', by path and suffix in the file.
    """
    found: dict[str, list[LowRankUpdate]] = {}
    for path, layer in layers.items():
        update = layer.update() if own is None else layer.update(own[path])
        if update is not None:
            found.setdefault(own_path(path), []).append(update)
    both = Combination("cat")
    return {path: each[0] if len(each) == 1 else both.of(each, [1.0] * len(each), None) for path, each in found.items()}


def lay(model: nn.Module, updates: Mapping[str, LowRankUpdate]) -> None:
    """Put frozen updates beneath whatever will be put on a model that carries no adapter; ``detach`` takes them out."""
    for path, update in updates.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, Beneath(model.get_submodule(path), update))
