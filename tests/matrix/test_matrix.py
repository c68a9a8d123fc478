"""What is promised of one method on one base is kept by all methods, on all kinds of bases, in all families.

By default each method meets each kind and each family once; ``pytest tests/matrix --whole-matrix`` runs every cell.
All checks of a cell go by one run, and all that fail are named.
"""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from matrix import cells, checks
from matrix.cells import Cell
from matrix.tuned import Tuned
from truetune.config.methods import METHODS
from truetune.config.resolve import resolve
from truetune.config.sft import SFTConfig
from truetune.errors import ConfigError


def test_no_method_kind_or_family_is_left_out() -> None:
    every = set(itertools.product(cells.KINDS, cells.FAMILIES))
    assert set(METHODS) == set(cells.FORMS)
    for method, forms in cells.FORMS.items():
        found = [cell for cell in cells.sample() if cell.method == method]
        assert {cell.kind for cell in found} == set(cells.KINDS)
        assert {cell.family for cell in found} == set(cells.FAMILIES)
        assert {cell.form for cell in found} == set(forms)
        for form in forms:
            cells_of = [(c.kind, c.family) for c in cells.whole() if (c.method, c.form) == (method, form)]
            assert set(cells_of) == every


def test_what_is_promised_is_kept(cell: Cell, base_of: Callable[[Cell], Path], task_file: Path, tmp_path: Path) -> None:
    if cell.is_refused:
        is_refused(cell, tmp_path)
        return
    tuned = Tuned(cell, base_of(cell), task_file, tmp_path / "run")
    tuned.run(tuned.out)
    live, faults = tuned.load(), []
    for check in checks.ALL:
        try:
            check(tuned, live, tmp_path)
        except AssertionError as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            faults.append(f"{check.__name__}: {error or where.line}")
    assert faults == [], "\n\n".join(faults)


def is_refused(cell: Cell, folder: Path) -> None:
    """At once, by name and with the way out: there is no model to read."""
    nowhere = {"model": str(folder / "none"), "data": [str(folder / "none.jsonl")], "out": str(folder / "out")}
    with pytest.raises(ConfigError, match=rf"--quant {cell.kind}: packed weights can't be trained(.|\n)*--method lora"):
        resolve(SFTConfig, file=None, flags=nowhere | cell.flags)
