"""Parameters that are adapted where they are no layer: the experts of a mixture, kept as one tensor [experts, …]."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from truetune.adapters.names import NONE as NONE
from truetune.errors import AdapterError, nearest
from truetune.ops.frozen import is_linear


def owners(model: nn.Module, names: Sequence[str], *, all_must_match: bool = True) -> dict[str, tuple[str, ...]]:
    """Path of a module → those of its own parameters that ``names`` name, both in the model's order.

    PEFT's rule: a name matches the last parts of a parameter's.

    Raises:
        AdapterError: a name that matches nothing, or a parameter that is not this module's to adapt.
    """
    found = {
        path: own
        for path, module in model.named_modules()
        if path and (own := tuple(p for p, _ in module.named_parameters(recurse=False) if _named(names, path, p)))
    }
    matched = [name for name in names if any(_named((name,), path, p) for path, own in found.items() for p in own)]
    unmatched = [name for name in names if name not in matched]
    if unmatched and (all_must_match or not matched):
        raise _no_such_parameter(model, unmatched[0])
    for path, own in found.items():
        _check(model.get_submodule(path), path, own)
    return found


def _named(names: Sequence[str], path: str, parameter: str) -> bool:
    whole = f"{path}.{parameter}"
    return any(whole == name or whole.endswith(f".{name}") for name in names)


def _check(module: nn.Module, path: str, own: Sequence[str]) -> None:
    layer = path.rpartition(".")[2]
    if is_linear(module) or isinstance(module, nn.Embedding):
        raise AdapterError(
            f"--target-parameters: '{layer}.{own[0]}' belongs to a {type(module).__name__}, which is a layer",
            ("way out", f"--targets {layer}"),
        )
    for name in own:
        if (ndim := getattr(module, name).ndim) not in (2, 3):
            raise AdapterError(
                f"--target-parameters: '{layer}.{name}' has {ndim} dimension{'s' if ndim > 1 else ''}",
                ("expected", "a matrix, or one per expert"),
            )


def _no_such_parameter(model: nn.Module, name: str) -> AdapterError:
    """The error for a name that matches nothing, with the stacks of matrices that there are."""
    stacks = {
        f"{path.rpartition('.')[2]}.{own}"
        for path, module in model.named_modules()
        for own, parameter in module.named_parameters(recurse=False)
        if path and parameter.ndim == 3 and not isinstance(module, nn.Conv1d)
    }
    return AdapterError(
        f"--target-parameters: the model has no parameter called '{name}'",
        ("did you mean", nearest(name, stacks)),
        ("it has", ", ".join(sorted(stacks)) or "no parameter that is no layer's: its experts, if any, are layers"),
        ("way out", "" if stacks else "--targets with their names"),
    )
