"""Parameters that keep 32 bits, and the embedding that asks for it."""

import copy

import pytest
import torch
from torch import nn

import truetune as tt
from truetune.optim import AdamW8bit, override_32bit


def bits(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> int:
    return 8 if optimizer.state[parameter]["state1"].dtype == torch.uint8 else 32


def stepped(*modules: nn.Module) -> AdamW8bit:
    parameters = [p for module in modules for p in module.parameters()]
    optimizer = AdamW8bit(parameters)
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer


def test_a_named_parameter_or_module_keeps_32_bits() -> None:
    first, second, third = (nn.Linear(70, 70) for _ in range(3))
    override_32bit(first.weight, second)
    optimizer = stepped(first, second, third)
    assert [bits(optimizer, layer.weight) for layer in (first, second, third)] == [32, 32, 8]


def test_of_a_module_it_concerns_what_it_has_at_the_first_step() -> None:
    layer = nn.Linear(70, 70)
    override_32bit(layer)
    layer.weight = nn.Parameter(torch.zeros(80, 80))
    assert bits(stepped(layer), layer.weight) == 32


def test_a_stable_embedding_keeps_32_bits_and_so_do_its_copies() -> None:
    table = tt.nn.StableEmbedding(100, 64)
    for known in (table, copy.deepcopy(table)):
        assert bits(stepped(known), known.weight) == 32
    assert bits(stepped(plain := nn.Embedding(100, 64)), plain.weight) == 8


def test_it_normalises_what_it_looks_up() -> None:
    table = tt.nn.StableEmbedding(100, 64, padding_idx=3)
    found = table(torch.tensor([[1, 2], [3, 4]]))
    assert found.shape == (2, 2, 64)
    torch.testing.assert_close(found, nn.functional.layer_norm(table.weight[[1, 2, 3, 4]].view(2, 2, 64), (64,)))
    assert (table.weight[3] == 0).all()


def test_it_starts_xavier_uniform() -> None:
    weight = tt.nn.StableEmbedding(1000, 64).weight.detach()
    bound = (6 / 1064) ** 0.5
    assert 0.99 * bound < weight.abs().max() <= bound
    assert float(weight.std()) == pytest.approx(bound / 3**0.5, rel=0.02)  # of 64,000 draws


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_norm_keeps_float32_and_the_result_the_weight_s_type(dtype: torch.dtype) -> None:
    table = tt.nn.StableEmbedding(10, 8, dtype=dtype)
    assert table.norm.weight.dtype == torch.float32
    assert table(torch.tensor([1])).dtype == dtype


def test_its_checkpoints_are_bitsandbytes_s() -> None:
    theirs = pytest.importorskip("bitsandbytes").nn.StableEmbedding(10, 8)
    ours = tt.nn.StableEmbedding(10, 8)
    nn.init.normal_(ours.norm.weight)
    theirs.load_state_dict(ours.state_dict())
    ids = torch.arange(10)
    torch.testing.assert_close(theirs(ids), ours(ids))
