"""Training some of the base's own layers: the last ones, or a few at a time."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from families import FAMILIES
from method_checks import learn
from truetune.adapters.inject import trainable
from truetune.adapters.partial import LayerDraws, at_once, parameters_by_layer, unfreeze
from truetune.config.other_methods import Freeze, Full, Lisa
from truetune.errors import AdapterError
from truetune.optim.adamw import adamw
from truetune.train.hooks import Hooks

LAYERS = {"llama": "num_hidden_layers", "gpt2": "n_layer", "bloom": "n_layer", "neox": "num_hidden_layers"}


def deep(family: str, layers: int = 5) -> Any:
    return FAMILIES[family].make(**{LAYERS[family]: layers})


def trained_layers(model: Any) -> set[int]:
    return {number for number, own in parameters_by_layer(model).items() if any(p.requires_grad for p in own)}


# --- freeze -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", LAYERS)
def test_the_last_layers_are_trained_and_nothing_else(family: str) -> None:
    model = deep(family)
    unfreeze(model, Freeze(train_layers=2))
    assert trained_layers(model) == {3, 4}
    assert all(".3." in name or ".4." in name for name in trainable(model))


def test_a_pattern_chooses_instead() -> None:
    model = deep("llama")
    unfreeze(model, Freeze(train_pattern=r"layers\.[01]\.mlp\.down"))
    assert set(trainable(model)) == {f"model.layers.{n}.mlp.down_proj.weight" for n in (0, 1)}


def test_parts_are_trained_beside_the_layers() -> None:
    model = deep("gpt2")
    unfreeze(model, Freeze(train_layers=0, trainable=("norm", "head")))
    names = set(trainable(model))
    assert {name.split(".")[-2] for name in names} == {"ln_1", "ln_2", "ln_f", "wte"}  # the head is the table


def test_it_learns_and_leaves_the_rest_alone() -> None:
    model = deep("llama", layers=3)
    unfreeze(model, Freeze(train_layers=1))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = learn(model, Freeze())
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert losses[-1] < losses[0] - 0.01
    assert moved == set(trainable(model))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Freeze(train_layers=0), "--train-layers 0: nothing would be trained"),
        (Freeze(train_layers=6), "--train-layers 6: the model has 5 decoder layers"),
        (Freeze(train_pattern="nowhere"), "--train-pattern: 'nowhere' matches no parameter"),
        (Freeze(train_pattern="["), r"--train-pattern: '\[' is no regular expression"),
        (Freeze(trainable=("bias",)), "this model has no bias"),
        (Lisa(lisa_layers=6), "--lisa-layers 6: the model has 5 decoder layers"),
        (Lisa(trainable=("norm",)), "--trainable norm: --method lisa trains all of the base"),
        (Full(trainable=("norm", "head")), "--trainable norm head: --method full trains all of the base"),
    ],
)
def test_what_can_not_be_is_refused_by_its_flag(config: Any, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        unfreeze(deep("llama"), config)


# --- LISA ---------------------------------------------------------------------------------------------------------


def draws(model: Any, *, layers: int = 2, every: int = 3, seed: int = 0) -> LayerDraws:
    config = Lisa(lisa_layers=layers, lisa_every=every)
    unfreeze(model, config)
    return LayerDraws(model, config, seed=seed)


@pytest.mark.parametrize("family", LAYERS)
def test_a_few_layers_are_trained_at_a_time_and_what_is_in_none_always(family: str) -> None:
    model = deep(family)
    drawn = draws(model)
    outside = {n for n, p in model.named_parameters() if all(p is not q for own in drawn.layers.values() for q in own)}
    for step in range(12):
        with drawn.at(step):
            assert trained_layers(model) == drawn.drawn(step)
            assert len(drawn.drawn(step)) == 2
            assert outside <= set(trainable(model))
        assert all(p.requires_grad for p in model.parameters())


def test_layers_are_drawn_by_seed_and_step_alone_and_all_alike() -> None:
    model = deep("llama")
    one, other = draws(model, every=3), draws(model, every=3, seed=1)
    assert [one.drawn(s) for s in range(30)] == [draws(model, every=3).drawn(s) for s in range(30)]
    assert [one.drawn(s) for s in range(30)] != [other.drawn(s) for s in range(30)]
    assert all(one.drawn(s) == one.drawn(s // 3 * 3) for s in range(30))
    counts = Counter(layer for s in range(0, 3000, 3) for layer in one.drawn(s))
    assert sorted(counts) == [0, 1, 2, 3, 4]
    assert max(counts.values()) - min(counts.values()) < 100  # of 400 expected each, give or take 15


def test_a_layer_at_rest_neither_moves_nor_keeps_state() -> None:
    model = deep("llama")
    drawn = draws(model, every=2)
    optimizer = adamw(dict(model.named_parameters()), lr=1e-2, weight_decay=0.1)
    for step in range(8):
        before = {n: [p.detach().clone() for p in own] for n, own in drawn.layers.items()}
        with drawn.at(step, optimizer):
            model(input_ids=torch.arange(12)[None]).logits.logsumexp(-1).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        for number, own in drawn.layers.items():
            moved = [not torch.equal(p, q) for p, q in zip(own, before[number], strict=True)]
            assert all(moved) if number in drawn.drawn(step) else not any(moved)
            assert all((p in optimizer.state) == (number in drawn.drawn(step)) for p in own)
        assert model.model.embed_tokens.weight in optimizer.state
    assert len({frozenset(drawn.drawn(s)) for s in range(8)}) > 1


def test_it_learns() -> None:
    model = deep("gpt2")
    losses = learn(model, Lisa(), hooks=Hooks(around=draws(model, every=2).at))
    assert losses[-1] < losses[0] - 0.01


def test_what_is_trained_at_once_is_counted() -> None:
    model, config = deep("llama"), Lisa(lisa_layers=1)
    unfreeze(model, config)
    whole = sum(trainable(model).values())
    layer = sum(p.numel() for p in parameters_by_layer(model)[0])
    with at_once(model, config, seed=0):
        assert sum(trainable(model).values()) == whole - 4 * layer
    with at_once(model, Full(), seed=0):
        assert sum(trainable(model).values()) == whole
