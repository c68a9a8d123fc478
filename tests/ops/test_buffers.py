"""Blocks are used again when, and only when, nobody holds them any more."""

import pytest
import torch

from truetune.ops import buffers

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _fresh() -> None:
    buffers.release()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_is_used_again_once_it_is_free(dtype: torch.dtype) -> None:
    first = buffers.empty(1000, 300, dtype, CPU)
    where = first.data_ptr()
    assert (first.shape, first.dtype, first.is_contiguous(), where % 64) == ((1000, 300), dtype, True, 0)
    del first
    assert buffers.empty(900, 300, dtype, CPU).data_ptr() == where  # a few rows less fit as well


def test_what_is_held_is_never_handed_out() -> None:
    held = [buffers.empty(500, 300, torch.float32, CPU).fill_(i) for i in range(5)]
    views = [tensor[7:9].T for tensor in held]
    del held
    for i in range(5, 20):
        buffers.empty(500, 300, torch.float32, CPU).fill_(i)
    assert [view.unique().tolist() for view in views] == [[0.0], [1.0], [2.0], [3.0], [4.0]]


def test_autograd_holds_what_it_saved() -> None:
    x = buffers.empty(500, 300, torch.float32, CPU).fill_(3.0)
    w = torch.ones(300, requires_grad=True)
    y = (x * w).sum()
    del x
    buffers.empty(500, 300, torch.float32, CPU).fill_(7.0)
    y.backward()
    assert w.grad is not None
    assert w.grad.unique().tolist() == [1500.0]


def test_more_rows_make_larger_blocks_and_the_small_ones_go() -> None:
    small = buffers.empty(500, 300, torch.float32, CPU)
    large = buffers.empty(600, 300, torch.float32, CPU)
    places = {small.data_ptr(), large.data_ptr()}
    del small, large
    again = buffers.empty(600, 300, torch.float32, CPU)
    assert again.data_ptr() in places
    other = buffers.empty(600, 300, torch.float32, CPU)
    assert other.data_ptr() != again.data_ptr()


@pytest.mark.parametrize(("rows", "dtype"), [(3, torch.float32), (1000, torch.float64), (0, torch.float32)])
def test_small_and_other_tensors_are_torchs_own(rows: int, dtype: torch.dtype) -> None:
    tensor = buffers.empty(rows, 300, dtype, CPU)
    assert (tensor.shape, tensor.dtype) == ((rows, 300), dtype)
    assert not buffers._rows


def test_the_shape_of_another() -> None:
    x = torch.empty(4, 500, 300, dtype=torch.bfloat16)
    assert buffers.empty_like(x).shape == x.shape
