"""What a model's name means, on every system."""

import os

import pytest

from truetune.models.names import is_local


def test_on_windows_a_model_of_the_hub_is_none_of_this_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sep", "\\")
    assert not is_local("org/model")


def test_a_backslash_is_a_folders() -> None:
    assert is_local(r"C:\models\mine")
    assert is_local(r"models\mine")
