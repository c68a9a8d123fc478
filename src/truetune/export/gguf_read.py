"""A GGUF read back: its weights under the names a checkpoint has for them, and what its keys say the model is.

The other way round of ``gguf_tensors`` and ``gguf_arch``, for whoever holds a file against the model it was made from.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from truetune.checkpoint.header import few
from truetune.errors import AdapterError, ModelError, TruetuneError
from truetune.export.gguf import read_keys
from truetune.export.gguf_arch import Arch, hyperparameters
from truetune.export.gguf_rope import rope_factors
from truetune.export.gguf_tensors import library, name_map, restored, stored_shape

HEAD, TABLE, ROPE = "output.weight", "token_embd.weight", "rope_freqs.weight"
_A, _B = ".lora_a", ".lora_b"
# How llama.cpp stores matrices, by what the kinds of ``eval.limits`` are called; its other forms have fewer bits.
_KINDS = {"F32": "f32", "F16": "f16", "BF16": "bf16", "Q8_0": "q8_0", "Q6_K": "q6", "Q5_0": "q5", "Q5_1": "q5",
          "Q5_K": "q5", "Q4_0": "q4", "Q4_1": "q4", "Q4_K": "q4", "IQ4_NL": "q4", "IQ4_XS": "q4"}  # fmt: skip
_ORDER = ("f32", "f16", "bf16", "q8_0", "q6", "q5", "q4")


@dataclass(frozen=True)
class GGUFFile:
    """Keys by their full names, and the reader's tensors by theirs."""

    path: Path
    keys: Mapping[str, Any]
    tensors: Mapping[str, Any]

    @property
    def is_adapter(self) -> bool:
        """Whether it holds a LoRA alone."""
        return self.keys.get("general.type") == "adapter"

    @property
    def kind(self) -> str:
        """How coarsely it is stored, as ``eval.limits`` calls it: by the coarsest of its matrices.

        Raises:
            TruetuneError: in a form that nothing has been measured of.
        """
        types = {tensor.tensor_type.name for tensor in self.tensors.values() if len(tensor.shape) > 1}
        if unknown := sorted(types - _KINDS.keys()):
            raise TruetuneError(
                f"{self.path} holds weights as {', '.join(unknown)}, of which it is not known how far they may round",
                ("known", ", ".join(_KINDS)),
            )
        return "gguf-" + max((_KINDS[name] for name in types), key=_ORDER.index, default="f32")


def read_file(path: Path) -> GGUFFile:
    """Open a file; bodies are read when they are asked for.

    Raises:
        ModelError: no GGUF, or one that is cut short.
        TruetuneError: the gguf package is not installed.
    """
    keys, tensors = read_keys(path)
    return GGUFFile(path, keys, {str(tensor.name): tensor for tensor in tensors})


def dense(tensor: Any) -> Tensor:
    """A tensor of the reader in float32, with the shape that torch has for it."""
    values = library().dequantize(tensor.data, tensor.tensor_type)
    return torch.from_numpy(values.copy()).to(torch.float32)


def weights(
    file: GGUFFile, arch: Arch, config: Any, wanted: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, Tensor]]:
    """``(name in the model, values in float32)``, one at a time.

    Args:
        wanted: shapes of the model's tensors by its own names; a tied head is not among them.
    Raises:
        ModelError: tensors that are missing, left over, or of another shape; all of them at once.
    """
    places = _places(arch, config, wanted)
    faults = [f"missing {place}" for place in places if place not in file.tensors]
    faults += [f"left over {place}" for place in sorted(file.tensors.keys() - places.keys() - {ROPE})]
    for place, name in places.items():
        if place in file.tensors:
            found, expected = shape_of(file.tensors[place]), stored_shape(arch, place, wanted[name])
            faults += [f"misshaped {place}: {list(found)}, expected {list(expected)}"] if found != expected else []
    if faults:
        raise ModelError(f"{file.path} does not hold the tensors of this model", ("tensors", few(faults)))
    for place, name in places.items():
        yield name, restored(arch, config, place)(dense(file.tensors[place]))


