"""``tt.load(max_memory=…)``: a base that stays on disk computes what one in memory does, and is never written to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import truetune as tt
from memory_pages import on_linux, present_bytes
from packed import KINDS, quantize
from truetune.errors import ConfigError, ModelError
from truetune.models.streaming import frozen_bytes, keep_on_disk, streams_of

SHAPE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 4,
         "num_key_value_heads": 4, "tie_word_embeddings": False}  # fmt: skip
IDS = torch.arange(1, 41)[None]


@pytest.fixture(scope="module")
def base(make_tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("dense") / "base", dtype="bfloat16", **SHAPE)


@pytest.fixture(scope="module")
def packed(base: Path) -> Path:
    return quantize(base, base.parent / "packed", KINDS["nf4-double"], dtype=torch.bfloat16)


def most_of(model: PreTrainedModel) -> float:
    """MB that two layers fit into, and not all of them."""
    return 0.7 * frozen_bytes(model.requires_grad_(False)) / 1e6


def step(model: PreTrainedModel) -> dict[str, Tensor]:
    """Gradients of a new adapter, and the logits."""
    tt.attach(model, tt.LoRA(rank=4), seed=1)
    logits = model(input_ids=IDS).logits
    logits.float().square().mean().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | {"logits": logits.detach()}


@on_linux
@pytest.mark.parametrize("name", ["base", "packed"])
def test_a_base_on_disk_computes_the_same(name: str, request: pytest.FixtureRequest) -> None:
    folder = str(request.getfixturevalue(name))
    expected, model = step(tt.load(folder, dtype="bfloat16")), tt.load(folder, dtype="bfloat16")
    assert keep_on_disk(model, limit_mb=most_of(model), held_mb=0.0)
    found = step(model)
    assert found.keys() == expected.keys()
    assert len(found) > 6
    assert all(torch.equal(found[key], expected[key]) for key in found)
    layers = streams_of(model).layers
    assert sum(map(present_bytes, layers)) <= layers[0].nbytes + layers[1].nbytes < sum(one.nbytes for one in layers)


@on_linux
def test_what_fits_stays_in_memory(packed: Path) -> None:
    model = tt.load(str(packed), dtype="bfloat16", max_memory="64GB")
    model(input_ids=IDS)
    assert not any(p.requires_grad for p in model.parameters())
    assert all(present_bytes(pages) for pages in streams_of(model).layers)


@on_linux
def test_a_part_that_is_trained_is_refused_before_its_updates_are_lost(base: Path) -> None:
    model = tt.load(str(base), dtype="bfloat16")
    assert keep_on_disk(model, limit_mb=most_of(model), held_mb=0.0)
    model.model.norm.weight.requires_grad_(True)
    with pytest.raises(ModelError, match=r"model\.norm\.weight.*stays on disk"):
        model(input_ids=IDS)


@on_linux
def test_a_base_that_is_packed_while_it_is_read_can_not_stay_there(base: Path) -> None:
    model = tt.load(str(base), quant="nf4", dtype="bfloat16")
    with pytest.raises(ModelError, match="could stay on disk"):
        keep_on_disk(model, limit_mb=0.5, held_mb=0.0)


@pytest.mark.parametrize(
    ("limit", "message"), [("much", "found 'much'"), ("1MB", "1 MB, and [0-9,]+ are needed"), ("0GB", "above zero")]
)
def test_a_limit_that_can_not_be_kept_is_refused(limit: str, message: str, packed: Path) -> None:
    with pytest.raises((ConfigError, ModelError), match=message) as caught:
        tt.load(str(packed), dtype="bfloat16", max_memory=limit)
    assert "max_memory" in str(caught.value)
