"""A plain LoRA folded into a plain base by their files alone: no model, no torch, rows changed as they pass by.

It is for what most merges are. Whatever is not certain here is left to ``export.fold``, which knows every method and
words every refusal; the arithmetic of both is ``ops.lowrank.fold``'s, here by its native tier.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from truetune.adapters.lora_settings import from_peft
from truetune.adapters.names import ALL_LINEAR, ROOT, WEIGHTS, matches
from truetune.checkpoint.header import CODES, TensorEntry, read_header
from truetune.checkpoint.tensors import reading
from truetune.config.lora import LoRA
from truetune.errors import AdapterError, ModelError
from truetune.export.merge import RowEdit, not_finite
from truetune.models.by_files import HEAD, TABLE, PlainConfig, is_matrix
from truetune.ops import dispatch
from truetune.ops.native import fold as native
from truetune.ops.native.library import Library
from truetune.ops.scale import scale

_FACTORS = ("lora_A.weight", "lora_B.weight")


def row_edits(
    folder: Path, settings: Mapping[str, Any], base: PlainConfig, entries: Mapping[str, TensorEntry]
) -> dict[str, RowEdit] | None:
    """The edits that fold an adapter into a base, by tensor; None where that is not for this module.

    Args:
        folder: the adapter's.
        settings: its ``adapter_config.json``.
        entries: every tensor of the base.
    """
    if (lora := _plain_settings(settings, folder)) is None or (library := dispatch.library_here()) is None:
        return None
    try:
        held = read_header(folder / WEIGHTS)
        paths = _targeted(lora, base, entries)
    except (ModelError, re.error):
        return None
    factors = {path: [held.get(f"{ROOT}{path}.{suffix}") for suffix in _FACTORS] for path in paths}
    if not paths or len(held) != 2 * len(paths):
        return None
    edits = {}
    for path, (a, b) in factors.items():
        weight = entries[f"{path}.weight"]
        if a is None or b is None or not _fit(weight, a, b, lora.rank):
            return None
        s = scale(lora.alpha, lora.rank, rank_stabilised=lora.use_rslora)
        edits[weight.name] = RowEdit(weight.name, _Folding(library, weight, a, b, s))
    return edits


def _plain_settings(settings: Mapping[str, Any], folder: Path) -> LoRA | None:
    """The settings of an adapter that is A and B beside linear layers, of one rank and scale, and nothing else."""
    if settings.get("peft_type") != "LORA" or settings.get("modules_to_save") or settings.get("ensure_weight_tying"):
        return None
    try:
        found = from_peft(settings, folder)
    except AdapterError:
        return None
    more = (
        found.trainable, found.token_rows, found.exclude, found.layers, found.rank_pattern, found.alpha_pattern,
        found.lora_bias, found.slices, found.target_parameters, found.start_in_file,
    )  # fmt: skip
    return None if any(more) else found


def _targeted(lora: LoRA, base: PlainConfig, entries: Mapping[str, TensorEntry]) -> list[str]:
    """The linear layers that the targets name; none where they name the table, or a head that is the table."""
    known = [name for name in entries if is_matrix(name)] + ([HEAD] if base.tied else [])
    paths = {name.removesuffix(".weight"): name for name in known}
    inner = {path for path, name in paths.items() if name not in (TABLE, HEAD)}
    everywhere = inner if ALL_LINEAR in lora.targets else set()
    found = [path for path in paths if path in everywhere or any(matches(t, path) for t in lora.targets)]
    names = {paths[path] for path in found}
    return [] if TABLE in names or (base.tied and HEAD in names) else found


def _fit(weight: TensorEntry, a: TensorEntry, b: TensorEntry, rank: int) -> bool:
    rows, columns = weight.shape
    stored = all(CODES[entry.code][0] in native.CODE for entry in (weight, a, b))
    return stored and math.prod((rows, columns, rank)) > 0 and a.shape == (rank, columns) and b.shape == (rows, rank)


@dataclass
class _Folding:
    """W + s B A of rows as they pass; A and B are in memory from the first row to the last."""

    library: Library
    weight: TensorEntry
    a: TensorEntry
    b: TensorEntry
    scale: float
    _factors: native.Factors | None = field(default=None, init=False)

    def __call__(self, first: int, rows: memoryview) -> None:
        if self._factors is None:
            self._factors = self._laid_out()
        total = self.weight.shape[0]
        count = len(rows) * total // self.weight.nbytes
        dtype = CODES[self.weight.code][0]
        if not native.fold(self.library, native.address(rows), count, self._factors, dtype=dtype, first=first):
            raise not_finite(self.weight.name)
        if first + count == total:
            self._factors = None

    def _laid_out(self) -> native.Factors:
        (rank, columns), (a, b) = self.a.shape, (_raw(entry) for entry in (self.a, self.b))
        wide = native.wide(self.library, b, dtype=CODES[self.b.code][0])
        return native.factors(
            self.library, native.address(a), native.address(wide),
            rank=rank, columns=columns, scale=self.scale, dtype=CODES[self.a.code][0], kept=wide,
        )  # fmt: skip


def _raw(entry: TensorEntry) -> bytearray:
    raw = bytearray(entry.nbytes)
    with reading(entry) as read:
        read(memoryview(raw))
    return raw
