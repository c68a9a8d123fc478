"""Other makers' layers: which shapes are theirs, and what is refused by name."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from families import FAMILIES
from truetune.adapters import lora, lora_embedding
from truetune.adapters.foreign_layers import Layer, Pairs, of_lit, of_loralib
from truetune.errors import AdapterError

Q, FUSED = "model.layers.0.self_attn.q_proj", "transformer.h.0.attn.attn"


def pair(rows: int, inner: int, out: int, rank: int) -> tuple[Tensor, Tensor]:
    """A [rows, inner] and B [out, rank]."""
    return torch.randn(rows, inner), torch.randn(out, rank)


class Net(nn.Module):
    """Layers of every kind that loralib adapts, and one that it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.fused, self.table = nn.Linear(6, 12), nn.Embedding(9, 6)
        self.kernel, self.flat, self.norm = nn.Conv2d(2, 3, 3), nn.Conv2d(2, 3, (3, 1)), nn.LayerNorm(6)


def test_a_layer_is_the_tensors_of_our_file() -> None:
    a, b = pair(2, 6, 12, 2)
    assert dict(Layer("x", a, b).tensors()) == {lora.A: a, lora.B: b}
    assert dict(Layer("x", a, b, is_table=True).tensors()) == {lora_embedding.A: a, lora_embedding.B: b}
    assert Layer("x", a, b).rank == 2


def test_parts_of_a_fused_layer_are_named_by_which_they_are() -> None:
    (found,) = of_loralib({"fused": pair(4, 6, 8, 2)}, Net(), [True, False, True])
    assert (found.parts, found.rank) == (("1/3", "3/3"), 2)


@pytest.mark.parametrize(
    ("pairs", "enabled", "message"),
    [
        ({"fuzed": pair(2, 6, 12, 2)}, None, "lacks 1 of the 1 adapted layers"),
        ({"norm": pair(2, 6, 6, 2)}, None, "norm is a LayerNorm"),
        ({"fused": pair(4, 6, 8, 2)}, None, "does not say in which: B has 8 of 12 rows"),
        ({"fused": pair(4, 6, 8, 2)}, [True, False, False], "are not those of 1 of 3 parts"),
        ({"flat": pair(6, 6, 9, 6)}, None, "are not those of a square kernel"),
        ({"kernel": pair(6, 5, 9, 6)}, None, "are not those of a square kernel"),
    ],
)
def test_what_is_not_loralibs_is_refused(pairs: Pairs, enabled: Any, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        of_loralib(pairs, Net(), enabled)


def test_a_kernels_update_is_that_of_loralib() -> None:
    a, b = pair(2 * 3, 2 * 3, 3 * 3, 2 * 3)
    net = Net()
    (found,) = of_loralib({"kernel": (a, b)}, net, None)
    ours = (found.b.flatten(1) @ found.a.flatten(1)).view(net.kernel.weight.shape)
    torch.testing.assert_close(ours, (b @ a).view(net.kernel.weight.shape))
    assert found.widened == 9


def model() -> nn.Module:
    """Queries of 32 rows, keys and values of 16."""
    return FAMILIES["llama"].make()


@pytest.mark.parametrize(
    ("enabled", "rows", "out", "leaves"),
    [
        (None, 4, 48, ["q_proj", "v_proj"]),  # of two, queries and values
        (None, 6, 64, ["q_proj", "k_proj", "v_proj"]),
        ([False, True, True], 4, 32, ["k_proj", "v_proj"]),
        ([True, False, False], 2, 32, ["q_proj"]),
    ],
)
def test_litgpts_fused_layer_is_taken_apart(enabled: Any, rows: int, out: int, leaves: list[str]) -> None:
    a, b = pair(rows, 32, out, 2)
    found = of_lit({FUSED: (a, b)}, model(), enabled)
    assert [layer.path.rpartition(".")[2] for layer in found] == leaves
    torch.testing.assert_close(torch.cat([layer.a for layer in found]), a)
    torch.testing.assert_close(torch.cat([layer.b for layer in found]), b)


@pytest.mark.parametrize(
    ("pairs", "enabled", "message"),
    [
        ({FUSED: pair(2, 32, 32, 2)}, None, "adapted in one part, and the file does not say in which"),
        ({FUSED: pair(4, 32, 40, 2)}, None, "do not fit"),
        ({"transformer.h.7.mlp.proj": pair(2, 48, 32, 2)}, None, "named like Llama's"),
        ({}, None, "named like Llama's"),
    ],
)
def test_what_is_not_litgpts_is_refused(pairs: Pairs, enabled: Any, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        of_lit(pairs, model(), enabled)


def test_lit_llamas_neighbours_become_halves_of_a_head() -> None:
    a, b = pair(6, 32, 64, 2)
    key: Callable[[str], str] = "transformer.h.0.attn.{}".format
    plain, turned = (of_lit({key(name): (a, b)}, model(), None) for name in ("attn", "c_attn"))
    first = plain[0].b.view(4, 8, 2)  # heads, rows, rank
    halves = torch.cat([first[:, 0::2], first[:, 1::2]], dim=1)
    torch.testing.assert_close(turned[0].b.view(4, 8, 2), halves)
    torch.testing.assert_close(turned[2].b, plain[2].b)  # values are not turned by their position
