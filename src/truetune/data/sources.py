"""From what the user names to the list of data files, or an error that names the way out.

A source is a file, a folder, a glob, ``-`` (standard input), ``hub:ORG/NAME`` or the name of a data set in a registry,
``REGISTRY.yaml:NAME``. Behind ``=`` it may say how often its rows are seen in one pass: ``rows.jsonl=0.3`` takes three
rows in ten, ``rows.jsonl=2`` takes each of them twice.
"""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from truetune.data import hub, standard_input
from truetune.data.compressed import PACKINGS, unpacker_of
from truetune.data.registry import DEFAULT, Entry, check_hash, entry_of, names_in
from truetune.errors import DataError, nearest

_TEXTS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt")
# Words in the names of files by which data sets tell their parts.
_PARTS = {
    "training": ("train", "training"),
    "evaluation": ("test", "testing", "val", "valid", "validation", "dev", "eval"),
}
SUFFIXES = (*_TEXTS, ".parquet", ".arrow", ".feather", *(text + packing for text in _TEXTS for packing in PACKINGS))
_KINDS = f"{' '.join(_TEXTS)} (also packed: {' '.join(PACKINGS)}) .parquet .arrow .feather"


@dataclass(frozen=True)
class Source:
    """The files behind one name, and how they are to be read.

    Attributes:
        name: as the user gave it.
        files: on this machine, in order; where they can be read tells ``standard_input.path_of``.
        form: their format, or ``""`` for what holds for all.
        columns: which of their columns holds which field, beside what holds for all.
        weight: how often each row is seen in one pass.
    """

    name: str
    files: tuple[str, ...]
    form: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)
    weight: float = 1.0

    @property
    def times(self) -> int:
        """How often its files are read: once for a share of their rows."""
        return max(1, int(self.weight))


def find_sources(paths: Sequence[str]) -> list[Source]:
    """What is behind each of ``paths``, in the order given; a folder or glob gives its files sorted by name.

    A folder stands for the data files directly inside it (not for those in its sub-folders, nor for hidden ones);
    ``folder/**/*.jsonl`` reaches deeper. Files of other kinds are passed over in a folder or glob, and refused when
    named one by one.

    Raises:
        DataError: a path that does not exist or can't be listed, a file of unknown kind, a folder or glob without
            any data file, a data set that can't be fetched or has changed, a weight that can't be.
    """
    if not paths:
        raise DataError("no data: no file was named", ("or", "--data FILE, --data FOLDER, --data 'FOLDER/*.jsonl'"))
    return [_source(path) for path in paths]


def find_files(paths: Sequence[str]) -> list[str]:
    """The files of ``find_sources``, each as often as it is read.

    Raises:
        DataError: as ``find_sources``.
    """
    return [file for source in find_sources(paths) for _ in range(source.times) for file in source.files]


def passed_over(paths: Sequence[str]) -> list[str]:
    """The files of other kinds that lie directly in the folders among ``paths``, and are not read."""
    plain = [os.path.expanduser(_weighed(path)[0]) for path in paths]
    return [
        str(file)
        for folder in map(Path, filter(os.path.isdir, plain))
        for file in sorted(folder.iterdir())
        if file.is_file() and not file.name.startswith(".") and not suffix_of(file.name)
    ]


def mixed_parts(paths: Sequence[str]) -> list[str]:
    """What to warn of: folders and globs among ``paths`` whose files are, by their names, to train on and to test on.

    Raises:
        DataError: as ``find_sources``.
    """
    found = []
    for source in find_sources(paths):
        by_part = {part: [file for file in source.files if _is_of(file, words)] for part, words in _PARTS.items()}
        if len(source.files) > 1 and all(by_part.values()):
            held = ", ".join(os.path.basename(file) for file in by_part["evaluation"][:5])
            found.append(f"{source.name}: all of its files are read, {held} too, which by its name is no training data")
    return found


