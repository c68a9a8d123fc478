"""The weight files of a model's folder: which they are, whether they are there, and whether they are still the same."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from pathlib import Path

from truetune.checkpoint import tensors
from truetune.config.cache import cache_folder
from truetune.errors import ModelError

_SETTLED_SECONDS = 2  # a file written this lately may be written again within one tick of its clock


def weight_files(folder: Path) -> list[Path]:
    """The files whose weights transformers loads from a model folder: safetensors, else pickled ones."""
    if files := tensors.weight_files(folder):
        return files
    single = folder / "pytorch_model.bin"
    return [single] if single.is_file() else sorted(folder.glob("pytorch_model*.bin"))


def check_weights(folder: Path) -> None:
    """That the files with the weights are there at all.

    Raises:
        ModelError: naming those that are not, or an index that can't be read.
    """
    files = weight_files(folder)
    missing = [path.name for path in files if not path.is_file()]
    if missing or not files:
        raise ModelError(
            f"--model: {folder} has no weights" if not missing else f"--model: {folder} lacks a part of its weights",
            ("missing", ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")),
            ("expected", "model.safetensors, or the parts that model.safetensors.index.json lists"),
        )


def weight_hash(folder: Path) -> str:
    """SHA-256 over a model's weight files; ``""`` when it has none, or not all.

    Kept by the files' paths, sizes and times of change, because reading a whole base takes longer than a short answer.
    """
    files = weight_files(folder)
    if not files or not all(path.is_file() for path in files):
        return ""
    stats = [path.stat() for path in files]
    facts = [(str(path.resolve()), stat.st_size, stat.st_mtime_ns) for path, stat in zip(files, stats, strict=True)]
    kept = cache_folder() / "weights" / hashlib.sha256(repr(facts).encode()).hexdigest()
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if len(found := kept.read_text(encoding="ascii")) == 64:
            return found
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    if time.time() - max(stat.st_mtime for stat in stats) > _SETTLED_SECONDS:
        _keep(kept, digest.hexdigest())
    return digest.hexdigest()


def _keep(path: Path, text: str) -> None:
    """Write a file of the cache whole or not at all; one that can't be written is done without."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="ascii")
        temporary.replace(path)


def fingerprint(folder: Path) -> str:
    """A quick identity of a base: its config, and of each weight file the size and 64 samples spread over it.

    Raises:
        ModelError: weight files are missing.
    """
    check_weights(folder)
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in weight_files(folder):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for part in range(64):
                file.seek(part * size // 64)
                digest.update(file.read(1 << 14))
    return digest.hexdigest()
