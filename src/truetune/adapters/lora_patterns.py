"""Ranks and alphas that differ from layer to layer: ``rank_pattern`` and ``alpha_pattern``, by PEFT's rule.

The first name, or expression, that matches the end of a layer's path counts. The scale of a layer is that of its own
alpha and its own rank.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

from truetune.adapters.expert_lora import ExpertUpdate
from truetune.adapters.lora import LoRALinear
from truetune.adapters.lora_conv import LoRAConv
from truetune.adapters.lora_embedding import LoRAEmbedding
from truetune.adapters.peft_fields import plain_number
from truetune.config.lora import LoRA
from truetune.errors import AdapterError, nearest

L = TypeVar("L", bound=LoRA)
N = TypeVar("N", int, float)


def named_by(name: str, path: str) -> bool:
    """Whether a name, or an expression, matches the end of a path."""
    return re.match(rf"(.*\.)?({name})$", path) is not None


def at_layer(config: L, path: str) -> L:
    """The settings of one layer."""
    rank, alpha = _of(config.ranks, path, config.rank), _of(config.alphas, path, config.alpha)
    return config.model_copy(update={"rank": rank, "alpha": alpha})


def check_patterns(config: LoRA, paths: Sequence[str]) -> None:
    """Raises AdapterError for a name that matches none of these layers, or is no valid expression."""
    for flag, names in (("--rank-pattern", config.ranks), ("--alpha-pattern", config.alphas)):
        for name in names:
            try:
                found = any(named_by(name, path) for path in paths)
            except re.error as error:
                raise AdapterError(f"{flag}: '{name}' is no valid regular expression: {error}") from None
            if not found:
                leaves = {path.rpartition(".")[2] for path in paths}
                raise AdapterError(
                    f"{flag}: '{name}' is none of the layers that get an adapter",
                    ("did you mean", nearest(name, leaves)),
                    ("it has", ", ".join(sorted(leaves))),
                )


def patterns_of(config: LoRA, layers: Mapping[str, nn.Module]) -> dict[str, Any]:
    """``r``, ``lora_alpha`` and the two patterns, for layers as they are."""
    kinds = LoRALinear | LoRAConv | LoRAEmbedding | ExpertUpdate
    ranks = {path: layer.rank for path, layer in layers.items() if isinstance(layer, kinds)}
    alphas = {path: layer.alpha for path, layer in layers.items() if isinstance(layer, kinds)}
    rank, rank_pattern = _described(ranks, config.rank, config.ranks)
    alpha, alpha_pattern = _described(alphas, config.alpha, config.alphas)
    return {
        "r": rank,
        "lora_alpha": plain_number(alpha),
        "rank_pattern": rank_pattern,
        "alpha_pattern": {name: plain_number(number) for name, number in alpha_pattern.items()},
    }


def _of(pattern: Mapping[str, N], path: str, otherwise: N) -> N:
    return next((number for name, number in pattern.items() if named_by(name, path)), otherwise)


def _described(values: Mapping[str, N], default: N, pattern: Mapping[str, N]) -> tuple[N, dict[str, N]]:
    """``(the number of most layers, the others' by name)``: as the settings have them, where these still hold.

    A file's keys are sorted, so that names whose order counts are told apart in another way.
    """
    in_file = dict(sorted(pattern.items()))
    if all(_of(in_file, path, default) == value for path, value in values.items()):
        return default, in_file
    default = Counter(values.values()).most_common(1)[0][0]
    others = {path: value for path, value in values.items() if value != default}
    leaves = {path.rpartition(".")[2]: value for path, value in others.items()}
    if all(_of(leaves, path, default) == value for path, value in values.items()):
        return default, leaves
    return default, {re.escape(path): value for path, value in others.items()}
