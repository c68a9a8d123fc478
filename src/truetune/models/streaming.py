"""A frozen base that stays on disk: a decoder layer's pages are in memory while it is computed, and no longer.

The tensors are views of the checkpoint's files. Before a layer runs, the system is told to read the next one; after it,
the layer's pages are let go, and the backward does the same in the reverse order. Nothing is copied and no number
changes: a page that is needed again comes back from the system's cache, or from the disk.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from truetune.checkpoint.header import TensorEntry
from truetune.checkpoint.mapped import Pages, file_mappings, pages_of
from truetune.checkpoint.tensors import name_in_checkpoint
from truetune.errors import ModelError
from truetune.models.layers import decoder_layers
from truetune.ops.allocator import trim
from truetune.quant.packed import Packed

# Share of a base that has to lie in files for streaming to be of use; norms in float32 may be copies.
_STREAMABLE = 0.8


@dataclass(frozen=True)
class Streams:
    """The pages of a base.

    Attributes:
        layers: of each decoder layer.
        head: of the output head.
        outside: of all that is in no layer: embeddings, norms, the head.
    """

    layers: tuple[Pages, ...]
    head: Pages
    outside: Pages

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that lie in files."""
        return sum(pages.nbytes for pages in (*self.layers, self.outside))

    @property
    def in_flight(self) -> int:
        """Bytes of those that are in memory at a time: two layers that follow each other, or all outside of them."""
        sizes = [pages.nbytes for pages in self.layers]
        return max([*map(sum, zip(sizes, [*sizes[1:], 0], strict=True)), self.outside.nbytes])

    def enter(self, i: int) -> None:
        """A forward comes to layer i: what it used before the first layer, or after the last in another pass, goes.

        So does freed memory: the gradients of the step before, and the holes that the optimizer's state was put among.
        The largest moment is at the head, before there are gradients. Taking it anew costs less than a layer's reading.
        """
        if i == 0:
            self.outside.drop()
            trim()
        (self.layers[i + 1] if i + 1 < len(self.layers) else self.head).fetch()

    def leave(self, i: int) -> None:
        """A forward is through with layer i."""
        self.layers[i].drop()

    def turn_back(self, i: int) -> None:
        """A backward comes to layer i: it has left what follows that one."""
        (self.layers[i + 1] if i + 1 < len(self.layers) else self.outside).drop()
        if i > 0:
            self.layers[i - 1].fetch()

    def drop(self) -> None:
        """Let all of it go."""
        for pages in (*self.layers, self.outside):
            pages.drop()


def streams_of(model: PreTrainedModel) -> Streams:
    """Where a model's frozen tensors lie in files; tensors that are trained, or in memory of their own, are left out.

    A frozen tensor that has been written to since it was loaded must not be among them.
    """
    mappings, layers, head = file_mappings(), decoder_layers(model), model.get_output_embeddings()
    found = tuple(pages_of(_frozen(layer), mappings) for layer in layers)
    inside = {id(module) for layer in layers for module in layer.modules()}
    others = [t for module in model.modules() if id(module) not in inside for t in _own(module)]
    return Streams(found, pages_of(_frozen(head) if head else (), mappings), pages_of(others, mappings))


@contextlib.contextmanager
def streamed(model: PreTrainedModel) -> Iterator[Streams]:
    """Stream the base inside the block; gradients and losses are those of a base in memory, to the bit."""
    streams = streams_of(model)
    hooks = _hooked(model, streams)
    try:
        yield streams
    finally:
        for hook in hooks:
            hook.remove()
        streams.drop()


