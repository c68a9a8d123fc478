"""A LoRA as servers take it: one rank and one scale for all layers, and nothing but pairs of A and B.

vLLM reads ``r`` and ``lora_alpha`` once, and passes over ``rank_pattern`` and ``alpha_pattern`` without a word; a file
with anything but A and B it refuses. So ranks are padded with zeros, each layer's own scale moves into its B, and what
is no plain pair (DoRA, parts trained in full, tables and heads) is named, to be merged into the base.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from truetune.adapters.files import AdapterFile
from truetune.adapters.lora import A, B
from truetune.adapters.lora_patterns import at_layer
from truetune.adapters.peft_fields import plain_number
from truetune.config.lora import LoRA
from truetune.errors import AdapterError
from truetune.ops import lowrank

ROOT = "base_model.model."
# What vLLM may be told with --max-lora-rank; it takes no other number.
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class Served:
    """A plain LoRA, and what is left for the base.

    Attributes:
        config, tensors: of the adapter's files; no tensors where everything goes into the base.
        plain: paths of the layers that the adapter keeps.
        folded: what must be merged into the base, by what it is.
        changes: what was changed, as sentences.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    plain: tuple[str, ...]
    folded: Mapping[str, int]
    changes: tuple[str, ...]

    @property
    def max_lora_rank(self) -> int | None:
        """The least that ``--max-lora-rank`` must say; None where the rank is too large for it."""
        return next((rank for rank in RANKS if rank >= int(self.config["r"])), None)


def serving(file: AdapterFile) -> Served:
    """Bring an adapter into the form for serving; its tensors are not modified.

    Raises:
        AdapterError: a method that adds to the input (prompts, prefixes) or to the layers, and so does not merge.
    """
    settings = file.settings
    pairs, folded = _sorted_out(file)
    if not pairs:
        return Served({}, {}, (), folded, ())
    assert isinstance(settings, LoRA)
    own = {path: at_layer(settings, path) for path in pairs}
    ranks = {path: len(a) for path, (a, _) in pairs.items()}
    scales = {path: lowrank.scale(own[path].alpha, ranks[path], rank_stabilised=settings.use_rslora) for path in pairs}
    rank, scale = max(ranks.values()), _one_scale(scales, max(ranks.values()))
    tensors: dict[str, Tensor] = {}
    for path, (a, b) in pairs.items():
        wide_a, wide_b = _padded(a, b, rank, scales[path] / scale)
        tensors |= {f"{ROOT}{path}.{A}": wide_a, f"{ROOT}{path}.{B}": wide_b}
    config = _config(file, tuple(pairs), rank=rank, alpha=scale * rank)
    return Served(config, tensors, tuple(pairs), folded, tuple(_said(ranks, scales, rank, scale, settings)))


def _sorted_out(file: AdapterFile) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, int]]:
    """``(A and B by the path of their layer, count of the rest by what it is)``."""
    layers: dict[str, dict[str, Tensor]] = {}
    rest: Counter[str] = Counter()
    for key, tensor in file.tensors.items():
        found = re.fullmatch(r"(.+?)\.((?:lora|start)_\w+(?:\.\w+)?|base_layer\.\w+)", key.removeprefix(ROOT))
        if found is None:
            rest[_kind(key)] += 1
        else:
            layers.setdefault(found[1], {})[found[2]] = tensor
    pairs = {}
    stacked = tuple(file.config.get("target_parameters") or ())  # one A and B for all experts
    sliced = isinstance(file.settings, LoRA) and bool(file.settings.slices)
    for path, own in layers.items():
        parts = {name: tensor for name, tensor in own.items() if name != "base_layer.weight"}
        # A module at the top of a model is its head; servers that share it with the table take no adapter on it.
        plain = file.settings.kind == "lora" and parts.keys() == {A, B} and parts[A].ndim == 2
        if plain and "." in path and not sliced and not path.endswith(stacked):
            pairs[path] = (parts[A], parts[B])
            continue
        rest[_layer_kind(path, parts, file.settings.kind, sliced=sliced)] += 1
    return pairs, dict(rest)


