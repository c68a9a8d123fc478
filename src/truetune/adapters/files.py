"""Adapters on disk: PEFT's format to the letter, both ways, with ``truetune.json`` beside it.

Nothing is ever half loaded (see ``adapters.tensors``). A setting this version does not implement is an error that names
it, unless it is at the value that means "off".
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from truetune.adapters.inject import attach, attach_rows, attachment, detach, tied_paths
from truetune.adapters.parts import has_bias
from truetune.adapters.peft_config import from_peft, saved_modules, to_peft
from truetune.adapters.targets import targeted
from truetune.adapters.tensors import fill as fill
from truetune.adapters.tensors import state as state
from truetune.adapters.tensors import to_file as to_file
from truetune.adapters.token_rows import FIELD, saved_rows
from truetune.adapters.vocabulary import KEY, NewTokens, admit, dismiss, new_tokens, resize, rows_of_table
from truetune.config.adapter import AdapterConfig, Targeted
from truetune.errors import AdapterError

_MOST_UNKNOWN_ROWS = 4096  # that an adapter made elsewhere may have skipped, to round its vocabulary up
CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "truetune.json"


@dataclass(frozen=True)
class AdapterFile:
    """An adapter folder, read: settings, tensors in float32 or as stored, and our card when there is one."""

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    card: Mapping[str, Any]

    @property
    def settings(self) -> AdapterConfig:
        """The settings in our terms. Raises AdapterError on what this version does not implement."""
        return from_peft(self.config, self.folder)


def save(model: nn.Module, folder: Path, *, base: str | None, card: Mapping[str, Any] | None = None) -> None:
    """Write the adapter that ``model`` carries into ``folder``, which must exist or be creatable.

    Args:
        base: what ``base_model_name_or_path`` should say.
        card: the content of ``truetune.json``.
    Raises:
        AdapterError: the model carries no adapter.
    """
    attached = attachment(model)
    if attached is None:
        raise AdapterError("the model carries no adapter", ("way out", "truetune.attach(model, truetune.LoRA()) first"))
    new = new_tokens(model)
    content = {**(card or {}), **({KEY: new.card()} if new else {})}
    write(AdapterFile(folder, to_peft(model, attached, base=base), to_file(model), content), folder)


def write(file: AdapterFile, folder: Path) -> None:
    """Write an adapter's settings, tensors and card into ``folder``, which must exist or be creatable."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(file.tensors), folder / WEIGHTS, metadata={"format": "pt"})
    _write_json(folder / CONFIG, file.config)
    _write_json(folder / CARD, file.card)


def read(folder: Path) -> AdapterFile:
    """Read an adapter folder without touching any model.

    Raises:
        AdapterError: not an adapter folder, or a file in it that can't be read.
    """
    if not (folder / CONFIG).is_file():
        raise AdapterError(f"{folder} is no adapter: it has no {CONFIG}", ("way out", _nearby(folder)))
    config = _read_json(folder / CONFIG)
    card = _read_json(folder / CARD) if (folder / CARD).is_file() else {}
    if (folder / WEIGHTS).is_file():
        try:
            tensors = load_file(folder / WEIGHTS)
        except (SafetensorError, OSError) as error:
            raise AdapterError(f"{folder / WEIGHTS} can't be read: {error}", ("likely", "a copy cut short")) from None
    elif (folder / "adapter_model.bin").is_file():
        tensors = _read_pickle(folder / "adapter_model.bin")
    else:
        raise AdapterError(f"{folder} has no {WEIGHTS}")
    return AdapterFile(folder, config, tensors, card)


def load(
    model: nn.Module,
    file: AdapterFile,
    *,
    config: AdapterConfig | None = None,
    trained: bool = False,
    before_fill: Callable[[], None] | None = None,
) -> None:
    """Attach the adapter a folder holds, and fill it; the model is as it was when that can't be done.

    Parts of the base that were trained in full take the model's dtype, so that it runs as it did. For tokens that the
    adapter brings, the embedding table and the head grow; ``detach`` makes them what they were.

    Args:
        config: settings to take for the folder's, which they may differ from in what only training reads.
        trained: the adapter goes on being trained, so those parts of the base are kept in float32.
        before_fill: called between the two.
    Raises:
        AdapterError: a target the model lacks, or any tensor missing, extra or of another shape; all named at once.
    """
    if attachment(model) is not None:
        raise AdapterError("the model already carries an adapter", ("way out", "truetune.detach(model) first"))
    config = config or file.settings
    if "bias" in config.trainable and not has_bias(model):  # PEFT's bias="all" asks for what there is, be it nothing
        config = config.model_copy(update={"trainable": tuple(part for part in config.trainable if part != "bias")})
    # Names that this model has nothing for: an adapter's list may be of a whole family of models.
    sites = targeted(model, config, all_must_match=False) if isinstance(config, Targeted) else None
    full = saved_modules(model, file.config)
    tie = bool(file.config.get("ensure_weight_tying"))
    plain = config.model_copy(update={"token_rows": ()})  # which may be rows of one layer and not of another
    before = rows_of_table(model) if config.token_rows else 0
    grows = _grow(model, file, config.token_rows)
    try:
        rows = saved_rows(model, file.config.get(FIELD), tied_paths(model))
        attach(model, plain, sites=sites, full=full, tie=tie, in_float32=trained)
        if rows:
            attach_rows(model, rows, grew_from=before if grows else None)
        if before_fill is not None:
            before_fill()
        fill(model, file.tensors, where=str(file.folder))
    except BaseException:  # out of memory and Ctrl-C too: half an adapter on a model answers nonsense
        detach(model)
        if grows:
            dismiss(model, before)
        raise


def brings_rows(model: nn.Module, file: AdapterFile) -> bool:
    """Whether an adapter has rows for tokens that the model's table has none for."""
    return max(file.settings.token_rows, default=-1) >= rows_of_table(model)


def _grow(model: nn.Module, file: AdapterFile, ids: Sequence[int]) -> bool:
    """Whether the vocabulary was made larger, or told of new tokens, for what an adapter brings.

    Raises:
        AdapterError: ids so far beyond the vocabulary that they can't be new tokens of this base.
    """
    if not ids:
        return False
    before, new = rows_of_table(model), NewTokens.of_card(file.card)
    needed = max(*ids, before - 1) + 1
    if needed > before + len(ids) + _MOST_UNKNOWN_ROWS:
        raise AdapterError(
            f"{file.folder} has rows of token {needed - 1}, and this model's vocabulary ends at {before - 1}",
            ("likely", "the adapter was trained on another base"),
        )
    if new:
        admit(model, new)
    resize(model, needed)
    return bool(new) or needed > before


def _read_pickle(path: Path) -> dict[str, Tensor]:
    """PEFT's older file; only tensors are unpickled."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise AdapterError(f"{path} can't be read: {reason}", ("likely", "a copy cut short, or no weights")) from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise AdapterError(f"{path} holds something else than tensors by name")
    return tensors


def _nearby(folder: Path) -> str:
    """A folder with an adapter close to where the user looked."""
    if folder.is_file():
        return "pass the folder that holds an adapter, not a file"
    if not folder.is_dir():
        return f"there is no folder {folder}"
    found = sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
    return f"pass {found[0]}" if found else "pass the folder that holds it"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} can't be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise AdapterError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
