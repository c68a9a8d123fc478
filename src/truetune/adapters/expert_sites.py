"""LoRA on the parameters of a model that are no layers: which settings it takes, where it starts, PEFT's fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from truetune.adapters.expert_lora import ExpertsLoRA, ExpertUpdate, stacked
from truetune.adapters.lora_patterns import at_layer
from truetune.adapters.lora_start import FROM_WEIGHTS, start
from truetune.adapters.methods import Site
from truetune.adapters.parameter_targets import owners
from truetune.config.lora import LoRA
from truetune.errors import AdapterError
from truetune.ops.experts import frozen_expert


def check_settings(config: LoRA) -> None:
    """Raises AdapterError for a setting that has no meaning beside ``--target-parameters``: PEFT's rules."""
    if not config.target_parameters:
        return
    refused = {
        f"--method {config.kind}": config.kind != "lora",
        f"--dropout {config.dropout}": config.dropout > 0,
        "--lora-bias": config.lora_bias,
        f"--init {config.init}": config.init in FROM_WEIGHTS,
    }
    for flag, given in refused.items():
        if given:
            raise AdapterError(
                f"{flag}: not beside --target-parameters, whose experts are no layers",
                ("way out", f"leave out the one or the other{'; --dropout 0' if config.dropout else ''}"),
            )


def expanded(model: nn.Module, config: LoRA, paths: list[str]) -> list[str]:
    """The paths with each module of experts replaced by its adapted parameters: what patterns go by."""
    own = owners(model, config.target_parameters, all_must_match=False) if config.target_parameters else {}
    return [name for path in paths for name in ([f"{path}.{p}" for p in own[path]] if path in own else [path])]


def wrap_experts(layer: nn.Module, config: LoRA, site: Site) -> ExpertsLoRA | None:
    """The module with low-rank paths beside the parameters that are named; None where none of its own is."""
    if not config.target_parameters or not any(True for _ in layer.parameters(recurse=False)):
        return None
    names = owners(site.model, config.target_parameters, all_must_match=False).get(site.path)
    if names is None:
        return None
    return ExpertsLoRA(layer, {name: _begun(layer, name, config, site) for name in names})


def _begun(layer: nn.Module, name: str, config: LoRA, site: Site) -> ExpertUpdate:
    """A and B where ``--init`` says, expert by expert."""
    own, draw = at_layer(config, f"{site.path}.{name}"), site.generator(f"lora {name}")
    weight: Tensor = getattr(layer, name)
    transposed = weight.ndim == 3 and bool(getattr(layer, "is_transposed", False))
    matrices = [frozen_expert(layer, name, e) for e in range(len(weight) if weight.ndim == 3 else 1)]
    begun = [start(own.init, one, own.rank, generator=draw) for one in matrices]
    a, b = stacked([(one.a, one.b) for one in begun])
    return ExpertUpdate(a, b, rank=own.rank, alpha=own.alpha, rank_stabilised=own.use_rslora, transposed=transposed)


def parts_by_path(layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The layers with each module of experts replaced by what is beside its parameters."""
    found: dict[str, nn.Module] = {}
    for path, layer in layers.items():
        if isinstance(layer, ExpertsLoRA):
            found |= {f"{path}.{name}": part for name, part in layer.parts().items()}
        else:
            found[path] = layer
    return found


def is_experts(layer: nn.Module) -> bool:
    """Whether it is a module with adapted parameters of its own."""
    return isinstance(layer, ExpertsLoRA)


def to_peft(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, Any]:
    """``target_parameters``, where there are any: names within the module where they mean exactly these."""
    wrapped = {path: set(layer.parts()) for path, layer in layers.items() if isinstance(layer, ExpertsLoRA)}
    if not wrapped:
        return {}
    short = sorted({f"{path.rpartition('.')[2]}.{name}" for path, names in wrapped.items() for name in names})
    inner = {path: getattr(layer, "base", layer) for path, layer in model.named_modules()}
    meant = {
        path: names
        for path, module in inner.items()
        if (names := {p for p, _ in module.named_parameters(recurse=False) if _ends(f"{path}.{p}", short)})
        and not path.endswith(".base")
    }
    whole = sorted(f"{path}.{name}" for path, names in wrapped.items() for name in names)
    return {"target_parameters": short if meant == wrapped else whole}


def _ends(name: str, short: list[str]) -> bool:
    return any(name == one or name.endswith(f".{one}") for one in short)
