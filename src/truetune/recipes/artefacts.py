"""What was made from a run: noted in its folder, so that it can be proven later without being named."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from truetune.checkpoint.atomic import write_text
from truetune.errors import OutputError

RECORD = "artefacts.json"
"""In a run's folder: what was made from it."""


def read_recorded(run: Path) -> list[str]:
    """The artefacts that were made from a run, as far as they are still where they were."""
    try:
        found = json.loads((run / RECORD).read_text(encoding="utf-8"))["artefacts"]
        return [str(path) for path in found if Path(path).exists()]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def note_artefact(adapter: Path, out: Path) -> None:
    """Let the run that an adapter or a model is from know of what was made from it, for a later ``verify``.

    A run that can't be written to any more is no reason to fail: the model is there.
    """
    run = adapter.resolve().parent
    if not (run / "run.yaml").is_file():
        return
    known = list(dict.fromkeys([*read_recorded(run), str(out.resolve())]))
    with contextlib.suppress(OutputError, OSError):
        write_text(run / RECORD, json.dumps({"artefacts": known}, indent=1) + "\n")
