"""Tokenised data kept between runs, found by everything that it was made of (see ``data.token_files``).

A folder that can't be written is done without. Of several processes that want the same entry at the same time, one
makes it and the others wait.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from truetune import __version__
from truetune.config.cache import cache_folder
from truetune.data.shards import file_digest
from truetune.data.standard_input import path_of
from truetune.data.token_files import Tokenised, load_file, load_folder, save_file, save_folder
from truetune.errors import DataError, TruetuneError

FORMAT = 1  # of an entry
LIMIT = 2_000_000_000  # bytes of all entries together; those not used for longest go first

_ABANDONED = 3 * 86_400  # seconds after which the shards of a run that was killed are not waited for any more


def key_of(settings: Mapping[str, Any], files: Sequence[str]) -> str | None:
    """SHA-256 over ``settings``, the bytes of ``files``, and the code that makes the one out of the other.

    Returns:
        None where a file is no plain one or can't be read: what can't be read twice has no key.
    """
    digest = hashlib.sha256(json.dumps([FORMAT, __version__, settings], sort_keys=True).encode())
    try:
        digest.update(_code_digest())
        for name in files:
            path = path_of(name)
            if not os.path.isfile(path):
                return None
            digest.update(bytes.fromhex(file_digest(Path(path))))
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


def _kept(tokens: Path, key: str) -> Tokenised | None:
    """A whole entry, which then counts as used just now; None when there is none."""
    path = tokens / f"{key}.safetensors"
    made = load_file(path)
    if made is None:
        path = tokens / key
        made = load_folder(path)
    if made:
        with contextlib.suppress(OSError):
            os.utime(path)
    return made


def _write(path: Path, made: Tokenised) -> None:
    """Write an entry, and only where it takes a small part of the free space."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        if save_file(path, made, limit=min(LIMIT, shutil.disk_usage(path.parent).free // 10)):
            _make_room(path.parent, path)


def _write_folder(path: Path, made: Tokenised) -> None:
    """The same of sets that are in files already."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_folder(path, made)
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