def keep_on_disk(model: PreTrainedModel, *, limit_mb: float, held_mb: float) -> bool:
    """Freeze a model that was just loaded and stream it from now on, if it would not fit into a limit otherwise.

    Args:
        limit_mb: what the process may hold, but for what computing takes.
        held_mb: what it held before the model was loaded.
    Returns:
        Whether it is streamed.
    Raises:
        ModelError: it does not lie on disk as it is used, or two of its layers are too much as well.
    """
    whole = frozen_bytes(model.requires_grad_(False))
    if held_mb + whole / 1e6 <= limit_mb:
        return False
    streams = streams_of(model)
    if streams.nbytes < _STREAMABLE * whole:
        raise ModelError(
            f"max_memory: only {streams.nbytes / 1e6:,.0f} MB of the base's {whole / 1e6:,.0f} could stay on disk",
            ("because", "what stays there must lie there as it is used, and be read on Linux to a CPU"),
            ("way out", "truetune quantize MODEL packed --quant nf4, then load that; or the dtype that the files have"),
        )
    least = held_mb + (whole - streams.nbytes + streams.in_flight) / 1e6
    if least > limit_mb:
        raise ModelError(
            f"max_memory: {limit_mb:,.0f} MB, and {least:,.0f} are needed though the base stays on disk",
            ("of that", f"{held_mb:,.0f} MB the process before, the rest two layers at a time, or the largest table"),
            ("way out", f"max_memory of {-(-least // 10) * 10:.0f} MB, and room for activations on top"),
        )
    mapped = {tensor.data_ptr() for pages in (*streams.layers, streams.outside) for tensor in pages.tensors}
    frozen = [(name, p) for name, p in model.named_parameters() if p.data_ptr() in mapped]
    model.register_forward_pre_hook(partial(_check_frozen, frozen))
    _hooked(model, streams)
    return True


def _check_frozen(frozen: Sequence[tuple[str, nn.Parameter]], _: nn.Module, args: Any) -> None:
    """What an optimizer wrote there would be lost with the page."""
    for name, parameter in frozen:
        if parameter.requires_grad:
            raise ModelError(
                f"{name}: is to be trained, and this base stays on disk (max_memory)",
                ("way out", "load it without max_memory, or train an adapter beside it"),
            )


def _hooked(model: PreTrainedModel, streams: Streams) -> list[Any]:
    hooks: list[Any] = []
    for i, layer in enumerate(decoder_layers(model)):
        hooks.append(layer.register_forward_pre_hook(partial(_before, streams, i)))
        hooks.append(layer.register_forward_hook(partial(_after, streams, i)))
    return hooks


def _before(streams: Streams, i: int, _: nn.Module, args: Any) -> None:
    streams.enter(i)


def _after(streams: Streams, i: int, _: nn.Module, args: Any, output: Any) -> None:
    streams.leave(i)
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    if hidden.requires_grad:  # the hook runs when the gradient is complete: just before the layer's own backward
        hidden.register_hook(lambda _: streams.turn_back(i))  # type: ignore[no-untyped-call]


def _frozen(module: nn.Module) -> Iterator[Tensor]:
    for part in module.modules():
        yield from _own(part)


def _own(module: nn.Module) -> Iterator[Tensor]:
    """The frozen tensors of one module, its children's not counted."""
    yield from (p.detach() for p in module.parameters(recurse=False) if not p.requires_grad)
    if isinstance(module, Packed):
        yield from module.stored()


def frozen_bytes(model: nn.Module) -> int:
    """Bytes of all that is frozen, wherever it lies; packed weights as they are packed, a shared tensor once."""
    packed = [module for module in model.modules() if isinstance(module, Packed)]
    weights = {id(getattr(module, name)) for module in packed for name in module.nbytes_by_parameter}
    others = {id(p): p for p in model.parameters() if not p.requires_grad and id(p) not in weights}
    return sum(p.nbytes for p in others.values()) + sum(module.packed_bytes for module in packed)


def copied_bytes(model: PreTrainedModel, entries: Mapping[str, TensorEntry], dtype: torch.dtype) -> int:
    """How much of a model has to be in memory because its files don't hold it just as it is used.

    Args:
        model: without adapters; may be on the meta device.
        entries: the tensors of its checkpoint.
        dtype: of the dense weights in memory.
    """
    copied: dict[int, int] = {}
    for path, module in model.named_modules():
        codes = module.nbytes_by_parameter if isinstance(module, Packed) else {}
        for name, parameter in module.named_parameters(recurse=False):
            stored = name_in_checkpoint(f"{path}.{name}".removeprefix("."), entries, model.base_model_prefix)
            entry = entries[stored] if stored else None
            copied.setdefault(id(parameter), codes.get(name, parameter.nbytes))
            if entry is None or entry.offset % entry.dtype.itemsize:
                continue
            if (
                entry.dtype in _CODES
                if name in codes
                else (entry.dtype, entry.shape) == (dtype, tuple(parameter.shape))
            ):
                copied[id(parameter)] = 0  # under one of its names, if it is shared
    return sum(copied.values())


_CODES = (torch.uint8, torch.int8)
