"""What a model's name means: a folder here, or a repository of the Hub; and what a folder must hold."""

from __future__ import annotations

import functools
import json
import os
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from truetune.errors import ModelError, beside, nearest


def is_local(name: str) -> bool:
    """Whether a model's name means a folder here: it exists, its parent does, or it is no ``org/model``."""
    path = Path(name).expanduser()
    if path.exists() or path.is_absolute() or name.startswith((".", "/", "~")) or "\\" in name:
        return True
    return name.count("/") != 1 or path.parent.is_dir()


def only_local(name: str) -> bool:
    """Whether nothing may be asked of the network: a folder here, or a Hub that can't be reached (its cache may do)."""
    return is_local(name) or not _hub_is_reachable()


@functools.cache
def _hub_is_reachable() -> bool:
    """One look-up of the Hub's address: its client tries six times, for half a minute, before it says so."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    host = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    try:
        return bool(socket.getaddrinfo(host, 443))
    except OSError:
        return False


def model_folder(name: str) -> Path:
    """The folder a local name means.

    Raises:
        ModelError: it is not there, or holds no model.
    """
    path = Path(name).expanduser()
    if not path.is_dir():
        what = "is a file, not a folder" if path.exists() else ""
        raise ModelError(
            f"--model: {name} {what}" if what else f"--model: there is no folder {name}",
            ("did you mean", "" if what else beside(path)),
            ("expected", "a folder with config.json and model.safetensors, or a Hub name like org/model"),
        )
    if not (path / "config.json").is_file():
        inner = sorted(p.parent for p in path.glob("*/config.json"))
        is_adapter = (path / "adapter_config.json").is_file()
        raise ModelError(
            f"--model: {name} holds no model: it has no config.json",
            ("it is", "an adapter; pass its base as --model and the adapter as --adapter" if is_adapter else ""),
            ("did you mean", str(inner[0]) if inner else ""),
            ("expected", "config.json, model.safetensors and the tokenizer's files"),
        )
    return path


def check_config(folder: Path) -> None:
    """Look into ``config.json`` before the library does, whose words for the common mistakes are long.

    Raises:
        ModelError: no JSON, an architecture that is unknown, or one that needs code from the folder.
    """
    path = folder / "config.json"
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"--model: {path} can't be read as JSON: {error}") from None
    kind = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(kind, str):
        raise ModelError(
            f"--model: {path} does not say what kind of model it describes",
            ("expected", 'a JSON object with a "model_type", such as "llama"'),
        )
    from transformers import CONFIG_MAPPING  # a second of processor time, which a merge by files does without

    if kind in CONFIG_MAPPING:
        return
    if "auto_map" in config:
        raise needs_code(str(folder))
    raise ModelError(
        f"--model: {path}: the installed transformers knows no architecture '{kind}'",
        ("did you mean", nearest(kind, CONFIG_MAPPING.keys())),
        ("way out", "pip install --upgrade transformers, if the model is newer than it"),
    )


def needs_code(name: str) -> ModelError:
    """The refusal of a model that brings its own Python files."""
    return ModelError(
        f"--model: {name} needs code of its own to be run (trust_remote_code)",
        ("because", "truetune never runs code that comes with a model"),
        ("way out", "a model whose architecture is part of transformers"),
    )
