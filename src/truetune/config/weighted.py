"""``DIR=WEIGHT``: an adapter and what its contribution is multiplied by."""

from __future__ import annotations

import os
from collections.abc import Sequence


def weighted(text: str) -> tuple[str, float]:
    """``("run/adapter", 0.7)`` of ``run/adapter=0.7``; without a number, the weight is 1.

    A folder whose whole name is given is that folder, whatever its name looks like.
    """
    path, _, number = text.rpartition("=")
    if not path or os.path.isdir(os.path.expanduser(text)):
        return text, 1.0
    try:
        return path, float(number)
    except ValueError:
        return text, 1.0


def check_weights(adapters: Sequence[str]) -> None:
    """Raises ValueError for a weight that is no finite number, or an adapter that is given twice."""
    if not all(weighted(text)[0].strip() for text in adapters):
        raise ValueError("--adapter: a folder, and its name is empty")
    for text in adapters:
        path, weight = weighted(text)
        if abs(weight) == float("inf") or weight != weight:
            raise ValueError(f"--adapter {text}: a finite weight, such as {path}=0.5")
    paths = [os.path.normpath(weighted(text)[0]) for text in adapters]
    if twice := sorted({path for path in paths if paths.count(path) > 1}):
        raise ValueError(f"--adapter {twice[0]} is given twice: give it once, with the sum of the weights")
