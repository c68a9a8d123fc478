"""Tokenised data kept between runs, found by everything that it was made of.

An entry is one safetensors file: the tensors, and as one more of them the JSON of what is no tensor. It is never
trusted: a checksum is compared when it is read, and an entry that can't be read or differs is made again. A folder that
can't be written is done without.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from truetune import __version__
from truetune.config.cache import cache_folder
from truetune.data.schema import Origin, Reject, TokenSet

FORMAT = 1  # of an entry
LIMIT = 2_000_000_000  # bytes of all entries together; those not used for longest go first


@dataclass(frozen=True)
class Tokenised:
    """All that is computed from the rows of a run, and all that the user was told meanwhile.

    ``templated`` says whether any row needed a template; ``told`` are ``(warn or note, text)`` in their order.
    """

    train: TokenSet
    held_out: TokenSet | None
    rejects: list[Reject]
    report: dict[str, Any]
    templated: bool = False
    told: tuple[tuple[str, str], ...] = ()


def key_of(settings: Mapping[str, Any], files: Sequence[str]) -> str | None:
    """SHA-256 over ``settings``, the bytes of ``files``, and the code that makes the one out of the other.

    Returns:
        None where a file is no plain one or can't be read: what can't be read twice has no key.
    """
    digest = hashlib.sha256(json.dumps([FORMAT, __version__, settings], sort_keys=True).encode())
    try:
        digest.update(_code_digest())
        for name in files:
            if not os.path.isfile(name):
                return None
            digest.update(_sha256(name))
    except OSError:
        return None
    return digest.hexdigest()


def _sha256(name: str) -> bytes:
    digest = hashlib.sha256()
    with open(name, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.digest()


@functools.cache
def _code_digest() -> bytes:
    """Of the package's Python files: its rules may change between two states of the code with one version number."""
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).digest()


def through_cache(key: Callable[[], str | None], build: Callable[[], Tokenised]) -> tuple[Tokenised, bool]:
    """What ``build`` makes, or made in an earlier run.

    Args:
        key: see ``key_of``; None keeps nothing. Asked again after building, so that files which were changed meanwhile
            leave nothing behind.
        build: called when there is no whole entry. What it raises passes through and is not kept.
    Returns:
        The data, and whether it is from the cache.
    """
    asked = key()
    if asked is None:
        return build(), False
    path = cache_folder() / "tokens" / f"{asked}.safetensors"
    if kept := _read(path):
        return kept, True
    made = build()
    if key() == asked:
        _write(path, made)
    return made, False


def _read(path: Path) -> Tokenised | None:
    """A whole entry, which then counts as used just now; None when there is none."""
    try:
        raw = path.read_bytes()
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        tensors = load(raw)
        if header["__metadata__"]["sha256"] != _checksum(tensors):
            return None
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None
    with contextlib.suppress(OSError):
        os.utime(path)
    return _unpacked(tensors)


def _write(path: Path, made: Tokenised) -> None:
    """Write an entry whole or not at all, and only where it takes a small part of the free space."""
    tensors = _packed(made)
    raw = save(tensors, metadata={"sha256": _checksum(tensors)})
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        if len(raw) > min(LIMIT, shutil.disk_usage(path.parent).free // 10):
            return
        handle, temporary = tempfile.mkstemp(dir=path.parent)  # for its owner's eyes alone: it tells the rows
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(raw)
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)
        _make_room(path.parent)


def _make_room(folder: Path) -> None:
    """Remove what was not used for longest (and what a killed process left) until the rest is within the limit."""
    stats = sorted(((file.stat(), file) for file in folder.iterdir()), key=lambda found: found[0].st_mtime_ns)
    excess = sum(stat.st_size for stat, _ in stats) - LIMIT
    for stat, file in stats:
        if excess > 0:
            file.unlink(missing_ok=True)
            excess -= stat.st_size


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().data)
    return digest.hexdigest()


def _packed(made: Tokenised) -> dict[str, Tensor]:
    files: dict[str, int] = {}
    tensors: dict[str, Tensor] = {}
    for side, examples in (("train", made.train), ("held_out", made.held_out)):
        if examples is not None:
            places = [files.setdefault(origin.file, len(files)) for origin in examples.origins]
            tensors |= {
                f"{side}.tokens": examples.tokens,
                f"{side}.trained": examples.trained,
                f"{side}.offsets": examples.offsets,
                f"{side}.files": torch.tensor(places, dtype=torch.int32),
                f"{side}.rows": torch.tensor([origin.row for origin in examples.origins], dtype=torch.int64),
            }
    rejects = [[r.origin.file, r.origin.row, r.reason, r.detail, r.raw] for r in made.rejects]
    rest = [list(files), rejects, made.report, made.templated, made.told]
    tensors["rest"] = torch.frombuffer(bytearray(json.dumps(rest).encode()), dtype=torch.uint8)
    return tensors


def _unpacked(tensors: Mapping[str, Tensor]) -> Tokenised:
    files, rejects, report, templated, told = json.loads(tensors["rest"].numpy().tobytes())

    def examples(side: str) -> TokenSet:
        places = zip(tensors[f"{side}.files"].tolist(), tensors[f"{side}.rows"].tolist(), strict=True)
        origins = [Origin(files[file], row) for file, row in places]
        return TokenSet(tensors[f"{side}.tokens"], tensors[f"{side}.trained"], tensors[f"{side}.offsets"], origins)

    return Tokenised(
        train=examples("train"),
        held_out=examples("held_out") if "held_out.tokens" in tensors else None,
        rejects=[Reject(Origin(file, row), *words) for file, row, *words in rejects],
        report=report,
        templated=templated,
        told=tuple((kind, text) for kind, text in told),
    )
