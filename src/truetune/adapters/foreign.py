"""Files of other makers, as adapters of a model: loralib's state dicts, and those of litgpt and lit-llama.

LLaMA-Adapters of the latter two are in ``foreign_prompts``, AdapterHub's bottlenecks in ``foreign_bottleneck``; what
follows is about LoRA.

Such a file holds A and B by layer and little else: alpha is in none of them, nor is which parts of a fused layer are
updated. litgpt's are told by the ``hyperparameters.yaml`` beside the file, where there is one; else they must be given.

    loralib    PATH.lora_A, PATH.lora_B          names as in the model; Hu et al. 2021, github.com/microsoft/LoRA
    litgpt     transformer.h.N.attn.qkv.lora_A   its own names; queries, keys and values in one layer
    lit-llama  transformer.h.N.attn.c_attn.…     the same, with the two halves of a head's positions interleaved
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from truetune.adapters import foreign_bottleneck
from truetune.adapters.files import AdapterFile
from truetune.adapters.files import load as attach_file
from truetune.adapters.foreign_layers import Layer, of_lit, of_loralib
from truetune.adapters.foreign_prompts import has_prompts, of_lit_prompts
from truetune.errors import AdapterError

_LIT = re.compile(r"transformer\.h\.\d+\.(attn\.(qkv|attn|c_attn|proj)|mlp\.(fc_1|fc_2|proj))")
_ROOT = "base_model.model."


@dataclass(frozen=True)
class Settings:
    """What such a file does not say: alpha, and which parts of a fused layer are updated, in their order."""

    alpha: float
    enable_lora: tuple[bool, ...] | None = None


def load(
    model: nn.Module,
    path: Path,
    *,
    alpha: float | None = None,
    enable_lora: Sequence[bool] | None = None,
    mixed_maps: bool | None = None,
) -> None:
    """Put the adapter that a file holds on a model, and fill it. Arguments and errors as in ``read``."""
    attach_file(model, read(path, model, alpha=alpha, enable_lora=enable_lora, mixed_maps=mixed_maps))


def read(
    path: Path,
    model: nn.Module,
    *,
    alpha: float | None = None,
    enable_lora: Sequence[bool] | None = None,
    mixed_maps: bool | None = None,
) -> AdapterFile:
    """Read a file as the adapter folder that says the same.

    Args:
        model: of transformers, that the adapter is for.
        alpha: what the update was multiplied by, over the rank.
        enable_lora: as loralib has it, such as ``[True, False, True]`` for the first and last third of a fused layer;
            of litgpt, queries, keys and values.
        mixed_maps: of a LLaMA-Adapter, as ``foreign_prompts`` has it.
    Raises:
        AdapterError: a file that can't be read or holds something else, layers that the model lacks, or settings that
            are in no file and were not given.
    """
    if hub := foreign_bottleneck.config_of(path):
        held = _tensors(foreign_bottleneck.weights_in(path))
        return AdapterFile(path, *foreign_bottleneck.of_hub(hub, held, model, path), {})
    tensors = _tensors(path)
    if has_prompts(tensors):
        return AdapterFile(path, *of_lit_prompts(tensors, model, path, mixed_maps=mixed_maps), {})
    layers = sorted({name.removesuffix(".lora_A") for name in tensors if name.endswith(".lora_A")})
    pairs = {name: (tensors.pop(f"{name}.lora_A"), tensors.pop(f"{name}.lora_B", None)) for name in layers}
    halves = [name for name, (_, b) in pairs.items() if b is None]
    biases = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[2] == "bias"}
    if not pairs or halves or len(biases) < len(tensors):
        odd = [*halves, *(name for name in tensors if name not in biases)] or ["no lora_A at all"]
        raise AdapterError(f"{path} is no LoRA of loralib or litgpt", ("found", "\n".join(odd[:8])))
    settings = _settings(path, alpha, enable_lora)
    whole = {name: (a, b) for name, (a, b) in pairs.items() if b is not None}
    is_lit = any(_LIT.fullmatch(name) and not _has(model, name) for name in layers)
    found = (of_lit if is_lit else of_loralib)(whole, model, settings.enable_lora)
    return AdapterFile(path, _config(found, settings, biases), _keyed(found, model, biases, path), {})


def _config(layers: Sequence[Layer], settings: Settings, biases: Mapping[str, Tensor]) -> dict[str, Any]:
    """As PEFT would say it."""
    first = layers[0].rank // layers[0].widened
    return {
        "peft_type": "LORA",
        "r": first,
        "lora_alpha": settings.alpha,
        "target_modules": [layer.path for layer in layers],
        "rank_pattern": {re.escape(layer.path): layer.rank for layer in layers if layer.rank != first},
        "alpha_pattern": {
            re.escape(layer.path): settings.alpha * layer.widened for layer in layers if layer.widened > 1
        },
        "slices": [f"{re.escape(layer.path)}={','.join(layer.parts)}" for layer in layers if layer.parts],
        "bias": "all" if biases else "none",
    }


def _keyed(layers: Sequence[Layer], model: nn.Module, biases: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors by PEFT's keys. Biases can be taken over if they are all of the model's."""
    tensors = {_ROOT + f"{layer.path}.{suffix}": tensor for layer in layers for suffix, tensor in layer.tensors()}
    if not biases:
        return tensors
    own = {name for name, _ in model.named_parameters() if name.rpartition(".")[2] == "bias"}
    if own != set(biases):
        raise AdapterError(
            f"{path} holds {len(biases)} biases, and the model has {len(own)}",
            ("expected", "all or none of them: bias='lora_only' is not implemented"),
        )
    wrapped = {layer.path for layer in layers}
    for name, tensor in biases.items():
        owner = name.removesuffix(".bias")
        tensors[f"{_ROOT}{owner}{'.base_layer' if owner in wrapped else ''}.bias"] = tensor
    return tensors


def _settings(path: Path, alpha: float | None, enable_lora: Sequence[bool] | None) -> Settings:
    beside = path.parent / "hyperparameters.yaml"
    known: dict[str, Any] = yaml.safe_load(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    alpha = known.get("lora_alpha") if alpha is None else alpha
    if alpha is None:
        raise AdapterError(f"{path} does not say its alpha", ("way out", "alpha=…, as it was trained"))
    if enable_lora is None and "lora_query" in known:
        enable_lora = [bool(known[f"lora_{part}"]) for part in ("query", "key", "value")]
    return Settings(float(alpha), None if enable_lora is None else tuple(enable_lora))


def _tensors(path: Path) -> dict[str, Tensor]:
    """What a file holds; of a pickle, only tensors are unpickled."""
    try:
        held = load_file(path) if path.suffix == ".safetensors" else _unpickled(path)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise AdapterError(f"{path} can't be read: {reason}") from None
    held = held.get("model", held) if isinstance(held, dict) else held
    if not isinstance(held, dict) or not all(isinstance(tensor, Tensor) for tensor in held.values()):
        raise AdapterError(f"{path} holds something else than tensors by name")
    return dict(held)


def _unpickled(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _has(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True
