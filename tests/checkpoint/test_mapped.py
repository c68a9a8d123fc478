"""Tensors that lie in files: which of their pages may be let go, and that nothing else goes with them."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from memory_pages import on_linux, present_bytes
from truetune.checkpoint import mapped
from truetune.checkpoint.header import read_header
from truetune.checkpoint.mapped import file_mappings, pages_of, view

PAGE = mmap.PAGESIZE


@pytest.fixture
def views(tmp_path: Path) -> list[Tensor]:
    """Three tensors behind one another in a file; none begins or ends where a page does."""
    values = {name: torch.full((40 * PAGE + 100,), float(i)) for i, name in enumerate("abc", start=1)}
    save_file(values, tmp_path / "x.safetensors")
    return [view(entry) for entry in read_header(tmp_path / "x.safetensors").values()]


@on_linux
def test_whole_pages_of_a_tensor_are_found_and_its_neighbours_are_not_among_them(views: list[Tensor]) -> None:
    first, second, third = views
    pages = pages_of([second], file_mappings())
    ((start, stop),) = pages.areas
    assert start % PAGE == stop % PAGE == 0
    assert first.data_ptr() + first.nbytes <= start < stop <= third.data_ptr()
    assert second.nbytes - 2 * PAGE < stop - start <= second.nbytes == pages.nbytes


@on_linux
def test_pages_that_are_let_go_leave_memory_and_come_back_as_they_were(views: list[Tensor]) -> None:
    pages = pages_of(views, file_mappings())
    before = [t.clone() for t in views]
    assert present_bytes(pages) == sum(stop - start for start, stop in pages.areas)
    pages.drop()
    assert present_bytes(pages) == 0
    pages.fetch()
    assert all(torch.equal(t, old) for t, old in zip(views, before, strict=True))


@on_linux
def test_what_was_written_to_a_neighbour_stays(views: list[Tensor]) -> None:
    views[0].fill_(7.0)
    views[2].fill_(9.0)
    pages_of([views[1]], file_mappings()).drop()
    assert [set(t.tolist()) for t in views] == [{7.0}, {2.0}, {9.0}]


@on_linux
def test_memory_that_is_no_files_is_left_alone(views: list[Tensor]) -> None:
    own = torch.ones(100 * PAGE)
    strided = views[0][: 100 * 100].view(100, 100)[:, :50]
    pages = pages_of([own, own.to("meta"), torch.empty(0), strided], file_mappings())
    assert pages.areas == pages.tensors == ()
    pages.drop()
    assert bool((own == 1).all())


@on_linux
def test_a_tensor_that_is_named_twice_counts_once(views: list[Tensor]) -> None:
    assert pages_of([views[0], views[0].detach()], file_mappings()).nbytes == views[0].nbytes


def test_where_the_system_does_not_say_nothing_is_found(monkeypatch: pytest.MonkeyPatch, views: list[Tensor]) -> None:
    monkeypatch.setattr(mapped.sys, "platform", "win32")
    assert pages_of(views, file_mappings()).areas == ()
