"""What makes a model beside its weights: the one list for what a merge copies and what is fetched for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

# Anything else in the folder (README, optimizer, logs, other formats) belongs to the base or to the run that made it;
# the licence has to travel with the weights.
KEPT = (
    "*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.py", "additional_chat_templates/*.jinja",
    "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
_LEFT_OUT = (
    "*.index.json",
    "MANIFEST.json",
    "adapter_config.json",
    "truetune.json",
    "trainer_state.json",
    "*_results.json",
)

# A Hub's patterns match whole paths, and ``*`` reaches across folders there: what lies deeper is another format of the
# same weights (original/, onnx/, …), as are consolidated weights at the top.
FETCHED = (*KEPT, "*.safetensors")
_AT_THE_TOP = tuple(pattern for pattern in FETCHED if "/" not in pattern and pattern != "*.jinja")
NOT_FETCHED = ("original/*", "consolidated*", *(f"*/{pattern}" for pattern in _AT_THE_TOP))


def side_files(base: Path) -> Iterator[Path]:
    """The files of a model's folder that belong to the model and are not its weights."""
    for path in (path for pattern in KEPT for path in sorted(base.glob(pattern))):
        foreign = path.name.startswith((".", "README")) or any(path.match(pattern) for pattern in _LEFT_OUT)
        if path.is_file() and not foreign:
            yield path
