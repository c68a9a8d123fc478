"""Put adapters into a model, and take them out again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.nn import Parameter

from truetune.adapters.base import Adapter
from truetune.adapters.lora_embedding import LoRAEmbedding, TiedHead
from truetune.adapters.methods import Site, module_of, trained_parts
from truetune.adapters.partial import unfreeze
from truetune.adapters.parts import full_modules, parameters_of, widen
from truetune.adapters.targets import output_head
from truetune.adapters.token_rows import check_rows, put_rows, rows_for
from truetune.adapters.vocabulary import dismiss
from truetune.config.adapter import AdapterConfig
from truetune.config.methods import METHODS
from truetune.errors import AdapterError

if TYPE_CHECKING:
    from truetune.adapters.files import AdapterFile


@dataclass(frozen=True)
class Attachment:
    """What was wrapped, by which settings; kept on the model so that saving needs no second telling."""

    config: AdapterConfig
    sites: tuple[str, ...]
    full_modules: tuple[str, ...] = ()  # base modules trained as a whole
    tied: tuple[str, ...] = ()  # (table, head) where they share one matrix that is adapted or trained
    untied: tuple[str, ...] = ()  # (table, head) where they shared one and had to be taken apart
    learned: tuple[Parameter, ...] = ()  # what required gradients before
    rows: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # path → ids of the rows that are trained
    one_matrix: tuple[str, ...] = ()  # (table, head) where the head reads the table's rows
    grew_from: int | None = None  # rows the table had, where the adapter brought tokens of its own
    beneath: AdapterFile | None = None  # a frozen adapter that this one is on top of

    @property
    def virtual_tokens(self) -> int:
        """Trained positions in front of every text; their ids are ``adapters.virtual.virtual_ids``."""
        return int(getattr(self.config, "virtual_tokens", 0))


def attach(
    model: nn.Module,
    config: AdapterConfig,
    *,
    seed: int = 0,
    sites: Sequence[str] | None = None,
    full: Sequence[str] | None = None,
    tie: bool = True,
    in_float32: bool = True,
    prompt_ids: Sequence[int] = (),
) -> Attachment:
    """Freeze a model and put a method's adapters on it; nothing is changed when that can't be done.

    Args:
        model: changed in place.
        seed: of the adapters' start; each layer draws from a generator of its own, so the start of one layer does not
            depend on which others are wrapped.
        sites: exact paths to wrap instead of those that the method finds by ``config``.
        full: exact paths of the modules to train as a whole instead of those that ``config.trainable`` names.
        tie: keep an embedding table and a head that share one matrix the same through the adapter as well; an adapter
            made elsewhere may have changed just one of the two.
        in_float32: keep the trained parts of the base in float32, as training needs; else in their own dtype.
        prompt_ids: the ids of ``config.prompt_text``, where there is one.
    Raises:
        AdapterError: a target that matches nothing, or a model that already carries adapters.
    """
    if attachment(model) is not None:
        raise AdapterError("the model already carries an adapter", ("way out", "truetune.detach(model) first"))
    places = _places(model, config, sites=sites, full=full, tie=tie)
    names = trained_parts(config)
    parts = parameters_of(model, names, places.whole)
    learned = tuple(p for p in model.parameters() if p.requires_grad)
    model.requires_grad_(False)
    if places.untied:
        _untie(model, places.untied[1])
        parts = parameters_of(model, names, places.whole)
    _wrap(model, config, places, seed, prompt_ids)
    one_matrix = put_rows(model, places.rows, places.shared)
    for parameter in parts:
        parameter.requires_grad_(True)
    if in_float32:
        widen(model, parts)
    result = Attachment(
        config, tuple(places.paths), places.whole, places.tied, places.untied, learned, places.rows, one_matrix
    )
    model.truetune_attachment = result  # type: ignore[assignment]
    return result


@dataclass(frozen=True)
class _Places:
    """What of a model a method is put on, settled before anything is changed."""

    paths: list[str]
    whole: tuple[str, ...]
    shared: tuple[str, ...]  # (table, head) where they share one matrix
    tied: tuple[str, ...]  # the same where that matrix is adapted or trained, and stays one
    untied: tuple[str, ...]  # the same where it is trained, and they part
    table: tuple[str, ...]  # the same where one adapter serves both
    rows: Mapping[str, tuple[int, ...]]


def _places(
    model: nn.Module, config: AdapterConfig, *, sites: Sequence[str] | None, full: Sequence[str] | None, tie: bool
) -> _Places:
    """As for ``attach``."""
    method = module_of(config.kind)
    paths = list(sites) if sites is not None else method.sites(model, config)
    whole = tuple(full) if full is not None else full_modules(model, trained_parts(config))
    shared = tied_paths(model)
    changes_table = set(paths) if method.CHANGES_TABLE else set()
    tied = shared if tie and set(shared) & {*changes_table, *whole} else ()
    _check_disjoint(paths, whole, tied, config)
    rows = rows_for(model, config.token_rows, shared)
    _check_rows(model, rows, shared, [*(() if hasattr(config, "virtual_tokens") else paths), *whole])
    untied = shared if not tie and set(shared) & set(whole) else ()
    return _Places(paths, whole, shared, tied, untied, tied if set(tied) & changes_table else (), rows)


def _wrap(model: nn.Module, config: AdapterConfig, places: _Places, seed: int, prompt_ids: Sequence[int]) -> None:
    """Put a layer's adapter in its place; of a table and a head that are one, the table's first."""
    method, together = module_of(config.kind), dict[str, Any](prompt_ids=tuple(prompt_ids))
    for path in [*places.table[:1], *(path for path in places.paths if path not in places.table)]:
        layer = model.get_submodule(path)
        _replace(model, path, method.wrap(layer, config, Site(path, model, seed, together)))
    if places.table:
        _tie_head(model, places.table)


def attach_rows(model: nn.Module, rows: Mapping[str, tuple[int, ...]], *, grew_from: int | None = None) -> None:
    """Train rows of tokens beside what is attached, at exact paths.

    Args:
        grew_from: rows that the table had, if it was made larger for this adapter; ``detach`` gives them back.
    Raises:
        AdapterError: rows that are not there, or whose matrix is adapted or trained already.
    """
    attached = attachment(model)
    assert attached is not None
    shared, config = tied_paths(model), attached.config
    taken = () if hasattr(config, "virtual_tokens") else attached.sites
    _check_rows(model, rows, shared, [*taken, *attached.full_modules])
    one_matrix = put_rows(model, rows, shared)
    now = replace(attached, rows=rows, one_matrix=one_matrix, grew_from=grew_from)
    model.truetune_attachment = now  # type: ignore[assignment]


def tune(model: nn.Module, config: AdapterConfig, *, seed: int = 0, prompt_ids: Sequence[int] = ()) -> tuple[str, ...]:
    """Put any method on a model, one that trains the base's own weights too; returns the paths that were wrapped."""
    if METHODS[config.kind].result == "model":
        unfreeze(model, config)
        return ()
    return attach(model, config, seed=seed, prompt_ids=prompt_ids).sites


