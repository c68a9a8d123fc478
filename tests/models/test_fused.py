"""Layers from fused parts learn what the layers' own code learns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from fused_models import FUSABLE, Step, adapted, by_definition, farthest, made, same_bits, step
from reference.norms import distance
from step_models import LENGTHS, rows
from truetune.adapters.inject import attach
from truetune.adapters.lora import LoRALinear
from truetune.adapters.projecting import projection_group
from truetune.config.lora import DoRA
from truetune.data.pack import collate
from truetune.models.forward import Path, prepared
from truetune.models.fused import FusedLayer
from truetune.models.layers import decoder_layers
from truetune.models.survey import survey
from truetune.ops import dispatch
from truetune.ops.native.build import INSTRUCTION_SETS

TIERS = ["reference", *(f"native-{entry.name}" for entry in INSTRUCTION_SETS if entry.present())]
CLOSE = 1e-5  # in float32 every way is 2e-6 from the truth at most


@pytest.fixture(params=[name for name in TIERS if name != "native-avx512_bf16" or "native-amx" not in TIERS])
def tier(request: pytest.FixtureRequest) -> Iterator[str]:
    """The test's kernels run in this tier; of two sets whose every line a third runs too, one is left out."""
    found = dispatch.library.load(request.param.removeprefix("native-")) if request.param != "reference" else True
    if not found:
        pytest.skip(dispatch.library.reason(request.param.removeprefix("native-")))
    with dispatch.forced(request.param):
        yield request.param


@cache
def truth(name: str, dtype: torch.dtype = torch.float32) -> Step:
    return by_definition(adapted(name, dtype=dtype))


def fused_layers(model: PreTrainedModel) -> int:
    return len(survey(model).fusable)


@pytest.mark.parametrize("name", FUSABLE)
def test_every_way_through_the_layers_gives_the_loss_and_gradients_of_the_definition(tier: str, name: str) -> None:
    model = adapted(name)
    assert fused_layers(model) == len(decoder_layers(model)) == 2
    assert len(truth(name)[1]) == 2 * 2 * 7  # A and B of seven projections in two layers
    ways = [step(model, **way) for way in ({}, {"fused": False}, {"packing": False, "micro_tokens": 200})]
    assert max(farthest(found, truth(name)) for found in ways) < CLOSE
    assert farthest(ways[0], ways[1]) < CLOSE
    assert farthest(ways[0], ways[2]) < CLOSE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama-bias", "qwen3"])
def test_what_is_computed_again_is_what_was_computed_to_the_bit(tier: str, name: str, dtype: torch.dtype) -> None:
    model = adapted(name, dtype=dtype, dropout=0.3)
    kept, *again = (step(model, recompute=how) for how in ("none", "cheap", "full"))
    assert all(same_bits(kept, found) for found in again)
    assert same_bits(kept, step(model, recompute="cheap", full_layers=1))


def test_a_layer_that_is_computed_again_has_the_product_that_its_magnitude_learns_from(tier: str) -> None:
    model = made("llama")
    attach(model, DoRA(rank=4, dropout=0.3))
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "lora_b" in path:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(3))
    kept = step(model)
    assert any("down_proj" in path and "magnitude" in path for path in kept[1])
    assert same_bits(kept, step(model, recompute="full"))


@pytest.mark.parametrize("name", ["mistral", "qwen3", "gemma"])
def test_bfloat16_is_no_worse_than_the_layers_own_code(tier: str, name: str) -> None:
    exact = truth(name, torch.bfloat16)

    def whole(found: Step) -> Tensor:
        return torch.cat([found[1][path].flatten() for path in exact[1]])

    model = adapted(name, dtype=torch.bfloat16)
    with dispatch.forced("reference"):
        plain = step(model, packing=False, micro_tokens=200)
    error, allowed = (distance(whole(found), whole(exact)) for found in (step(model), plain))
    assert error < 1.2 * allowed  # some hundred roundings each, of which a few fall otherwise
    assert allowed < 0.05


