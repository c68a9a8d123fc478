"""The weights of a checkpoint as a GGUF names, orders and stores them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from truetune.checkpoint.header import TensorEntry, few
from truetune.checkpoint.tensors import load
from truetune.errors import ModelError, TruetuneError
from truetune.export.gguf_arch import Arch
from truetune.export.gguf_rope import halves_apart, rope_factors, side_by_side

TYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}  # ``general.file_type``
_BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
# llama.cpp adds or multiplies with these in float32, and has no other kernel for them.
_ALWAYS_F32 = ("_norm.weight", "position_embd.weight")


@dataclass(frozen=True)
class Planned:
    """A tensor of the file: its name, its shape as torch has it, its type, and how its values are made."""

    name: str
    shape: tuple[int, ...]
    kind: str  # a key of TYPES
    make: Callable[[], Tensor]  # in float32


def library() -> Any:
    """The ``gguf`` package. Raises TruetuneError where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise TruetuneError(
            "GGUF files need the package gguf, which is not installed", ("way out", "pip install 'truetune[gguf]'")
        ) from None
    return gguf


def plan(arch: Arch, config: Any, entries: Mapping[str, TensorEntry], kind: str) -> list[Planned]:
    """Every tensor of the GGUF, in the order of the checkpoint's files.

    Args:
        kind: of the matrices; vectors are float32, and so are rows that q8_0's blocks of 32 do not divide.
    Raises:
        ModelError: a tensor that this architecture has no name for.
    """
    names = name_map(arch, config)
    found, unknown = [], []
    tied = bool(getattr(config, "tie_word_embeddings", False))
    for entry in entries.values():
        if entry.name.endswith(_BUFFERS) or (tied and entry.name == "lm_head.weight"):
            continue
        name = names(entry.name)
        if name is None or not entry.dtype.is_floating_point:
            unknown.append(entry.name)
            continue
        change = laid_out(arch, config, name)
        shape = stored_shape(arch, name, entry.shape)
        found.append(Planned(name, shape, _kind(name, shape, kind), lambda e=entry, c=change: c(load(e).float())))  # type: ignore[misc]
    if unknown:
        raise ModelError(
            f"{len(unknown)} tensors of this model have no name in a GGUF of '{arch.name}'",
            ("tensors", few(unknown)),
            ("likely", "packed weights, or a variant of the architecture"),
            ("way out", "--to hf, and the unquantised base"),
        )
    if (factors := rope_factors(config)) is not None:
        found.append(Planned("rope_freqs.weight", tuple(factors.shape), "f32", lambda: factors))
    return found


def name_map(arch: Arch, config: Any) -> Callable[[str], str | None]:
    """From a checkpoint's name of a tensor to a GGUF's; None where it has none."""
    gguf = library()
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == arch.name)
    blocks = getattr(config, "num_hidden_layers", None) or config.n_layer
    names = gguf.get_tensor_name_map(number, blocks)

    def named(name: str) -> str | None:
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:  # files saved from a bare body lack its name
            body = "transformer" if arch.conv1d else "model"
            found = names.get_name(f"{body}.{name}", try_suffixes=(".weight", ".bias"))
        return None if found is None else str(found)

    return named


Turn = Callable[[Tensor], Tensor]


def laid_out(arch: Arch, config: Any, name: str) -> Turn:
    """What is done to the values of a tensor, by its name in the GGUF."""
    return _to_and_fro(arch, config, name)[0]


def restored(arch: Arch, config: Any, name: str) -> Turn:
    """What undoes ``laid_out``."""
    return _to_and_fro(arch, config, name)[1]


def _to_and_fro(arch: Arch, config: Any, name: str) -> tuple[Turn, Turn]:
    if not arch.rotates_halves and (".attn_q." in name or ".attn_k." in name):
        heads = config.num_attention_heads
        if ".attn_k." in name:
            heads = config.num_key_value_heads or heads
        return functools.partial(side_by_side, heads=heads), functools.partial(halves_apart, heads=heads)
    if arch.norm_plus_one and name.endswith("norm.weight"):
        return lambda weight: weight + 1, lambda weight: weight - 1
    if _is_transposed(arch, name):
        return _transposed, _transposed
    return lambda weight: weight, lambda weight: weight


def _transposed(weight: Tensor) -> Tensor:
    return weight.T.contiguous()


def stored_shape(arch: Arch, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a checkpoint's tensor has in the GGUF, where it is called ``name``."""
    return tuple(reversed(shape)) if _is_transposed(arch, name) else shape


def _is_transposed(arch: Arch, name: str) -> bool:
    parts = ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")
    return arch.conv1d and name.endswith(parts)


def _kind(name: str, shape: tuple[int, ...], kind: str) -> str:
    if len(shape) < 2 or name.endswith(_ALWAYS_F32):
        return "f32"
    return "f16" if kind == "q8_0" and shape[-1] % 32 else kind


def kind_of(setting: str, dtype: torch.dtype) -> str:
    """The type of the matrices: the checkpoint's own, for ``auto``."""
    if setting != "auto":
        return setting
    return {torch.bfloat16: "bf16", torch.float16: "f16"}.get(dtype, "f32")


def nbytes(planned: Planned) -> int:
    """The size of a tensor's body."""
    block, size = library().GGML_QUANT_SIZES[_type(planned)]
    return math.prod(planned.shape) // int(block) * int(size)


def _type(planned: Planned) -> Any:
    return getattr(library().GGMLQuantizationType, TYPES[planned.kind])


def encoded(planned: Planned) -> Any:
    """The body as numpy has it, made now.

    Raises:
        ModelError: a value that float16 can't hold.
    """
    values = planned.make().contiguous()
    assert tuple(values.shape) == planned.shape, f"{planned.name}: {tuple(values.shape)}, planned {planned.shape}"
    if planned.kind == "f16":
        narrow = values.to(torch.float16)
        if not torch.isfinite(narrow).all():
            raise ModelError(
                f"{planned.name} holds values that float16 can't ({values.abs().max():g})",
                ("way out", "--gguf-type bf16"),
            )
        return narrow.numpy()
    if planned.kind == "f32":
        return values.numpy()
    return library().quantize(values.numpy(), _type(planned))


def announce(writer: Any, planned: Planned) -> None:
    """Tell a ``GGUFWriter`` of a tensor whose body comes later."""
    import numpy

    writer.add_tensor_info(planned.name, planned.shape, numpy.dtype("float32"), nbytes(planned), _type(planned))
