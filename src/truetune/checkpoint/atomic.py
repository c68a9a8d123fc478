"""Folders that exist whole or not at all.

Everything is written into a temporary sibling, synced, listed with sizes and SHA-256 in ``MANIFEST.json``, and renamed.
A folder without a valid manifest is not a checkpoint, whatever it is called.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from truetune.checkpoint import disk

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
                files = [path for path in temporary.rglob("*") if path.is_file()]
                write_manifest(temporary, {p.relative_to(temporary).as_posix(): sha256(p) for p in files})
            _open_to_readers(temporary)
            _sync_tree(temporary)
            _put_in_place(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def writing(folder: Path) -> contextlib.AbstractContextManager[None]:
    """``disk.writing`` with the way out of a run that has checkpoints."""
    return disk.writing(
        folder,
        ("kept", "every checkpoint that was complete before is still there"),
        ("way out", "free some space, or lower --keep, then run again with --resume auto"),
    )


def is_valid(folder: Path) -> bool:
    """Whether a folder's manifest is there and every file in it has its size and hash."""
    return not faults(folder)


def faults(folder: Path) -> list[str]:
    """What is wrong with a folder, by its manifest: one line per fault."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        listed = {folder / name: (int(entry["size"]), str(entry["sha256"])) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [f"no readable {MANIFEST}"]
    found = []
    for file, (size, digest) in listed.items():
        name = file.relative_to(folder)
        if not file.is_file():
            found.append(f"{name} is missing")
        elif file.stat().st_size != size:
            found.append(f"{name} has {file.stat().st_size:,} bytes, expected {size:,}")
        elif sha256(file) != digest:
            found.append(f"{name} has another content than when it was saved")
    return found


def sha256(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def write_manifest(folder: Path, digests: Mapping[str, str]) -> None:
    """Write ``MANIFEST.json``: size and SHA-256 by name, of files whose digests are known."""
    listed = {n: {"size": (folder / n).stat().st_size, "sha256": digest} for n, digest in sorted(digests.items())}
    (folder / MANIFEST).write_text(json.dumps({"files": listed}, indent=1), encoding="utf-8")


def _open_to_readers(folder: Path) -> None:
    """Give every file the rights that its folder was made with: safetensors keeps what it writes to the owner alone."""
    rights = stat.S_IMODE(folder.stat().st_mode) & 0o666
    for path in folder.rglob("*"):
        if path.is_file() and stat.S_IMODE(path.stat().st_mode) != rights:
            with contextlib.suppress(OSError):  # disks of other systems know no rights, and lose nothing by it
                path.chmod(rights)


def _sync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        disk.sync(path)


def _put_in_place(temporary: Path, path: Path) -> None:
    """Rename; a folder that is already there steps aside first and goes only once the new one stands."""
    aside = path.parent / f".{path.name}.old-{os.getpid()}"
    shutil.rmtree(aside, ignore_errors=True)
    if path.exists():
        path.rename(aside)
    temporary.rename(path)
    disk.sync(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is whole or the old one, never half."""
    with writing(path.parent):
        temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
        try:
            temporary.write_text(text, encoding="utf-8")
            disk.sync(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
