"""Adapted layers in anyone's own model and training loop: merge one on the spot, train adapters alone, save them alone.

A layer's ``merge`` puts the merged weight in the base's place and keeps the base's own, so ``unmerge`` gives back the
very same bits; nothing is ever subtracted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from truetune.adapters.base import Adapter
from truetune.errors import AdapterError

Bias = Literal["none", "adapted", "all"]


class Mergeable(Adapter):
    """An adapter that can be merged where it is."""

    fixed: ClassVar[frozenset[str]] = frozenset()
    """Suffixes of tensors that the adapter owns and that never train."""

    _kept: dict[str, Tensor] | None = None  # the base's own tensors while it is merged

    @property
    def is_merged(self) -> bool:
        """Whether the base holds the merged weight, so that it alone computes what the layer does."""
        return self._kept is not None

    def own(self) -> dict[str, Tensor]:
        """The adapter's tensors by their suffixes in the file, as ``changes`` takes them."""
        return dict(self.adapter_parameters())

    def merge(self) -> None:
        """Fold the adapter into the base's weight, which is kept aside: twice the memory until ``unmerge``.

        Raises:
            AdapterError: it is merged already, or the base is packed and has no dense weight to change.
        """
        if self.is_merged:
            raise AdapterError("the layer is merged already", ("way out", "unmerge() gives the base's own weight back"))
        if hasattr(self.base, "frozen_weight"):
            raise AdapterError(
                f"{type(self.base).__name__} is packed: merged, it would have to be packed anew",
                ("way out", "truetune merge writes a checkpoint, dense or packed, and says how far it is off"),
            )
        changes = self.changes({suffix: tensor.detach() for suffix, tensor in self.own().items()})
        with torch.no_grad():
            merged = {name: change(_parameter(self.base, name).detach()) for name, change in changes.items()}
        self._kept = {name: _parameter(self.base, name).data for name in merged}
        for name, tensor in merged.items():
            _parameter(self.base, name).data = tensor

    def unmerge(self) -> None:
        """Give the base its own weight back.

        Raises:
            AdapterError: it is not merged.
        """
        if self._kept is None:
            raise AdapterError("the layer is not merged")
        for name, tensor in self._kept.items():
            _parameter(self.base, name).data = tensor.to(_parameter(self.base, name).device)
        self._kept = None


def only_adapters_trainable(module: nn.Module, *, bias: Bias = "none") -> dict[str, int]:
    """Let the adapters inside a module require gradients, and nothing else.

    Args:
        bias: of the base, train none, those of adapted layers, or all.
    Returns:
        What is trained: name → count.
    Raises:
        AdapterError: there is no adapter in it.
    """
    found = list(_adapters(module))
    if not found:
        raise AdapterError(f"{type(module).__name__} holds no adapter", ("way out", "wrap a layer with LoRALinear"))
    module.requires_grad_(False)
    for _, adapter in found:
        for suffix, parameter in adapter.adapter_parameters():
            parameter.requires_grad_(suffix not in getattr(adapter, "fixed", ()))
    for parameter in _biases(module, bias):
        parameter.requires_grad_(True)
    return {name: p.numel() for name, p in module.named_parameters() if p.requires_grad}


def adapter_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """What the adapters in a module own, and what else is trained in it: name in the module → tensor.

    The tensors are the module's own, not copies.
    """
    owned = {id(p) for _, adapter in _adapters(module) for _, p in adapter.adapter_parameters()}
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad or id(p) in owned}


def load_adapter_state_dict(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy what ``adapter_state_dict`` gave into a module that is wrapped alike; exactly all of it.

    Raises:
        AdapterError: a tensor missing, extra or of another shape; then none was copied.
    """
    expected = adapter_state_dict(module)
    faults = [f"missing    {name}" for name in expected if name not in tensors]
    faults += [f"extra      {name}" for name in tensors if name not in expected]
    faults += [
        f"misshaped  {name}: found {list(tensors[name].shape)}, expected {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    if faults:
        raise AdapterError(f"{len(faults)} tensors do not fit this module", ("tensors", "\n".join(faults[:12])))
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name in expected:
            parameters[name].copy_(tensors[name])


def _adapters(module: nn.Module) -> Iterator[tuple[str, Adapter]]:
    return ((path, m) for path, m in module.named_modules() if isinstance(m, Adapter))


def _biases(module: nn.Module, wanted: Bias) -> Iterator[Parameter]:
    """Biases of the base; an adapter's own are named otherwise."""
    if wanted == "all":
        yield from (p for name, p in module.named_parameters() if name.rpartition(".")[2] == "bias")
    if wanted == "adapted":
        yield from (p for _, adapter in _adapters(module) if isinstance(p := adapter.bias, Parameter))


def _parameter(base: nn.Module, name: str) -> Parameter:
    return cast(Parameter, getattr(base, name))
