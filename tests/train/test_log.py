"""What a person sees of a step while it runs."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from truetune.train.log import RunLog, Screen


def bar(folder: Path, width: int) -> str:
    """The bar as a terminal of this width shows it after a step behind an evaluation."""
    screen, shown = Screen(), io.StringIO()
    screen.console = Console(file=shown, width=width, force_terminal=True, legacy_windows=False)
    with RunLog(folder / "log.jsonl", screen, steps=1000, start=0, every=1) as log:
        log.evaluation(0, 4.2, 10)
        log.step(1, {"loss": 3.12, "tokens": 10, "peak_mb": 1400.0})
        log._bar.refresh()
        lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.getvalue()).replace("\r", "\n").splitlines()
    return next(line for line in reversed(lines) if "step" in line)


@pytest.mark.parametrize("width", [50, 60, 80, 120])
def test_a_bar_keeps_to_its_line_and_cuts_no_figure(width: int, tmp_path: Path) -> None:
    line = bar(tmp_path, width)
    assert len(line.rstrip()) <= width
    assert "…" not in line
    assert "step 1/1000  loss 3.1200" in line
    assert re.search(r"\d:\d\d:\d\d|-:--:--", line)  # the time left


def test_a_wide_bar_has_all_figures(tmp_path: Path) -> None:
    line = bar(tmp_path, 120)
    assert "val 4.2000" in line
    assert "tok/s  1.4 GB" in line
