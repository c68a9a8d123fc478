"""What is promised of one method on one base is kept by all methods, on all kinds of bases, in all families.

By default each method meets each kind and each family once; ``pytest tests/matrix --whole-matrix`` runs every cell.
All checks of a cell go by one run, and all that fail are named.
"""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from matrix import cells, checks
from matrix.cells import Cell
from matrix.tuned import Tuned
from truetune.config.methods import METHODS
from truetune.config.resolve import resolve
from truetune.config.sft import SFTConfig
from truetune.errors import ConfigError

Promise = Callable[[Any, Any, Path], None]


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
    assert not (faults := broken(checks.ALL, tuned, tuned.load(), tmp_path)), "\n\n".join(faults)


def broken(promises: Iterable[Promise], tuned: Any, live: Any, folder: Path) -> list[str]:
    """Each promise that is not kept, and how; one that falls over is not kept either."""
    faults = []
    for promise in promises:
        try:
            promise(tuned, live, folder)
        except (Exception, pytest.fail.Exception) as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
            faults.append(f"{promise.__name__}: {kind}{error or where.line}")
    return faults


def test_all_that_fail_are_named_however_they_fail(tmp_path: Path) -> None:
    def differs(*_: object) -> None:
        assert not _

    def falls_over(*_: object) -> None:
        raise RuntimeError("no such tensor")

    def is_not_refused(*_: object) -> None:
        with pytest.raises(ConfigError):
            pass

    def is_kept(*_: object) -> None:
        return

    found = broken((falls_over, is_not_refused, is_kept, differs), None, None, tmp_path)
    assert [fault.split(":")[0] for fault in found] == ["falls_over", "is_not_refused", "differs"]
    assert found[0] == "falls_over: RuntimeError: no such tensor"
    assert "DID NOT RAISE" in found[1]


def is_refused(cell: Cell, folder: Path) -> None:
    """At once, by name and with the way out: there is no model to read."""
    nowhere = {"model": str(folder / "none"), "data": [str(folder / "none.jsonl")], "out": str(folder / "out")}
    with pytest.raises(ConfigError, match=rf"--quant {cell.kind}: packed weights can't be trained(.|\n)*--method lora"):
        resolve(SFTConfig, file=None, flags=nowhere | cell.flags)
