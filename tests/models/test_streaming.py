"""A base that stays on disk: the same gradients to the bit, and at most two of its layers in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from fused_models import Step, same_bits, state_of
from memory_pages import on_linux, present_bytes
from step_models import LENGTHS, VOCAB, rows
from truetune.adapters.inject import attach
from truetune.checkpoint.tensors import open_index
from truetune.config.lora import LoRA
from truetune.config.quant import QuantRecipe
from truetune.data.plan import StepPlan
from truetune.export.quantize import quantize_checkpoint
from truetune.models import load, streaming
from truetune.models.forward import Path as Way
from truetune.models.forward import prepared
from truetune.models.layers import decoder_layers
from truetune.models.streaming import Streams, streamed, streams_of
from truetune.models.survey import survey
from truetune.train.step import accumulate

LAYERS = 6
SHAPE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": LAYERS,
         "num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": False}  # fmt: skip
GPT2 = {"vocab_size": VOCAB, "n_embd": 256, "n_layer": LAYERS, "n_head": 4, "n_positions": 128, "resid_pdrop": 0.0,
        "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # fmt: skip
WAYS: dict[str, dict[str, Any]] = {
    "kept": {},
    "cheap": {"recompute": "cheap"},
    "full": {"recompute": "full"},
    "mixed": {"recompute": "cheap", "full_layers": 3},
    "padded": {"packing": False, "micro_tokens": 100},
    "own code": {"fused": False, "recompute": "full"},
}
Make = Callable[..., PreTrainedModel]


@pytest.fixture(scope="module")
def bases(make_tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints: dense in two dtypes, packed, and of a family whose layers are not fused."""
    folder = tmp_path_factory.mktemp("bases")
    for name, dtype in (("float32", "float32"), ("bfloat16", "bfloat16")):
        make_tiny(folder / name, dtype=dtype, **SHAPE)
    make_tiny(folder / "tied", dtype="bfloat16", **(SHAPE | {"tie_word_embeddings": True}))
    for recipe in (QuantRecipe(kind="nf4", double=True), QuantRecipe(kind="int8")):
        skeleton = load.skeleton(load.load_config(str(folder / "bfloat16")), dtype=torch.bfloat16)
        quantize_checkpoint(folder / "bfloat16", folder / recipe.kind, skeleton, recipe, dtype=torch.bfloat16)
    load.save_model(_gpt2(), folder / "gpt2")
    return {path.name: path for path in folder.iterdir()}


def _gpt2() -> PreTrainedModel:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(**GPT2)).to(torch.bfloat16)


@pytest.fixture
def make(bases: dict[str, Path]) -> Make:
    """``make(base)``: the model as a run loads it, with adapters that are away from their start."""

    def made(name: str, **lora: Any) -> PreTrainedModel:
        dtype = torch.float32 if name == "float32" else torch.bfloat16
        model = load.load_model(str(bases[name]), dtype=dtype).train()
        attach(model, LoRA(rank=4, **lora))
        draw = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if path.endswith("lora_b"):
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw))
        return model

    return made


def step(
    model: PreTrainedModel,
    watch: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    *,
    packing: bool = True,
    micro_tokens: int = sum(LENGTHS),
    **way: Any,
) -> Step:
    """Loss and gradients of a step over all rows, with ``watch`` around it and not around the survey before it."""
    plan = StepPlan.build(
        rows(), batch_size=len(LENGTHS), micro_tokens=micro_tokens, packing=packing, seed=3, epochs=1, max_steps=None
    )
    path = Way(model, survey(model), packing)
    with prepared(path, **way), watch():
        result = accumulate(path.loss, plan.micro_batches(0), seed=3, step=0, autocast=contextlib.nullcontext)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return result.loss, gradients


def streamed_step(model: PreTrainedModel, **way: Any) -> Step:
    with streamed(model):
        return step(model, **way)


@on_linux
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["nf4", "int8", "bfloat16", "gpt2"])
def test_gradients_are_those_of_a_base_in_memory_to_the_bit(name: str, way: str, make: Make) -> None:
    model = make(name, dropout=0.1)
    expected = step(model, **WAYS[way])
    assert any(bool(gradient.abs().sum() > 0) for gradient in expected[1].values())
    assert same_bits(streamed_step(model, **WAYS[way]), expected)


@on_linux
@pytest.mark.parametrize("lora", [{"targets": ("layers.5.mlp.down_proj",)}, {"targets": ("all-linear", "lm_head")}])
def test_adapters_may_be_anywhere(lora: Any, make: Make) -> None:
    model = make("nf4", **lora)
    assert same_bits(streamed_step(model, recompute="cheap"), step(model, recompute="cheap"))


Seen = dict[str, list[int]]