def updates(
    file: GGUFFile, arch: Arch, config: Any, wanted: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, Tensor]]:
    """``(name in the model, what llama.cpp adds to it)`` of a LoRA: alpha / r · B A, as the model has the weight.

    Raises:
        AdapterError: half a pair, a layer that the model lacks, or one of another shape; all of them at once.
    """
    places = _places(arch, config, wanted)
    stems = sorted({name.removesuffix(_A).removesuffix(_B) for name in file.tensors})
    faults = [f"half a pair {stem}" for stem in stems if not {stem + _A, stem + _B} <= file.tensors.keys()]
    faults += [f"no such layer {stem}" for stem in stems if stem not in places]
    if not faults:
        faults += [f"misshaped {stem}" for stem in stems if _pair_shape(file, stem) != stored_shape(
            arch, stem, wanted[places[stem]])]  # fmt: skip
    if faults:
        raise AdapterError(f"{file.path} does not fit this model", ("tensors", few(faults)))
    alpha = float(file.keys.get("adapter.lora.alpha", 0.0))
    for stem in stems:
        a, b = dense(file.tensors[stem + _A]), dense(file.tensors[stem + _B])
        scale = alpha / len(a) if alpha else 1.0  # as llama.cpp has it
        yield places[stem], restored(arch, config, stem)(scale * b @ a)


def shape_of(tensor: Any) -> tuple[int, ...]:
    """As torch has it: a GGUF counts dimensions from the innermost."""
    return tuple(int(size) for size in reversed(tensor.shape))


def _pair_shape(file: GGUFFile, stem: str) -> tuple[int, ...]:
    return shape_of(file.tensors[stem + _B])[0], shape_of(file.tensors[stem + _A])[1]


def _places(arch: Arch, config: Any, wanted: Mapping[str, Any]) -> dict[str, str]:
    """Name in a GGUF → name in the model."""
    names = name_map(arch, config)
    return {str(names(name)): name for name in wanted}


def other_hyperparameters(file: GGUFFile, arch: Arch, config: Any, rows: int) -> list[str]:
    """What a file says of its model and the model does not, as sentences; llama.cpp would compute with it.

    A key that is not there is what llama.cpp takes in its place.
    """
    expected, own = hyperparameters(arch, config, rows), f"{arch.name}."
    found = {key.removeprefix(own): value for key, value in file.keys.items() if key.startswith(own)}
    taken = _taken_for_granted(found)
    said = []
    for name in sorted(expected.keys() | {name for name in found if name.startswith(_COMPUTED_WITH)}):
        one, other = found.get(name, taken.get(name)), expected.get(name, taken.get(name))
        if name not in _NOT_COMPUTED_WITH and not _equal(one, other):
            said.append(f"{own}{name} is {_word(one)} in the file, and the trained model's is {_word(other)}")
    return said + _other_frequencies(file, config)


_COMPUTED_WITH = ("attention.", "rope.", "attn_", "final_logit", "logit_scale", "residual_scale", "embedding_scale")
# How long a text may be, and what llama.cpp tells from the tensors.
_NOT_COMPUTED_WITH = ("context_length", "vocab_size", "rope.scaling.finetuned")


def _taken_for_granted(found: Mapping[str, Any]) -> dict[str, Any]:
    heads, wide = found.get("attention.head_count") or 1, found.get("embedding_length") or 0
    width = found.get("attention.key_length", wide // heads)
    return {
        "attention.head_count_kv": heads, "attention.key_length": width, "attention.value_length": wide // heads,
        "rope.dimension_count": width, "rope.freq_base": 10000.0, "rope.scaling.type": "linear",
        "rope.scaling.factor": 1.0, "rope.scaling.attn_factor": 1.0, "attention.causal": True,
        "rope.scaling.original_context_length": found.get("context_length"), "attention.sliding_window": 0,
    }  # fmt: skip


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, list) and not isinstance(other, list):  # a value for each layer
        return all(_equal(value, other) for value in one)
    if isinstance(one, int | float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=1e-6)
    return bool(one == other)


def _word(value: Any) -> str:
    return "not there" if value is None else str(value)


def _other_frequencies(file: GGUFFile, config: Any) -> list[str]:
    expected = rope_factors(config)
    found = dense(file.tensors[ROPE]) if ROPE in file.tensors else None
    if (found is None) != (expected is None):
        return [f"{ROPE} is {'not ' if found is None else ''}in the file, and the trained model says otherwise"]
    same = found is None or (expected is not None and found.shape == expected.shape and torch.allclose(found, expected))
    return [] if same else [f"{ROPE} holds other factors than those of the trained model's config"]
