"""Put adapters into a model, and take them out again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from torch.nn import Parameter

from truetune.adapters.base import Adapter
from truetune.adapters.lora import LoRALinear
from truetune.adapters.lora_embedding import LoRAEmbedding, TiedHead
from truetune.adapters.targets import output_head, resolve_targets
from truetune.config.lora import LoRA
from truetune.errors import AdapterError
from truetune.ops.rng import derive_seed, generator

_SHARED_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True)
class Attachment:
    """What was wrapped, by which settings; kept on the model so that saving needs no second telling."""

    config: LoRA
    sites: tuple[str, ...]
    full_modules: tuple[str, ...] = ()  # base modules trained as a whole
    tied: tuple[str, ...] = ()  # (table, head) where they share one matrix that is adapted or trained
    untied: tuple[str, ...] = ()  # (table, head) where they shared one and had to be taken apart
    learned: tuple[Parameter, ...] = ()  # what required gradients before


def attach(
    model: nn.Module,
    config: LoRA,
    *,
    seed: int = 0,
    sites: Sequence[str] | None = None,
    full: Sequence[str] | None = None,
    tie: bool = True,
    in_float32: bool = True,
) -> Attachment:
    """Freeze a model and wrap the layers that ``config.targets`` names; nothing is changed when that can't be done.

    Args:
        model: changed in place.
        seed: of the adapters' start; each layer draws from a generator of its own, so the start of one layer does not
            depend on which others are wrapped.
        sites: exact paths to wrap instead of ``config.targets``.
        full: exact paths of the modules to train as a whole instead of those that ``config.trainable`` names.
        tie: keep an embedding table and a head that share one matrix the same through the adapter as well; an adapter
            made elsewhere may have changed just one of the two.
        in_float32: keep the trained parts of the base in float32, as training needs; else in their own dtype.
    Raises:
        AdapterError: a target that matches nothing, or a model that already carries adapters.
    """
    if attachment(model) is not None:
        raise AdapterError("the model already carries an adapter", ("way out", "truetune.detach(model) first"))
    paths = list(sites) if sites is not None else resolve_targets(model, config.targets)
    whole = tuple(full) if full is not None else _full_modules(model, config)
    shared = tied_paths(model)
    tied = shared if tie and set(shared) & {*paths, *whole} else ()
    _check_disjoint(paths, whole, tied)
    parts = _parts(model, config, whole)
    untied = shared if not tie and set(shared) & set(whole) else ()
    learned = tuple(p for p in model.parameters() if p.requires_grad)
    model.requires_grad_(False)
    if untied:
        _untie(model, untied[1])
        parts = _parts(model, config, whole)
    if tied and set(tied) & set(paths):
        _wrap_tied(model, tied, config, seed)
    for path in paths:
        if path not in tied:
            _wrap(model, path, config, seed)
    for parameter in parts:
        parameter.data = parameter.data.float() if in_float32 else parameter.data
        parameter.requires_grad_(True)
    result = Attachment(config, tuple(paths), whole, tied, untied, learned)
    model.truetune_attachment = result  # type: ignore[assignment]
    return result


def _check_disjoint(paths: Sequence[str], whole: Sequence[str], tied: Sequence[str]) -> None:
    if both := set(whole) & {*paths, *(tied if set(tied) & set(paths) else ())}:
        raise AdapterError(
            f"{', '.join(sorted(both))} would be trained in full and get an adapter as well",
            ("way out", "name it in --targets or in --trainable, not in both"),
        )


def attachment(model: nn.Module) -> Attachment | None:
    """What ``attach`` did to this model, if anything."""
    return cast("Attachment | None", getattr(model, "truetune_attachment", None))


def detach(model: nn.Module) -> None:
    """Take every adapter out again; the base is as it was, except for parts that were trained in full."""
    for path, adapter in list(adapters(model)):
        _replace(model, path, adapter.base)
    if attached := attachment(model):
        _tie_again(model, attached.untied)
        model.requires_grad_(False)
        for parameter in attached.learned:
            parameter.requires_grad_(True)
        del model.truetune_attachment


def adapters(model: nn.Module) -> Iterator[tuple[str, Adapter]]:
    """``(path, adapter)`` of every wrapped layer, in the model's order."""
    for path, module in model.named_modules():
        if isinstance(module, Adapter):
            yield path, module


