"""Counters, not generators: these values may never change, or no run could be resumed by a newer version."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from truetune.adapters.lora import LoRALinear
from truetune.adapters.projecting import projection_group
from truetune.ops.projection import project
from truetune.ops.rng import (
    LISTED,
    Shuffle,
    current_keys,
    derive_seed,
    generator,
    keyed,
    order,
    permutation,
    token_keys,
)

LONG = [7692509, 998571, 7647871, 4493736]


def test_a_seed_is_the_one_it_always_was() -> None:
    assert derive_seed(0) == 4246866556266386882
    assert derive_seed(0, "dropout", 3, 1) == 6490832839603493413


def test_an_order_is_the_one_it_always_was() -> None:
    assert permutation(10, 0, "order", 0).tolist() == [2, 0, 1, 4, 5, 8, 7, 6, 9, 3]


def test_another_process_draws_the_same() -> None:
    code = (
        "from truetune.ops.rng import generator; import torch;"
        "print(torch.rand(4, generator=generator(7, 'x', 2)).tolist())"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str(torch.rand(4, generator=generator(7, "x", 2)).tolist())


def test_purposes_seeds_and_steps_do_not_share_a_stream() -> None:
    seeds = [derive_seed(s, purpose, n) for s in range(5) for purpose in ("order", "dropout") for n in range(100)]
    assert len(set(seeds)) == len(seeds)


def test_the_parts_are_kept_apart() -> None:
    assert derive_seed(1, 2, 3) != derive_seed(1, 23)


def test_a_permutation_holds_every_number_once() -> None:
    assert sorted(permutation(1000, 5, "order", 2).tolist()) == list(range(1000))


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16, 17, 1000, 4097])
def test_a_shuffle_that_is_not_listed_holds_every_number_once(count: int) -> None:
    shuffle = Shuffle(count, tuple(derive_seed(3, "round", n) for n in range(8)))
    assert sorted(shuffle[i] for i in range(len(shuffle))) == list(range(count))
    for outside in (-1, count):
        with pytest.raises(IndexError):
            shuffle[outside]


def test_a_long_order_is_the_one_it_always_was_and_takes_no_list() -> None:
    long = order(10_000_000, 0, "order", 0)
    assert isinstance(long, Shuffle)
    assert [long[i] for i in (0, 1, 2, 9_999_999)] == LONG
    assert torch.equal(torch.as_tensor(order(1000, 5, "order", 2)), permutation(1000, 5, "order", 2))
    assert isinstance(order(LISTED, 5), Tensor)


def test_a_long_order_is_as_even_as_a_drawn_one() -> None:
    """Where the first places come from: 16 equal stretches of the data, by chi squared with 15 degrees of freedom."""
    count, drawn = 3_000_000, 16_000
    for epoch in range(3):
        shuffle = order(count, 7, "order", epoch)
        places = [int(shuffle[i]) * 16 // count for i in range(drawn)]
        chi = sum((places.count(n) - drawn / 16) ** 2 / (drawn / 16) for n in range(16))
        assert 3 < chi < 45  # 1 in 10,000 on either side
        pairs = sum(abs(int(shuffle[i]) - int(shuffle[i + 1])) for i in range(2000)) / 2000 / count
        assert abs(pairs - 1 / 3) < 0.03  # neighbours are as far apart as any two


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    permutation(100, 5, "order", 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_token_s_key_is_the_one_it_always_was() -> None:
    assert token_keys(0, 3, [5], [3]).tolist() == [2902231710629040913, -4143797543757312218, 7256917275565886267]


def test_no_two_tokens_of_a_run_share_a_key() -> None:
    keys = torch.cat([token_keys(seed, step, range(20), [30] * 20) for seed in range(4) for step in range(25)])
    assert len(keys.unique()) == len(keys) == 60_000


def test_a_token_s_key_depends_on_no_other_example() -> None:
    together = token_keys(7, 2, [4, 9, 1], [3, 5, 2])
    alone = [token_keys(7, 2, [example], [length]) for example, length in ((4, 3), (9, 5), (1, 2))]
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(token_keys(7, 2, [9], [50])[:5], alone[1])  # nor on how long its own is


def test_the_keys_in_force_are_those_of_the_innermost_block() -> None:
    outer, inner = torch.arange(3), torch.arange(3) + 10

    def fail() -> None:
        with keyed(inner):
            raise ValueError(current_keys(3).tolist())

    with keyed(outer):
        with pytest.raises(ValueError, match="10, 11, 12"):
            fail()
        assert torch.equal(current_keys(3), outer)
        with keyed(None):
            assert not torch.equal(current_keys(3), outer)


def test_where_rows_are_not_tokens_keys_are_drawn() -> None:
    with keyed(torch.arange(3)):
        assert len(current_keys(4).unique()) == 4
        assert not torch.equal(current_keys(4), current_keys(4))


@pytest.mark.parametrize("keys", [None, torch.arange(3)], ids=["drawn", "given"])
def test_the_keys_go_where_the_layer_is(keys: Tensor | None) -> None:
    """Rows are counted on the CPU, and dropped wherever the model lies."""
    layer = LoRALinear(nn.Linear(8, 6, device="meta"), rank=2, alpha=2, dropout=0.3)
    with keyed(keys):
        group = projection_group((layer,), 3)
    assert group is not None
    (y,) = project(group, torch.ones(3, 8, device="meta"))
    assert y.shape == (3, 6)


def alone(p: float = 0.3) -> LoRALinear:
    """A layer that only passes on what its low-rank path is given."""
    linear = nn.Linear(200, 200, bias=False)
    nn.init.zeros_(linear.weight)
    layer = LoRALinear(linear, rank=200, alpha=200, dropout=p)
    for parameter in (layer.lora_a, layer.lora_b):
        nn.init.eye_(parameter)
    return layer


def passed(layer: LoRALinear, *shape: int) -> Tensor:
    out: Tensor = layer(torch.ones(*shape, 200))
    return out.detach()


@pytest.mark.parametrize("p", [0.1, 0.3, 0.9])
def test_a_layer_in_somebody_s_own_loop_drops_that_share_and_scales_the_rest(p: float) -> None:
    torch.manual_seed(0)
    found = passed(alone(p), 5, 100)
    share = float((found == 0).float().mean())
    assert abs(share - p) < 4 * (p * (1 - p) / 100_000) ** 0.5  # four standard deviations
    torch.testing.assert_close(found[found != 0].unique(), torch.tensor([1 / (1 - p)]))


def test_each_call_in_somebody_s_own_loop_drops_others() -> None:
    layer = alone()
    assert not torch.equal(passed(layer, 50), passed(layer, 50))
    rows = passed(layer, 50)
    assert len({tuple(row) for row in (rows == 0).tolist()}) == 50


def test_a_layer_in_somebody_s_own_loop_follows_the_global_seed() -> None:
    layer = alone()
    torch.manual_seed(5)
    first = passed(layer, 50)
    other = passed(layer, 50)
    torch.manual_seed(5)
    assert torch.equal(passed(layer, 50), first)
    assert not torch.equal(other, first)


def test_without_training_nothing_is_dropped_or_drawn() -> None:
    layer = alone().eval()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert torch.equal(passed(layer, 50), torch.ones(50, 200))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_backward_drops_what_the_forward_dropped() -> None:
    layer, x = alone(), torch.ones(50, 200, requires_grad=True)
    y: Tensor = layer(x)
    y.backward(torch.ones_like(y))
    assert x.grad is not None
    assert torch.equal(x.grad, y)
    assert 0.2 < float((y == 0).float().mean()) < 0.4


def test_a_layer_takes_no_rows_and_one_row_without_a_batch() -> None:
    layer = alone()
    assert passed(layer, 0).shape == (0, 200)
    assert passed(layer, 2, 0).shape == (2, 0, 200)
    assert passed(layer).shape == (200,)
