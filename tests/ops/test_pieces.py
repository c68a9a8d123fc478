"""Pieces of a tensor, put together, are its values in row-major order."""

import pytest
import torch
from torch import Tensor

from truetune.ops import dispatch, pieces

SHAPES = [(200_000,), (3, 100_001), (5, 7, 9001), (400_000, 1), (1, 300_000), (2, 1, 131_072), (0, 4), ()]


def reversed_strides(*shape: int) -> Tensor:
    values = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape[::-1])
    return values.permute(tuple(reversed(range(len(shape)))))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("multiple", [1, 64, 100])
def test_pieces_are_the_whole(shape: tuple[int, ...], multiple: int) -> None:
    x = reversed_strides(*shape)
    with dispatch.forced("reference"):
        found = list(pieces.of(x, multiple))
    assert [start for start, _ in found] == list(range(0, x.numel(), pieces.length(multiple)))
    assert all(piece.is_contiguous() for _, piece in found)
    assert torch.equal(torch.cat([torch.empty(0), *(piece for _, piece in found)]), x.flatten())


def test_pieces_are_multiples() -> None:
    assert all(pieces.length(multiple) % multiple == 0 for multiple in (1, 100, 4096, 10**6))


def test_dense_values_are_not_copied() -> None:
    x = torch.randn(300, 1000)
    with dispatch.forced("reference"):
        for start, piece in pieces.of(x, 64):
            assert piece.data_ptr() == x.data_ptr() + 4 * start
