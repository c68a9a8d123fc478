"""Adapters on disk: PEFT's format to the letter, both ways, with ``truetune.json`` beside it.

Nothing is ever half loaded (see ``adapters.tensors``). A setting this version does not implement is an error that names
it, unless it is at the value that means "off".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as parse_file
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from truetune.adapters.beneath import lay
from truetune.adapters.folder import check_values, digest, no_adapter, read_json, read_pickle, write_json
from truetune.adapters.inject import Attachment, attach, attach_rows, attachment, detach, tied_paths
from truetune.adapters.methods import module_of
from truetune.adapters.names import CARD as CARD
from truetune.adapters.names import CONFIG as CONFIG
from truetune.adapters.names import PICKLED
from truetune.adapters.names import WEIGHTS as WEIGHTS
from truetune.adapters.parts import has_bias
from truetune.adapters.peft_config import from_peft, is_on_another, saved_modules, to_peft
from truetune.adapters.targets import targeted
from truetune.adapters.tensors import fill as fill
from truetune.adapters.tensors import frozen_updates
from truetune.adapters.tensors import state as state
from truetune.adapters.tensors import to_file as to_file
from truetune.adapters.token_rows import FIELD, saved_rows
from truetune.adapters.vocabulary import KEY, NewTokens, admit, dismiss, new_tokens, resize, rows_of_table
from truetune.config.adapter import AdapterConfig, Targeted
from truetune.errors import AdapterError

_MOST_UNKNOWN_ROWS = 4096  # that an adapter made elsewhere may have skipped, to round its vocabulary up
BENEATH = "beneath"
"""The folder in an adapter's with the one that it was trained on top of, and what ``truetune.json`` calls that."""


@dataclass(frozen=True)
class AdapterFile:
    """An adapter folder, read: settings, tensors in float32 or as stored, and our card when there is one.

    ``beneath`` is the frozen adapter that it was trained on top of; its folder is where it was then.
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    card: Mapping[str, Any]
    beneath: AdapterFile | None = None

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
    settings = to_peft(model, attached, base=base)
    write(AdapterFile(folder, settings, to_file(model), content, attached.beneath), folder)


def write(file: AdapterFile, folder: Path) -> None:
    """Write an adapter's settings, tensors and card into ``folder``, which must exist or be creatable."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(file.tensors), folder / WEIGHTS, metadata={"format": "pt"})
    write_json(folder / CONFIG, file.config)
    card = dict(file.card)
    if first := file.beneath:
        write(first, folder / BENEATH)
        where, method = str(first.folder.resolve()), first.settings.kind
        card[BENEATH] = {"folder": where, "method": method, "sha256": digest(folder / BENEATH / WEIGHTS)}
    write_json(folder / CARD, card)


def read(folder: Path, *, mapped: bool = True) -> AdapterFile:
    """Read an adapter folder without touching any model.

    Args:
        mapped: tensors may be views of the file. Not for what has to outlive a file that is cut short under its hands:
            the system ends a process that looks at pages which are gone.
    Raises:
        AdapterError: not an adapter folder, a file in it that can't be read, or values that are not finite.
    """
    if not (folder / CONFIG).is_file():
        raise no_adapter(folder)
    config = read_json(folder / CONFIG)
    card = read_json(folder / CARD) if (folder / CARD).is_file() else {}
    if (folder / WEIGHTS).is_file():
        try:
            weights = folder / WEIGHTS
            tensors = load_file(weights) if mapped else parse_file(weights.read_bytes())
        except (SafetensorError, OSError) as error:
            raise AdapterError(f"{folder / WEIGHTS} can't be read: {error}", ("likely", "a copy cut short")) from None
    elif (folder / PICKLED).is_file():
        tensors = read_pickle(folder / PICKLED)
    else:
        raise AdapterError(f"{folder} has no {WEIGHTS}")
    check_values(folder, tensors)
    return AdapterFile(folder, config, tensors, card, _beneath(folder, config, card, mapped=mapped))


def _beneath(folder: Path, config: Mapping[str, Any], card: Mapping[str, Any], *, mapped: bool) -> AdapterFile | None:
    """The adapter that another was trained on top of, where there is one.

    Raises:
        AdapterError: it is not there, or is another.
    """
    if not is_on_another(config):
        return None
    known = card.get(BENEATH)
    if not isinstance(known, dict):
        raise AdapterError(
            f"{folder} was trained on top of another adapter, and its {CARD} does not name it",
            ("way out", f"copy the folder whole, with {CARD} and {BENEATH}/"),
        )
    where, wanted = folder / BENEATH, str(known.get("sha256"))
    was = ("trained on", f"{known.get('method')} of {known.get('folder')} ({wanted[:12]})")
    if not (where / WEIGHTS).is_file():
        raise AdapterError(
            f"{folder} was trained on top of another adapter, and that is not there",
            was,
            ("expected", f"{where}, with its {CONFIG} and {WEIGHTS}"),
            ("way out", "copy the folder whole; alone it would answer nonsense"),
        )
    if (found := digest(where / WEIGHTS)) != wanted:
        raise AdapterError(
            f"{where} is not the adapter that {folder} was trained on top of",
            was,
            ("found", found[:12]),
            ("way out", "put that one there"),
        )
    return replace(read(where, mapped=mapped), folder=Path(str(known.get("folder"))))


def put_beneath(model: nn.Module, first: AdapterFile) -> None:
    """Make a frozen adapter part of the maps of a model that carries none; ``detach`` takes it out again.

    Raises:
        AdapterError: it does not fit, or is none that another can be trained on; the model is as it was.
    """
    load(model, first)
    try:
        updates = frozen_updates(model, first.tensors, where=str(first.folder))
    finally:
        detach(model)
    lay(model, updates)


def attach_on(
    model: nn.Module, first: AdapterFile, *, config: AdapterConfig, seed: int, prompt_ids: Sequence[int] = ()
) -> Attachment:
    """Put a method's adapters on a model, on top of one that stays frozen; returns what was wrapped.

    Raises:
        AdapterError: as ``attach`` and ``put_beneath``; then the model is as it was.
    """
    sites = module_of(config.kind).sites(model, config)  # of the bare model, as the file's keys are
    put_beneath(model, first)
    try:
        attached = replace(attach(model, config, seed=seed, sites=sites, prompt_ids=prompt_ids), beneath=first)
    except BaseException:
        detach(model)
        raise
    model.truetune_attachment = attached  # type: ignore[assignment]
    return attached


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
    if file.beneath and sites is None:
        sites = module_of(config.kind).sites(model, config)
    full = saved_modules(model, file.config)
    tie = bool(file.config.get("ensure_weight_tying"))
    plain = config.model_copy(update={"token_rows": ()})  # which may be rows of one layer and not of another
    before = rows_of_table(model) if config.token_rows else 0
    grows = _grow(model, file, config.token_rows)
    try:
        rows = saved_rows(model, file.config.get(FIELD), tied_paths(model))
        if file.beneath:
            put_beneath(model, file.beneath)
        attached = attach(model, plain, sites=sites, full=full, tie=tie, in_float32=trained)
        model.truetune_attachment = replace(attached, beneath=file.beneath)  # type: ignore[assignment]
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