PARTS = {
    "q": ["q_proj"],
    "q, v": ["q_proj", "v_proj"],
    "o": ["o_proj"],
    "gate": ["gate_proj"],
    "down": ["down_proj"],
    "the last layer": [r".*\.1\..*_proj"],
    "the first layer": [r".*\.0\..*_proj"],
    "k of the last layer": [r".*\.1\..*k_proj"],
}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("part", PARTS)
def test_adapters_on_some_projections_learn_the_same(part: str, dropout: float) -> None:
    model = adapted("llama-bias", targets=PARTS[part], dropout=dropout)
    found = step(model)
    assert farthest(found, step(model, fused=False)) < CLOSE
    assert all(same_bits(found, step(model, recompute=how)) for how in ("cheap", "full"))
    if not dropout:
        assert farthest(found, by_definition(model)) < CLOSE


TRAINED = {("norm",): 0, ("bias",): 0, ("embedding",): 2, ("head",): 2}


@pytest.mark.parametrize("recompute", ["none", "cheap", "full"])
@pytest.mark.parametrize(("parts", "fused"), TRAINED.items(), ids=str)
def test_parts_of_the_base_that_are_trained_learn_in_whatever_layers_can_be_fused(
    parts: Any, fused: int, recompute: Any
) -> None:
    model = adapted("qwen2", trainable=parts)
    assert fused_layers(model) == fused
    found = step(model, recompute=recompute)
    assert farthest(found, by_definition(model)) < CLOSE
    assert any("lora" not in path for path in found[1])


@pytest.mark.parametrize("name", ["llama-bias", "qwen3"])
def test_frozen_weights_get_no_gradient(name: str) -> None:
    model = adapted(name)
    step(model)
    _, gradients = step(model, recompute="cheap")
    assert all("lora_" in path for path in gradients)


class Products(TorchDispatchMode):
    """Counts the matrix products that read a weight, and the rows they have."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {p.data_ptr(): path for path, p in model.named_parameters() if p.ndim == 2}
        self.rows: dict[str, list[int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [t for t in args if isinstance(t, Tensor)]
        for t in tensors:
            if t.data_ptr() in self.names and "mm" in str(func):
                (other,) = [o for o in tensors[-2:] if o is not t]
                self.rows.setdefault(self.names[t.data_ptr()], []).append(other.shape[0])
        return func(*args, **(kwargs or {}))


def products(
    model: PreTrainedModel, examples: tuple[int, ...] = (1, 3, 5), *, full_layers: int = 0
) -> dict[str, list[int]]:
    """The rows of the products that a micro-batch makes with each base weight, by the weight's name in its layer."""
    path, batch = Path(model, survey(model), packing=True), collate(rows(), examples, packing=True)
    with prepared(path, recompute="cheap", full_layers=full_layers), Products(model) as seen:
        path.loss(batch).backward()
    return {name.removeprefix("model.layers."): found for name, found in seen.rows.items() if "lora" not in name}


def test_the_first_layers_are_computed_again_but_for_their_last_product() -> None:
    """Nobody reads what a layer that is computed again ends in."""
    before, after = (products(adapted("llama", layers=3), full_layers=n) for n in (0, 2))
    more = {path: len(after[path]) - len(found) for path, found in before.items() if "proj" in path}
    assert {path for path, n in more.items() if n} == {
        f"{layer}.{part}" for layer in (0, 1) for part in {p[2:] for p in more} if "down_proj" not in part
    }
    assert set(more.values()) == {0, 1}


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_each_frozen_weight_is_read_twice_and_the_first_three_once(name: str) -> None:
    """Nothing below the first projections learns, so they need no gradient of their input."""
    counts = Counter({path: len(found) for path, found in products(adapted(name)).items()})
    first = {path: n for path, n in counts.items() if path.startswith("0.self_attn") and "o_proj" not in path}
    assert set(first.values()) == {1}
    assert {n for path, n in counts.items() if path not in first} == {2}
    assert len(counts) == 14 + 1  # the head too, read once for its logits and once for their gradient


