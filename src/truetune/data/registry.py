"""``data.yaml``: data sets by name, each with its files, its format, and what its content must hash to.

support:
  files: [tickets/*.jsonl]     # relative to this file; also hub:ORG/NAME
  format: alpaca               # optional, as are all that follow
  columns: {instruction: question, output: answer}
  weight: 0.5                  # of its rows, see ``sources``
  sha256: 9f86d0…              # of one file; of several: of their hashes, one a line
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from truetune.errors import DataError, nearest

DEFAULT = "data.yaml"
_KEYS = ("files", "format", "columns", "weight", "sha256", "split", "about")


@dataclass(frozen=True)
class Entry:
    """One data set of a registry; ``files`` are paths, globs, folders or Hub names, no longer relative to it."""

    name: str
    files: tuple[str, ...]
    form: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)
    weight: float = 1.0
    sha256: str = ""


def names_in(registry: str) -> list[str]:
    """The data sets that ``registry`` has; none where it can't be read, which matters to whoever asks for one."""
    try:
        return [str(name) for name in _read(registry)]
    except DataError:
        return []


def entry_of(registry: str, name: str) -> Entry:
    """The data set that ``registry`` calls ``name``.

    Raises:
        DataError: the file can't be read, has no such name, or says something that is not understood.
    """
    entries = _read(registry)
    if name not in entries:
        raise DataError(
            f"{registry}: no data set is called '{name}'",
            ("did you mean", nearest(name, entries)),
            ("it has", ", ".join(entries) or "none at all"),
        )
    found = entries[name]
    values: Mapping[str, Any] = found if isinstance(found, dict) else {"files": found}
    where = f"{registry}: '{name}'"
    if unknown := [str(key) for key in values if key not in _KEYS]:
        close = nearest(unknown[0], _KEYS)
        raise DataError(f"{where}: unknown key '{unknown[0]}'", ("did you mean", close), ("known", ", ".join(_KEYS)))
    files, columns = values.get("files"), values.get("columns") or {}
    files = [files] if isinstance(files, str) else files
    if not isinstance(files, list) or not files or not all(isinstance(file, str) for file in files):
        raise DataError(f"{where}: `files` is missing, or no path or list of paths")
    if not isinstance(columns, dict) or not all(isinstance(v, str) for pair in columns.items() for v in pair):
        raise DataError(f"{where}: `columns` is no mapping", ("expected", "columns: {instruction: question}"))
    weight = values.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise DataError(f"{where}: `weight` is {weight!r}", ("expected", "a number such as 0.5"))
    split = f":{values['split']}" if values.get("split") else ""
    base = os.path.dirname(registry)
    paths = tuple(f"{f}{split}" if f.startswith("hub:") else os.path.join(base, os.path.expanduser(f)) for f in files)
    return Entry(name, paths, str(values.get("format") or ""), columns, float(weight), _sha256_of(values, where))


def _sha256_of(values: Mapping[str, Any], where: str) -> str:
    """A hash that is there but can't be compared is refused: it would look as if the files had been checked."""
    if "sha256" not in values:
        return ""
    found = values["sha256"]
    if not isinstance(found, str) or not found.strip():
        figures = "YAML takes figures alone for a number" if isinstance(found, int | float) else ""
        raise DataError(
            f"{where}: `sha256` is {'empty' if found in (None, '') else repr(found)}",
            ("expected", "64 hexadecimal digits, in quotes; or no such key"),
            ("likely", figures),
        )
    return found.strip()


def check_hash(entry: Entry, files: Sequence[str]) -> None:
    """Compare what the files hold with what the registry says, where it says something.

    Raises:
        DataError: names both hashes.
    """
    if not entry.sha256:
        return
    stats = [os.stat(file) for file in files]
    found = _hash_of(tuple((file, s.st_size, s.st_mtime_ns) for file, s in zip(files, stats, strict=True)))
    if found != entry.sha256.lower():
        raise DataError(
            f"'{entry.name}': the files are not those that the registry describes",
            ("sha256", found),
            ("expected", entry.sha256),
            ("way out", "fetch them again, or write the new hash into the registry"),
        )


@functools.lru_cache(maxsize=64)
def _hash_of(files: tuple[tuple[str, int, int], ...]) -> str:
    """By size and time too, so that a file which changes meanwhile is read again."""
    hashes = []
    for name, _, _ in files:
        with open(name, "rb") as stream:
            hashes.append(_sha256(stream))
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(f"{h}\n" for h in hashes).encode()).hexdigest()


def _sha256(stream: Any) -> str:
    digest = hashlib.sha256()
    while chunk := stream.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


class _Loader(yaml.SafeLoader):
    """YAML, but a key that is there twice is a fault: of two data sets with one name, one would never be read."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := next((key for key in keys if keys.count(key) > 1), ""):
            raise yaml.constructor.ConstructorError(None, None, f"the key '{twice}' is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _read(registry: str) -> Mapping[str, Any]:
    try:
        entries = yaml.load(Path(registry).read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise DataError(f"{registry}: the registry can't be read: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{registry}: not a readable YAML file: {' '.join(str(error).split())}") from error
    if entries is None:
        return {}
    if not isinstance(entries, dict) or not all(isinstance(name, str) for name in entries):
        raise DataError(f"{registry}: no mapping from names to data sets", ("expected", "NAME: {files: FILE}"))
    return entries
