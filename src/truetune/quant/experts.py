"""A module of experts whose stacks of matrices are packed (``quant.stack``)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from truetune.config.quant import QuantRecipe
from truetune.ops import experts
from truetune.ops.frozen import FrozenWeight
from truetune.quant.packed import Packed, taken
from truetune.quant.stack import Stack, parts_of, stack_of, suffix_of

MAPS = (experts.GATED, experts.PLAIN, experts.LAST)


def stacks_of(module: nn.Module) -> tuple[str, ...]:
    """Names of a module's own parameters that are stacks of experts' matrices, where it computes what is known."""
    if isinstance(module, QuantExperts) or not experts.follows_interface(module):
        return ()
    own = dict(module.named_parameters(recurse=False))
    return tuple(name for name in MAPS if name in own and own[name].ndim == 3 and own[name].is_floating_point())


class QuantExperts(nn.Module, Packed):
    """A module of experts with packed stacks; every expert that got tokens has its matrix made dense for its products.

    Until a stack is filled, its parameter has its dense shape on the meta device. Assigning a dense stack packs that at
    once; a packed one comes with ``fill``. What is no stack stays the base's.

    Args:
        base: a module that ``stacks_of`` finds stacks in; it is not changed.
        names: which of its stacks.
        recipe: how each matrix is packed.
        dtype: that the products are computed in.
        path: what to call it in errors.
    Raises:
        QuantizationError: values that are not finite.
    """

    def __init__(
        self, base: nn.Module, names: Sequence[str], recipe: QuantRecipe, *, dtype: torch.dtype, path: str = ""
    ) -> None:
        super().__init__()
        self.awaits_packed = False  # a loader's dense stand-in is to be ignored, ``fill`` comes later
        self.dtype, self.recipe, self.names = dtype, recipe, tuple(names)
        for field in (*experts.INTERFACE, "has_post_expert_norm", "act_fn"):
            if hasattr(base, field):
                setattr(self, field, getattr(base, field))
        own, self._stacks = dict(base.named_parameters(recurse=False)), dict[str, Stack]()
        self._parts, self._weights = dict[str, dict[str, Tensor]](), dict[str, list[FrozenWeight]]()
        for name, child in base.named_children():
            self.add_module(name, child)
        for name, parameter in own.items():
            if name in self.names:
                whole = f"{path}.{name}".removeprefix(".")
                self._take(name, parameter, stack_of(base, name, recipe, dtype=dtype, path=whole))
            else:
                self.register_parameter(name, parameter)
        self._base = (_without_parameters(base),)  # in a tuple: it is no child, only its gate is asked

    def _take(self, name: str, parameter: nn.Parameter, stack: Stack) -> None:
        self._stacks[name] = stack
        empty = torch.empty(parameter.shape, dtype=self.dtype, device="meta")
        self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        if not parameter.is_meta:
            self.pack(name, parameter.detach())

    def __setattr__(self, name: str, value: Any) -> None:
        stacks = self.__dict__.get("_stacks", {})
        if name in stacks and isinstance(value, Tensor) and value.is_floating_point() and not value.is_meta:
            if not self.awaits_packed:
                self.pack(name, value.detach())
                getattr(self, name).__dict__.update(value.__dict__)  # a loader's notes
        else:
            super().__setattr__(name, value)

    def pack(self, name: str, dense: Tensor) -> None:
        """Quantise a stack [experts, …], expert by expert.

        Raises:
            QuantizationError: values that are not finite, or another shape, by the stack's path and the expert.
        """
        stack = self._stacks[name]
        stack.check(dense.shape)
        self.fill(name, stack.pack(iter(dense)))

    def fill(self, name: str, parts: Mapping[str, Tensor]) -> None:
        """Take a packed stack: part of a linear layer (``weight``, ``weight.absmax``, ``SCB`` …) → [experts, …].

        Raises:
            QuantizationError: they don't fit each other or this module.
        """
        self._weights[name] = self._stacks[name].weights(parts)
        self._parts[name] = dict(parts)
        self.register_parameter(name, nn.Parameter(parts["weight"], requires_grad=False))

    def is_packed(self, name: str) -> bool:
        """See ``ops.experts.OwnsStacks``; a dense stack may stand in for the codes while it is trained."""
        if name not in self._weights:
            return False
        now: Tensor = getattr(self, name)
        return not now.is_floating_point() or now.shape != self._stacks[name].shape

    def frozen_expert(self, name: str, e: int) -> FrozenWeight:
        """One expert's matrix [out, in] of a packed stack, as adapters see it."""
        return self._weights[name][e]

    def dense(self, name: str) -> Tensor:
        """A stack as it was before, in memory of its own."""
        stack = self._stacks[name]
        return torch.stack([stack.as_stored(weight) for weight in self._weights[name]])

    def packed_stack(self, name: str) -> dict[str, Tensor]:
        """The tensors that ``fill`` takes."""
        return self._parts[name]

    def _apply_gate(self, x: Tensor) -> Tensor:
        """[n, 2 · inner] -> [n, inner], as the base has it."""
        gated: Tensor = self._base[0]._apply_gate(x)  # type: ignore[operator]
        return gated

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[tokens, hidden], [tokens, k] int64, [tokens, k] -> [tokens, hidden]; see ``ops.experts.routed``."""

        def product(name: str, e: int, x: Tensor) -> Tensor:
            return experts.product(self, name, e, x)

        def one(e: int, x: Tensor) -> Tensor:
            return experts.expert(self, e, x, product)

        return experts.routed(hidden_states, top_k_index, top_k_weights, int(self.num_experts), one)  # type: ignore[arg-type]

    @property
    def nbytes_by_parameter(self) -> Mapping[str, int]:
        """See ``Packed``."""
        return {name: stack.nbytes for name, stack in self._stacks.items()}

    @property
    def dense_values(self) -> int:
        """See ``Packed``."""
        return sum(torch.Size(stack.shape).numel() for stack in self._stacks.values())

    @property
    def dense_at_once(self) -> int:
        """See ``Packed``."""
        return max(torch.Size(stack.sizes).numel() for stack in self._stacks.values())

    def stored(self) -> Iterator[Tensor]:
        """See ``Packed``."""
        for parts in self._parts.values():
            yield from parts.values()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, parts in self._parts.items():
            destination.update({f"{prefix}{name}{suffix_of(part)}": tensor for part, tensor in parts.items()})

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
        rest, filled, missing = dict(state_dict), set[str](), list[str]()
        for name in self.names:
            own = {part: rest.pop(key) for part, key in parts_of(prefix + name, state_dict, self.recipe).items()}
            if own.keys() == {"weight"} and own["weight"].is_floating_point():
                self.pack(name, own["weight"])
            elif own:
                self.fill(name, taken(own, self._device, local_metadata))
            if own:
                filled.add(prefix + name)
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        missing_keys += (name for name in missing if name not in filled)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantExperts:
        """Scales are float32 whatever a model is cast to: only where they are may change."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self._device)).dtype
        for name, stack in self._stacks.items():
            stack.dtype = self.dtype
            if parts := self._parts.get(name):
                device = getattr(self, name).device
                self.fill(name, {part: tensor.to(device) for part, tensor in parts.items()})
        return self

    @property
    def _device(self) -> torch.device:
        found: torch.device = getattr(self, self.names[0]).device
        return found

    def extra_repr(self) -> str:
        """Sizes and form, for ``print(model)``."""
        sizes = ", ".join(f"{name}={list(stack.shape)}" for name, stack in self._stacks.items())
        return f"{sizes}, kind={self.recipe.kind}{', double' if self.recipe.double else ''}"


def _without_parameters(base: nn.Module) -> nn.Module:
    """The module's settings and methods, none of its memory."""
    bare = copy.copy(base)
    bare._parameters = {}
    return bare
