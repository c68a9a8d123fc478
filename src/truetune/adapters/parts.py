"""Parts of the base that are trained themselves, beside an adapter or alone: biases, norms, embeddings, head."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn
from torch.nn import Parameter

from truetune.adapters.targets import output_head
from truetune.errors import AdapterError
from truetune.ops.frozen import is_linear


def full_modules(model: nn.Module, names: Iterable[str]) -> tuple[str, ...]:
    """Paths of the modules that names of parts mean (``bias`` names parameters, not modules).

    Raises:
        AdapterError: the model has no such part.
    """
    get = getattr(model, "get_input_embeddings", None)
    paths = []
    for part in names:
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


def parameters_of(model: nn.Module, names: Iterable[str], whole: Sequence[str]) -> list[Parameter]:
    """The parameters that are trained: each once, though it be shared or named twice.

    Args:
        names: of parts.
        whole: paths of the modules among them, from ``full_modules``.
    Raises:
        AdapterError: biases of a model that has none.
    """
    chosen: dict[int, Parameter] = {}
    for path in whole:
        chosen |= {id(p): p for p in model.get_submodule(path).parameters()}
    if "bias" in names:
        if not has_bias(model):
            raise AdapterError("--trainable bias: this model has no bias", ("way out", "leave bias out of --trainable"))
        chosen |= {id(p): p for p in _biases(model)}
    return list(chosen.values())


def widen(model: nn.Module, parameters: Iterable[Parameter]) -> None:
    """Keep them in float32, and with a bias the weight of its norm: a norm takes both in one dtype only."""
    for parameter in parameters:
        parameter.data = parameter.data.float()
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if len({p.dtype for p in own}) > 1 and not is_linear(module):
            for parameter in own:
                parameter.data = parameter.data.float()


def has_bias(model: nn.Module) -> bool:
    """Whether any layer has a bias that could be trained."""
    return bool(_biases(model))


def _biases(model: nn.Module) -> list[Parameter]:
    return [p for name, p in model.named_parameters() if name.rsplit(".", 1)[-1] == "bias"]
