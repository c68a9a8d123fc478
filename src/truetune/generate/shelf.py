"""The adapters an engine can serve: registered by name, loaded when asked for, put away when memory is short."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

from torch import nn

from truetune.adapters import files
from truetune.adapters.names import CARD, CONFIG, PICKLED, WEIGHTS
from truetune.errors import AdapterError, nearest
from truetune.generate.loaded import LoadedAdapter, Stamp, fit

_TRIES = 3


class AdapterChangedError(AdapterError):
    """The adapter is not the one any more that a prompt was worded for."""


class AdapterShelf:
    """Adapters of one model.

    Args:
        model: is attached to for a moment while an adapter is loaded.
        lock: held while the model computes.
        budget: bytes that loaded adapters may take; one alone may take more. None for no limit.
    """

    def __init__(self, model: nn.Module, lock: threading.RLock, budget: int | None) -> None:
        self._model, self._lock, self.budget = model, lock, budget
        self._folders: dict[str, Path] = {}
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
        loaded = self._read(name, path)
        with self._lock:
            self._folders[name] = path
            self._put(loaded)
        return loaded

    def unregister(self, name: str) -> None:
        """Forget an adapter; running answers keep it. Raises AdapterError for an unknown name."""
        with self._lock:
            self._folder(name)
            del self._folders[name]
            self._loaded.pop(name, None)

    def names(self) -> list[str]:
        """Those that are registered, in that order."""
        with self._lock:
            return list(self._folders)

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
            self._folder(name)

    def get(self, name: str, *, stamp: Stamp | None = None) -> LoadedAdapter:
        """An adapter as its folder has it now: loaded if it is not, and again if its files have changed.

        Args:
            stamp: of the one that is wanted; None for whichever is there.
        Raises:
            AdapterError: it is not registered any more, or its folder no longer holds one that fits.
            AdapterChangedError: it is not the one that is wanted.
        """
        with self._lock:
            folder = self._folder(name)
            found = self._loaded.get(name)
            if found is not None and stamp_of(folder) == found.stamp:
                self._loaded.move_to_end(name)
            else:
                found = None
        if found is None:
            found = self._read(name, folder)
            with self._lock:
                self._folder(name)  # it may be gone by now
                self._put(found)
        if stamp is not None and found.stamp != stamp:
            raise AdapterChangedError(f"the adapter {name!r} has just been replaced", ("way out", "ask again"))
        return found

    def _folder(self, name: str) -> Path:
        if name not in self._folders:
            raise AdapterError(
                f"there is no adapter {name!r}",
                ("did you mean", nearest(name, self._folders)),
                ("registered", _few(self._folders) or "none"),
            )
        return self._folders[name]

    def _put(self, loaded: LoadedAdapter) -> None:
        self._loaded.pop(loaded.name, None)
        self._loaded[loaded.name] = loaded
        while self.budget is not None and self.nbytes > self.budget and len(self._loaded) > 1:
            self._loaded.popitem(last=False)

    def _read(self, name: str, folder: Path) -> LoadedAdapter:
        """All of it from one state of the files: half of an old adapter and half of a new one is neither."""
        for _ in range(_TRIES):
            real = folder.resolve()  # where a link leads now: it may be turned to and fro while we read
            stamp = stamp_of(real)
            try:
                file = files.read(real, mapped=False)
                with self._lock:  # the disk is done with: those who answer wait for the fitting alone
                    self._versions += 1
                    owner = f"{name}/{self._versions}"
                    loaded = fit(self._model, file, name=name, owner=owner, stamp=stamp)
            except AdapterError:
                if stamp_of(folder) == stamp:
                    raise
                continue
            if stamp_of(folder) == stamp:
                return loaded
        raise AdapterError(f"{folder} is written to while it is read", ("way out", "ask again once it is whole"))


def stamp_of(folder: Path) -> Stamp:
    """What tells that an adapter's files were written anew: their names, sizes and times."""
    found = []
    for file in (CONFIG, WEIGHTS, PICKLED, CARD):
        try:
            stat = (folder / file).stat()
        except OSError:
            continue
        found.append((file, stat.st_size, stat.st_mtime_ns))
    return tuple(found)


def _few(names: Iterable[str]) -> str:
    every = list(names)
    return ", ".join(every[:8]) + (f" and {len(every) - 8} more" if len(every) > 8 else "")
