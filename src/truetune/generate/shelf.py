"""The adapters an engine can serve: registered by name, loaded when asked for, put away when memory is short."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from truetune.adapters.files import CARD, CONFIG, WEIGHTS
from truetune.errors import AdapterError, nearest
from truetune.generate.loaded import LoadedAdapter, load

Stamp = tuple[tuple[str, int, int], ...]


@dataclass
class _Entry:
    folder: Path
    stamp: Stamp
    version: int


class AdapterShelf:
    """Adapters of one model.

    Args:
        model: is attached to for a moment while an adapter is loaded.
        lock: held while the model computes.
        budget: bytes that loaded adapters may take; one alone may take more. None for no limit.
    """

    def __init__(self, model: nn.Module, lock: threading.RLock, budget: int | None) -> None:
        self._model, self._lock, self.budget = model, lock, budget
        self._entries: dict[str, _Entry] = {}
        self._loaded: OrderedDict[str, LoadedAdapter] = OrderedDict()  # the one used longest ago first
        self._versions = 0

    def register(self, name: str, folder: str | Path) -> LoadedAdapter:
        """Make an adapter known, and load it; a name that is known gets another adapter.

        Running answers keep the one they began with.

        Raises:
            AdapterError: the folder holds none, it is broken, or it does not fit the model; nothing has changed then.
        """
        path = Path(folder).expanduser()
        if not name:
            raise AdapterError(f"the adapter in {path} needs a name")
        with self._lock:
            entry = _Entry(path, stamp_of(path), self._versions)
            loaded = self._load(name, entry)
            self._entries[name] = entry
            return loaded

    def unregister(self, name: str) -> None:
        """Forget an adapter; running answers keep it. Raises AdapterError for an unknown name."""
        with self._lock:
            self._entry(name)
            del self._entries[name]
            self._loaded.pop(name, None)

    def names(self) -> list[str]:
        """Those that are registered, in that order."""
        with self._lock:
            return list(self._entries)

    def loaded(self) -> list[str]:
        """Those in memory, the one used longest ago first."""
        with self._lock:
            return list(self._loaded)

    @property
    def nbytes(self) -> int:
        """The memory of those that are loaded."""
        return sum(adapter.nbytes for adapter in list(self._loaded.values()))

    def check(self, name: str) -> None:
        """Raises AdapterError for a name that is not registered."""
        with self._lock:
            self._entry(name)

    def get(self, name: str) -> LoadedAdapter:
        """An adapter as its folder has it now: loaded if it is not, and again if its files have changed.

        Raises:
            AdapterError: it is not registered any more, or its folder no longer holds one that fits.
        """
        with self._lock:
            entry = self._entry(name)
            stamp = stamp_of(entry.folder)
            found = self._loaded.get(name)
            if found is not None and stamp == entry.stamp:
                self._loaded.move_to_end(name)
                return found
            fresh = _Entry(entry.folder, stamp, self._versions)
            loaded = self._load(name, fresh)
            self._entries[name] = fresh
            return loaded

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise AdapterError(
                f"there is no adapter {name!r}",
                ("did you mean", nearest(name, self._entries)),
                ("registered", _few(self._entries) or "none"),
            )
        return self._entries[name]

    def _load(self, name: str, entry: _Entry) -> LoadedAdapter:
        self._versions += 1
        loaded = load(self._model, name, f"{name}/{entry.version}", entry.folder)
        self._loaded.pop(name, None)
        self._loaded[name] = loaded
        while self.budget is not None and self.nbytes > self.budget and len(self._loaded) > 1:
            self._loaded.popitem(last=False)
        return loaded


def stamp_of(folder: Path) -> Stamp:
    """What tells that an adapter's files were written anew: their names, sizes and times."""
    found = []
    for file in (CONFIG, WEIGHTS, "adapter_model.bin", CARD):
        try:
            stat = (folder / file).stat()
        except OSError:
            continue
        found.append((file, stat.st_size, stat.st_mtime_ns))
    return tuple(found)


def _few(names: Iterable[str]) -> str:
    every = list(names)
    return ", ".join(every[:8]) + (f" and {len(every) - 8} more" if len(every) > 8 else "")
