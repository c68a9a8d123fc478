"""Where LoftQ finds the weights that quantising took away: in whatever files the base lies in."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from truetune.adapters.loftq import original_weight
from truetune.errors import AdapterError

PATH = "model.layer"


class Model(nn.Module):
    """A model that knows the folder it came from."""

    base_model_prefix = "model"

    def __init__(self, folder: Path | None, *, transposed: bool = False) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layer = nn.Linear(4, 3)
        self.model.layer.transposed = transposed
        self.config = None if folder is None else type("Config", (), {"name_or_path": str(folder)})()


def weight() -> Tensor:
    return torch.arange(12.0).view(3, 4)


@pytest.mark.parametrize("name", ["model.layer.weight", "layer.weight"])
def test_a_file_may_leave_the_models_prefix_out(name: str, tmp_path: Path) -> None:
    save_file({name: weight()}, tmp_path / "model.safetensors")
    assert torch.equal(original_weight(Model(tmp_path), PATH), weight())


def test_or_have_one_that_the_model_has_not(tmp_path: Path) -> None:
    save_file({"model.layer.weight": weight()}, tmp_path / "model.safetensors")
    inner = Model(tmp_path)
    inner.layer = inner.model.layer
    assert torch.equal(original_weight(inner, "layer"), weight())


def test_a_shard_is_found_by_the_index(tmp_path: Path) -> None:
    save_file({"model.layer.weight": weight()}, tmp_path / "two.safetensors")
    save_file({"model.other.weight": -weight()}, tmp_path / "one.safetensors")
    index = {"weight_map": {"model.other.weight": "one.safetensors", "model.layer.weight": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    assert torch.equal(original_weight(Model(tmp_path), PATH), weight())


def test_a_transposed_layers_weight_is_turned(tmp_path: Path) -> None:
    save_file({"model.layer.weight": weight().T.contiguous()}, tmp_path / "model.safetensors")
    assert torch.equal(original_weight(Model(tmp_path, transposed=True), PATH), weight())


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (None, "has none"),
        ({"elsewhere.weight": weight()}, f"holds no weight of {PATH}"),
        ({"model.layer.weight": weight().to(torch.uint8)}, f"holds {PATH} packed"),
    ],
)
def test_what_is_not_there_is_said(tensors: dict[str, Tensor] | None, message: str, tmp_path: Path) -> None:
    if tensors:
        save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(AdapterError, match=message) as caught:
        original_weight(Model(tmp_path), PATH)
    assert "--quant" in str(caught.value)


def test_a_model_of_no_folder_is_refused() -> None:
    with pytest.raises(AdapterError, match="the base's own weights are needed"):
        original_weight(Model(None), PATH)
