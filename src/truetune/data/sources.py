"""From what the user names (files, folders, globs) to the list of data files, or an error that names the way out."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from truetune.errors import DataError, nearest

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".parquet", ".txt", ".json.gz", ".jsonl.gz", ".ndjson.gz")


def find_files(paths: Sequence[str]) -> list[str]:
    """The data files behind ``paths``, in the order given; a folder or glob gives its files sorted by name.

    A folder stands for the data files directly inside it (not for those in its sub-folders, nor for hidden ones);
    ``folder/**/*.jsonl`` reaches deeper. Files of other kinds are passed over in a folder or glob, and refused when
    named one by one.

    Raises:
        DataError: a path that does not exist or can't be listed, a file of unknown kind, a folder or glob without
            any data file.
    """
    if not paths:
        raise DataError("no data: no file was named", ("or", "--data FILE, --data FOLDER, --data 'FOLDER/*.jsonl'"))
    return [file for path in paths for file in _expand(os.path.expanduser(path))]


def passed_over(paths: Sequence[str]) -> list[str]:
    """The files of other kinds that lie directly in the folders among ``paths``, and are not read."""
    folders = [Path(os.path.expanduser(path)) for path in paths if os.path.isdir(os.path.expanduser(path))]
    return [
        str(file)
        for folder in folders
        for file in sorted(folder.iterdir())
        if file.is_file() and not file.name.startswith(".") and not suffix_of(file.name)
    ]


def suffix_of(path: str) -> str:
    """The entry of ``SUFFIXES`` that ``path`` ends in (case aside), or ``""``."""
    lower = path.lower()
    return next((s for s in sorted(SUFFIXES, key=len, reverse=True) if lower.endswith(s)), "")


def _expand(path: str) -> list[str]:
    if os.path.isdir(path):
        return _in_folder(path)
    if os.path.lexists(path):
        if not suffix_of(path):
            raise _unknown_kind(path)
        return [path]
    if glob.has_magic(path):
        matches = sorted(file for file in glob.glob(path, recursive=True) if os.path.isfile(file))
        return _data_files(matches, f"{path}: no data file matches")
    raise _missing(path)


def _in_folder(folder: str) -> list[str]:
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder}: the folder can't be listed: {error.strerror}") from error
    entries = [os.path.join(folder, name) for name in names]
    below = [name for name, entry in zip(names, entries, strict=True) if os.path.isdir(entry)]
    deeper = f"'{os.path.join(folder, '**', '*.jsonl')}', for the sub-folders {', '.join(below[:5])}" if below else ""
    return _data_files([e for e in entries if os.path.isfile(e)], f"{folder}: no data file in this folder", deeper)


def _data_files(candidates: list[str], complaint: str, way_out: str = "") -> list[str]:
    files = [file for file in candidates if suffix_of(file)]
    if not files:
        others = ", ".join(os.path.basename(file) for file in candidates[:5])
        raise DataError(complaint, ("it has", others), ("known kinds", " ".join(SUFFIXES)), ("or", way_out))
    return files


def _unknown_kind(path: str) -> DataError:
    suffix = os.path.splitext(path)[1]
    found = f"a '{suffix}' file" if suffix else "a file name without a suffix"
    return DataError(
        f"{path}: {found}, and its suffix says how a file is read",
        ("did you mean", nearest(suffix, SUFFIXES) if suffix else ""),
        ("known kinds", " ".join(SUFFIXES)),
        ("or", "convert or rename it; JSON lines (.jsonl) suits every format"),
    )


def _missing(path: str) -> DataError:
    """Names the first part of the path that is missing, and what there is instead of it."""
    parent, name = os.path.split(path.rstrip(os.sep))
    while parent and not os.path.isdir(parent):
        parent, name = os.path.split(parent)
    try:
        entries = os.listdir(parent or ".")
    except OSError as error:
        return DataError(f"{path}: no such file: the folder {parent} can't be listed: {error.strerror}")
    close = nearest(name, entries)
    data = sorted(entry for entry in entries if suffix_of(entry))
    more = f" and {len(data) - 8} more" if len(data) > 8 else ""
    return DataError(
        f"{path}: no such file or folder",
        ("did you mean", os.path.join(parent, close) if close else ""),
        (f"{parent or 'this folder'} has", ", ".join(data[:8]) + more),
        ("expected", "a file, folder or glob on this machine; a data set of the Hub has to be downloaded first"),
    )
