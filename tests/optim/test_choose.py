"""Optimizers by name."""

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from truetune.config.groups import OPTIMIZERS
from truetune.config.sft import SFTConfig
from truetune.errors import ConfigError
from truetune.optim.choose import CLASSES, optimizer, state_bytes

NAMES = ("adamw", *CLASSES)


def parameters() -> dict[str, Parameter]:
    return {"w": Parameter(torch.ones(90, 70)), "b": Parameter(torch.ones(70)), "row": Parameter(torch.ones(1, 5000))}


def test_the_settings_and_the_table_have_the_same_names() -> None:
    assert sorted(OPTIMIZERS) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_each_is_made_with_the_rate_and_decay_given(name: str) -> None:
    given = parameters()
    found = optimizer(name, given, lr=0.5, weight_decay=0.25, steps=7)
    assert type(found).__name__.lower() == name
    decay = {id(p): group["weight_decay"] for group in found.param_groups for p in group["params"]}
    assert {key: decay[id(p)] for key, p in given.items()} == {"w": 0.25, "b": 0.0, "row": 0.25}
    assert {group["lr"] for group in found.param_groups} == {0.5}


@pytest.mark.parametrize("name", ["ademamix", "ademamix8bit"])
def test_the_slow_mean_comes_in_over_the_whole_run(name: str) -> None:
    (group, _) = optimizer(name, parameters(), lr=0.5, weight_decay=0.0, steps=7).param_groups
    assert (group["t_alpha"], group["t_beta3"]) == (7, 7)


@pytest.mark.parametrize("name", NAMES)
def test_state_takes_what_was_foretold(name: str) -> None:
    given = parameters()
    found = optimizer(name, given, lr=0.5, weight_decay=0.0, steps=7)
    for p in given.values():
        p.grad = torch.ones_like(p)
    found.step()
    taken = sum(
        value.nbytes
        for state in found.state.values()
        for key, value in state.items()
        if isinstance(value, Tensor) and key not in ("step", "unorm_vec")
    )
    assert taken == state_bytes(name, [p.numel() for p in given.values()])


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    for call in (lambda: optimizer("lion8", {}, lr=1.0, weight_decay=0.0, steps=1), lambda: state_bytes("lion8", [])):
        with pytest.raises(ConfigError, match=r"optimizer: found 'lion8'[\s\S]*did you mean   lion"):
            call()
    with pytest.raises(ConfigError, match=r"--optim: found 'adamw8bti', .*; did you mean 'adamw8bit'"):
        SFTConfig(model="m", data="d", optim="adamw8bti")


@pytest.mark.parametrize(
    ("elsewhere", "here"),
    [("adamw_torch", "adamw"), ("adamw_torch_fused", "adamw"), ("adamw_8bit", "adamw8bit"), ("AdamW8bit", "adamw8bit"),
     ("adamw_bnb_8bit", "adamw8bit"), ("lion_8bit", "lion8bit"), ("ademamix_8bit", "ademamix8bit"), ("sgd", "sgd")],
)  # fmt: skip
def test_the_spellings_of_transformers_are_understood(elsewhere: str, here: str) -> None:
    assert SFTConfig(model="m", data="d", optim=elsewhere).optim == here


def test_paged_ones_are_not_pretended() -> None:
    with pytest.raises(ConfigError, match="--optim: found 'paged_adamw_8bit'"):
        SFTConfig(model="m", data="d", optim="paged_adamw_8bit")
