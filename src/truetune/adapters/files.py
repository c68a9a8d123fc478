"""Adapters on disk: PEFT's format to the letter, both ways, with ``truetune.json`` beside it.

Loading compares every tensor that the model expects with every tensor in the file and reports all that is missing,
extra or misshaped at once; nothing is ever half loaded. A setting this version does not implement is an error that
names it, unless it is at the value that means "off".
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import Parameter

from truetune.adapters.base import Adapter
from truetune.adapters.inject import adapters, attach, attachment
from truetune.adapters.lora import LoRALinear, LoRAParams
from truetune.adapters.lora_embedding import LoRAEmbedding, TiedHead
from truetune.adapters.peft_config import from_peft, to_peft
from truetune.adapters.targets import resolve_targets
from truetune.config.lora import LoRA
from truetune.errors import AdapterError

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "truetune.json"
_ROOT = "base_model.model."


@dataclass(frozen=True)
class AdapterFile:
    """An adapter folder, read: settings, tensors in float32 or as stored, and our card when there is one."""

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    card: Mapping[str, Any]

    @property
    def lora(self) -> LoRA:
        """The settings in our terms. Raises AdapterError on what this version does not implement."""
        return from_peft(self.config, self.folder)


def state(model: nn.Module) -> dict[str, Parameter]:
    """Key in PEFT's file → parameter, for everything that is trained beside or in the frozen base."""
    owned, keys = set(), {}
    for path, adapter in adapters(model):
        for suffix, parameter in adapter.adapter_parameters():
            keys[f"{_ROOT}{path}.{suffix}"] = parameter
            owned.add(id(parameter))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in owned:
            keys[_ROOT + name.replace(".base.", ".base_layer.")] = parameter
    return keys


