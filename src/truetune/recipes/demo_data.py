"""The demo's rows: functions of the running interpreter's standard library, body from signature and docstring."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from importlib.resources import as_file, files
from pathlib import Path

from truetune.checkpoint.atomic import write_text
from truetune.config.cache import cache_folder
from truetune.data import stdlib
from truetune.errors import OutputError

# Longer functions are more than the tiny base can hold together; this keeps about 60 % of them.
MAX_CHARS = 500


def base_folder() -> Path:
    """The embedded base model's folder."""
    with as_file(files("truetune") / "assets" / "base") as path:
        return path


def rows(folder: Path) -> tuple[Path, Path]:
    """Write ``train.jsonl`` and ``heldout.jsonl`` into ``folder``; extracted once per interpreter, then cached."""
    key = hashlib.sha256(f"{sys.version}{MAX_CHARS}".encode() + Path(stdlib.__file__).read_bytes()).hexdigest()[:16]
    kept = cache_folder() / f"demo-{key}"
    names = ("train.jsonl", "heldout.jsonl")
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        if not (kept / name).is_file():
            text = "".join(_line(row) for row in stdlib.function_rows(held_out=name == names[1], max_chars=MAX_CHARS))
            try:
                kept.mkdir(parents=True, exist_ok=True)
                write_text(kept / name, text)
            except (OSError, OutputError):  # a cache that can't be written costs time, not the run
                (folder / name).write_text(text, encoding="utf-8")
                continue
        shutil.copyfile(kept / name, folder / name)
    return folder / names[0], folder / names[1]


def _line(row: stdlib.FunctionRow) -> str:
    return json.dumps({"prompt": row.prompt, "completion": row.answer, "module": row.module}) + "\n"
