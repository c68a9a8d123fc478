"""Load a causal language model: a local folder without any network, or a name on the Hub."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from truetune.errors import ModelError, nearest


def is_local(name: str) -> bool:
    """Whether a model's name means a folder here: it exists, or it is written like a path."""
    path = Path(name).expanduser()
    return path.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1 or os.sep != "/"


def model_folder(name: str) -> Path:
    """The folder a local name means.

    Raises:
        ModelError: it is not there, or holds no model.
    """
    path = Path(name).expanduser()
    if not path.is_dir():
        siblings = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        close = nearest(path.name, siblings)
        raise ModelError(
            f"--model: there is no folder {name}",
            ("did you mean", str(path.parent / close) if close else ""),
            ("expected", "a folder with config.json and model.safetensors, or a Hub name like org/model"),
        )
    if not (path / "config.json").is_file():
        kind = "an adapter; pass its base as --model and the adapter as --adapter" if _is_adapter(path) else ""
        raise ModelError(
            f"--model: {name} holds no model: it has no config.json",
            ("it is", kind),
            ("expected", "config.json, model.safetensors and the tokenizer's files"),
        )
    return path


def _is_adapter(path: Path) -> bool:
    return (path / "adapter_config.json").is_file()


def load_config(name: str, *, revision: str | None = None) -> Any:
    """The model's config alone; no weights are read."""
    with _explained(name):
        folder = str(model_folder(name)) if is_local(name) else name
        return AutoConfig.from_pretrained(folder, revision=revision, local_files_only=is_local(name))


def checkpoint_dtype(config: Any) -> torch.dtype:
    """The dtype a checkpoint says it is stored in; float32 when it says nothing."""
    dtype = getattr(config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def load_model(
    name: str, *, dtype: torch.dtype, device: str = "cpu", revision: str | None = None, config: Any = None
) -> PreTrainedModel:
    """Load a causal language model for training or inference, in ``eval`` mode.

    Raises:
        ModelError: not found, unreadable, code needed, or a checkpoint whose tensors do not fit the model.
    """
    config = config if config is not None else load_config(name, revision=revision)
    with _explained(name), quiet():
        model, info = AutoModelForCausalLM.from_pretrained(
            str(model_folder(name)) if is_local(name) else name,
            config=config,
            revision=revision,
            dtype=dtype,
            local_files_only=is_local(name),
            output_loading_info=True,
        )
    _check_complete(name, info)
    model.to(device)
    model.eval()
    return model


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """Write a model as transformers does, without its progress bars."""
    with quiet():
        model.save_pretrained(str(folder))


def skeleton(config: Any, *, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a config with shapes and no weights, on the meta device."""
    with quiet(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    return model


def _check_complete(name: str, info: Any) -> None:
    missing = sorted(map(str, info.get("missing_keys", ())))
    mismatched = sorted(str(item[0] if isinstance(item, tuple) else item) for item in info.get("mismatched_keys", ()))
    if missing or mismatched:
        listing = [f"missing    {key}" for key in missing] + [f"misshaped  {key}" for key in mismatched]
        more = f"\n… and {len(listing) - 12} more" if len(listing) > 12 else ""
        raise ModelError(
            f"--model: the weights in {name} do not fill the model that its config.json describes",
            ("tensors", "\n".join(listing[:12]) + more),
            ("way out", "fetch the checkpoint again, or correct its config.json"),
        )


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn the library's exceptions about a checkpoint into ours."""
    try:
        yield
    except ModelError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        text = " ".join(str(error).split())
        if "trust_remote_code" in text or "custom code" in text:
            raise ModelError(
                f"--model: {name} needs code of its own to be run, and truetune never runs code from a model's folder",
                ("way out", "use a model whose architecture is part of transformers"),
            ) from None
        raise ModelError(f"--model: {name} can't be loaded", ("because", text[:600])) from None
    except Exception as error:
        # safetensors and tokenizers raise bare Exception subclasses of their own for damaged files.
        if type(error).__module__.split(".")[0] in ("safetensors", "safetensors_rust", "tokenizers", "builtins"):
            raise ModelError(f"--model: {name} can't be loaded", ("because", str(error)[:600])) from None
        raise


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the library's bars and advice off the terminal; what matters is checked and said by us."""
    verbosity = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()


def local_copy(name: str, *, revision: str | None = None) -> Path:
    """The folder with a model's files: the local one, or the Hub's, fetched into its cache."""
    if is_local(name):
        return model_folder(name)
    from huggingface_hub import snapshot_download

    with _explained(name):
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
            )
        )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in order."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        return [folder / name for name in names]
    return [folder / "model.safetensors"] if (folder / "model.safetensors").is_file() else []


def weight_hash(folder: Path) -> str:
    """SHA-256 over a model's weight files; ``""`` when it has none in safetensors."""
    digest = hashlib.sha256()
    for path in weight_files(folder):
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest() if weight_files(folder) else ""


def context_length(config: Any) -> int | None:
    """The longest text the model was made for, where its config says."""
    for name in ("max_position_embeddings", "n_positions", "seq_length"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None
