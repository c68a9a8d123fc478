"""The only place that chooses which version of a kernel runs.

Three tiers, each with the same names and signatures:

- ``reference``: plain torch, in closed form. Every operation has it, on any device, in float64 too.
- ``native``: C, compiled on first use (``ops/native``); dense CPU tensors in float32 or bfloat16. It has RMS norm and
  layer norm, gated activations, counter-based dropout, softmax cross-entropy, attention over packed segments,
  block-wise quantisation to 4 and 8 bits, 8-bit optimizers, low-rank updates folded into a weight, and on CPUs with a
  tile unit (AMX) products of int8 codes and those with a rank.
- ``triton``: not there yet.

``TRUETUNE_KERNELS=reference|native|triton|auto`` chooses. ``auto``, the default, runs the native version wherever there
is one for the tensors at hand, and the reference elsewhere. ``native`` does the same, but a machine that can't have the
native tier is an error then.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from truetune.errors import ConfigError, nearest
from truetune.ops.native import library
from truetune.ops.native.build import INSTRUCTION_SETS
from truetune.ops.native.library import Library

if TYPE_CHECKING:  # a merge needs kernels, and no torch
    from torch import Tensor

VARIABLE = "TRUETUNE_KERNELS"
CHOICES = ("reference", "native", "triton", "auto")


@dataclass(frozen=True)
class _Choice:
    library: Library | None
    why: str  # there is no library


_forced: list[_Choice] = []  # the innermost last


def native(*tensors: Tensor) -> Library | None:
    """The library, if the native tier is chosen and can take these tensors; None means: run the reference.

    Args:
        tensors: the floating ones of a call. That their dtypes agree where a kernel needs it is the caller's business.
    Raises:
        ConfigError: on the first call, if ``TRUETUNE_KERNELS`` asks for what is not to be had.
    """
    import torch

    dtypes = (torch.float32, torch.bfloat16)
    plain = (torch.Tensor, torch.nn.Parameter)  # a subclass may hold no memory of its own, or not where it seems
    for tensor in tensors:
        fits = tensor.is_cpu and tensor.dtype in dtypes and tensor.layout is torch.strided and type(tensor) in plain
        if not fits:
            return None
    if torch.compiler.is_compiling():
        return None  # a tracer sees through the reference, not through a C call
    chosen = _current().library
    if chosen is not None:
        chosen.use_threads(torch.get_num_threads())
    return chosen


def library_here() -> Library | None:
    """The library, if the native tier is chosen, for what works on plain memory; it imports no torch.

    Raises:
        ConfigError: as ``native``.
    """
    return _current().library


def describe() -> str:
    """What runs on this CPU, for the log: ``native (avx512)``, or ``reference (no C compiler)``.

    Raises:
        ConfigError: as ``native``.
    """
    choice = _current()
    return f"reference ({choice.why})" if choice.library is None else f"native ({choice.library.isa})"


def tiers(isas: Iterable[str] | None = None) -> list[str]:
    """Every tier that can be had here, such as ``["reference", "native-avx512", "native-avx2"]``; compiles them all.

    Args:
        isas: the instruction sets to try; default all.
    """
    names = [entry.name for entry in INSTRUCTION_SETS] if isas is None else list(isas)
    with ThreadPoolExecutor() as pool:  # each waits for a compiler of its own
        return ["reference", *(f"native-{found.isa}" for found in pool.map(library.load, names) if found)]


@contextlib.contextmanager
def forced(tier: str, isa: str | None = None) -> Iterator[None]:
    """Within the block, this tier runs, whatever the environment says. For tests and measurements.

    Args:
        tier: one of ``CHOICES``, or one of ``tiers()``.
        isa: the instruction set of the native tier; default the best.
    Raises:
        ConfigError: the tier is unknown, or can't be had.
    """
    name, _, named = tier.partition("-")
    _forced.append(_choice(name, isa or named or None, "forced"))
    try:
        yield
    finally:
        _forced.pop()


def _current() -> _Choice:
    return _forced[-1] if _forced else _from_environment()


@cache
def _from_environment() -> _Choice:
    return _choice(os.environ.get(VARIABLE) or "auto", None, VARIABLE)


def _choice(tier: str, isa: str | None, asked_by: str) -> _Choice:
    if tier not in CHOICES:
        close = nearest(tier, CHOICES)
        raise ConfigError(
            f"{VARIABLE}: found {tier!r}, expected {', '.join(CHOICES)}",
            ("did you mean", f"{VARIABLE}={close}" if close else ""),
        )
    if tier == "reference":
        return _Choice(None, asked_by)
    if tier == "triton":
        raise ConfigError(f"{VARIABLE}=triton: there are no Triton kernels yet", ("way out", f"{VARIABLE}=auto"))
    found = library.load(isa)
    if found is None and tier == "native":
        raise ConfigError(
            f"{VARIABLE}=native: the native kernels can't be had: {library.reason(isa)}",
            ("way out", f"{VARIABLE}=auto, which runs the plain torch versions then"),
        )
    return _Choice(found, library.reason(isa))
