"""How an adapter's folder, its tensors and its layers are called: what can be known without torch."""

from __future__ import annotations

import re

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "truetune.json"
PICKLED = "adapter_model.bin"
"""PEFT's older file, where there is no ``WEIGHTS``."""

ROOT = "base_model.model."
"""What PEFT puts in front of a layer's path in the names of its tensors."""

ALL_LINEAR = "all-linear"
NONE = "none"
"""The target that no layer is, for ``--target-parameters`` alone."""

REGEX_MARKS = re.compile(r"[\\^$*+?\[\](){}|]")


def matches(pattern: str, path: str) -> bool:
    """PEFT's rule: a name matches a path's last parts, an expression the whole path."""
    if REGEX_MARKS.search(pattern):
        return re.fullmatch(pattern, path) is not None
    return path == pattern or path.endswith("." + pattern)