def trainable(model: nn.Module) -> dict[str, int]:
    """Parameters that are trained: name → count."""
    return {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}


def _wrap(model: nn.Module, path: str, config: LoRA, seed: int) -> None:
    module = model.get_submodule(path)
    draws = generator(seed, "lora", path)
    if isinstance(module, nn.Embedding):
        _replace(model, path, LoRAEmbedding.from_base(module, config, generator=draws))
    else:
        adapter = LoRALinear.from_base(module, config, generator=draws)
        adapter.site = derive_seed(0, "site", _mask_name(path))
        _replace(model, path, adapter)


def _mask_name(path: str) -> str:
    """The name a layer's dropout masks go by: one for layers that read the same input, so that it is dropped once."""
    parent, _, name = path.rpartition(".")
    return f"{parent}.{next((names[0] for names in _SHARED_INPUT if name in names), name)}"


def _wrap_tied(model: nn.Module, tie: tuple[str, ...], config: LoRA, seed: int) -> None:
    """One update for the one matrix: the table owns it, the head reads it."""
    table_path, head_path = tie
    _wrap(model, table_path, config, seed)
    table, head = model.get_submodule(table_path), model.get_submodule(head_path)
    assert isinstance(table, LoRAEmbedding)
    assert isinstance(head, nn.Linear)
    _replace(model, head_path, TiedHead(head, table))


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def tied_paths(model: nn.Module) -> tuple[str, ...]:
    """Paths of (embedding table, output head) where they share a weight, else ``()``."""
    get = getattr(model, "get_input_embeddings", None)
    table, head = get() if get else None, output_head(model)
    if table is None or head is None or head.weight is not table.weight:
        return ()
    names = {id(module): path for path, module in model.named_modules()}
    return names[id(table)], names[id(head)]


def _full_modules(model: nn.Module, config: LoRA) -> tuple[str, ...]:
    """Paths of the base modules that ``config.trainable`` names (``bias`` names parameters, not modules)."""
    get = getattr(model, "get_input_embeddings", None)
    paths = []
    for part in config.trainable:
        wanted = {"embedding": get() if get else None, "head": output_head(model)}.get(part)
        found = [
            path
            for path, module in model.named_modules()
            if (module is wanted if part != "norm" else "norm" in type(module).__name__.lower())
        ]
        if part != "bias" and not found:
            raise AdapterError(f"--trainable {part}: the model has no such part")
        paths += found if part != "bias" else []
    return tuple(dict.fromkeys(paths))


def _parts(model: nn.Module, config: LoRA, whole: Sequence[str]) -> list[Parameter]:
    """The parameters of the base that are trained: each once, though it be shared or named twice."""
    chosen: dict[int, Parameter] = {}
    for path in whole:
        chosen |= {id(p): p for p in model.get_submodule(path).parameters()}
    if "bias" in config.trainable:
        if not has_bias(model):
            raise AdapterError("--trainable bias: this model has no bias", ("way out", "leave bias out of --trainable"))
        chosen |= {id(p): p for p in _biases(model)}
    return list(chosen.values())


def _untie(model: nn.Module, head_path: str) -> None:
    """Give the head a matrix of its own."""
    head = model.get_submodule(head_path)
    assert isinstance(head.weight, Parameter)
    head.weight = Parameter(head.weight.detach().clone(), requires_grad=False)


def _tie_again(model: nn.Module, untied: Sequence[str]) -> None:
    """Share one matrix again where nothing was learned that would be lost."""
    if untied:
        table, head = (model.get_submodule(path) for path in untied)
        assert isinstance(table.weight, Parameter)
        assert isinstance(head.weight, Parameter)
        if not table.weight.is_meta and torch.equal(table.weight, head.weight):
            head.weight = table.weight


def has_bias(model: nn.Module) -> bool:
    """Whether any layer has a bias that could be trained."""
    return bool(_biases(model))


def _biases(model: nn.Module) -> list[Parameter]:
    return [p for name, p in model.named_parameters() if name.rsplit(".", 1)[-1] == "bias"]