def named_twice(paths: Sequence[str]) -> list[str]:
    """Files that several of ``paths`` lead to: their rows are read once for each.

    Raises:
        DataError: as ``find_sources``.
    """
    files = [{os.path.realpath(file): file for file in source.files} for source in find_sources(paths)]
    times = Counter(real for of_source in files for real in of_source)
    shown = {real: file for of_source in reversed(files) for real, file in of_source.items()}
    return [shown[real] for real, count in times.items() if count > 1]


def _is_of(file: str, words: Sequence[str]) -> bool:
    return not set(words).isdisjoint(re.split(r"[^a-z]+", os.path.basename(file).lower()))


def suffix_of(path: str) -> str:
    """The entry of ``SUFFIXES`` that ``path`` ends in (case aside), or ``""``."""
    lower = path.lower()
    return next((s for s in sorted(SUFFIXES, key=len, reverse=True) if lower.endswith(s)), "")


def _source(path: str) -> Source:
    name, weight = _weighed(path)
    entry = _entry(name)
    if entry is None:
        return Source(path, tuple(_expand(os.path.expanduser(name))), weight=_checked(path, weight))
    files = tuple(file for inner in entry.files for file in _expand(inner))
    check_hash(entry, files)
    return Source(path, files, entry.form, entry.columns, _checked(path, weight * entry.weight))


def _weighed(path: str) -> tuple[str, float]:
    """``("rows.jsonl", 0.3)`` of ``rows.jsonl=0.3``; a file may have such a name itself."""
    found = re.fullmatch(r"(.+)=(\d*\.?\d+)", path)
    return (found[1], float(found[2])) if found and not os.path.lexists(path) else (path, 1.0)


def _checked(path: str, weight: float) -> float:
    if weight <= 0 or (weight > 1 and weight != int(weight)):
        raise DataError(
            f"{path}: the rows can't be seen {weight:g} times",
            ("expected", "a share of them above 0 and up to 1, or a whole number of times"),
        )
    return weight


def _entry(name: str) -> Entry | None:
    """The data set of a registry that is meant, by ``REGISTRY.yaml:NAME`` or by a name in this folder's own."""
    found = re.fullmatch(r"(.+\.ya?ml):([^/:]+)", name)
    if found:
        return entry_of(os.path.expanduser(found[1]), found[2])
    if not re.fullmatch(r"[\w-]+", name) or name == standard_input.NAME or not os.path.isfile(DEFAULT):
        return None
    if not os.path.lexists(name):
        return entry_of(DEFAULT, name)
    if name in names_in(DEFAULT):
        raise DataError(
            f"--data {name}: {DEFAULT} has a data set of this name, and there is a file or folder of it as well",
            ("way out", f"--data {DEFAULT}:{name} for the data set, --data .{os.sep}{name} for the other"),
        )
    return None


def _expand(path: str) -> list[str]:
    if standard_input.is_meant(path):
        standard_input.spooled()
        return [standard_input.SHOWN]
    if path.startswith(hub.PREFIX):
        return list(hub.fetch(path, SUFFIXES))
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
        raise DataError(complaint, ("it has", others), ("known kinds", _KINDS), ("or", way_out))
    return files


def _unknown_kind(path: str) -> DataError:
    if command := unpacker_of(path):
        return DataError(f"{path}: an archive, which is not unpacked here", ("way out", f"{command} {path}"))
    suffix = os.path.splitext(path)[1]
    found = f"a '{suffix}' file" if suffix else "a file name without a suffix"
    return DataError(
        f"{path}: {found}, and its suffix says how a file is read",
        ("did you mean", nearest(suffix, SUFFIXES) if suffix else ""),
        ("known kinds", _KINDS),
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
        ("expected", f"a file, folder or glob on this machine{_or_hub(path)}"),
    )


def _or_hub(path: str) -> str:
    is_name = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path)
    return f", or --data hub:{path} for a data set of the Hub" if is_name else ", or hub:ORG/NAME"
