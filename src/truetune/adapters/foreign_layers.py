"""A and B of other makers' layers as those of ours: shapes, names and the order of rows."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from truetune.adapters import lora, lora_embedding
from truetune.errors import AdapterError, nearest
from truetune.ops.frozen import frozen_weight, is_linear

Pairs = Mapping[str, tuple[Tensor, Tensor]]

# litgpt's names within a layer, and transformers' in Llama and what is built like it.
WITHIN = {
    "attn.proj": "self_attn.o_proj", "mlp.fc_1": "mlp.gate_proj", "mlp.fc_2": "mlp.up_proj",
    "mlp.proj": "mlp.down_proj",
}  # fmt: skip
FUSED = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Layer:
    """One adapted layer.

    Attributes:
        a, b: as our file has them.
        parts: which of a fused layer, as ``--slices`` names them.
        widened: how many times larger the rank is than it was, with the same scale.
    """

    path: str
    a: Tensor
    b: Tensor
    parts: tuple[str, ...] = ()
    widened: int = 1
    is_table: bool = False

    @property
    def rank(self) -> int:
        """Of one part."""
        return self.b.shape[1]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """``(suffix in the file, tensor)``."""
        names = (lora_embedding.A, lora_embedding.B) if self.is_table else (lora.A, lora.B)
        yield from zip(names, (self.a, self.b), strict=True)


def of_loralib(pairs: Pairs, model: nn.Module, enabled: Sequence[bool] | None) -> list[Layer]:
    """Layers that are named as in the model.

    Raises:
        AdapterError: a layer that the model lacks, or whose shapes are not loralib's.
    """
    known = dict(model.named_modules())
    if missing := [path for path in pairs if path not in known]:
        raise AdapterError(
            f"the model lacks {len(missing)} of the {len(pairs)} adapted layers",
            ("missing", "\n".join(missing[:6])),
            ("did you mean", nearest(missing[0], known)),
        )
    return [_loralib(path, known[path], *pair, enabled) for path, pair in pairs.items()]


def _loralib(path: str, layer: nn.Module, a: Tensor, b: Tensor, enabled: Sequence[bool] | None) -> Layer:
    if isinstance(layer, nn.Embedding):
        return Layer(path, a, b, is_table=True)
    if isinstance(layer, nn.Conv2d):
        return _convolution(path, layer, a, b)
    if not is_linear(layer):
        raise AdapterError(f"{path} is a {type(layer).__name__}, which loralib's file can't be of")
    out = frozen_weight(layer).out_features
    if len(a) == b.shape[1] and len(b) == out:
        return Layer(path, a, b)
    if enabled is None:
        raise AdapterError(
            f"{path} is adapted in parts, and the file does not say in which: B has {len(b)} of {out} rows",
            ("way out", "enable_lora=[True, False, True], as it was trained"),
        )
    parts = tuple(f"{i + 1}/{len(enabled)}" for i, on in enumerate(enabled) if on)
    if len(a) != b.shape[1] * len(parts) or len(b) * len(enabled) != out * len(parts):
        raise AdapterError(
            f"{path}: A {list(a.shape)} and B {list(b.shape)} are not those of {len(parts)} of {len(enabled)} parts"
        )
    return Layer(path, a, b[..., None], parts)


def _convolution(path: str, layer: nn.Conv2d, a: Tensor, b: Tensor) -> Layer:
    """loralib's update of a kernel is (B A).view(out, in, k, k) with B [out · k, r · k] and A [r · k, in · k].

    Of an output, row i of k is B_i A, and all rows together are [B_0 … B_k-1] times A repeated along a diagonal: a
    low-rank update of the kernel as a matrix, of rank r · k².
    """
    k, out = layer.kernel_size[0], layer.out_channels
    inner = layer.in_channels
    if layer.kernel_size != (k, k) or layer.groups > 1 or len(b) != out * k or a.shape[1] != inner * k:
        raise AdapterError(f"{path}: A {list(a.shape)} and B {list(b.shape)} are not those of a square kernel")
    rank = len(a) // k
    beside = b.view(out, k, rank * k).flatten(1)
    along: Tensor = torch.block_diag(*[a] * k)  # type: ignore[no-untyped-call]
    shape = (rank * k * k, inner, k, k)
    return Layer(path, along.view(shape), beside[..., None, None], widened=k * k)


def of_lit(pairs: Pairs, model: nn.Module, enabled: Sequence[bool] | None) -> list[Layer]:
    """litgpt's and lit-llama's layers, on a model whose layers are named like Llama's.

    Raises:
        AdapterError: a model of another kind, or parts of a fused layer that can't be told apart.
    """
    known, found = dict(model.named_modules()), list[Layer]()
    for name, (a, b) in pairs.items():
        matched = re.fullmatch(r"transformer\.h\.(\d+)\.(.+)", name)
        if matched is None:
            found.append(Layer(name, a, b))
        elif matched[2] in WITHIN:
            found.append(Layer(f"model.layers.{matched[1]}.{WITHIN[matched[2]]}", a, b))
        else:
            paths = [f"model.layers.{matched[1]}.self_attn.{part}" for part in FUSED]
            if all(path in known for path in paths):
                found += _split(name, paths, known, a, b, enabled)
    if not found or any(layer.path not in known for layer in found):
        raise AdapterError(
            "litgpt's layers are read for models whose layers are named like Llama's",
            ("missing", next((layer.path for layer in found if layer.path not in known), "self_attn.q_proj")),
        )
    if any(".c_attn" in name for name in pairs):
        found = [_turned(layer, model) for layer in found]
    return found


def _split(
    name: str,
    paths: Sequence[str],
    known: Mapping[str, nn.Module],
    a: Tensor,
    b: Tensor,
    enabled: Sequence[bool] | None,
) -> list[Layer]:
    """Queries, keys and values, each a layer of its own. Without a word on it two are queries and values."""
    rank = b.shape[1]
    count = len(a) // rank
    enabled = enabled or {2: (True, False, True), 3: (True, True, True)}.get(count)
    if enabled is None:
        raise AdapterError(f"{name} is adapted in one part, and the file does not say in which",
                           ("way out", "enable_lora=[True, False, False] for queries, and so on"))  # fmt: skip
    wanted = [path for path, on in zip(paths, enabled, strict=True) if on]
    sizes = [frozen_weight(known[path]).out_features for path in wanted]
    if len(wanted) * rank != len(a) or sum(sizes) != len(b):
        raise AdapterError(f"{name}: A {list(a.shape)} and B {list(b.shape)} do not fit {', '.join(wanted)}")
    parts = zip(wanted, torch.split(a, rank), torch.split(b, sizes), strict=True)
    return [Layer(path, own, beside) for path, own, beside in parts]


def _turned(layer: Layer, model: nn.Module) -> Layer:
    """lit-llama turns neighbours, rows 2i and 2i + 1 of a head, where transformers turns rows i and i + d / 2."""
    if not layer.path.endswith(("q_proj", "k_proj")):
        return layer
    return replace(layer, b=by_halves(layer.b, layer.path, model))


def by_halves(rows: Tensor, path: str, model: nn.Module) -> Tensor:
    """[out, n] of a map of queries or keys, each head's rows in transformers' order instead of lit-llama's."""
    dim: int = model.get_submodule(path.rpartition(".")[0]).head_dim  # type: ignore[assignment]
    return rows.view(-1, dim // 2, 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape)
