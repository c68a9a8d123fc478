"""Which layers a pattern names, and what is said when it names none."""

from __future__ import annotations

import re

import pytest

from families import FAMILIES
from truetune.adapters.targets import matches, resolve_targets, shortest_names
from truetune.config.lora import LoRA
from truetune.errors import AdapterError


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("q_proj", "model.layers.0.self_attn.q_proj", True),
        ("self_attn.q_proj", "model.layers.0.self_attn.q_proj", True),
        ("proj", "model.layers.0.self_attn.q_proj", False),
        ("q_proj", "q_proj", True),
        ("q_proj", "model.q_proj.inner", False),
        (r".*\.0\..*", "model.layers.0.self_attn.q_proj", True),
        (r"layers\.0", "model.layers.0.self_attn.q_proj", False),
    ],
)
def test_a_name_matches_last_parts_and_an_expression_the_whole_path(pattern: str, path: str, expected: bool) -> None:
    assert matches(pattern, path) is expected


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_is_every_linear_layer_but_the_head(family: str) -> None:
    model = FAMILIES[family].make()
    linear = [path for path, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")]
    head = next(path for path, m in model.named_modules() if m is model.get_output_embeddings())
    assert resolve_targets(model, ["all-linear"]) == [path for path in linear if path != head]


def test_targets_come_once_and_in_the_models_order() -> None:
    model = FAMILIES["llama"].make()
    found = resolve_targets(model, ["v_proj", r".*\.1\..*[qv]_proj", "q_proj"])
    assert [path.removeprefix("model.layers.") for path in found] == [
        f"{n}.self_attn.{name}" for n in (0, 1) for name in ("q_proj", "v_proj")
    ]


def test_a_pattern_that_matches_nothing_is_named_with_the_nearest_and_all_there_are() -> None:
    with pytest.raises(AdapterError) as caught:
        resolve_targets(FAMILIES["llama"].make(), ["v_proj", "q_porj"])
    text = str(caught.value)
    assert text.splitlines()[0] == "--targets: the model has no layer called 'q_porj'"
    assert re.search(r"did you mean +q_proj\n", text)
    for name in ("q_proj x2", "down_proj x2", "embed_tokens x1", "lm_head x1"):
        assert name in text
    assert "--targets all-linear" in text


def test_an_expression_that_matches_nothing_is_named() -> None:
    with pytest.raises(AdapterError, match=r"no layer called 'layers\\\.0\\\.\.\*'"):
        resolve_targets(FAMILIES["llama"].make(), ["q_proj", r"layers\.0\..*"])


@pytest.mark.parametrize(("name", "kind"), [("mlp", "LlamaMLP"), ("self_attn", "LlamaAttention"), ("norm", "RMSNorm")])
def test_a_container_is_told_from_a_layer(name: str, kind: str) -> None:
    with pytest.raises(AdapterError, match=rf"'{name}' is a \w*{kind}, which takes no adapter of its own"):
        resolve_targets(FAMILIES["llama"].make(), [name])


@pytest.mark.parametrize("pattern", ["(q_proj", "*q_proj", "[a"])
def test_an_invalid_expression_is_an_error_that_says_why(pattern: str) -> None:
    with pytest.raises(AdapterError, match=rf"'{re.escape(pattern)}' is no valid regular expression: \w+"):
        resolve_targets(FAMILIES["llama"].make(), [pattern])


def test_names_are_shortened_only_where_they_mean_the_same() -> None:
    model = FAMILIES["gpt2"].make()
    everywhere = [path for path, _ in model.named_modules() if path.endswith("c_proj")]
    assert shortest_names(model, everywhere) == ["c_proj"]
    attention = [path for path in everywhere if "attn" in path]
    assert shortest_names(model, attention) == sorted(attention)


def test_names_between_commas_are_names_and_expressions_keep_theirs() -> None:
    assert LoRA(targets=("q_proj,v_proj", "o_proj")).targets == ("q_proj", "v_proj", "o_proj")
    assert LoRA(targets=(r".*q_proj{1,2}",)).targets == (r".*q_proj{1,2}",)
