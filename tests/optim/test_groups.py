"""What decays, and what learns faster than the rest."""

from __future__ import annotations

import pytest
import torch
from torch.nn import Parameter

from truetune.config.sft import SFTConfig
from truetune.errors import ConfigError
from truetune.optim import choose
from truetune.optim.adamw import adamw
from truetune.optim.groups import parameter_groups
from truetune.train.step import update

KEYS = {
    "base_model.model.q_proj.lora_A.weight": (4, 8),
    "base_model.model.q_proj.lora_B.weight": (8, 4),
    "base_model.model.embed.lora_embedding_A": (4, 20),
    "base_model.model.embed.lora_embedding_B": (8, 4),
    "base_model.model.k_proj.lora_B": (8, 4),  # AdaLoRA's
    "base_model.model.k_proj.lora_E": (4, 1),
    "base_model.model.v_proj.ia3_l": (8, 1),
    "base_model.model.norm.weight": (8,),
}
VECTORS = {"norm.weight", "ia3_l", "lora_E"}


def made() -> dict[str, Parameter]:
    return {key: Parameter(torch.ones(shape)) for key, shape in KEYS.items()}


def names(parameters: dict[str, Parameter], group: dict[str, object]) -> set[str]:
    ids = {id(p) for p in group["params"]}  # type: ignore[attr-defined]
    return {key for key, p in parameters.items() if id(p) in ids}


def test_matrices_decay_and_vectors_do_not_also_where_a_file_holds_them_as_matrices() -> None:
    parameters = made()
    matrices, vectors = parameter_groups(parameters, weight_decay=0.1)
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    assert {key.split(".model.")[1].split(".", 1)[1] for key in names(parameters, vectors)} <= VECTORS | {"weight"}
    assert len(names(parameters, vectors)) == 3
    assert names(parameters, matrices) | names(parameters, vectors) == set(KEYS)
    assert "lr_ratio" not in matrices


def test_the_b_of_a_pair_and_nothing_else_learns_faster() -> None:
    parameters = made()
    groups = parameter_groups(parameters, weight_decay=0.1, lora_plus_ratio=16)
    faster = [group for group in groups if group.get("lr_ratio") == 16]
    assert set().union(*(names(parameters, group) for group in faster)) == {key for key in KEYS if "lora_B" in key}
    assert set().union(*(names(parameters, group) for group in groups)) == set(KEYS)
    assert faster[0]["weight_decay"] == 0.1


@pytest.mark.parametrize("name", ["adamw", *choose.CLASSES])
def test_every_optimizer_keeps_the_ratio_and_the_update_obeys_it(name: str) -> None:
    parameters = made()
    optimizer = choose.optimizer(name, parameters, lr=1.0, weight_decay=0.0, steps=9, lora_plus_ratio=4)
    for p in parameters.values():
        p.grad = torch.ones_like(p)
    update(optimizer, parameters.values(), lr=1e-3, clip=0.0)
    rates = {key: next(g["lr"] for g in optimizer.param_groups if key in names(parameters, g)) for key in KEYS}
    assert rates == {key: 4e-3 if "lora_B" in key else 1e-3 for key in KEYS}
    moved = {key: float((1 - p.detach()).abs().mean()) for key, p in parameters.items()}
    one, other = (f"base_model.model.{key}" for key in ("q_proj.lora_B.weight", "embed.lora_embedding_B"))
    assert moved[one] == pytest.approx(4 * moved[other], rel=5e-3)  # what is left of 1 - p in float32


def test_the_first_step_of_adamw_moves_b_by_the_ratio() -> None:
    parameters = made()
    optimizer = adamw(parameters, lr=1.0, weight_decay=0.0, lora_plus_ratio=16)
    for p in parameters.values():
        p.grad = torch.ones_like(p)
    update(optimizer, parameters.values(), lr=1e-3, clip=1.0)
    for key, p in parameters.items():
        assert float((1 - p.detach()).abs().max()) == pytest.approx(16e-3 if "lora_B" in key else 1e-3, rel=1e-3)


def test_a_method_without_a_pair_has_nothing_to_learn_faster() -> None:
    with pytest.raises(ConfigError, match=r"--method ia3 has no A and B(.|\n)*lora, dora, adalora do"):
        SFTConfig(model="m", data=("d",), method="ia3", lora_plus_ratio=16.0)
    assert SFTConfig(model="m", data=("d",), method="adalora", lora_plus_ratio=16.0).lora_plus_ratio == 16
