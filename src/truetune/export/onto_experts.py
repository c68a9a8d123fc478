"""Merging for packed stacks of experts: what ``export.onto`` does for packed layers, expert by expert.

Files hold a stack as one tensor, or one by one, where a matrix that was packed as a whole may lie in two parts: each of
these is then made from both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from truetune.checkpoint.header import TensorEntry
from truetune.checkpoint.mapped import view
from truetune.checkpoint.tensors import load, name_in_checkpoint
from truetune.config.quant import QuantRecipe
from truetune.export.expert_files import matrices_of
from truetune.export.merge import Addition, Edit
from truetune.export.onto import Drift, Onto, Site, change_of, not_in_files
from truetune.quant.stack import Stack, parts_of


@dataclass(kw_only=True)
class _StackSite(Site):
    stack: Stack

    def through(self, recipe: QuantRecipe, weight: Tensor, dtype: torch.dtype) -> Tensor:
        form = self.stack.packed_as(recipe, dtype)
        return torch.stack([form.through(one, e) for e, one in enumerate(weight)])


@dataclass(kw_only=True)
class _PartSite(Site):
    """Part of one expert's matrix, which is a tensor of its own in the files.

    Attributes:
        files: those of the matrix, from its first row to its last.
        index: which of them this is.
        e: the expert.
    """

    stack: Stack
    files: Sequence[TensorEntry]
    index: int
    e: int

    def through(self, recipe: QuantRecipe, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The other parts are taken as the files hold them."""
        parts = [weight if i == self.index else load(entry).to(dtype) for i, entry in enumerate(self.files)]
        whole = self.stack.packed_as(recipe, dtype).through(torch.cat(parts), self.e)
        return torch.split(whole, [len(part) for part in parts])[self.index]


def experts_on_quantised(
    edits: Mapping[str, Edit | Addition],
    stacks: Mapping[str, Stack],
    entries: Mapping[str, TensorEntry],
    recipe: QuantRecipe,
    *,
    onto: Onto,
    dtype: torch.dtype,
    prefix: str,
    drift: Drift,
) -> dict[str, Edit | Addition]:
    """``onto.on_quantised`` for stacks of experts: path of each parameter that was packed → its form."""
    result = dict(edits)
    for name, stack in stacks.items():
        for key, site in _sites(name, stack, edits, entries, prefix, onto):
            result[key] = Edit(key, site.edit(recipe, onto, dtype, drift))
    return result


def experts_unpacked(
    edits: Mapping[str, Edit | Addition],
    stacks: Mapping[str, Stack],
    entries: Mapping[str, TensorEntry],
    recipe: QuantRecipe,
    *,
    dtype: torch.dtype,
    prefix: str,
    drift: Drift,
) -> tuple[dict[str, Edit | Addition], list[str]]:
    """``onto.unpacked`` for stacks of experts."""
    result, drop = dict(edits), list[str]()
    for path, stack in stacks.items():
        name = name_in_checkpoint(path, entries, prefix)
        if name is None or entries[name].dtype.is_floating_point:
            continue
        site = _StackSite(path=path, stack=stack, change=change_of(result.pop(name, None)))
        parts = parts_of(name, entries, recipe)
        drop += parts.values()
        own = {part: entries[key] for part, key in parts.items()}
        result[name] = Addition(name, dtype, stack.shape, lambda s=site, o=own: _dense(s, o, dtype, drift))  # type: ignore[misc]
    return result, drop


def _sites(
    name: str,
    stack: Stack,
    edits: Mapping[str, Edit | Addition],
    entries: Mapping[str, TensorEntry],
    prefix: str,
    onto: Onto,
) -> Iterator[tuple[str, Site]]:
    if stored := name_in_checkpoint(name, entries, prefix):
        stack.check(entries[stored].shape)
        yield stored, _StackSite(path=name, stack=stack, change=change_of(edits.get(stored)))
        return
    found = matrices_of(name, stack, entries, prefix)
    if not found and onto == "dequantized":
        raise not_in_files(name)
    for e, files in enumerate(found):
        for i, entry in enumerate(files):
            change = change_of(edits.get(entry.name))
            yield entry.name, _PartSite(path=name, stack=stack, change=change, files=files, index=i, e=e)


def _dense(site: _StackSite, own: Mapping[str, TensorEntry], dtype: torch.dtype, drift: Drift) -> Tensor:
    weights = site.stack.weights({part: view(entry) for part, entry in own.items()})
    dense = torch.stack([site.stack.as_stored(weight) for weight in weights])
    return site.unpacked(dense, dtype, drift)
