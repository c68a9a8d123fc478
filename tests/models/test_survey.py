"""What a survey finds out: which models keep packed rows apart, and which layers are what they look like."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama import modeling_llama as llama

from fused_models import FAMILIES, FUSABLE, adapted, by_definition, farthest, made, state_of, step
from step_models import _CONFIGS, PACKED, family
from truetune.errors import ModelError
from truetune.models.layers import decoder_layers
from truetune.models.survey import survey

GPT2_PACKS = Version(transformers.__version__) >= Version("5.3")


@pytest.mark.parametrize("name", PACKED)
def test_segments_are_supported_where_they_stay_apart(name: str) -> None:
    if name == "gpt2" and not GPT2_PACKS:
        pytest.skip("GPT-2 of transformers before 5.3 does not hand the borders of segments down")
    assert survey(family(name)).packs


@pytest.mark.parametrize("name", ["bloom", "gpt-oss", *([] if GPT2_PACKS else ["gpt2"])])
def test_segments_are_refused_where_the_attention_is_of_another_kind_or_gets_no_borders(name: str) -> None:
    assert not survey(family(name)).packs


@pytest.mark.parametrize("name", ["llama", "gpt-oss", "bloom"])
def test_asking_leaves_the_model_as_it_was(name: str) -> None:
    model = family(name)
    before = model.config._attn_implementation
    survey(model)
    assert model.training
    assert model.config._attn_implementation == before
    assert all(p.grad is None for p in model.parameters())


_WINDOWED = {
    "PhimoeConfig": {"sliding_window": 16, "num_local_experts": 2, "num_experts_per_tok": 1},
    "DogeConfig": {"sliding_window": 16},
    "Llama4TextConfig": {"attention_chunk_size": 16, "num_local_experts": 2, "num_experts_per_tok": 1,
                         "intermediate_size_mlp": 48, "interleave_moe_layer_step": 1},
    "MistralConfig": {"sliding_window": 16},
    "Gemma2Config": {"sliding_window": 16},
}  # fmt: skip


def windowed(name: str, **settings: Any) -> PreTrainedModel:
    config = getattr(transformers, name)(**{**_CONFIGS["llama"][1], **_WINDOWED[name], **settings})
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")  # type: ignore[no-any-return]


@pytest.mark.parametrize("longest", [None, 17, 100])
@pytest.mark.parametrize("name", ["PhimoeConfig", "DogeConfig", "Llama4TextConfig"])
def test_a_window_that_is_only_in_the_mask_is_not_lost(name: str, longest: int | None) -> None:
    assert not survey(windowed(name), longest=longest).packs


@pytest.mark.parametrize("name", ["MistralConfig", "Gemma2Config"])
def test_a_window_that_is_handed_down_is_kept(name: str) -> None:
    assert survey(windowed(name), longest=100).packs


@pytest.mark.parametrize("name", ["PhimoeConfig", "Llama4TextConfig"])
def test_a_window_that_no_row_exceeds_does_not_matter(name: str) -> None:
    assert survey(windowed(name), longest=16).packs


@pytest.mark.parametrize(
    ("name", "size"), [("PhimoeConfig", "sliding_window"), ("Llama4TextConfig", "attention_chunk_size")]
)
def test_a_window_too_long_to_be_tried_is_noticed(name: str, size: str) -> None:
    model = windowed(name, **{size: 4096})
    assert not survey(model, longest=4097).packs
    assert survey(model, longest=4096).packs
    assert survey(windowed("MistralConfig", sliding_window=4096), longest=4097).packs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_layers_are_fused_in_the_families_that_are_built_so(name: str, dtype: torch.dtype) -> None:
    model = made(name, dtype=dtype).requires_grad_(False)
    found = survey(model)
    assert found.packs == (name != "gpt2" or GPT2_PACKS)
    assert list(found.fusable) == (decoder_layers(model) if name in FUSABLE else [])
    assert found.last is (decoder_layers(model)[-1] if found.packs else None)


HEADS = {"gemma2": (1.0, 3.0), "cohere": (0.5, 0.0), "granite": (0.25, 0.0)}


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_done_to_the_logits_is_known(name: str) -> None:
    head = survey(made(name).requires_grad_(False)).head
    assert head is not None
    assert head.weight is not None
    assert (head.scale, head.softcap) == HEADS.get(name, (1.0, 0.0))


@pytest.mark.parametrize("name", FUSABLE)
@pytest.mark.parametrize("start", ["fresh", "spread"])
def test_the_rounding_of_many_layers_hides_nothing(name: str, start: str) -> None:
    """Each layer of a random model in bfloat16 adds to the differences before it."""
    model = made(name, dtype=torch.bfloat16, num_hidden_layers=24).requires_grad_(False)
    if start == "fresh":
        model = transformers.AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16).requires_grad_(False)
    found = survey(model)
    assert found.packs
    assert found.head is not None
    assert len(found.fusable) == 24


def test_only_the_layers_that_turn_their_queries_are_fused() -> None:
    config = transformers.SmolLM3Config(
        **_CONFIGS["llama"][1] | {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]}
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.requires_grad_(False).parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.15)
    assert list(survey(model).fusable) == decoder_layers(model)[:3]


def test_a_window_and_a_scale_are_handed_on() -> None:
    (_, settings), *_ = survey(made("mistral").requires_grad_(False)).fusable.values()
    assert (settings.window, settings.scale, settings.softcap) == (6, 8**-0.5, None)


class ScaledResidual(llama.LlamaDecoderLayer):
    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
        added = super().forward(hidden_states, **kwargs) - hidden_states
        return hidden_states + 0.9 * added  # type: ignore[no-any-return]


class PostNorm(llama.LlamaDecoderLayer):
    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
        return self.post_attention_layernorm(super().forward(hidden_states, **kwargs))  # type: ignore[no-any-return]


class Shortcut(llama.LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.1 * x  # type: ignore[no-any-return]


class Quieter(llama.LlamaAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        mixed, weights = super().forward(*args, **kwargs)
        return 0.9 * mixed, weights


class Centred(llama.LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states - hidden_states.mean(-1, keepdim=True))  # type: ignore[no-any-return]


class Dropping(llama.LlamaMLP):
    """Computes something else in training alone."""

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(super().forward(x))  # type: ignore[no-any-return]


LOOKALIKES: dict[type[nn.Module], str] = {
    ScaledResidual: "", PostNorm: "", Shortcut: "mlp", Quieter: "self_attn", Centred: "input_layernorm",
}  # fmt: skip


def disguised(kind: type[nn.Module], model: PreTrainedModel) -> PreTrainedModel:
    """The first layer, or a part of it, is of this kind."""
    decoder_layers(model)[0].get_submodule(LOOKALIKES[kind]).__class__ = kind
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", LOOKALIKES)
def test_a_layer_that_looks_like_llama_s_and_computes_something_else_is_not_fused(
    kind: type[nn.Module], dtype: torch.dtype
) -> None:
    model = disguised(kind, made("llama", dtype=dtype).requires_grad_(False))
    assert list(survey(model).fusable) == [decoder_layers(model)[1]]


@pytest.mark.parametrize("kind", LOOKALIKES)
def test_a_model_with_one_such_layer_still_learns_what_its_code_says(kind: type[nn.Module]) -> None:
    model = disguised(kind, adapted("llama"))
    ways = [step(model, recompute=how) for how in ("none", "cheap", "full")]
    plain = step(adapted("llama"))
    truth = by_definition(model)
    assert max(farthest(found, truth) for found in ways) < 1e-5
    assert farthest(plain, truth) > 0.01


def test_a_layer_that_drops_something_in_training_is_not_fused() -> None:
    model = made("llama").requires_grad_(False)
    mlp = decoder_layers(model)[0].mlp
    mlp.__class__, mlp.dropout = Dropping, nn.Dropout(0.5)
    assert list(survey(model).fusable) == [decoder_layers(model)[1]]


def test_attention_that_drops_its_weights_is_not_fused() -> None:
    assert survey(made("llama", attention_dropout=0.1).requires_grad_(False)).fusable == {}


@pytest.mark.parametrize("part", ["input_layernorm", "self_attn.q_proj", "mlp.down_proj"])
def test_a_layer_with_a_trained_part_is_not_fused(part: str) -> None:
    model = made("llama").requires_grad_(False)
    decoder_layers(model)[1].get_submodule(part).requires_grad_(True)
    assert list(survey(model).fusable) == [decoder_layers(model)[0]]


def test_without_layers_to_look_at_nothing_is_fused() -> None:
    class Table(transformers.PreTrainedModel):
        config_class = transformers.LlamaConfig

        def __init__(self) -> None:
            super().__init__(transformers.LlamaConfig(**_CONFIGS["llama"][1]))
            self.table = nn.Embedding(97, 97)

        def get_input_embeddings(self) -> nn.Module:
            return self.table

        def get_output_embeddings(self) -> None:
            return None

        def forward(self, input_ids: Tensor, **_: Any) -> Any:
            return transformers.modeling_outputs.CausalLMOutput(logits=self.table(input_ids))

    found = survey(Table())
    assert found.fusable == {}
    assert found.last is None
    assert found.head is None


@pytest.mark.parametrize("mode", ["training", "evaluating", "mixed"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_a_model_is_left_as_it_was(name: str, mode: str) -> None:
    model = adapted(name).train(mode != "evaluating")
    decoder_layers(model)[0].train(mode == "training")
    before = state_of(model)
    survey(model)
    assert state_of(model) == before


def test_a_model_that_fails_is_left_as_it_was() -> None:
    model = family("llama")
    before = state_of(model)
    model.model.norm.__class__ = Broken
    with pytest.raises(ZeroDivisionError):
        survey(model)
    model.model.norm.__class__ = llama.LlamaRMSNorm
    after = state_of(model)
    assert {key for key in before if after[key] != before[key]} <= {"model"}  # a hook of transformers' own is left


class Broken(llama.LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states / (1 // 0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_model_that_answers_nan_is_refused_by_the_tensors_name(bad: float) -> None:
    model = made("llama")
    name, weight = list(model.named_parameters())[4]
    with torch.no_grad():
        weight.view(-1)[3] = bad
    with pytest.raises(ModelError, match=rf"answers NaN(.|\n)*{name} holds NaN or infinity"):
        survey(model)
