"""Which layers get an adapter: every name and every expression must match, or the run does not start."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from torch import nn

from truetune.adapters.names import ALL_LINEAR as ALL_LINEAR
from truetune.adapters.names import REGEX_MARKS
from truetune.adapters.names import matches as matches
from truetune.adapters.parameter_targets import NONE, owners
from truetune.config.adapter import Targeted
from truetune.errors import AdapterError, nearest
from truetune.ops.frozen import is_linear

_ROUTERS = ("gate", "router", "shared_expert_gate")  # beside experts: what chooses among them
_LAYER = re.compile(r"\.(\d+)\.")


def adaptable(model: nn.Module) -> dict[str, nn.Module]:
    """Path → module of every layer an adapter can wrap: linear maps and embedding tables."""
    return {
        path: module for path, module in model.named_modules() if is_linear(module) or isinstance(module, nn.Embedding)
    }


def output_head(model: nn.Module) -> nn.Module | None:
    """The module that makes logits, where the model has one."""
    get = getattr(model, "get_output_embeddings", None)
    return get() if get else None


def resolve_targets(model: nn.Module, patterns: Sequence[str], *, all_must_match: bool = True) -> list[str]:
    """The paths of the layers that ``patterns`` name, in the model's order.

    ``all-linear`` means every linear layer but the output head and what chooses among experts.

    Raises:
        AdapterError: a pattern is no valid expression, or matches nothing.
    """
    layers = adaptable(model)
    found: set[str] = set()
    for pattern in patterns:
        hits = _hits(model, layers, pattern)
        if not hits and all_must_match:
            raise no_such_layer(model, layers, pattern)
        found |= set(hits)
    if not found:
        raise no_such_layer(model, layers, ", ".join(patterns))
    return [path for path in layers if path in found]


def targeted(model: nn.Module, config: Targeted, *, all_must_match: bool = True) -> list[str]:
    """The paths that the targets of a method name, without those that it excludes, in the layers that it is for.

    After them the modules whose own parameters it names, wherever they are.

    Raises:
        AdapterError: a pattern is no valid expression, or matches nothing; or nothing is left.
    """
    names: Sequence[str] = getattr(config, "target_parameters", ())
    parameters = owners(model, names, all_must_match=all_must_match) if names else {}
    if names and config.targets == (NONE,):
        return list(parameters)
    paths = resolve_targets(model, config.targets, all_must_match=all_must_match)
    layers = adaptable(model)
    for pattern in config.exclude:
        hits = _hits(model, layers, pattern)
        if not hits and all_must_match:
            raise no_such_layer(model, layers, pattern, flag="--exclude")
        paths = [path for path in paths if path not in hits]
    if config.layers:
        numbers = {path: int(found[1]) for path in paths if (found := _LAYER.search(path))}
        if absent := sorted(set(config.layers) - set(numbers.values())):
            last = max(numbers.values(), default=-1)
            raise AdapterError(f"--layers {absent[0]}: the model has no such decoder layer", ("it has", f"0 to {last}"))
        paths = [path for path in paths if numbers.get(path) in config.layers]
    if not paths:
        raise AdapterError("--exclude and --layers leave none of the layers that --targets names")
    return [*paths, *parameters]


def _hits(model: nn.Module, layers: dict[str, nn.Module], pattern: str) -> list[str]:
    if pattern == ALL_LINEAR:
        head = output_head(model)
        linear = (path for path, module in layers.items() if is_linear(module) and module is not head)
        return [path for path in linear if not _is_router(model, path)]
    try:
        return [path for path in layers if matches(pattern, path)]
    except re.error as error:
        raise AdapterError(f"--targets: '{pattern}' is no valid regular expression: {error}") from None


def _is_router(model: nn.Module, path: str) -> bool:
    parent, _, name = path.rpartition(".")
    return name in _ROUTERS and hasattr(model.get_submodule(parent), "experts")


def no_such_layer(
    model: nn.Module, layers: dict[str, nn.Module], pattern: str, *, flag: str = "--targets"
) -> AdapterError:
    """The error for a pattern that matches nothing, with what there is."""
    leaves = Counter(path.rsplit(".", 1)[-1] for path in layers)
    others = {path: type(m).__name__ for path, m in model.named_modules() if path and path not in layers}
    kind = next(
        (kind for path, kind in others.items() if not REGEX_MARKS.search(pattern) and matches(pattern, path)), ""
    )
    has = ", ".join(f"{name} x{count}" for name, count in sorted(leaves.items(), key=lambda item: -item[1]))
    return AdapterError(
        f"{flag}: '{pattern}' is a {kind}, which takes no adapter of its own"
        if kind
        else f"{flag}: the model has no layer called '{pattern}'",
        ("did you mean", "" if kind else nearest(pattern, [*leaves, ALL_LINEAR])),
        ("it has", has),
        ("or", f"--targets {ALL_LINEAR}" if flag == "--targets" else ""),
    )


def shortest_names(model: nn.Module, paths: Iterable[str]) -> list[str]:
    """The names to write into an adapter's config: last parts where they mean exactly ``paths``, else whole paths."""
    wanted = set(paths)
    leaves = sorted({path.rsplit(".", 1)[-1] for path in wanted})
    hits = {path for path, _ in model.named_modules() if any(matches(leaf, path) for leaf in leaves)}
    return leaves if hits == wanted else sorted(wanted)
