"""Compiling the C sources for this CPU, once: the library is kept in the cache folder under a hash of what made it."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from truetune.config.cache import cache_folder
from truetune.ops.native import cpu

_log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "c"
_FLAGS = (
    *("-O3", "-shared", "-fPIC", "-fvisibility=hidden", "-Werror=implicit-function-declaration"),
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),  # sums keep their order: no -ffast-math
)
_SECONDS = 120  # a few are enough; a compiler that hangs on a network drive shall not hang the run


class BuildError(Exception):
    """Why there is no library, in one line. Never reaches the user as an error: the reference does the work."""


@dataclass(frozen=True)
class InstructionSet:
    """One way to compile the sources."""

    name: str
    flags: tuple[str, ...]
    present: Callable[[], bool]
    """Whether this CPU can run what these flags produce."""


_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c")
_BF16 = (*_AVX512, "-mavx512bf16")
_AMX = (*_BF16, "-mamx-tile", "-mamx-bf16")  # each CPU with tiles multiplies bfloat16 in them

INSTRUCTION_SETS = (
    InstructionSet("amx", _AMX, lambda: cpu.level() == "avx512" and cpu.has("avx512_bf16", "amx_tile", "amx_bf16")),
    InstructionSet("avx512_bf16", _BF16, lambda: cpu.level() == "avx512" and cpu.has("avx512_bf16")),
    InstructionSet("avx512", _AVX512, lambda: cpu.level() == "avx512"),
    InstructionSet("avx2", ("-mavx2", "-mfma", "-mf16c"), lambda: cpu.level() in ("avx512", "avx2")),
    # What every CPU of the platform has: SSE2 on x86, NEON on arm64.
    InstructionSet("generic", (), lambda: True),
)
"""Best first."""


def built(isa: InstructionSet, *, afresh: bool = False) -> Path:
    """The shared library for one instruction set, compiled if it is not in the cache yet, which is logged.

    Args:
        afresh: compile even if it is there.
    Raises:
        BuildError: no compiler, the sources do not compile, or the cache folder can't be used.
    """
    if sys.platform == "win32":
        raise BuildError("not on Windows")
    compiler, version = _compiler()
    flags = [*_FLAGS, *isa.flags]
    made_of = [version, platform.machine(), *flags, *(text for path in _files() for text in (path.name, _text(path)))]
    path = cache_folder() / "native" / f"{hashlib.sha256(repr(made_of).encode()).hexdigest()[:24]}.so"
    if afresh or not path.is_file():
        _log.info("compiling the kernels for this CPU (%s): once, a few seconds", isa.name)
        try:
            _compile([*compiler, *flags], path)
        except OSError as error:
            raise BuildError(f"the cache can't be written: {error}") from error
    _check_owner(path)
    return path


def _files() -> list[Path]:
    return sorted(path for path in SOURCES.iterdir() if path.suffix in (".c", ".h"))


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _compiler() -> tuple[list[str], str]:
    """The command of the first compiler that answers, and the first line of its answer to ``--version``."""
    names = ["cc", "gcc", "clang"]
    if sys.platform == "darwin" and not _answer(["xcode-select", "-p"]):
        names = []  # Apple's stand-in for cc would open a window that offers to install one
    for name in filter(None, [os.environ.get("CC"), *names]):
        command = name.split()
        if command and shutil.which(command[0]) and (answer := _answer([*command, "--version"])):
            return command, answer.splitlines()[0]
    raise BuildError("no C compiler")


def _answer(command: list[str]) -> str:
    """What a command prints; empty if it can't be run or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _compile(command: list[str], path: Path) -> None:
    """Compile into a temporary sibling and rename it, so that processes that race each see a whole library."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=".tmp", dir=path.parent)
    os.close(handle)
    try:
        code, messages = _run([*command, "-o", temporary, str(SOURCES / "truetune.c"), "-lm"])
        if code:
            raise BuildError(f"{command[0]} failed: {_first_error(messages)}")
        os.chmod(temporary, 0o700)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _run(command: list[str]) -> tuple[int, str]:
    """Exit code and messages of a compiler; what it started is ended with it when it takes too long."""
    with tempfile.TemporaryFile() as messages:  # a pipe would be held open by what the compiler started
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=messages, stderr=messages, start_new_session=True
        )
        try:
            code = process.wait(_SECONDS)
        except subprocess.TimeoutExpired:
            raise BuildError(f"{command[0]} took more than {_SECONDS} s") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        messages.seek(0)
        return code, messages.read().decode(errors="replace")


def _first_error(messages: str) -> str:
    lines = [line.strip() for line in messages.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[0] if lines else "no message")


def _check_owner(path: Path) -> None:
    """That nobody else can have put machine code into the cache: a shared folder may be named as the cache."""
    for place in (path, path.parent):
        if os.stat(place).st_uid not in (os.geteuid(), 0):
            raise BuildError(f"{place} belongs to another user")
