"""Tokenised data as files that are never trusted: each carries a checksum, and what is damaged is as if it were not.

A set in memory becomes one safetensors file: the tensors, and as one more of them the JSON of what is no tensor. A set
that is mapped becomes a folder: the files of ``data.shards``, and that JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from truetune.data.rejects import Rejects
from truetune.data.schema import Origin, Reject
from truetune.data.shards import PARTS, MappedSet, Origins, file_digest, open_set
from truetune.data.token_set import TokenSet

_OF_ROWS = ("files", "rows")  # parts of a set that its digest does not cover
_REST = "rest.safetensors"


@dataclass(frozen=True)
class Tokenised:
    """All that is computed from the rows of a run, and all that the user was told meanwhile.

    ``templated`` says whether any row needed a template; ``told`` are ``(warn or note, text)`` in their order.
    """

    train: TokenSet
    held_out: TokenSet | None
    rejects: Rejects
    report: dict[str, Any]
    templated: bool = False
    told: tuple[tuple[str, str], ...] = ()


def save_file(path: Path, made: Tokenised, *, limit: int) -> bool:
    """Write sets that are in memory; as ``save_whole``."""
    return save_whole(path, *_packed(made), limit=limit)


def load_file(path: Path) -> Tokenised | None:
    """What ``save_file`` wrote; None when there is none, or it is damaged."""
    found = load_whole(path)
    return _unpacked(*found) if found else None


def save_folder(path: Path, made: Tokenised) -> None:
    """Move mapped sets to where they are found, beside what is no set; all of it or nothing.

    Raises:
        OSError: it can't be written.
    """
    sides = {"train": made.train, "held_out": made.held_out}
    sets = {side: found for side, found in sides.items() if isinstance(found, MappedSet)}
    assert len(sets) == sum(found is not None for found in sides.values())
    names = sets["train"].origins
    assert isinstance(names, Origins)
    digests = {side: found.digest for side, found in sets.items()}
    rest = [list(names.names), digests, *_rest(made)]
    temporary = Path(tempfile.mkdtemp(dir=path.parent))
    try:
        for side, found in sets.items():
            for part in PARTS:
                os.replace(found.folder / f"{found.stem}.{part}", temporary / f"{side}.{part}")
        origins = {f"{side}.{part}": file_digest(temporary / f"{side}.{part}") for side in sets for part in _OF_ROWS}
        save_whole(temporary / _REST, {}, [origins, *rest])
        shutil.rmtree(path, ignore_errors=True)  # one that was found damaged
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_folder(path: Path) -> Tokenised | None:
    """What ``save_folder`` wrote; None when there is none, or it is damaged."""
    found = load_whole(path / _REST)
    if found is None:
        return None
    try:
        origins, names, digests, *rest = found[1]
        if any(file_digest(path / name) != digest for name, digest in origins.items()):
            return None
        sets = {side: open_set(path, side, names) for side in digests}
        if any(sets[side].digest != digest for side, digest in digests.items()):
            return None
        return _from_rest(sets["train"], sets.get("held_out"), rest)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def load_whole(path: Path) -> tuple[dict[str, Tensor], Any] | None:
    """The tensors and the rest of a file that ``save_whole`` wrote; None when there is none, or it is damaged."""
    try:
        raw = path.read_bytes()
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        tensors = load(raw)
        if header["__metadata__"]["sha256"] != _checksum(tensors):
            return None
        return tensors, json.loads(tensors.pop("rest").numpy().tobytes())
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None


def save_whole(path: Path, tensors: Mapping[str, Tensor], rest: Any, *, limit: int | None = None) -> bool:
    """Write tensors and JSON with a checksum, whole or not at all.

    Returns:
        Whether it was written: not when it has more than ``limit`` bytes.
    Raises:
        OSError: it can't be written.
    """
    as_tensor = torch.frombuffer(bytearray(json.dumps(rest).encode()), dtype=torch.uint8)
    tensors = {**tensors, "rest": as_tensor}
    raw = save(tensors, metadata={"sha256": _checksum(tensors)})
    if limit is not None and len(raw) > limit:
        return False
    handle, temporary = tempfile.mkstemp(dir=path.parent)  # for its owner's eyes alone: it tells the rows
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(raw)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return True


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().data)
    return digest.hexdigest()


def _packed(made: Tokenised) -> tuple[dict[str, Tensor], list[Any]]:
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
    return tensors, [list(files), *_rest(made)]


def _rest(made: Tokenised) -> list[Any]:
    rejects = [[r.origin.file, r.origin.row, r.reason, r.detail, r.raw] for r in made.rejects]
    left_out = [[*what, rows] for what, rows in made.rejects.left_out.items()]
    return [rejects, left_out, made.report, made.templated, made.told]


def _unpacked(tensors: Mapping[str, Tensor], rest: Any) -> Tokenised:
    files, *others = rest

    def examples(side: str) -> TokenSet:
        origins = Origins(files, tensors[f"{side}.files"], tensors[f"{side}.rows"])
        return TokenSet(
            tensors[f"{side}.tokens"], tensors[f"{side}.trained"], tensors[f"{side}.offsets"], list(origins)
        )

    return _from_rest(examples("train"), examples("held_out") if "held_out.tokens" in tensors else None, others)


def _from_rest(train: TokenSet, held_out: TokenSet | None, rest: Any) -> Tokenised:
    rejects, left_out, report, templated, told = rest
    return Tokenised(
        train=train,
        held_out=held_out,
        rejects=Rejects(
            (Reject(Origin(file, row), *words) for file, row, *words in rejects),
            {(file, reason, detail): rows for file, reason, detail, rows in left_out},
        ),
        report=report,
        templated=templated,
        told=tuple((kind, text) for kind, text in told),
    )
