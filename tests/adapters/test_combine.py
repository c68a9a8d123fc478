"""Combining updates: the formulas against plain restatements, and against PEFT's ``add_weighted_adapter``."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from families import FAMILIES, distance
from peft_peer import saved_by_peft, unwarned
from truetune.adapters import files
from truetune.adapters.bank import Bank
from truetune.adapters.base import LowRankUpdate
from truetune.adapters.combine import Combination
from truetune.adapters.combine_entries import dropped_at_random, in_agreement, largest, weighted_sum
from truetune.adapters.composed import attachment_of
from truetune.adapters.stack import combined_updates
from truetune.errors import AdapterError

CLOSE = 1e-5
WEIGHTS = {"one": 0.7, "two": -0.4, "six": 1.5}
BY_FACTORS = ("linear", "ties", "magnitude-prune")
BY_PRODUCTS = ("svd", "ties-svd", "magnitude-prune-svd")


def update(rank: int, *, seed: int, scale: float = 2.0, shift: bool = False) -> LowRankUpdate:
    draws = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, 7, generator=draws), torch.randn(5, rank, generator=draws)
    return LowRankUpdate(a, b, scale, torch.randn(5, generator=draws) if shift else None)


def product(made: LowRankUpdate) -> Tensor:
    return made.b.flatten(1) @ made.a.flatten(1) * made.scale


def peft_on(family: str, kinds: dict[str, peft.LoraConfig]) -> Any:
    """PEFT's model with several adapters that are moved from where they start."""
    draws = torch.Generator().manual_seed(5)
    with unwarned():
        (first, config), *others = kinds.items()
        model = peft.get_peft_model(FAMILIES[family].make(), config, adapter_name=first)
        for name, other in others:
            model.add_adapter(name, other)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draws) * 0.1)
    return model


def lora(targets: tuple[str, ...], rank: int = 4, alpha: float = 8, **more: Any) -> peft.LoraConfig:
    return peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), **more)


