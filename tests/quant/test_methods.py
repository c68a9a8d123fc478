"""Every method that trains beside a packed base does so on every kind of it, as beside the dense weights it holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from families import perturb
from fused_models import farthest, made
from packed import KINDS, dense_twin, packed_layers
from truetune.adapters.inject import attach
from truetune.config.methods import METHODS
from truetune.quant.linear8bit import unrounded
from truetune.quant.replace import replace
from virtual_checks import step

CLOSE = 1e-4
SETTINGS: dict[str, dict[str, Any]] = {"llama-adapter": {"adapter_layers": 2}}
NAMES = [name for name, method in METHODS.items() if method.on_quantised]


def test_there_are_methods_that_train_beside_packed_weights() -> None:
    assert {"lora", "dora", "ia3", "prefix"} <= set(NAMES)
    assert "full" not in NAMES


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_a_method_trains_beside_packed_weights(name: str, kind: str) -> None:
    model = made("llama-bias")
    replace(model, KINDS[kind], dtype=torch.float32)
    dense = dense_twin(model)
    config = METHODS[name].config(**SETTINGS.get(name, {}))
    for one in (model, dense):
        attach(one, config, seed=5)
        perturb(one)
    frozen = {path: layer.weight.clone() for path, layer in packed_layers(model).items()}
    assert len(frozen) == 14
    with unrounded():
        found = step(model, packing=True)
        assert farthest(found, step(dense, packing=True)) < CLOSE
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert found[1].keys() == trained.keys()
    assert step(model, packing=True)[0] == pytest.approx(found[0], rel=0.02 if kind == "int8" else 0.0)
    with torch.no_grad():
        size = 0.02 / torch.cat([g.flatten() for g in found[1].values()]).norm()
        for n, gradient in found[1].items():
            trained[n] -= size * gradient
    with unrounded():
        assert step(model, packing=True)[0] < found[0]
    assert all(torch.equal(layer.weight, frozen[path]) for path, layer in packed_layers(model).items())