@contextlib.contextmanager
def watched(model: PreTrainedModel, streams: Streams, seen: Seen) -> Iterator[None]:
    """Note what of the layers is in memory before and after each layer's forward, and before its backward."""

    def note(when: str) -> None:
        seen.setdefault(when, []).append(sum(present_bytes(pages) for pages in streams.layers))

    def after(_: Any, args: Any, output: Any) -> None:
        note("after")
        output.register_hook(lambda _: note("backward"))

    layers = decoder_layers(model)
    hooks = [layer.register_forward_pre_hook(lambda *_: note("before")) for layer in layers]
    hooks += [layer.register_forward_hook(after) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def seen_in_a_step(model: PreTrainedModel, streams: Streams, **way: Any) -> Seen:
    seen: Seen = {}
    step(model, lambda: watched(model, streams, seen), **way)
    return seen


@on_linux
@pytest.mark.parametrize("way", ["cheap", "full", "padded"])
@pytest.mark.parametrize("name", ["nf4", "bfloat16"])
def test_two_layers_are_in_memory_at_most(name: str, way: str, make: Make) -> None:
    model = make(name)
    with streamed(model) as streams:
        seen = seen_in_a_step(model, streams, **WAYS[way])
    kept = seen_in_a_step(model, streams, **WAYS[way])
    one = streams.layers[0].nbytes
    # Beside what is noted, the layer that comes is in memory. A fault maps 64 KiB around it, of the neighbours too.
    for when in ("before", "after", "backward"):
        assert len(seen[when]) % LAYERS == 0
        assert max(seen[when]) < one
        assert max(kept[when]) > 5 * one


@on_linux
def test_nothing_is_in_memory_afterwards_and_the_model_is_as_it_was(make: Make) -> None:
    model = make("bfloat16")
    before = state_of(model)
    with streamed(model) as streams:
        step(model)
    assert state_of(model) == before
    assert present_bytes(streams.outside) + sum(present_bytes(pages) for pages in streams.layers) == 0


@on_linux
@pytest.mark.parametrize("name", ["nf4", "bfloat16", "tied"])
def test_all_that_is_frozen_is_streamed(name: str, make: Make) -> None:
    model = make(name)
    streams = streams_of(model)
    # Of a packed weight the code books and the JSON are read and done with: 1,408 bytes, and here it has 32 KB or more.
    assert 0 <= streaming.frozen_bytes(model) - streams.nbytes <= 1500 * 7 * LAYERS * (name == "nf4")
    table = model.get_input_embeddings().weight.nbytes
    assert streams.head.nbytes == table
    assert streams.outside.nbytes >= (1 if name == "tied" else 2) * table


@on_linux
def test_what_is_trained_stays_and_keeps_what_it_learned(make: Make) -> None:
    """In float32 the trained parts lie in the file's pages: written to, they are this process's own."""
    model = make("float32", trainable=("norm",))
    norms = [p for n, p in model.named_parameters() if "norm" in n]
    with streamed(model) as streams:
        held = {t.data_ptr() for pages in (*streams.layers, streams.outside) for t in pages.tensors}
        with torch.no_grad():
            for norm in norms:
                norm.fill_(2.0)
        step(model)
    assert not held & {norm.data_ptr() for norm in norms}
    assert all(bool((norm == 2).all()) for norm in norms)


@pytest.mark.parametrize(
    ("name", "dtype", "share"),
    [("bfloat16", torch.bfloat16, 0.0), ("tied", torch.bfloat16, 0.0), ("bfloat16", torch.float32, 1.0)],
)
def test_what_lies_in_another_dtype_has_to_be_copied(
    name: str, dtype: torch.dtype, share: float, bases: dict[str, Path]
) -> None:
    model = load.skeleton(load.load_config(str(bases[name])), dtype=dtype)
    whole = sum(p.nbytes for p in {id(p): p for p in model.parameters()}.values())
    assert streaming.copied_bytes(model, open_index(bases[name]), dtype) == share * whole
    assert streaming.copied_bytes(model, {}, dtype) == whole


def test_packed_weights_need_no_copy_where_they_are_packed_on_disk(bases: dict[str, Path]) -> None:
    model = load.skeleton(load.load_config(str(bases["nf4"])), dtype=torch.bfloat16)
    load.plan_quantised(model, QuantRecipe(kind="nf4", double=True), dtype=torch.bfloat16)
    packed = sum(module.packed_bytes for module in model.modules() if hasattr(module, "packed_bytes"))
    assert streaming.copied_bytes(model, open_index(bases["nf4"]), torch.bfloat16) == 0
    assert streaming.copied_bytes(model, open_index(bases["bfloat16"]), torch.bfloat16) == packed
