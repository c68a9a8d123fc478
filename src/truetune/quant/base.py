"""What the quantised linear layers share: y = W x + b, W frozen and packed, the products through one graph node."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import Self

from truetune.errors import QuantizationError
from truetune.ops.frozen import FrozenLinear, FrozenWeight, is_conv1d
from truetune.ops.projection import Group, Projection, project
from truetune.quant.packed import Packed, taken


class QuantLinear(nn.Module, Packed):
    """A linear layer with a packed weight.

    Until it is filled, ``weight`` is [out, in] on the meta device. Assigning a dense weight to it packs that at once,
    so a checkpoint that is loaded tensor by tensor is never held whole; a packed one comes with ``fill``.

    Args:
        in_features, out_features: sizes of the map.
        bias: whether there is one; [out], frozen.
        dtype: that the layer computes in. Inputs of another are cast, and so is what comes out.
        path: what to call the layer in errors.
        transposed: dense weights come as [in, out], as GPT-2's ``Conv1D`` keeps them.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        path: str = "",
        transposed: bool = False,
    ) -> None:
        super().__init__()
        self.awaits_packed = False  # a loader's dense stand-in is to be ignored, ``fill`` comes later
        self.in_features, self.out_features = in_features, out_features
        self.dtype, self.path, self.transposed = dtype, path, transposed
        shape = (in_features, out_features) if transposed else (out_features, in_features)
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
        empty = torch.empty(out_features, dtype=dtype, device="meta")
        self.bias = nn.Parameter(empty, requires_grad=False) if bias else None

    @classmethod
    def from_base(cls, base: nn.Module, **settings: Any) -> Self:
        """Quantise an ``nn.Linear`` or a ``Conv1D``, which is not changed; settings as the class takes them.

        Raises:
            QuantizationError: values that are not finite.
        """
        inner, outer, transposed = sizes_of(base)
        weight, bias = cast(Tensor, base.weight).detach(), cast("Tensor | None", base.bias)
        new = cls(inner, outer, bias=bias is not None, **{"dtype": weight.dtype, "transposed": transposed, **settings})
        if not weight.is_meta:
            new.pack(weight)
            new.bias = None if bias is None else nn.Parameter(bias.detach().to(new.dtype), requires_grad=False)
        return new

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and isinstance(value, Tensor) and value.is_floating_point() and not value.is_meta:
            if not self.awaits_packed:
                self.pack(value.detach())
                self.weight.__dict__ |= value.__dict__  # a loader's notes, such as that nothing is left to initialise
        else:
            super().__setattr__(name, value)

    def pack(self, weight: Tensor) -> None:
        """Quantise a dense weight, stored as the layer it came from stores it.

        Raises:
            QuantizationError: values that are not finite, or another shape, named by the layer's path.
        """
        if weight.is_meta:
            raise QuantizationError(f"{self.path or 'weight'}: on the meta device, which holds no values")
        dense = weight.T if self.transposed else weight
        if dense.shape != (self.out_features, self.in_features):
            raise QuantizationError(
                f"{self.path or 'weight'}: found {list(dense.shape)}, expected {[self.out_features, self.in_features]}"
            )
        try:
            self._pack(dense.to(self.dtype))
        except QuantizationError as error:
            raise QuantizationError(f"{self.path or 'weight'}: {error.message}", *error.notes) from None

    @property
    def is_filled(self) -> bool:
        """Whether there is a weight."""
        return not self.weight.is_meta

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out] in the dtype of ``x``."""
        rows, trained = x.shape[:-1].numel(), self.bias is not None and self.bias.requires_grad
        group = Group((Projection(self.frozen_weight(), None if trained else self.bias),))
        (y,) = project(group, x.reshape(rows, self.in_features).to(self.dtype))
        if self.bias is not None and trained:  # the group's node has no gradient for what it holds
            y = y + self.bias.to(y.dtype)
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def dense(self) -> Tensor:
        """W as [out, in] in ``dtype``, in memory of its own."""
        return self.frozen_weight().dense().clone()

    def extra_repr(self) -> str:
        """Sizes and form, for ``print(model)``."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    @abstractmethod
    def _pack(self, dense: Tensor) -> None:
        """Quantise W [out, in], which comes in ``dtype``."""

    @abstractmethod
    def _move(self, device: torch.device) -> None:
        """Let the scales follow ``weight``.

        They are neither parameters nor buffers: a loader resets those of them that no file names.
        """

    @abstractmethod
    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Take packed tensors, by their names in bitsandbytes' files without the layer's path (``weight.absmax``, …).

        Raises:
            QuantizationError: they don't fit each other or this layer.
        """

    @property
    def dense_values(self) -> int:
        """See ``Packed``."""
        return self.in_features * self.out_features

    @property
    def dense_at_once(self) -> int:
        """See ``Packed``."""
        return self.dense_values

    def stored(self) -> Iterator[Tensor]:
        """See ``Packed``."""
        if self.is_filled:
            yield from self.packed().values()

    @abstractmethod
    def packed(self) -> dict[str, Tensor]:
        """The tensors that ``fill`` takes."""

    def frozen_weight(self) -> FrozenWeight:
        """W as adapters see it; before there is one, its sizes."""
        return self._frozen() if self.is_filled else FrozenLinear(self.weight, self.transposed)

    @abstractmethod
    def _frozen(self) -> FrozenWeight:
        """The weight that is there."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if not self.is_filled:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            return
        destination.update({prefix + name: tensor for name, tensor in self.packed().items()})
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        found = {name.removeprefix(prefix): t for name, t in state_dict.items() if name.startswith(prefix)}
        device, bias = self.weight.device, found.pop("bias", None)
        if self.bias is not None and bias is not None:
            bias = taken({"bias": bias}, device, local_metadata)["bias"]
            self.bias = nn.Parameter(bias.to(self.dtype), requires_grad=False)
        elif (self.bias is None) != (bias is None):
            (missing_keys if bias is None else unexpected_keys).append(f"{prefix}bias")
        if "weight" not in found:
            missing_keys.append(f"{prefix}weight")
        elif found["weight"].is_floating_point() and len(found) == 1:
            self.pack(found["weight"])
        else:
            self.fill(taken(found, device, local_metadata))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        """Scales are float32 whatever a model is cast to: only where they are may change."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.is_filled:
            self._move(self.weight.device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device)).dtype
        return self


def sizes_of(module: nn.Module) -> tuple[int, int, bool]:
    """``(in, out, transposed)`` of an ``nn.Linear`` or a ``Conv1D``."""
    shape = cast(Tensor, module.weight).shape
    return (shape[0], shape[1], True) if is_conv1d(module) else (shape[1], shape[0], False)
