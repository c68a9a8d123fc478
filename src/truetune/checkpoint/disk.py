"""Disks that are full, read-only or about to lose power: refusals worded once, space asked for, folders synced."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from truetune.errors import OutputError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_FOLDER = (errno.ENOTDIR, errno.EEXIST)


@contextlib.contextmanager
def writing(folder: Path, *advice: tuple[str, str], needed: int = 0) -> Iterator[None]:
    """Turn the system's refusals to write into an error with a way out; what else goes wrong passes as it is.

    Args:
        folder: what is written to, for the message.
        advice: notes for a full disk, in place of the usual way out.
        needed: bytes of the whole output, where they are known.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = error.errno if isinstance(error, OSError) else _number_in(str(error))
        if number in _FULL:
            raise disk_full(folder, *advice, needed=needed, quota=number == errno.EDQUOT) from None
        if number == errno.EFBIG:
            way_out = "a higher limit (`ulimit -f` says which one holds here), or a disk that takes larger files"
            raise OutputError(f"a file in {folder} would be larger than allowed", ("way out", way_out)) from None
        if number in _FORBIDDEN:
            way_out = "--out with a folder you may write to"
            raise OutputError(f"{folder} can't be written: {os.strerror(number)}", ("way out", way_out)) from None
        if number in _NO_FOLDER:
            raise OutputError(f"{folder} is not a folder", ("way out", "choose another --out")) from None
        raise


def _number_in(text: str) -> int | None:
    """The system's error number of a ``SafetensorError`` from writing, which carries it in its text alone."""
    found = re.search(r"while serializing: .*\(os error (\d+)\)", text)
    return int(found[1]) if found else None


def disk_full(folder: Path, *advice: tuple[str, str], needed: int = 0, quota: bool = False) -> OutputError:
    """The error for a full disk; make it after removing what was written, so that it counts as free."""
    free = shutil.disk_usage(existing(folder)).free
    what = f"the quota for {folder} is used up" if quota else f"the disk that holds {folder} is full"
    return OutputError(
        f"{what}: {free / 1e6:,.0f} MB are left",
        ("needed", f"{needed:,} bytes" if needed else ""),
        ("free", f"{free:,} bytes" if needed else ""),
        *(advice or [("way out", "free some space, or write to another disk")]),
    )


def require_space(folder: Path, needed: int) -> None:
    """Refuse before the first byte what can't be finished.

    Raises:
        OutputError: the disk under ``folder`` has less than ``needed`` bytes free.
    """
    if needed > (free := shutil.disk_usage(existing(folder)).free):
        raise OutputError(
            f"the disk that holds {folder} has too little room",
            ("needed", f"{needed:,} bytes"),
            ("free", f"{free:,} bytes"),
            ("way out", "free some space, or write to another disk"),
        )


def reserve(handle: int, size: int) -> None:
    """Give an empty file its length, and its blocks where the system can.

    Blocks that are there need not be found at every write, and a disk without room for them says so before the first.
    The C library's ``posix_fallocate`` is not asked: where a disk can't do it, that one writes the whole file.

    Raises:
        OSError: the disk is full.
    """
    os.ftruncate(handle, size)
    if sys.platform != "linux" or not size:
        return
    fallocate = ctypes.CDLL(None, use_errno=True).fallocate
    fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    if fallocate(handle, 0, 0, size) and (number := ctypes.get_errno()) in _FULL:
        raise OSError(number, os.strerror(number))


LOCK = ".lock"


@contextlib.contextmanager
def alone(folder: Path, refusal: OutputError | None = None) -> Iterator[None]:
    """Hold a folder against a second process that would write the same into it.

    Args:
        refusal: what to raise in place of the usual words.
    Raises:
        OutputError: one is at work there.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with writing(folder):
        handle = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            way_out = ("way out", "wait for it, or stop it")
            raise refusal or OutputError(f"another process is writing {folder}", way_out) from None
        except OSError:  # network disks may know no locks
            pass
        yield
    finally:
        os.close(handle)


def sync(path: Path) -> None:
    """Bring a file, or the renames in a folder where the system lets a folder be synced, safely to disk."""
    if path.is_dir() and os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def existing(path: Path) -> Path:
    """The nearest of a path and the folders above it that is there.

    Raises:
        OutputError: none is, as on a drive that does not exist.
    """
    for candidate in (path, *path.parents):
        if candidate.exists():
            return candidate
    raise OutputError(
        f"{path} can't be written: there is no {path.anchor or path}", ("way out", "choose another --out")
    )