def to_file(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of ``adapter_model.safetensors``: ``state``, and the tied head's copies that PEFT expects."""
    tensors = {key: p.detach().cpu().contiguous() for key, p in state(model).items()}
    for key, _, tensor in _tied_copies(model):
        tensors[key] = tensor.detach().cpu().clone().contiguous()
    return tensors


def _tied_copies(model: nn.Module) -> Iterator[tuple[str, Literal["transpose", "same"], Tensor]]:
    """``(key, how it follows from the table's, tensor)`` of what the head of a tied model repeats in the file."""
    attached = attachment(model)
    for path, adapter in adapters(model):
        if isinstance(adapter, TiedHead):
            for suffix, parameter in adapter.tied_tensors():
                yield f"{_ROOT}{path}.{suffix}", "transpose", parameter.T
    if attached and attached.tied and set(attached.tied) & set(attached.full_modules):
        head = attached.tied[1]
        yield f"{_ROOT}{head}.weight", "same", model.get_submodule(head).weight  # type: ignore[misc]


def save(model: nn.Module, folder: Path, *, base: str | None, card: Mapping[str, Any] | None = None) -> None:
    """Write the adapter that ``model`` carries into ``folder``, which must exist or be creatable.

    Args:
        base: what ``base_model_name_or_path`` should say.
        card: the content of ``truetune.json``.
    Raises:
        AdapterError: the model carries no adapter.
    """
    attached = attachment(model)
    if attached is None:
        raise AdapterError("the model carries no adapter", ("way out", "truetune.attach(model, truetune.LoRA()) first"))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(to_file(model), folder / WEIGHTS, metadata={"format": "pt"})
    _write_json(folder / CONFIG, to_peft(model, attached, base=base))
    _write_json(folder / CARD, dict(card or {}))


def read(folder: Path) -> AdapterFile:
    """Read an adapter folder without touching any model.

    Raises:
        AdapterError: not an adapter folder, or a file in it that can't be read.
    """
    if not (folder / CONFIG).is_file():
        raise AdapterError(f"{folder} is no adapter: it has no {CONFIG}", ("way out", _nearby(folder)))
    config = _read_json(folder / CONFIG)
    card = _read_json(folder / CARD) if (folder / CARD).is_file() else {}
    if (folder / WEIGHTS).is_file():
        try:
            tensors = load_file(folder / WEIGHTS)
        except (SafetensorError, OSError) as error:
            raise AdapterError(f"{folder / WEIGHTS} can't be read: {error}", ("likely", "a copy cut short")) from None
    elif (folder / "adapter_model.bin").is_file():
        tensors = torch.load(folder / "adapter_model.bin", map_location="cpu", weights_only=True)
    else:
        raise AdapterError(f"{folder} has no {WEIGHTS}")
    return AdapterFile(folder, config, tensors, card)


def load(model: nn.Module, file: AdapterFile) -> None:
    """Attach the adapter a folder holds, and fill it.

    Raises:
        AdapterError: a target the model lacks, or any tensor missing, extra or of another shape; all named at once.
    """
    lora = file.lora
    sites = resolve_targets(model, lora.targets, all_must_match=False)
    attach(model, lora, sites=sites, tie=bool(file.config.get("ensure_weight_tying")))
    fill(model, file.tensors, where=str(file.folder))


def fill(model: nn.Module, tensors: Mapping[str, Tensor], *, where: str) -> None:
    """Copy ``tensors`` (keys as in PEFT's file) into the adapter that ``model`` carries; exactly all of them."""
    expected = state(model)
    copies = {key: tensor for key, _, tensor in _tied_copies(model)}
    allowed = {**expected, **copies}
    unused = {key for key in tensors if key not in allowed and not _is_base_copy(model, key, tensors[key])}
    problems = [f"missing    {key} {list(p.shape)}" for key, p in expected.items() if key not in tensors]
    problems += [f"extra      {key} {list(tensors[key].shape)}" for key in sorted(unused)]
    problems += [
        f"misshaped  {key}: found {list(tensors[key].shape)}, expected {list(p.shape)}"
        for key, p in allowed.items()
        if key in tensors and tensors[key].shape != p.shape
    ]
    if problems:
        more = f"\n… and {len(problems) - 12} more" if len(problems) > 12 else ""
        raise AdapterError(
            f"{where} does not fit this model: {len(problems)} of {len(tensors)} tensors",
            ("tensors", "\n".join(problems[:12]) + more),
            ("likely", "the adapter was trained on another base; its adapter_config.json names the one it knows"),
        )
    with torch.no_grad():
        for key, parameter in expected.items():
            parameter.copy_(tensors[key])
    for key, tensor in copies.items():
        if key in tensors and not tensor.is_meta and not torch.equal(tensors[key].to(tensor), tensor):
            raise AdapterError(
                f"{where}: {key} differs from the embedding table's, and this model's head is the table",
                ("way out", "untie the base first, or train with ensure_weight_tying"),
            )


def site_params(model: nn.Module, file: AdapterFile) -> Iterator[tuple[str, Adapter, LoRAParams]]:
    """``(path, wrapped layer, its tensors from the file)`` of every site that owns tensors."""
    for path, adapter in adapters(model):
        if isinstance(adapter, LoRALinear | LoRAEmbedding):
            a, b = (file.tensors[f"{_ROOT}{path}.{suffix}"] for suffix in adapter.files.values())
            yield path, adapter, LoRAParams(a=a, b=b, scale=adapter.scale)


def replaced_tensors(model: nn.Module, file: AdapterFile) -> dict[str, Tensor]:
    """Name of a base parameter → the tensor the file holds in its place, for parts that were trained in full."""
    copied = {key for key, how, _ in _tied_copies(model) if how == "transpose"}
    own = {f"{_ROOT}{path}.{suffix}" for path, a in adapters(model) for suffix, _ in a.adapter_parameters()} | copied
    return {
        key.removeprefix(_ROOT).replace(".base_layer.", "."): tensor
        for key, tensor in file.tensors.items()
        if key not in own and not _is_base_copy(model, key, tensor)
    }


def _is_base_copy(model: nn.Module, key: str, tensor: Tensor) -> bool:
    """PEFT stores the whole frozen table beside an adapter on it; fine as long as it is this model's own."""
    path, found, rest = key.removeprefix(_ROOT).partition(".base_layer.weight")
    wrapped = dict(adapters(model)).get(path)
    if not found or rest or wrapped is None:
        return False
    weight = wrapped.weight
    if weight.is_meta:
        return tensor.shape == weight.shape
    return torch.equal(tensor.to(weight), weight)


def _nearby(folder: Path) -> str:
    """A folder with an adapter close to where the user looked."""
    if not folder.is_dir():
        return f"there is no folder {folder}"
    found = sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
    return f"pass {found[0]}" if found else "pass the folder that holds it"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} can't be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise AdapterError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
