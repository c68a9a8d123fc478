"""Folders that exist whole or not at all.

Everything is written into a temporary sibling, synced, listed with sizes and SHA-256 in ``MANIFEST.json``, and renamed.
A folder without a valid manifest is not a checkpoint, whatever it is called.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from truetune.errors import OutputError

MANIFEST = "MANIFEST.json"


@contextlib.contextmanager
def atomic_folder(path: Path, *, manifest: bool = True) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``path`` when the block ends well, replacing what was there.

    Raises:
        OutputError: the disk is full or can't be written; ``path`` is then as it was before.
    """
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.parent / f".{path.name}.tmp-{os.getpid()}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    try:
        with writing(path.parent):
            yield temporary
            if manifest:
                _write_manifest(temporary)
            _sync_tree(temporary)
            _put_in_place(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn the system's refusals to write into an error with a way out."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise _disk_full(folder) from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise OutputError(
                f"{folder} can't be written: {error.strerror}", ("way out", "--out with a folder you may write to")
            ) from None
        if error.errno in (errno.ENOTDIR, errno.EEXIST):
            raise OutputError(f"{folder} is not a folder", ("way out", "choose another --out")) from None
        raise
    except SafetensorError as error:
        if "os error 28" in str(error) or "No space left" in str(error):
            raise _disk_full(folder) from None
        raise


def _disk_full(folder: Path) -> OutputError:
    free = shutil.disk_usage(_existing(folder)).free
    return OutputError(
        f"the disk that holds {folder} is full: {free / 1e6:,.0f} MB are left",
        ("kept", "every checkpoint that was complete before is still there"),
        ("way out", "free some space, or lower --keep, then run again with --resume auto"),
    )


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def is_valid(folder: Path) -> bool:
    """Whether a folder's manifest is there and every file in it has its size and hash."""
    return not faults(folder)


def faults(folder: Path) -> list[str]:
    """What is wrong with a folder, by its manifest: one line per fault."""
    try:
        listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return [f"no readable {MANIFEST}"]
    found = []
    for name, entry in listed.items():
        file = folder / name
        if not file.is_file():
            found.append(f"{name} is missing")
        elif file.stat().st_size != entry["size"]:
            found.append(f"{name} has {file.stat().st_size:,} bytes, expected {entry['size']:,}")
        elif sha256(file) != entry["sha256"]:
            found.append(f"{name} has another content than when it was saved")
    return found


def sha256(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _write_manifest(folder: Path) -> None:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    listed = {str(p.relative_to(folder)): {"size": p.stat().st_size, "sha256": sha256(p)} for p in files}
    (folder / MANIFEST).write_text(json.dumps({"files": listed}, indent=1), encoding="utf-8")


def _sync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _put_in_place(temporary: Path, path: Path) -> None:
    """Rename; a folder that is already there steps aside first and goes only once the new one stands."""
    aside = path.parent / f".{path.name}.old-{os.getpid()}"
    shutil.rmtree(aside, ignore_errors=True)
    if path.exists():
        path.rename(aside)
    temporary.rename(path)
    _sync(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is whole or the old one, never half."""
    with writing(path.parent):
        temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
        try:
            temporary.write_text(text, encoding="utf-8")
            _sync(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