def _kind(key: str) -> str:
    if key.endswith(".bias"):
        return "biases"
    if "token_adapter" in key:
        return "rows of tokens"
    return "parts of the base that were trained in full" if key.endswith(".weight") else "tensors of another method"


def _layer_kind(path: str, parts: Mapping[str, Tensor], kind: str, *, sliced: bool) -> str:
    if kind != "lora":
        return f"layers of {kind}"
    if any(name.startswith("lora_embedding") for name in parts):
        return "embedding tables"
    if "." not in path:
        return "output heads"
    return "layers updated in part" if sliced else "layers with other than one A and B"


def _one_scale(scales: Mapping[str, float], rank: int) -> float:
    """That of most layers, if it is a whole alpha: their B then stays as it is to the bit."""
    most = Counter(scales.values()).most_common(1)[0][0]
    return most if float(most * rank).is_integer() else 1.0


def _padded(a: Tensor, b: Tensor, rank: int, factor: float) -> tuple[Tensor, Tensor]:
    """Rows and columns of zeros up to ``rank``; B times what the scales differ by, in float32, rounded once."""
    wide_a, wide_b = a.new_zeros(rank, a.shape[1]), b.new_zeros(b.shape[0], rank)
    wide_a[: len(a)] = a
    wide_b[:, : len(a)] = b if factor == 1 else (b.to(torch.float64) * factor).to(b.dtype)
    return wide_a, wide_b


def _config(file: AdapterFile, paths: Sequence[str], *, rank: int, alpha: float) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": file.config.get("task_type") or "CAUSAL_LM",
        "base_model_name_or_path": file.config.get("base_model_name_or_path"),
        "revision": file.config.get("revision"),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": plain_number(alpha),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": bool(file.config.get("fan_in_fan_out")),
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "target_modules": _targets(file, paths),
    }


def _targets(file: AdapterFile, paths: Sequence[str]) -> list[str]:
    """The last parts of the paths where the file asked for these everywhere; else the paths in full."""
    asked, leaves = file.config.get("target_modules"), sorted({path.rpartition(".")[2] for path in paths})
    everywhere = isinstance(asked, list) and sorted(asked) == leaves
    limited = any(file.config.get(name) for name in ("layers_to_transform", "exclude_modules"))
    return leaves if everywhere and not limited else sorted(paths)


def _said(ranks: Mapping[str, int], scales: Mapping[str, float], rank: int, scale: float, settings: LoRA) -> list[str]:
    said = []
    if narrow := sum(own < rank for own in ranks.values()):
        said.append(f"{narrow} of {len(ranks)} layers padded with zeros to rank {rank}")
    if others := sum(own != scale for own in scales.values()):
        said.append(f"the scale of {others} layers moved into their B: one of {scale:g} holds for all")
    if settings.use_rslora:
        said.append(f"rsLoRA's alpha / sqrt(rank) is written as a plain alpha of {plain_number(scale * rank):g}")
    if settings.rank_pattern or settings.alpha_pattern:
        said.append("rank_pattern and alpha_pattern are gone: no layer needs one any more")
    if settings.dropout:
        said.append("dropout is off, as it is in any answer")
    return said


def check_servable(file: AdapterFile, *, mergeable: bool) -> None:
    """Raises AdapterError for adapters that are neither pairs of A and B nor fold into the base, and for two in one."""
    if file.beneath:
        raise AdapterError(
            f"{file.folder} is on top of another adapter, and a server takes one by itself",
            ("way out", f"truetune merge --adapter {file.folder} --to adapter makes one of both; export that"),
        )
    if not mergeable:
        raise AdapterError(
            f"{file.folder} was made by {file.settings.kind}, which is no LoRA and does not fold into a base",
            ("expected", "lora, dora, adalora, vera, ia3 or bitfit"),
            ("way out", "serve it beside its base: truetune generate --model BASE --adapter DIR"),
        )
