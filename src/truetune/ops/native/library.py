"""The compiled library in this process: loaded once per instruction set, on the threads that torch already has.

It serves a process without torch too, on the thread that calls it.
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache
from pathlib import Path

from truetune.ops.native.build import INSTRUCTION_SETS, BuildError, InstructionSet, built


class Library:
    """A loaded library.

    Attributes:
        isa: the instruction set it was compiled for, such as ``avx512``.
        functions: its C functions by name; ``declare`` gives them their argument types.
    """

    def __init__(self, isa: str, functions: ctypes.CDLL) -> None:
        self.isa = isa
        self.functions = functions
        self._threads = 1
        functions.tt_set_threads.argtypes = (ctypes.c_void_p, ctypes.c_int32)
        functions.tt_set_threads.restype = None
        if torch := sys.modules.get("torch"):
            self.use_threads(torch.get_num_threads())

    def use_threads(self, threads: int) -> None:
        """Split work over as many threads as torch uses; costs nothing while the number stays the same."""
        if threads != self._threads:
            self.functions.tt_set_threads(_gomp_parallel(), threads)
            self._threads = threads

    def __repr__(self) -> str:
        return f"Library({self.isa!r})"


def load(isa: str | None = None) -> Library | None:
    """The library for one instruction set, or the best that this CPU has and that can be built.

    Compiles on the first call on a machine (seconds). Never raises: ``reason`` tells why there is none.
    """
    names = [entry.name for entry in INSTRUCTION_SETS] if isa is None else [isa]
    return next((library for name in names if (library := _attempt(name)[0])), None)


def reason(isa: str | None = None) -> str:
    """Why ``load(isa)`` gives None, in one line; empty when it does not."""
    if load(isa):
        return ""
    # Every CPU has the last set, so what stopped that one stopped them all.
    return _attempt(INSTRUCTION_SETS[-1].name if isa is None else isa)[1]


@cache
def _attempt(name: str) -> tuple[Library | None, str]:
    entry = next((entry for entry in INSTRUCTION_SETS if entry.name == name), None)
    if entry is None:
        return None, f"unknown instruction set {name!r}; there are {', '.join(e.name for e in INSTRUCTION_SETS)}"
    if not entry.present():
        return None, f"this CPU has no {name}"
    try:
        return Library(name, _opened(entry)), ""
    except BuildError as error:
        return None, str(error)
    except OSError as error:
        return None, f"the compiled library can't be loaded: {error}"


def _opened(entry: InstructionSet) -> ctypes.CDLL:
    """Load what is in the cache; compile it once more if that is damaged, by a power cut for example."""
    try:
        return ctypes.CDLL(str(built(entry)))
    except OSError:
        return ctypes.CDLL(str(built(entry, afresh=True)))


@cache
def _gomp_parallel() -> int | None:
    """The address of GOMP_parallel in the OpenMP runtime that torch has loaded; None without one."""
    present = getattr(os, "RTLD_NOLOAD", None)
    if present is None:
        return None
    import torch

    beside_torch = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    for name in [*map(str, beside_torch), None]:  # None: all that the process has made public
        try:
            found = ctypes.CDLL(name, mode=present | os.RTLD_LAZY).GOMP_parallel
        except (OSError, AttributeError):
            continue
        return ctypes.cast(found, ctypes.c_void_p).value
    return None
