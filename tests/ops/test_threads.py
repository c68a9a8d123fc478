"""Small tensors are worked on by one thread, and the number of threads comes back."""

import pytest
import torch

from truetune.ops.threads import threads_for


@pytest.mark.parametrize(("size", "inside"), [(10, 1), (1 << 20, 2)])
def test_threads_follow_the_size_of_the_work(size: int, inside: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with threads_for([torch.zeros(size)] * 3):
            assert torch.get_num_threads() == inside
        assert torch.get_num_threads() == 2
        with pytest.raises(RuntimeError, match="broken"), threads_for([torch.zeros(10)]):
            raise RuntimeError("broken")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