def both(
    family: str, kinds: dict[str, peft.LoraConfig], kind: str, folder: Path, **theirs: Any
) -> tuple[dict[str, LowRankUpdate], dict[str, Tensor]]:
    """Ours of the folders that PEFT wrote, and its own combination: path → s B A, as the layer stores its weight."""
    model = peft_on(family, kinds)
    weights = [WEIGHTS[name] for name in kinds]
    with unwarned():
        warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`")
        saved_by_peft(model, folder)
        model.add_weighted_adapter(list(kinds), weights, "sum", kind.replace("-", "_"), density=0.6, **theirs)
    deltas = {
        name.removeprefix("base_model.model."): module.get_delta_weight("sum").detach()
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
        and ("sum" in module.lora_A or "sum" in module.lora_embedding_A)
    }
    bank = Bank(FAMILIES[family].make())
    for name in kinds:
        bank.add(name, files.read(folder / name))
    found = {name: bank.updates(name) for name in kinds}
    combination = Combination(kind, theirs.get("svd_rank"), 0.6)
    return combined_updates(found, WEIGHTS, combination), deltas


@pytest.mark.parametrize("kind", [*BY_FACTORS, *BY_PRODUCTS, "cat"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_same_as_peft(family: str, kind: str, tmp_path: Path) -> None:
    targets = FAMILIES[family].targets
    flipped = {"fan_in_fan_out": family == "gpt2"}
    kinds = {
        "one": lora(targets, **flipped),
        "two": lora(targets[:2], alpha=3, **flipped),
        "six": lora(targets[1:], use_rslora=True, **flipped),
    }
    ours, theirs = both(family, kinds, kind, tmp_path)
    assert ours.keys() == theirs.keys()
    for path, delta in theirs.items():
        mine = product(ours[path])
        assert distance(mine.T if family == "gpt2" else mine, delta) <= CLOSE, path
        assert delta.abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_the_same_as_peft_for_other_ranks_and_a_table(kind: str, tmp_path: Path) -> None:
    kinds = {"one": lora(("embed_tokens", "q_proj")), "two": lora(("embed_tokens", "v_proj"), 2)}
    rank = {"svd_rank": 3} if kind == "svd" else {}
    ours, theirs = both("llama", kinds, kind, tmp_path, **rank)
    for path, delta in theirs.items():
        mine = product(ours[path])
        assert distance(mine.T if "embed" in path else mine, delta) <= CLOSE


def test_cat_is_the_exact_sum_and_its_rank_the_sum_of_ranks() -> None:
    parts = [update(2, seed=1), update(3, seed=2, scale=-0.5, shift=True)]
    made = Combination("cat").of(parts, [0.3, 2.0])
    assert (len(made.a), made.scale) == (5, 1.0)
    assert torch.allclose(product(made), 0.3 * product(parts[0]) + 2.0 * product(parts[1]), atol=1e-5)
    assert made.shift is not None
    assert parts[1].shift is not None
    assert torch.allclose(made.shift, -parts[1].shift)


def test_svd_is_the_nearest_of_its_rank() -> None:
    parts = [update(3, seed=1), update(2, seed=2)]
    whole = product(Combination("cat").of(parts, [1.0, 1.0]))
    singular = torch.linalg.svdvals(whole)
    for rank in (1, 2, 4):
        made = Combination("svd", rank=rank).of(parts, [1.0, 1.0])
        assert len(made.a) == rank
        assert torch.allclose((product(made) - whole).norm(), singular[rank:].norm(), atol=1e-4)
    assert len(Combination("svd").of(parts, [1.0, 1.0]).a) == 3


def test_a_convolution_keeps_its_shape() -> None:
    draws = torch.Generator().manual_seed(3)
    parts = [
        LowRankUpdate(
            torch.randn(r, 4, 3, 3, generator=draws), torch.randn(6, r, 1, 1, generator=draws), 0.5, None, "convolution"
        )
        for r in (2, 3)
    ]
    whole = product(parts[0]) + product(parts[1])
    for combination in (Combination("cat"), Combination("svd", rank=5)):
        made = combination.of(parts, [1.0, 1.0])
        assert (made.a.shape, made.b.shape) == ((5, 4, 3, 3), (6, 5, 1, 1))
        assert torch.allclose(product(made), whole, atol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "ties", "dare-linear", "dare-ties", "magnitude-prune"])
def test_factors_of_other_ranks_are_refused_with_the_way_out(kind: str) -> None:
    with pytest.raises(AdapterError, match=r"ranks 2, 3(.|\n)*--combine cat"):
        Combination(kind).of([update(2, seed=1), update(3, seed=2)], [1.0, 1.0])


def test_trimming_keeps_the_largest_entries() -> None:
    tensor = torch.tensor([[0.1, -3.0], [2.0, -0.2], [0.0, 1.0]])
    assert largest(tensor, density=0.5).tolist() == [[0.0, -3.0], [2.0, 0.0], [0.0, 1.0]]
    assert torch.equal(largest(tensor, density=1.0), tensor)


def test_the_elected_sign_decides_who_is_averaged() -> None:
    one, other, third = (
        torch.tensor([3.0, -1.0, 1.0, 0.0]),
        torch.tensor([-1.0, -2.0, -1.0, 0.0]),
        torch.tensor([2.0, 5.0, 0.0, 0.0]),
    )
    merged = in_agreement([one, other, third], [1.0, 1.0, 0.5])
    assert torch.allclose(merged, torch.tensor([(3 + 1) / 2, 2.5, 1.0, 0.0]))


def test_what_is_dropped_follows_the_seed_and_keeps_the_expectation() -> None:
    ones = torch.ones(200, 200)
    found = [dropped_at_random(ones, density=0.3, draws=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert abs(float(found[0].mean()) - 1) < 0.05  # four standard deviations are 0.03
    assert sorted(found[0].unique().tolist()) == pytest.approx([0.0, 1 / 0.3])


@pytest.mark.parametrize(("kind", "plain"), [("dare-linear", "linear"), ("dare-linear-svd", "svd")])
def test_dare_that_keeps_everything_is_the_plain_sum(kind: str, plain: str) -> None:
    parts = [update(3, seed=1), update(3, seed=2)]
    kept = Combination(kind, density=1.0).of(parts, [0.5, 0.5], torch.Generator())
    assert torch.allclose(product(kept), product(Combination(plain).of(parts, [0.5, 0.5])), atol=1e-5)


def test_dare_ties_is_ties_of_what_was_not_dropped() -> None:
    parts = [update(3, seed=1, scale=1.0), update(3, seed=2, scale=1.0)]
    made = Combination("dare-ties", density=0.5).of(parts, [1.0, 1.0], torch.Generator().manual_seed(4))
    draws = torch.Generator().manual_seed(4)
    a = in_agreement([dropped_at_random(p.a, density=0.5, draws=draws) for p in parts], [1.0, 1.0])
    b = in_agreement([dropped_at_random(p.b, density=0.5, draws=draws) for p in parts], [1.0, 1.0])
    assert torch.equal(made.a, a)
    assert torch.equal(made.b, b)
    assert not torch.equal(made.a, weighted_sum([p.a for p in parts], [1.0, 1.0]))


def test_adapters_that_change_no_layer_make_none() -> None:
    """AdaLoRA may have left no layer a rank."""
    with pytest.raises(AdapterError, match=r"change no layer(.|\n)*--target-rank"):
        attachment_of({})
