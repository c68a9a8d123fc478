"""Counters, not generators: these values may never change, or no run could be resumed by a newer version."""

import subprocess
import sys

import torch

from truetune.ops.rng import derive_seed, generator, permutation


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


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    permutation(100, 5, "order", 2)
    assert torch.equal(torch.get_rng_state(), before)
