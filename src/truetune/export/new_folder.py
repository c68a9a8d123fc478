"""A new folder for a model: checked first, filled under another name, and there only when it is complete."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from truetune.checkpoint.atomic import sha256, write_manifest
from truetune.checkpoint.disk import LOCK, alone, require_space, sync, writing
from truetune.checkpoint.side_files import side_files
from truetune.errors import ModelError, OutputError


def check_out(base: Path, out: Path) -> None:
    """That ``out`` can be written.

    Raises:
        OutputError: it is the base, a file, or not empty.
    """
    if out.resolve() == base.resolve():
        raise OutputError(f"{out}: is the base itself", ("way out", "write to a new folder"))
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out}: is a file", ("way out", "write to a new folder"))
    if out.is_dir() and (there := sorted(path.name for path in out.iterdir())):
        holds = "already holds a model" if "config.json" in there else "is not empty"
        found = ", ".join(there[:5]) + (" …" if len(there) > 5 else "")
        raise OutputError(f"{out}: {holds}", ("found", found), ("way out", "write to a new folder, or remove this one"))


def side_contents(
    base: Path, config_updates: Mapping[str, object], extra_files: Mapping[str, bytes | Path]
) -> dict[str, bytes | Path]:
    """What goes beside the weights, by its name in the folder: new contents, or the file to copy."""
    files: dict[str, bytes | Path] = {path.relative_to(base).as_posix(): path for path in side_files(base)}
    try:
        config = json.loads((base / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"{base / 'config.json'}: no readable config: {error}") from error
    if config_updates:
        # A null of the base's own is a setting: what its class takes where there is none may be something else.
        gone = {key for key, value in config_updates.items() if value is None}
        updated = {key: value for key, value in {**config, **config_updates}.items() if key not in gone}
        files["config.json"] = (json.dumps(updated, indent=2, ensure_ascii=False) + "\n").encode()
    for name in extra_files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or name.startswith("model"):
            raise ValueError(f"{name!r} is no name for a file beside the weights")
        if name == "config.json" and config_updates:
            raise ValueError("config.json is given as a file and updated at once")
    return files | dict(extra_files)


def _write_files(folder: Path, files: Mapping[str, bytes | Path]) -> None:
    for name, content in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        # Contents only: links and modes of a download cache stay behind.
        source = io.BytesIO(content) if isinstance(content, bytes) else content.open("rb")
        with source, target.open("xb") as file:
            shutil.copyfileobj(source, file)
            file.flush()
            os.fsync(file.fileno())


@dataclass(frozen=True)
class Partial:
    """A folder that is being filled, and what an earlier attempt at the very same had finished in it.

    Attributes:
        path: the folder, under its other name.
        kept: weight files that are whole, each with its SHA-256.
    """

    path: Path
    kept: Mapping[str, str] = field(default_factory=dict)

    def finished(self, name: str, digest: str) -> None:
        """Note a weight file that is whole, for a later attempt and for the list of all files."""
        with (self.path / _DONE).open("a", encoding="utf-8") as file:
            file.write(json.dumps([name, digest]) + "\n")
            file.flush()
            os.fsync(file.fileno())


_DONE = ".done.jsonl"


@contextlib.contextmanager
def continued(out: Path, files: Mapping[str, bytes | Path], needed: int, *, identity: str) -> Iterator[Partial]:
    """As ``appearing``, for work that neither a kill nor Ctrl-C should lose: finished weight files are found again.

    The folder gets a ``MANIFEST.json`` with size and SHA-256 of each file.

    Args:
        identity: of all that decides the content, files and all; another one starts anew.
    Raises:
        OutputError: another process is writing the same.
    """
    partial = out.with_name(f".{out.name}.{identity[:16]}.partial")
    with writing(out.parent, needed=needed):
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir(exist_ok=True)
    with alone(partial):
        try:
            kept = _whole(partial)
            with writing(out.parent, needed=needed):
                _clear(partial, but=kept)
                if kept:  # anew: a power cut may have left half a line, which the next one would be added to
                    lines = "".join(json.dumps(pair) + "\n" for pair in kept.items())
                    (partial / _DONE).write_text(lines, encoding="utf-8")
                else:
                    (partial / _DONE).unlink(missing_ok=True)
                require_space(out.parent, needed - sum((partial / name).stat().st_size for name in kept))
                _write_files(partial, files)
            folder = Partial(partial, kept)
            yield folder
            with writing(out.parent, needed=needed):
                _list_files(partial, files)
                _take_name(partial, out)
        except BaseException as error:
            if not (isinstance(error, KeyboardInterrupt) and (partial / _DONE).is_file()):
                shutil.rmtree(partial, ignore_errors=True)
            raise


def _whole(partial: Path) -> dict[str, str]:
    """The weight files that an earlier attempt finished and that still are what they were."""
    try:
        lines = (partial / _DONE).read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    found = {}
    for line in lines:
        with contextlib.suppress(ValueError, OSError):  # a line that the kill cut short
            name, digest = json.loads(line)
            if sha256(partial / name) == digest:
                found[str(name)] = str(digest)
    return found


def _clear(partial: Path, *, but: Collection[str]) -> None:
    for path in partial.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in (*but, _DONE, LOCK):
            path.unlink()


def _list_files(partial: Path, files: Mapping[str, bytes | Path]) -> None:
    """Write the manifest; the weights' digests were taken while they were written."""
    digests = dict(map(json.loads, (partial / _DONE).read_text(encoding="utf-8").splitlines()))
    (partial / _DONE).unlink()
    (partial / LOCK).unlink(missing_ok=True)
    for path in partial.rglob("*"):
        if path.is_file() and (name := path.relative_to(partial).as_posix()) not in digests:
            digests[name] = sha256(path)
    write_manifest(partial, digests)


@contextlib.contextmanager
def appearing(out: Path, files: Mapping[str, bytes | Path], needed: int) -> Iterator[Path]:
    """A folder beside ``out`` with ``files`` in it; takes the name of ``out`` at the end, is removed on any failure."""
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        with writing(out.parent, needed=needed):
            out.parent.mkdir(parents=True, exist_ok=True)
            require_space(out.parent, needed)
            partial.mkdir()
            _write_files(partial, files)
        yield partial
        with writing(out.parent, needed=needed):
            _take_name(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _take_name(partial: Path, out: Path) -> None:
    if out.is_dir():
        out.rmdir()  # empty, as checked; a rename onto a folder is not allowed everywhere
    partial.rename(out)
    sync(out.parent)
