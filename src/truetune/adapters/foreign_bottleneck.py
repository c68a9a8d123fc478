"""AdapterHub's bottleneck adapters: ``adapter_config.json`` with ``pytorch_adapter.bin`` beside it.

    …layers.N.attention_adapters.adapters.NAME.adapter_down.0.weight [inner, hidden], adapter_up.weight [hidden, inner]
    …layers.N.output_adapters.adapters.NAME.…                        and a bias of each

Its ``config`` says where the networks are and what they read (``adapters`` 1.3, ``configuration/adapter_config.py``):
with ``original_ln_before`` they read the sum of the sublayer and the residual stream, else the sublayer alone; parallel
ones read the stream. In a decoder no norm follows the sum, so the other placings of norms mean nothing there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from truetune.adapters.attention_layout import attention_layouts
from truetune.adapters.bottleneck import mlp_site
from truetune.config.other_methods import Bottleneck
from truetune.errors import AdapterError

CONFIG = "adapter_config.json"
WEIGHTS = ("pytorch_adapter.bin", "adapter.safetensors")

_KEY = re.compile(r".*?\.(\d+)\.(attention|output)_adapters\.adapters\.([^.]+)\.(adapter_(?:down|up))(?:\.0)?\.(\w+)")
# By (mh_adapter, output_adapter).
_PLACEMENTS: dict[tuple[bool, bool], Literal["pfeiffer", "houlsby"]] = {
    (False, True): "pfeiffer", (True, True): "houlsby",
}  # fmt: skip
_ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "swish": "silu", "silu": "silu"}
_BEFORE_VERSIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}  # what files without a version called them
_READ = {
    "architecture", "mh_adapter", "output_adapter", "reduction_factor", "non_linearity", "scaling", "is_parallel",
    "original_ln_before", "original_ln_after", "residual_before_ln",
}  # fmt: skip
# How it starts, what only training does, and what counts only with something else that is refused.
_WITHOUT_EFFECT = {
    "init_weights", "init_weights_seed", "dropout", "stochastic_depth", "adapter_residual_before_ln",
    "inv_adapter_reduction_factor", "cross_adapter",
}  # fmt: skip
_OF_PHM = ("phm_", "shared_", "learn_phm", "factorized_", "hypercomplex_")  # of ``phm_layer``, which is refused


def config_of(path: Path) -> Mapping[str, Any] | None:
    """The ``config`` of AdapterHub's folder, or of the one that a file is in; None where there is none."""
    file = (path if path.is_dir() else path.parent) / CONFIG
    if not file.is_file() or (not path.is_dir() and path.name not in WEIGHTS):
        return None
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{file} can't be read as JSON: {error}") from None
    own = held.get("config") if isinstance(held, dict) else None
    if not isinstance(own, dict):
        return None
    if "version" not in held and (named := own.get("non_linearity")) in _BEFORE_VERSIONS:
        return own | {"non_linearity": _BEFORE_VERSIONS[named]}
    return own


def weights_in(path: Path) -> Path:
    """The file with the tensors.

    Raises:
        AdapterError: a folder without one.
    """
    if not path.is_dir():
        return path
    found = [path / name for name in WEIGHTS if (path / name).is_file()]
    if not found:
        raise AdapterError(
            f"{path} has no {WEIGHTS[0]}", ("way out", "pass the folder that AdapterHub's library wrote")
        )
    return found[0]


def of_hub(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: nn.Module, path: Path
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and tensors as our own file has them.

    Raises:
        AdapterError: a field that has no counterpart here, by its name and value; or tensors of something else.
    """
    settings = _settings(config, path)
    placed = _places(model, settings)
    odd = [name for name in tensors if not (_KEY.fullmatch(name) and _site(name, placed))]
    names = {found[3] for name in tensors if (found := _KEY.fullmatch(name))}
    if odd or len(names) != 1:
        named = odd or [f"adapters called {', '.join(sorted(names)) or 'nothing'}"]
        raise AdapterError(f"{path} holds more, or other things, than one bottleneck adapter of a decoder",
                           ("found", "\n".join(named[:8])))  # fmt: skip
    held = {}
    for name, tensor in tensors.items():
        matched = _KEY.fullmatch(name)
        assert matched
        held[f"base_model.model.{_site(name, placed)}.{matched[4]}.{matched[5]}"] = tensor
    fields = settings.model_dump(include={"placement", "activation", "adapter_scale", "adapter_reads"})
    return {"peft_type": "TRUETUNE_BOTTLENECK", **fields, "reduction_factor": settings.reduction}, held


def _settings(config: Mapping[str, Any], path: Path) -> Bottleneck:
    known = _READ | _WITHOUT_EFFECT
    refused = {
        name: value
        for name, value in config.items()
        if name not in known and not name.startswith(_OF_PHM) and value not in (None, False, [], {})
    }
    parallel, before, after = (bool(config.get(f)) for f in ("is_parallel", "original_ln_before", "original_ln_after"))
    factor, activation, scaling = (config.get(name) for name in ("reduction_factor", "non_linearity", "scaling"))
    if isinstance(factor, Mapping) and len(set(factor.values())) == 1:
        factor = next(iter(factor.values()))
    residual_first = config.get("residual_before_ln", True)
    placement = _PLACEMENTS.get((bool(config.get("mh_adapter")), bool(config.get("output_adapter"))))
    keeps_residual = (residual_first is True) == after if before and not parallel else after
    said = {
        "architecture": config.get("architecture") in (None, "bottleneck"),
        "mh_adapter": placement is not None and not (parallel and placement == "houlsby"),
        "reduction_factor": isinstance(factor, int | float) and factor > 0,
        "non_linearity": str(activation).lower() in _ACTIVATIONS,
        "scaling": isinstance(scaling or 1.0, int | float),
        "original_ln_after": keeps_residual,
        "phm_layer": not config.get("phm_layer"),
    }
    refused |= {name: config.get(name) for name, is_known in said.items() if not is_known}
    if refused:
        listing = "\n".join(f"{name} = {value!r}" for name, value in sorted(refused.items()))
        raise AdapterError(
            f"{path}: this AdapterHub adapter uses what this version does not implement",
            ("fields", listing),
            ("expected", "a bottleneck after the MLP, after attention and MLP, or beside the MLP"),
        )
    return Bottleneck(
        placement="parallel" if parallel else placement or "pfeiffer",
        reduction=float(factor or 16),
        activation=_ACTIVATIONS[str(activation).lower()],  # type: ignore[arg-type]
        adapter_scale=float(1.0 if scaling is None else scaling),
        adapter_reads="stream" if parallel or before else "part",
    )


def _places(model: nn.Module, settings: Bottleneck) -> dict[tuple[int, str], str]:
    """(number of the layer, "attention" or "output") → path of our adapter."""
    found = {}
    for number, layout in enumerate(attention_layouts(model, settings.kind)):
        if settings.placement == "houlsby":
            found[number, "attention"] = layout.output
        found[number, "output"] = mlp_site(model, layout, settings)
    return found


def _site(name: str, placed: Mapping[tuple[int, str], str]) -> str | None:
    matched = _KEY.fullmatch(name)
    return placed.get((int(matched[1]), matched[2])) if matched else None
