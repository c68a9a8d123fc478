"""The targets of a method that stands beside linear maps and nothing else."""

from __future__ import annotations

from torch import nn

from truetune.adapters.targets import targeted
from truetune.config.adapter import Targeted
from truetune.errors import AdapterError
from truetune.ops.frozen import is_linear


def linear_sites(model: nn.Module, config: Targeted) -> list[str]:
    """Paths of the layers that the targets name.

    Raises:
        AdapterError: they name nothing, or a layer that is no linear map.
    """
    paths = targeted(model, config)
    for path in paths:
        check_linear(model.get_submodule(path), path, config)
    return paths


def check_linear(layer: nn.Module, path: str, config: Targeted) -> None:
    """Raises AdapterError for an embedding table, say."""
    if not is_linear(layer):
        raise AdapterError(
            f"--targets: {path} is of the kind {type(layer).__name__}, and {config.kind} stands beside linear maps",
            ("way out", "leave it out, or --method lora, which can be put beside it"),
        )
