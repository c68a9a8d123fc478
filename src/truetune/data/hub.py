"""``hub:ORG/NAME[/FOLDER][:SPLIT]``: the data files of a data set on the Hub, fetched once and then found offline."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Sequence
from pathlib import Path

from truetune.errors import DataError, nearest

PREFIX = "hub:"
_SPLITS = ("train", "validation", "valid", "val", "dev", "test")


@functools.cache
def fetch(name: str, suffixes: tuple[str, ...]) -> tuple[str, ...]:
    """Paths on this machine of the data files behind a name that begins with ``hub:``.

    Args:
        name: as the user gave it.
        suffixes: of files that are data.

    Raises:
        DataError: no such data set, no way to reach it, several splits and none named, or no file that is data.
    """
    repo, folder, split = _parts(name)
    folders = [_snapshot(name, repo, patterns=[f"{folder}*{suffix}" for suffix in suffixes])]
    root = folders[0] / folder if folder else folders[0]
    found = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
    data = [path for path in found if path.lower().endswith(suffixes) and not Path(path).name.startswith(".")]
    if not data:
        raise DataError(f"{name}: this data set has no data files", ("known kinds", " ".join(suffixes)))
    return tuple(str(root / path) for path in _of_split(name, data, split))


def _parts(name: str) -> tuple[str, str, str]:
    found = re.fullmatch(r"hub:([\w.-]+/[\w.-]+)((?:/[\w.-]+)*)/?(?::([\w.-]+))?", name)
    if not found:
        raise DataError(f"{name}: no name of a data set", ("expected", "hub:ORG/NAME, hub:ORG/NAME:SPLIT"))
    return found[1], found[2].lstrip("/") + ("/" if found[2] else ""), found[3] or ""


def _snapshot(name: str, repo: str, *, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download  # slow to load, and never needed for local files

    wanted = list(patterns)
    try:
        return Path(snapshot_download(repo, repo_type="dataset", allow_patterns=wanted))
    except Exception as error:  # the client raises its own, the network's and the platform's
        try:
            return Path(snapshot_download(repo, repo_type="dataset", allow_patterns=wanted, local_files_only=True))
        except Exception:  # nor is it in the cache: the first error is the one to tell
            raise _unreachable(name, error) from None


def _unreachable(name: str, error: Exception) -> DataError:
    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    said = (
        "HF_HUB_OFFLINE is set, and it was never fetched to this machine" if offline else " ".join(str(error).split())
    )
    return DataError(
        f"{name}: the data set can't be fetched",
        ("because", said[:300] or type(error).__name__),
        ("way out", "check the name and the network, log in where it is not public, or name files on this machine"),
    )


def _of_split(name: str, files: Sequence[str], wanted: str) -> list[str]:
    """The files of a split, by a word in their path; all of them where none of them names one."""
    by_split: dict[str, list[str]] = {}
    for file in files:
        by_split.setdefault(_split_of(file), []).append(file)
    if wanted:
        matching = [f for f in files if wanted in re.split(r"[^A-Za-z0-9]+", f)] or by_split.get(wanted, [])
        if not matching:
            named = sorted(filter(None, by_split))
            raise DataError(
                f"{name}: no split '{wanted}'",
                ("did you mean", nearest(wanted, named)),
                ("it has", ", ".join(named) or "no splits that its file names tell"),
            )
        return matching
    if len(by_split) > 1:
        names = [f"{name}:{split}" for split in sorted(filter(None, by_split))]
        raise DataError(f"{name}: several splits, and to train on all is not guessed", ("way out", " or ".join(names)))
    return list(files)


def _split_of(file: str) -> str:
    words = re.split(r"[^A-Za-z0-9]+", file.lower())
    return next((split for split in _SPLITS if split in words), "")
