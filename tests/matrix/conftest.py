"""The bases of the matrix, made once for all processes that run the suite together, and how much of it is run."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from matrix import cells
from matrix.bases import write_base, write_narrow, write_task

pytest.register_assert_rewrite("matrix.checks")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--whole-matrix", action="store_true", help="every method on every kind of base in every family")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "cell" in metafunc.fixturenames:
        chosen = cells.whole if metafunc.config.getoption("--whole-matrix", default=False) else cells.sample
        metafunc.parametrize("cell", chosen(), ids=str)


@pytest.fixture(autouse=True)
def _without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the ``plot`` extra is not installed: a run's curve takes longer to draw than a cell's steps to train."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)


@pytest.fixture(scope="session")
def base_of(make_tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[cells.Cell], Path]:
    """The checkpoint of a cell's base: in bfloat16 where that is its kind, else in float32. Read only."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    shared = tmp_path_factory.getbasetemp().parent if run else tmp_path_factory.mktemp("bases")

    def once(name: str, write: Callable[[Path], Path]) -> Path:
        folder = shared / name
        if not folder.is_dir():
            draft = write(Path(tempfile.mkdtemp(dir=shared)) / "base")
            try:
                draft.rename(folder)
            except OSError:
                assert folder.is_dir()  # another process was faster
        return folder

    def made(cell: cells.Cell) -> Path:
        wide = once(cell.family, lambda folder: write_base(cell.family, folder, make_tiny))
        if cell.kind != "bfloat16":
            return wide
        return once(f"{cell.family}-bfloat16", lambda folder: write_narrow(wide, folder))

    return made


@pytest.fixture(scope="session")
def task_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows to tune on. Read only."""
    return write_task(tmp_path_factory.mktemp("task") / "rows.jsonl")
