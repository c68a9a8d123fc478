"""The form of packed experts: a stack of matrices, each packed just as a linear layer of its own would be.

A stack's codes and scales lie one expert's after another's, under the names and with the bytes that bitsandbytes gives
to a linear layer, but for one dimension more in front: ``P`` [experts, …], ``P.absmax`` [experts, …] and so on. No
other program reads such a stack.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from truetune.config.quant import QuantRecipe
from truetune.errors import QuantizationError
from truetune.ops.frozen import FrozenWeight
from truetune.quant.base import QuantLinear
from truetune.quant.form import form_of

OWN = "truetune"
"""``quant_method`` of a checkpoint with packed stacks, which are in bitsandbytes' form one by one and not as a whole.
Programs that know no such method refuse it, or go on to find that no stack has the shape that they expect."""


class Stack:
    """The form of one stack.

    Args:
        shape: [experts, out, in], or [experts, in, out] where it is transposed.
        recipe: how each matrix is packed.
        dtype: that it computes in.
        path: what to call it in errors.
    """

    def __init__(
        self, shape: Sequence[int], recipe: QuantRecipe, *, transposed: bool, dtype: torch.dtype, path: str
    ) -> None:
        self.shape, self.path = tuple(shape), path
        self.recipe, self.transposed, self.dtype = recipe, transposed, dtype

    @property
    def sizes(self) -> tuple[int, int]:
        """``(out, in)`` of a matrix."""
        _, rows, columns = self.shape
        return (columns, rows) if self.transposed else (rows, columns)

    def layer(self, e: int) -> QuantLinear:
        """An empty linear layer for one expert."""
        out, inner = self.sizes
        cls, settings = form_of(self.recipe)
        return cls(
            inner, out, dtype=self.dtype, path=f"{self.path}, expert {e}", transposed=self.transposed, **settings
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and scales."""
        return self.shape[0] * self.layer(0).packed_bytes

    def pack(self, matrices: Iterator[Tensor]) -> dict[str, Tensor]:
        """Part → the stack of it, for one dense matrix per expert, as they are stored.

        Raises:
            QuantizationError: values that are not finite, or another shape, named by the expert; or not one for each.
        """
        stacks, found, count = dict[str, Tensor](), 0, self.shape[0]
        for e, matrix in enumerate(matrices):
            found += 1
            if found > count:
                continue  # only counted
            layer = self.layer(e)
            layer.pack(matrix)
            for part, tensor in layer.packed().items():
                flat = self._as_kept(part, tensor)
                if part not in stacks:
                    stacks[part] = flat.new_empty((count, *flat.shape))
                stacks[part][e] = flat
        if found != count:
            raise QuantizationError(f"{self.path}: found {found} matrices, expected {count}, one per expert")
        return stacks

    def check(self, shape: Sequence[int]) -> None:
        """Raises QuantizationError for a dense stack of another shape."""
        if tuple(shape) != self.shape:
            raise QuantizationError(f"{self.path}: found {list(shape)}, expected {list(self.shape)}")

    def weights(self, stacks: Mapping[str, Tensor]) -> list[FrozenWeight]:
        """Every expert's matrix from the stacks of its parts, in their memory.

        Raises:
            QuantizationError: they don't fit each other or this stack.
        """
        if any(not tensor.ndim or len(tensor) != self.shape[0] for tensor in stacks.values()):
            sizes = ", ".join(f"{part} {list(tensor.shape)}" for part, tensor in stacks.items())
            raise QuantizationError(f"{self.path}: not a stack of {self.shape[0]} packed matrices", ("found", sizes))
        found = []
        for e in range(self.shape[0]):
            layer = self.layer(e)
            layer.fill({part: self._as_packed(part, tensor[e]) for part, tensor in stacks.items()})
            found.append(layer.frozen_weight())
        return found

    def _as_kept(self, part: str, tensor: Tensor) -> Tensor:
        """Codes of 8 bits lie flat: in their own shape they would pass for weights where nobody looks at the dtype."""
        return tensor.reshape(-1, 1) if self.recipe.kind == "int8" and part == "weight" else tensor

    def _as_packed(self, part: str, tensor: Tensor) -> Tensor:
        fits = tensor.numel() == torch.Size(self.sizes).numel()
        return tensor.view(self.sizes) if self.recipe.kind == "int8" and part == "weight" and fits else tensor

    def packed_as(self, recipe: QuantRecipe, dtype: torch.dtype) -> Stack:
        """The same stack in another form."""
        return Stack(self.shape, recipe, transposed=self.transposed, dtype=dtype, path=self.path)

    def through(self, matrix: Tensor, e: int) -> Tensor:
        """What one expert's dense matrix becomes when it is packed: as it is stored, in memory of its own."""
        layer = self.layer(e)
        layer.pack(matrix)
        return self.as_stored(layer.frozen_weight())

    def as_stored(self, weight: FrozenWeight) -> Tensor:
        """A packed matrix made dense, in memory of its own."""
        dense = weight.dense()
        return dense.T.contiguous() if self.transposed else dense.clone()


def stack_of(module: nn.Module, name: str, recipe: QuantRecipe, *, dtype: torch.dtype, path: str) -> Stack:
    """The form of a stack of a dense module, which may be on the meta device."""
    shape, transposed = getattr(module, name).shape, bool(module.is_transposed)
    return Stack(shape, recipe, transposed=transposed, dtype=dtype, path=path)


def part_of(suffix: str, recipe: QuantRecipe) -> str:
    """A linear layer's part, by what its stack's name has behind the parameter's (``.absmax``, ``.SCB``)."""
    return suffix.removeprefix(".") if recipe.kind == "int8" and suffix else f"weight{suffix}"


def suffix_of(part: str) -> str:
    """The reverse of ``part_of``."""
    return part.removeprefix("weight") if part == "weight" or part.startswith("weight.") else f".{part}"


def parts_of(name: str, names: Iterable[str], recipe: QuantRecipe) -> dict[str, str]:
    """Part of a linear layer → what it is called among ``names``, for the stack of this name."""
    return {part_of(one[len(name) :], recipe): one for one in names if one == name or one.startswith(f"{name}.")}
