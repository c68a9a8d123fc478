"""A frozen weight's products: by every way they can take, for both ways of storing it."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from truetune.ops import frozen
from truetune.ops.frozen import FrozenLinear


@pytest.mark.parametrize("onednn", [False, True], ids=["blas", "onednn"])
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("rows", [1, 7, 300])
def test_products_are_those_of_the_dense_weight(
    rows: int, transposed: bool, onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozen, "float32_prefers_onednn", lambda: onednn)
    module = Conv1D(5, 300) if transposed else nn.Linear(300, 5)
    weight = FrozenLinear.of(module)
    x, g, start = torch.randn(rows, 300), torch.randn(rows, 5), torch.randn(rows, 300)
    with torch.no_grad():
        y = weight.matmul(x, module.bias)
        dx = weight.matmul_t(g)
        added = weight.matmul_t(g, into=start.clone())
    dense = weight.dense().double()
    torch.testing.assert_close(y.double(), x.double() @ dense.T + module.bias.double(), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(dx.double(), g.double() @ dense, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(added.double(), start.double() + g.double() @ dense, atol=1e-4, rtol=1e-5)
