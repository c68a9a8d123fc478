"""Tokens that a base does not have: added for a run, and found again wherever its adapter is used."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from truetune.adapters.files import AdapterFile
from truetune.adapters.vocabulary import NewTokens
from truetune.config.sft import TrainConfig
from truetune.errors import AdapterError, ConfigError
from truetune.models.tokenizer import ChatTokenizer
from truetune.recipes.data import Prepared
from truetune.train.estimate import text_shape
from truetune.train.log import Screen

_TOKENS = 1 << 22


@dataclass(frozen=True)
class Admitted:
    """What a run adds, and the ids whose rows it trains; those of ``--token-rows`` among them."""

    new: NewTokens | None
    rows: tuple[int, ...]


def admit(config: TrainConfig, tokenizer: ChatTokenizer, model_config: Any, screen: Screen) -> Admitted:
    """Add the tokens that a config names to its tokenizer, before any text is read.

    Raises:
        ConfigError: a file that can't be read, or an id that the model has no row for.
    """
    asked, size = _tokens(config.new_tokens), text_shape(model_config)["vocab"]
    known = len(tokenizer.hf)
    there = {token: i for token in asked if (i := tokenizer.id_of(token)) is not None}
    added = tokenizer.add([token for token in asked if token not in there])
    new = NewTokens(added, min(known, size), size, max([size, *(i + 1 for i in added.values())])) if added else None
    if beyond := [i for i in config.token_rows if i >= (new.after if new else size)]:
        raise ConfigError(f"--token-rows {beyond[0]}: the model's vocabulary ends at {size - 1}",
                          ("way out", "--new-tokens adds tokens that it does not have"))  # fmt: skip
    if there:
        named = ", ".join(f"{token} {i}" for token, i in there.items())
        how = "" if config.trains_model else ", and what is there is trained on"
        screen.note(f"the tokenizer has {named} already{how}")
    if new:
        _say(new, screen, alone=not config.trains_model)
    rows = () if config.trains_model else (*there.values(), *added.values())  # all rows learn, or these
    return Admitted(new, tuple(dict.fromkeys((*config.token_rows, *rows))))


def _tokens(values: Sequence[str]) -> list[str]:
    """The tokens themselves; what ends in .txt is a file with one per line."""
    found: list[str] = []
    for value in values:
        if not value.endswith(".txt"):
            found.append(value)
            continue
        try:
            lines = Path(value).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8"
            raise ConfigError(f"--new-tokens {value}: the file can't be read: {reason}",
                              ("expected", "one token per line")) from None  # fmt: skip
        tokens = [line for line in lines if line.strip()]
        if not tokens:
            raise ConfigError(f"--new-tokens {value}: the file holds no token", ("expected", "one token per line"))
        found += tokens
    return list(dict.fromkeys(found))


def _say(new: NewTokens, screen: Screen, *, alone: bool) -> None:
    named = [f"{token} {i}" for token, i in new.ids.items()]
    listed = ", ".join(named[:8]) + (f", … {len(named) - 8} more" if len(named) > 8 else "")
    screen.say("tokens", f"{len(named)} new: {listed}")
    grows = f"the embedding table grows from {new.before:,} to {new.after:,} rows"
    taken = f"the embedding table has rows for them ({new.before:,}, of which {new.known:,} had tokens)"
    start = "new rows start at the mean of the others" + (" and are trained, the others are not" if alone else "")
    screen.note(f"{grows if new.after > new.before else taken}; {start}")


def warn_of_unseen(new: NewTokens | None, prepared: Prepared, screen: Screen) -> None:
    """Say which new tokens no row contains: their rows would learn nothing but to be unlikely."""
    if new is None:
        return
    parts = torch.split(prepared.train.tokens, _TOKENS)  # all at once may not fit into memory
    seen = {int(i) for part in parts for i in torch.unique(part)}
    if unseen := [token for token, i in new.ids.items() if i not in seen]:
        more = f" and {len(unseen) - 5} more" if len(unseen) > 5 else ""
        screen.warn(f"--new-tokens: {', '.join(unseen[:5])}{more}: in no row that is trained on")


def tokenizer_of(file: AdapterFile, tokenizer: ChatTokenizer, screen: Screen) -> ChatTokenizer:
    """The base's tokenizer with the tokens that an adapter brings.

    Raises:
        AdapterError: they are other ids here than in training.
    """
    new = NewTokens.of_card(file.card)
    if new is None:
        return _of_folder(file, tokenizer, screen)
    there = {token: i for token in new.ids if (i := tokenizer.id_of(token)) is not None}
    found = there | tokenizer.add([token for token in new.ids if token not in there])
    if found != new.ids:
        wrong = next(token for token in new.ids if found[token] != new.ids[token])
        raise AdapterError(
            f"{file.folder} was trained with {wrong} as token {new.ids[wrong]}, and it is {found[wrong]} here",
            ("likely", "the base's tokenizer was changed since"),
            ("way out", "the tokenizer that the base had; the adapter's own is in its folder"),
        )
    screen.note(f"the adapter brings {', '.join(new.ids)}" + (
        f": the embedding table grows from {new.before:,} to {new.after:,} rows" if new.after > new.before else ""
    ))  # fmt: skip
    return tokenizer


def _of_folder(file: AdapterFile, tokenizer: ChatTokenizer, screen: Screen) -> ChatTokenizer:
    """Other makers say nothing of new tokens but put the whole tokenizer beside the adapter."""
    highest = max(file.settings.token_rows, default=-1)
    if highest < len(tokenizer.hf):
        return tokenizer
    if not (file.folder / "tokenizer_config.json").is_file():
        screen.warn(f"{file.folder} has a row for token {highest}, which the tokenizer does not have: no text "
                    "contains it")  # fmt: skip
        return tokenizer
    own = ChatTokenizer.load(str(file.folder))
    own.stop_ids |= tokenizer.stop_ids
    screen.note(f"the adapter's own tokenizer is used: {len(own.hf):,} tokens, {len(own.hf) - len(tokenizer.hf):,} new")
    return own


def files_of(tokenizer: ChatTokenizer) -> dict[str, bytes | Path]:
    """The contents of a tokenizer's files by their names, for a folder that is written elsewhere."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}


def vocabulary_update(base: Path, rows: int) -> dict[str, object]:
    """What in a base's ``config.json`` says how many rows the table has, for so many."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    updates: dict[str, object] = {"vocab_size": rows} if "vocab_size" in config else {}
    for name, part in config.items():
        if name == "text_config" and isinstance(part, dict):
            updates[name] = {**part, "vocab_size": rows}
    return updates or {"vocab_size": rows}
