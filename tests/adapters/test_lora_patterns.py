"""Ranks and alphas by layer: which name counts, and how they are told to PEFT."""

from typing import Any

import pytest

from families import FAMILIES
from truetune.adapters.inject import adapters, attach
from truetune.adapters.lora_patterns import at_layer, check_patterns, named_by, patterns_of
from truetune.adapters.lora_settings import named
from truetune.config.lora import LoRA
from truetune.errors import AdapterError

PATHS = ("layers.0.q_proj", "layers.0.v_proj", "layers.1.q_proj", "layers.11.q_proj")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("q_proj", {0, 2, 3}),
        ("proj", set()),  # a name is whole, between dots
        ("1.q_proj", {2}),  # and not the end of 11.q_proj
        (r"layers\.\d\.q_proj", {0, 2}),
        ("q_proj|v_proj", {0, 1, 2, 3}),
    ],
)
def test_a_name_matches_the_end_of_a_path(name: str, expected: set[int]) -> None:
    assert {i for i, path in enumerate(PATHS) if named_by(name, path)} == expected


def test_the_first_that_matches_counts_and_the_rest_have_the_default() -> None:
    config = LoRA(rank=8, alpha=16, rank_pattern=("1.q_proj=2", "q_proj=4"), alpha_pattern=("v_proj=3.5",))
    found = [(one.rank, one.alpha) for one in (at_layer(config, path) for path in PATHS)]
    assert found == [(4, 16.0), (8, 3.5), (2, 16.0), (4, 16.0)]
    assert config.rank == 8  # a copy


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank_pattern": ("q_porj=4",)}, "--rank-pattern: 'q_porj' is none of the layers"),
        ({"alpha_pattern": ("[=4",)}, r"--alpha-pattern: '\[' is no valid regular expression"),
    ],
)
def test_a_name_of_nothing_is_refused_with_what_there_is(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message) as caught:
        check_patterns(LoRA(**settings), PATHS)
    if "porj" in message:
        assert "q_proj" in str(caught.value)


@pytest.mark.parametrize(
    ("rank_pattern", "expected"),
    [
        ((), (8, {})),
        (("q_proj=4",), (8, {"q_proj": 4})),
        (("0.self_attn.q_proj=2", "q_proj=4"), (8, {"0.self_attn.q_proj": 2, "q_proj": 4})),
    ],
)
def test_layers_as_they_are_are_described_as_they_were_asked_for(
    rank_pattern: tuple[str, ...], expected: tuple[int, dict[str, int]]
) -> None:
    config = LoRA(rank=8, targets=("q_proj", "v_proj"), rank_pattern=rank_pattern)
    model = FAMILIES["llama"].make()
    attach(model, config)
    found = patterns_of(config, dict(adapters(model)))
    assert (found["r"], found["rank_pattern"]) == expected


def test_layers_that_are_no_longer_as_asked_for_are_described_anew() -> None:
    config = LoRA(rank=8, targets=("q_proj", "v_proj"))
    model = FAMILIES["llama"].make()
    attach(model, config)
    layers: dict[str, Any] = dict(adapters(model))
    for path, layer in layers.items():
        if path.endswith("v_proj"):
            layer.grow(16)
    found = patterns_of(config, layers)
    assert (found["r"], found["rank_pattern"]) == (8, {"v_proj": 16})
    assert found["alpha_pattern"] == {"v_proj": 64}
    assert (
        at_layer(LoRA(rank=8, rank_pattern=named(found["rank_pattern"])), "model.layers.1.self_attn.v_proj").rank == 16
    )


def test_where_leaves_do_not_tell_them_apart_whole_paths_do() -> None:
    config = LoRA(rank=8, targets=("q_proj",))
    model = FAMILIES["llama"].make(num_hidden_layers=3)
    attach(model, config)
    layers: dict[str, Any] = dict(adapters(model))
    layers["model.layers.1.self_attn.q_proj"].grow(16)
    found = patterns_of(config, layers)["rank_pattern"]
    assert found == {r"model\.layers\.1\.self_attn\.q_proj": 16}
    again = LoRA(rank=8, rank_pattern=named(found))
    assert [at_layer(again, path).rank for path in layers] == [8, 16, 8]
