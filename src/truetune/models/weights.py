"""The weight files of a model's folder: which they are, whether they are there, and whether they are still the same."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from truetune.errors import ModelError


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in order."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        return [folder / name for name in names]
    return [folder / "model.safetensors"] if (folder / "model.safetensors").is_file() else []


def check_weights(folder: Path) -> None:
    """That the files with the weights are there at all.

    Raises:
        ModelError: naming those that are not.
    """
    try:
        files = weight_files(folder)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"--model: {folder}/model.safetensors.index.json can't be read: {error!r}") from None
    missing = [path.name for path in files if not path.is_file()]
    if missing or not (files or list(folder.glob("pytorch_model*.bin"))):
        raise ModelError(
            f"--model: {folder} has no weights" if not missing else f"--model: {folder} lacks a part of its weights",
            ("missing", ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")),
            ("expected", "model.safetensors, or the parts that model.safetensors.index.json lists"),
        )


def weight_hash(folder: Path) -> str:
    """SHA-256 over a model's weight files; ``""`` when it has none in safetensors."""
    digest = hashlib.sha256()
    for path in weight_files(folder):
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest() if weight_files(folder) else ""


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
