"""What becomes of each tensor of a checkpoint that is packed: laid out before its values are known, then made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from truetune.checkpoint.header import PlannedTensor, TensorEntry
from truetune.checkpoint.tensors import load
from truetune.config.quant import QuantRecipe
from truetune.errors import QuantizationError
from truetune.export.difference import squared
from truetune.ops.finite import are_finite
from truetune.ops.frozen import is_conv1d
from truetune.quant import bnb_state
from truetune.quant.replace import quantised
from truetune.quant.stack import Stack, suffix_of


@dataclass
class Errors:
    """What packing took away, summed up over all packed weights (Frobenius)."""

    _error: float = 0.0
    _norm: float = 0.0

    def add(self, packed: Tensor, dense: Tensor) -> None:
        """One weight [rows, columns], before and after."""
        error, norm = squared(packed, dense)
        self._error, self._norm = self._error + error, self._norm + norm

    @property
    def relative(self) -> float:
        """|packed - dense| / |dense|."""
        return (self._error / self._norm) ** 0.5 if self._norm else 0.0


class Item(Protocol):
    """Tensors that are written together."""

    def planned(self) -> Iterator[PlannedTensor]:
        """Their names, dtypes and shapes."""

    def made(self, errors: Errors) -> Iterator[tuple[str, Tensor]]:
        """The same, with their values."""


@dataclass(frozen=True)
class Dense:
    """A tensor that stays as it is, but for its precision."""

    entry: TensorEntry
    dtype: torch.dtype

    def planned(self) -> Iterator[PlannedTensor]:
        """See ``Item``."""
        found = self.entry.dtype
        yield PlannedTensor(self.entry.name, self.dtype if found.is_floating_point else found, self.entry.shape)

    def made(self, errors: Errors) -> Iterator[tuple[str, Tensor]]:
        """See ``Item``."""
        tensor = load(self.entry)
        if tensor.is_floating_point():
            tensor = tensor.to(self.dtype)
            _check_finite(self.entry.name, tensor)
        yield self.entry.name, tensor


@dataclass(frozen=True)
class Layer:
    """A linear layer's weight.

    Attributes:
        path, skeleton: of the layer.
        dtype: that it is packed from, and dequantises to.
    """

    entry: TensorEntry
    path: str
    skeleton: nn.Module
    recipe: QuantRecipe
    dtype: torch.dtype

    def planned(self) -> Iterator[PlannedTensor]:
        """See ``Item``."""
        rows, columns = self.entry.shape[::-1] if is_conv1d(self.skeleton) else self.entry.shape
        stem = self.entry.name.removesuffix("weight")
        for part, (dtype, shape) in _parts(self.recipe, (rows, columns)).items():
            yield PlannedTensor(stem + part, dtype, shape)

    def made(self, errors: Errors) -> Iterator[tuple[str, Tensor]]:
        """See ``Item``."""
        dense, stem = load(self.entry), self.entry.name.removesuffix("weight")
        layer = quantised(self.skeleton, self.recipe, self.path, dtype=self.dtype)
        layer.pack(dense.to(self.dtype))
        errors.add(layer.frozen_weight().dense(), dense.T if is_conv1d(self.skeleton) else dense)
        yield from ((stem + name, tensor) for name, tensor in layer.packed().items())


@dataclass(frozen=True)
class Experts:
    """A stack of experts' matrices.

    Attributes:
        name: that it is written under.
        whole: the stack, where the files hold it as one tensor.
        matrices: else by expert the tensors that are its matrix, from the first row to the last.
    """

    name: str
    stack: Stack
    whole: TensorEntry | None = None
    matrices: Sequence[Sequence[TensorEntry]] = field(default_factory=tuple)

    def planned(self) -> Iterator[PlannedTensor]:
        """See ``Item``."""
        count = self.stack.shape[0]
        for part, (dtype, shape) in _parts(self.stack.recipe, self.stack.sizes).items():
            flat = (torch.Size(shape).numel(), 1) if dtype == torch.int8 else shape
            yield PlannedTensor(self.name + suffix_of(part), dtype, (count, *flat))

    def made(self, errors: Errors) -> Iterator[tuple[str, Tensor]]:
        """See ``Item``."""
        parts = self.stack.pack(one.to(self.stack.dtype) for one in self._dense())
        for weight, dense in zip(self.stack.weights(parts), self._dense(), strict=True):
            errors.add(self.stack.as_stored(weight), dense)
        yield from ((self.name + suffix_of(part), tensor) for part, tensor in parts.items())

    def _dense(self) -> Iterator[Tensor]:
        if self.whole is not None:
            yield from load(self.whole)
        for files in self.matrices:
            yield torch.cat([load(entry) for entry in files])


def _check_finite(name: str, tensor: Tensor) -> None:
    """What stays dense is refused as what is packed would be."""
    if not are_finite(tensor):
        bad = int((~tensor.float().isfinite()).sum())
        raise QuantizationError(
            f"{name}: {bad:,} of {tensor.numel():,} values are not finite",
            ("way out", "an earlier checkpoint if the run diverged, another copy if the file is damaged"),
        )


def _parts(recipe: QuantRecipe, sizes: tuple[int, int]) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Part of a packed weight [out, in] → its dtype and shape."""
    if recipe.kind == "int8":
        return {"weight": (torch.int8, sizes), "SCB": (torch.float32, sizes[:1]), "weight_format": (torch.uint8, ())}
    planned = bnb_state.planned4(recipe.kind, sizes, blocksize=recipe.blocksize, double=recipe.double)
    return {
        f"weight{suffix}": (dtype, (values,) if suffix else (values, 1)) for suffix, (dtype, values) in planned.items()
    }
