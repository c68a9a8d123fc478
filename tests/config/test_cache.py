"""Where derived data is kept."""

from pathlib import Path

import pytest

from truetune.config.cache import cache_folder


def test_the_variable_names_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRUETUNE_CACHE", str(tmp_path / "kept"))
    assert cache_folder() == tmp_path / "kept"


def test_a_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUETUNE_CACHE", "~/kept")
    assert cache_folder() == Path.home() / "kept"


@pytest.mark.parametrize(
    ("system", "variable", "parts"),
    [
        ("linux", "XDG_CACHE_HOME", ("root", "truetune")),
        ("win32", "LOCALAPPDATA", ("root", "truetune")),
        ("darwin", "HOME", ("root", "Library", "Caches", "truetune")),
    ],
)
def test_each_system_has_its_own_place(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, system: str, variable: str, parts: tuple[str, ...]
) -> None:
    monkeypatch.delenv("TRUETUNE_CACHE")
    monkeypatch.setattr("sys.platform", system)
    monkeypatch.setenv(variable, str(tmp_path / "root"))
    assert cache_folder() == tmp_path.joinpath(*parts)


def test_asking_makes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRUETUNE_CACHE", str(tmp_path / "kept"))
    cache_folder()
    assert not (tmp_path / "kept").exists()