def _check_disjoint(paths: Sequence[str], whole: Sequence[str], tied: Sequence[str], config: AdapterConfig) -> None:
    if both := set(whole) & {*paths, *(tied if set(tied) & set(paths) else ())}:
        if hasattr(config, "virtual_tokens"):
            one = ", which is the table of the embeddings as well," if set(tied) & both else ""
            raise AdapterError(
                f"{', '.join(sorted(both))}{one} would be trained in full, and --method {config.kind} puts its virtual "
                "tokens before that table",
                ("way out", f"leave {' and '.join(config.trainable)} out of --trainable, or --token-rows with the ids "
                 "whose rows are to learn; --method lora trains the whole matrix beside its adapter"),
            )  # fmt: skip
        raise AdapterError(
            f"{', '.join(sorted(both))} would be trained in full and get an adapter as well",
            ("way out", "name it in --targets or in --trainable, not in both"),
        )


def _check_rows(
    model: nn.Module, rows: Mapping[str, Sequence[int]], shared: Sequence[str], taken: Sequence[str]
) -> None:
    """Where table and head are one, what changes the one changes the other."""
    check_rows(model, rows, [*taken, *(shared if set(shared) & set(taken) else ())])


def attachment(model: nn.Module) -> Attachment | None:
    """What ``attach`` did to this model, if anything."""
    return cast("Attachment | None", getattr(model, "truetune_attachment", None))


def detach(model: nn.Module) -> None:
    """Take every adapter out again; the base is as it was, except for parts that were trained in full."""
    for path, adapter in reversed(list(adapters(model))):  # of two on one layer the inner one first
        _replace(model, path, adapter.base)
    if attached := attachment(model):
        _tie_again(model, attached.untied)
        if attached.grew_from is not None:
            dismiss(model, attached.grew_from)
        model.requires_grad_(False)
        for parameter in attached.learned:
            parameter.requires_grad_(True)
        del model.truetune_attachment


def adapters(model: nn.Module) -> Iterator[tuple[str, Adapter]]:
    """``(path, adapter)`` of every wrapped layer, in the model's order."""
    for path, module in model.named_modules():
        if isinstance(module, Adapter):
            yield path, module


def settle(model: nn.Module) -> None:
    """Let every adapter go of what only training needed, as the last thing before the result is written."""
    for _, adapter in adapters(model):
        adapter.settle()


def trainable(model: nn.Module) -> dict[str, int]:
    """Parameters that are trained: name → count."""
    return {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}


def _tie_head(model: nn.Module, tied: tuple[str, ...]) -> None:
    """One update for the one matrix: the table owns it, the head reads it."""
    table, head = (model.get_submodule(path) for path in tied)
    assert isinstance(table, LoRAEmbedding)
    assert isinstance(head, nn.Linear)
    _replace(model, tied[1], TiedHead(head, table))


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
