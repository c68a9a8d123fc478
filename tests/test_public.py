"""What ``import truetune`` offers: light, complete, documented, and it works as the design's example says."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import truetune as tt
from truetune.errors import TruetuneError


def test_all_names_what_is_there() -> None:
    assert len(set(tt.__all__)) == len(tt.__all__)
    assert set(tt.__all__) == set(tt._PUBLIC) | set(tt._MODULES)
    assert set(dir(tt)) == {*tt.__all__, "__version__"}
    for name in tt.__all__:
        assert getattr(tt, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'laod'"):
        tt.laod  # noqa: B018


@pytest.mark.parametrize("name", tt.__all__)
def test_every_public_name_is_documented(name: str) -> None:
    thing = getattr(tt, name)
    assert inspect.getdoc(thing)
    if inspect.isclass(thing) or inspect.isfunction(thing):
        assert inspect.getdoc(thing) != inspect.getdoc(object)


def test_every_public_member_of_the_modules_is_documented() -> None:
    members = [getattr(tt.nn, name) for name in tt.nn.__all__]
    members += [
        value for value in vars(tt.errors).values() if inspect.isclass(value) and issubclass(value, TruetuneError)
    ]
    assert all(inspect.getdoc(member) for member in members)


def test_importing_it_loads_no_heavy_library() -> None:
    code = "import sys, truetune; assert not {'torch', 'transformers', 'pydantic', 'rich'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_example_of_the_design_works(tiny_model: Path, alpaca_file: Path, tmp_path: Path) -> None:
    model = tt.load(str(tiny_model))
    untouched = tt.trainable(model)
    made = tt.attach(model, tt.LoRA(rank=4, alpha=8, targets="all-linear"))
    assert len(made.sites) == 14
    assert sum(tt.trainable(model).values()) == sum(p.numel() for p in model.parameters() if p.requires_grad) > 0
    tt.save_adapter(model, str(tmp_path / "adapter"))
    tt.detach(model)
    assert tt.trainable(model) == untouched

    config = tt.SFTConfig(model=str(tiny_model), data=str(alpaca_file), out=str(tmp_path / "out"), max_steps=2, lr=0.1)
    result = tt.sft(config)
    assert result["steps"] == 2

    tt.load_adapter(model, result["result"])
    report = tt.merge(str(tiny_model), result["result"], str(tmp_path / "merged"))
    assert report["changed"] == 14
    ids = torch.arange(12)[None]
    with torch.no_grad():
        live, merged = model(input_ids=ids).logits, tt.load(str(tmp_path / "merged"))(input_ids=ids).logits
        base = tt.load(str(tiny_model))(input_ids=ids).logits
    assert (live - merged).abs().max() < 1e-5 < (live - base).abs().max()


def test_a_layer_works_alone() -> None:
    layer = tt.nn.LoRALinear.from_base(nn.Linear(6, 5), tt.LoRA(rank=2), generator=torch.Generator())
    assert layer(torch.randn(3, 6)).shape == (3, 5)


def test_mistakes_in_python_are_the_same_errors() -> None:
    with pytest.raises(TruetuneError, match="--rank: found 0, expected more than 0"):
        tt.LoRA(rank=0)
    with pytest.raises(TruetuneError, match="there is no folder nowhere"):
        tt.load("nowhere")