def test_the_last_layer_computes_only_the_wanted_rows_after_its_attention() -> None:
    model, examples = adapted("llama"), (1, 3, 5)
    wanted, everything = collate(rows(), examples, packing=True).trained, sum(LENGTHS[i] for i in examples)
    assert 0 < wanted < everything
    found = products(model, examples)
    for path, counts in found.items():
        late = path.startswith("1.") and ("mlp" in path or "o_proj" in path)
        assert set(counts) == ({wanted} if late or "head" in path else {everything}), path


def test_no_gradient_goes_below_the_lowest_adapter() -> None:
    model = adapted("llama", layers=3, targets=[r".*\.2\..*_proj"])
    entered: list[bool] = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: entered.append(args[0].requires_grad))
        for layer in decoder_layers(model)
    ]
    counts = {path: len(found) for path, found in products(model).items()}
    for hook in hooks:
        hook.remove()
    assert entered[-3:] == [False, False, False]
    assert {n for path, n in counts.items() if path[0] in "01"} == {1}
    assert {n for path, n in counts.items() if path.startswith("2.mlp")} == {2}


def test_a_layer_computes_anything_but_a_packed_row_by_its_own_code() -> None:
    model = adapted("llama").eval()
    ids = rows().example(5)[0].long()[None]
    own = model(input_ids=ids).logits
    path = Path(model, survey(model), packing=True)
    with torch.no_grad(), prepared(path):
        assert isinstance(decoder_layers(model)[0].__dict__["forward"], FusedLayer)
        torch.testing.assert_close(model(input_ids=ids).logits, own)
        cached = model(input_ids=ids[:, :-1], use_cache=True)
        last = model(input_ids=ids[:, -1:], past_key_values=cached.past_key_values).logits
    torch.testing.assert_close(last[0, 0], own[0, -1], atol=1e-5, rtol=1e-5)


def test_the_model_generates_as_before_once_it_is_trained() -> None:
    model = adapted("qwen2")
    prompt = rows().example(1)[0].long()[None]

    def answer() -> list[int]:
        model.eval()
        return model.generate(prompt, max_new_tokens=12, do_sample=False)[0].tolist()  # type: ignore[no-any-return]

    before = answer()
    model.train()
    step(model, recompute="full")
    assert answer() == before


def lora(**settings: Any) -> LoRALinear:
    return LoRALinear.from_base(nn.Linear(4, 4), rank=2, **settings)


class Stored(nn.Linear):
    """Keeps its weight in some form of its own."""


def test_a_group_is_made_of_frozen_linear_maps_that_drop_alike() -> None:
    frozen = nn.Linear(4, 4).requires_grad_(False)
    half_trained = lora()
    assert half_trained.base.bias is not None
    half_trained.base.bias.requires_grad_(True)
    assert projection_group([lora(), frozen], 3) is not None
    assert projection_group([nn.Linear(4, 4)], 3) is None
    assert projection_group([half_trained], 3) is None
    assert projection_group([Stored(4, 4).requires_grad_(False)], 3) is None
    assert projection_group([nn.Identity()], 3) is None
    assert projection_group([lora(dropout=0.1), lora(dropout=0.2)], 3) is None
    assert projection_group([lora(dropout=0.1), lora(dropout=0.1).eval()], 3) is None


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_only_training_drops_in_a_group(dropout: float) -> None:
    one, other = lora(dropout=dropout), lora(dropout=dropout)
    learning = projection_group([one, other], 3)
    still = projection_group([one.eval(), other.eval()], 3)
    assert learning is not None
    assert still is not None
    assert still.keys is None
    assert (learning.keys is None) == (dropout == 0.0)


def test_a_base_without_adapters_is_fused_as_well() -> None:
    model = made("llama").requires_grad_(False)
    batch = collate(rows(), range(len(LENGTHS)), packing=True)
    path = Path(model, survey(model), packing=True)
    with prepared(path, fused=False):
        expected = path.loss(batch)
    with prepared(path):
        torch.testing.assert_close(path.loss(batch), expected)
