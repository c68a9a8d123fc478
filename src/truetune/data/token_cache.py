"""Tokenised data kept between runs, found by everything that it was made of.

An entry is one safetensors file: the tensors, and as one more of them the JSON of what is no tensor. Where the data is
large, it is a folder instead: the files of ``data.shards``, and that JSON. It is never trusted: a checksum is compared
when it is read, and an entry that can't be read or differs is made again. A folder that can't be written is done
without. Of several processes that want the same entry at the same time, one makes it and the others wait.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from truetune.data.shards import PARTS, MappedSet, Origins, file_digest, open_set
from truetune.errors import DataError, TruetuneError

FORMAT = 1  # of an entry
LIMIT = 2_000_000_000  # bytes of all entries together; those not used for longest go first

_OF_ROWS = ("files", "rows")  # parts of a set that its digest does not cover
_REST = "rest.safetensors"
_ABANDONED = 3 * 86_400  # seconds after which the shards of a run that was killed are not waited for any more


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
            digest.update(bytes.fromhex(file_digest(Path(name))))
    except OSError:
        return None
    return digest.hexdigest()


@functools.cache
def _code_digest() -> bytes:
    """Of the package's Python files: its rules may change between two states of the code with one version number."""
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).digest()


def through_cache(
    key: Callable[[], str | None],
    build: Callable[[], Tokenised],
    *,
    build_in: Callable[[Path], Tokenised] | None = None,
    waits: Callable[[], None] = lambda: None,
) -> tuple[Tokenised, bool]:
    """What ``build`` makes, or made in an earlier run.

    Args:
        key: see ``key_of``; None keeps nothing. Asked again after building, so that files which were changed meanwhile
            leave nothing behind.
        build: called when there is no whole entry. What it raises passes through and is not kept.
        build_in: the same for data that is kept in files: called in place of ``build`` with the folder of this key,
            in which an earlier process may have left a part of the work, where there is a disk to write to.
        waits: called when another process is making the same entry, which is then waited for.
    Returns:
        The data, and whether it is from the cache.
    """
    asked = key()
    if asked is None:
        return build(), False
    tokens = cache_folder() / "tokens"
    if kept := _kept(tokens, asked):
        return kept, True
    with _alone(asked, waits) as waited:
        if waited and (kept := _kept(tokens, asked)):
            return kept, True
        work = _workplace(asked) if build_in else None
        if work is None or build_in is None:
            made = build()
            if key() == asked:
                _write(tokens / f"{asked}.safetensors", made)
            return made, False
        made = _built_in(work, build_in)
        if key() == asked:
            _write_folder(tokens / asked, made)
        shutil.rmtree(work, ignore_errors=True)  # what is mapped stays readable
        return made, False


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


def _kept(tokens: Path, key: str) -> Tokenised | None:
    """A whole entry, which then counts as used just now; None when there is none."""
    path = tokens / f"{key}.safetensors"
    if found := load_whole(path):
        made: Tokenised | None = _unpacked(*found)
    else:
        path = tokens / key
        made = _read_folder(path)
    if made:
        with contextlib.suppress(OSError):
            os.utime(path)
    return made


def _write(path: Path, made: Tokenised) -> None:
    """Write an entry, and only where it takes a small part of the free space."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        if save_whole(path, *_packed(made), limit=min(LIMIT, shutil.disk_usage(path.parent).free // 10)):
            _make_room(path.parent, path)


def _workplace(key: str) -> Path | None:
    """Where the shards of an entry are made; None where nothing can be written."""
    place = cache_folder() / "shards" / key
    try:
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        for other in place.parent.iterdir():
            if other != place and time.time() - other.stat().st_mtime > _ABANDONED:
                shutil.rmtree(other, ignore_errors=True)
        os.utime(place)
    except OSError:
        return None
    return place


def _built_in(work: Path, build_in: Callable[[Path], Tokenised]) -> Tokenised:
    try:
        return build_in(work)
    except OSError as error:
        raise DataError(
            f"{work}: the tokens can't be written: {error.strerror or error}",
            ("kept", "the part that was finished: the same command goes on from there"),
            ("way out", "free some space, or set TRUETUNE_CACHE to a folder on another disk"),
        ) from error
    except TruetuneError as error:
        if error.exit_code == 2:  # the user's mistake: other rows will have another key
            shutil.rmtree(work, ignore_errors=True)
        raise


def _write_folder(path: Path, made: Tokenised) -> None:
    """Move sets that are in files to where they are found, beside what is no set."""
    sides = {"train": made.train, "held_out": made.held_out}
    sets = {side: found for side, found in sides.items() if isinstance(found, MappedSet)}
    assert len(sets) == sum(found is not None for found in sides.values())
    names = sets["train"].origins
    assert isinstance(names, Origins)
    digests = {side: found.digest for side, found in sets.items()}
    rest = [list(names.names), digests, *_rest(made)]
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent))
        try:
            for side, found in sets.items():
                for part in PARTS:
                    os.replace(found.folder / f"{found.stem}.{part}", temporary / f"{side}.{part}")
            origins = {
                f"{side}.{part}": file_digest(temporary / f"{side}.{part}") for side in sets for part in _OF_ROWS
            }
            save_whole(temporary / _REST, {}, [origins, *rest])
            shutil.rmtree(path, ignore_errors=True)  # one that was found damaged
            os.replace(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        _make_room(path.parent, path)


def _read_folder(path: Path) -> Tokenised | None:
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


@contextlib.contextmanager
def _alone(key: str, waits: Callable[[], None]) -> Iterator[bool]:
    """Hold the right to make an entry; yields whether another process had it first. None where locks are not known."""
    try:
        import fcntl

        folder = cache_folder() / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / key, os.O_CREAT | os.O_RDWR, 0o600)
    except (ImportError, OSError):
        yield False
        return
    waited = False
    try:
        with contextlib.suppress(OSError):  # network disks may know no locks
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waited = True
                waits()
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield waited
    finally:
        os.close(handle)  # the file stays: unlinked, it would let in one who waits for it and one who makes it anew


def _make_room(folder: Path, newest: Path) -> None:
    """Remove what was not used for longest (and what a killed process left) until the rest is within the limit.

    The newest entry stays whatever its size: it is being trained on.
    """
    found = [(path.stat().st_mtime_ns, _size(path), path) for path in folder.iterdir()]
    excess = sum(size for _, size, _ in found) - LIMIT
    for _, size, path in sorted(found):
        if excess > 0 and path != newest:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
            excess -= size


def _size(path: Path) -> int:
    if not path.is_dir():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.iterdir())


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
    return [rejects, made.report, made.templated, made.told]


def _unpacked(tensors: Mapping[str, Tensor], rest: Any) -> Tokenised:
    files, *others = rest

    def examples(side: str) -> TokenSet:
        origins = Origins(files, tensors[f"{side}.files"], tensors[f"{side}.rows"])
        return TokenSet(
            tensors[f"{side}.tokens"], tensors[f"{side}.trained"], tensors[f"{side}.offsets"], list(origins)
        )

    return _from_rest(examples("train"), examples("held_out") if "held_out.tokens" in tensors else None, others)


def _from_rest(train: TokenSet, held_out: TokenSet | None, rest: Any) -> Tokenised:
    rejects, report, templated, told = rest
    return Tokenised(
        train=train,
        held_out=held_out,
        rejects=[Reject(Origin(file, row), *words) for file, row, *words in rejects],
        report=report,
        templated=templated,
        told=tuple((kind, text) for kind, text in told),
    )
