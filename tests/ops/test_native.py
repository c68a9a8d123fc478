"""Building and loading the native library, and everything that may stand in the way."""

import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from truetune.ops.native import build, library

if sys.platform == "win32":
    pytest.skip("there is no native tier on Windows", allow_module_level=True)

GENERIC = build.INSTRUCTION_SETS[-1]


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder of the test's own; what this process has loaded so far is set aside."""
    monkeypatch.setenv("TRUETUNE_CACHE", str(tmp_path / "cache"))
    library._attempt.cache_clear()
    yield tmp_path / "cache" / "native"
    library._attempt.cache_clear()


@pytest.fixture
def small_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sources that compile in no time, in place of our own."""
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        pytest.skip("no C compiler")
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "truetune.c").write_text("void tt_set_threads(void *runtime, int threads) {}\n", encoding="utf-8")
    monkeypatch.setattr(build, "SOURCES", folder)
    monkeypatch.setattr(build, "_FLAGS", ("-shared", "-fPIC"))
    return folder


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """``compiler(script)``: CC tells its version, and runs the script when asked to compile."""

    def install(script: str) -> None:
        path = tmp_path / "some-cc"
        path.write_text(
            f'#!/bin/sh\nif [ "$1" = --version ]; then echo some-cc 1; exit; fi\n{script}\n', encoding="utf-8"
        )
        path.chmod(0o755)
        monkeypatch.setenv("CC", str(path))

    return install


def test_a_library_is_built_once_and_leaves_nothing_else(small_sources: Path, empty_cache: Path) -> None:
    path = build.built(GENERIC)
    written = path.stat().st_mtime_ns
    assert build.built(GENERIC) == path
    assert path.stat().st_mtime_ns == written
    assert [entry.name for entry in empty_cache.iterdir()] == [path.name]


def test_compiling_is_logged_and_finding_what_was_compiled_is_not(
    small_sources: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "truetune")
    for _ in range(2):
        build.built(GENERIC)
    assert caplog.messages == ["compiling the kernels for this CPU (generic): once, a few seconds"]


def test_sources_flags_and_compiler_each_make_another_library(
    small_sources: Path, compiler: Callable[[str], None]
) -> None:
    paths = [build.built(GENERIC), build.built(build.InstructionSet("other", ("-O1",), lambda: True))]
    (small_sources / "more.h").write_text("/* more */", encoding="utf-8")
    paths.append(build.built(GENERIC))
    compiler('exec cc "$@"')
    paths.append(build.built(GENERIC))
    assert len(set(paths)) == 4


def test_two_at_once_each_get_a_whole_library(small_sources: Path, empty_cache: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: build.built(GENERIC, afresh=True), range(8)))
    assert list(empty_cache.iterdir()) == [paths.pop()]
    assert library.load(GENERIC.name)


def test_the_best_that_can_be_built_is_loaded(small_sources: Path) -> None:
    best = next(entry.name for entry in build.INSTRUCTION_SETS if entry.present())
    found = library.load()
    assert found is not None
    assert found.isa == best
    assert library.load() is found is library.load(best)
    assert library.reason() == ""


def test_what_only_a_lesser_set_compiles_is_built_for_that_one(small_sources: Path) -> None:
    source = "#ifdef __AVX__\n#error no\n#endif\nvoid tt_set_threads(void *runtime, int threads) {}\n"
    (small_sources / "truetune.c").write_text(source, encoding="utf-8")
    found = library.load()
    assert found is not None
    assert found.isa == GENERIC.name


def test_no_compiler_is_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    assert library.load() is None
    assert library.reason() == "no C compiler"


@pytest.mark.parametrize("value", ["", "  ", "/no/such/compiler -m32"])
def test_a_cc_that_is_not_there_is_passed_over(
    small_sources: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("CC", value)
    assert library.load(GENERIC.name)


def test_a_compile_error_is_told_in_its_own_words(
    small_sources: Path, empty_cache: Path, compiler: Callable[[str], None]
) -> None:
    compiler("echo In file included from x >&2; echo 'x.h:3: error: what is this' >&2; exit 1")
    assert library.load() is None
    assert library.reason().endswith("some-cc failed: x.h:3: error: what is this")
    assert list(empty_cache.iterdir()) == []


def test_a_compiler_that_hangs_is_ended(
    small_sources: Path, empty_cache: Path, compiler: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "_SECONDS", 0.2)
    compiler("sleep 600; true")
    with pytest.raises(build.BuildError, match=r"some-cc took more than 0\.2 s"):
        build.built(GENERIC)
    assert list(empty_cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_no_harm(small_sources: Path, empty_cache: Path) -> None:
    empty_cache.parent.write_text("a file where a folder should be", encoding="utf-8")
    assert library.load() is None
    assert library.reason().startswith("the cache can't be written: ")


def test_a_damaged_library_is_built_again(small_sources: Path) -> None:
    path = build.built(GENERIC)
    path.write_bytes(b"")
    assert library.load(GENERIC.name)
    assert path.stat().st_size > 1000


def test_what_cannot_be_loaded_is_no_harm(small_sources: Path, compiler: Callable[[str], None]) -> None:
    compiler('while [ "$1" != -o ]; do shift; done; echo no library > "$2"')
    assert library.load(GENERIC.name) is None
    assert library.reason(GENERIC.name).startswith("the compiled library can't be loaded: ")


def test_a_library_of_another_user_is_not_loaded(small_sources: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    path = build.built(GENERIC)
    os.chown(path, 12345, -1)
    assert library.load(GENERIC.name) is None
    assert library.reason(GENERIC.name) == f"{path} belongs to another user"


def test_only_its_owner_may_write_the_library(small_sources: Path) -> None:
    path = build.built(GENERIC)
    assert [place.stat().st_mode & 0o777 for place in (path, path.parent)] == [0o700, 0o700]


@pytest.mark.parametrize("name", ["avx1024", ""])
def test_an_unknown_instruction_set_is_named(name: str) -> None:
    assert library.load(name) is None
    assert library.reason(name).startswith(f"unknown instruction set {name!r}; there are ")


def test_an_instruction_set_that_the_cpu_lacks_is_not_built(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = build.InstructionSet("later", (), lambda: False)
    monkeypatch.setattr(library, "INSTRUCTION_SETS", (lacking, GENERIC))
    assert library.load("later") is None
    assert library.reason("later") == "this CPU has no later"
    assert not empty_cache.exists()
