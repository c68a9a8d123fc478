"""One server for the tests that need no other."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from serve.live import OTHER, Live, make_adapter, serving
from truetune.config.lora import LoRA
from truetune.config.other_methods import Prefix


@pytest.fixture(scope="session")
def start() -> Callable[..., contextlib.AbstractContextManager[Live]]:
    """``start(**settings)`` serves for as long as a test wants."""
    return serving


@pytest.fixture(scope="session")
def adapters_folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three adapters: two that share a row with others, one of them with a template of its own, and one that can't."""
    folder = tmp_path_factory.mktemp("adapters")
    make_adapter(tiny_model, folder / "red", LoRA(rank=2, alpha=8), seed=1)
    make_adapter(tiny_model, folder / "blue", LoRA(rank=4, alpha=8), seed=2, template=OTHER)
    make_adapter(tiny_model, folder / "green", Prefix(virtual_tokens=3), seed=3)
    return folder


@pytest.fixture(scope="session")
def live(tiny_model: Path, adapters_folder: Path) -> Iterator[Live]:
    """The base under the name ``base``, with the three adapters."""
    with serving(
        model=str(tiny_model), adapters=(str(adapters_folder),), served_name="base", max_rows=4, max_new_tokens=200,
        max_body="100KB",
    ) as found:  # fmt: skip
        yield found
