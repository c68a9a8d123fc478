"""A GGUF read back is the model it was written from; what it says otherwise of that model is named."""

from pathlib import Path
from typing import Any

import pytest
import torch

from gguf_models import GRANTED, KNOWN, adapted, made, rewritten, written
from truetune.errors import AdapterError, ModelError, TruetuneError
from truetune.export import gguf_read
from truetune.export.gguf_arch import arch_of
from truetune.export.gguf_rope import halves_apart, side_by_side
from truetune.export.gguf_vocabulary import Vocabulary, differences
from truetune.models import load

gguf = pytest.importorskip("gguf", reason="the gguf extra is not installed")


def shapes(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", KNOWN)
def test_every_weight_comes_back(family: str, tmp_path: Path, tiny_model: Path) -> None:
    base = made(family, tmp_path, tiny_model)
    written(tmp_path / "m.gguf", model=str(base))
    model = KNOWN[family].make(**GRANTED.get(family, {}))
    config = load.load_config(str(base))
    file, arch = gguf_read.read_file(tmp_path / "m.gguf"), arch_of(config)
    assert file.kind == "gguf-f32"
    found = dict(gguf_read.weights(file, arch, config, shapes(model)))
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        # A norm of Gemma's is stored one higher, and rounded there.
        assert torch.allclose(found[name], parameter, rtol=0, atol=2e-7 if arch.norm_plus_one else 0), name
    assert gguf_read.other_hyperparameters(file, arch, config, 128) == []


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_lora_is_what_was_merged(family: str, tmp_path: Path, tiny_model: Path) -> None:
    base = made(family, tmp_path, tiny_model)
    adapter, _ = adapted(family, base, tmp_path / "adapter", rank=4)
    written(tmp_path / "merged.gguf", model=str(base), adapter=str(adapter))
    written(tmp_path / "lora.gguf", model=str(base), adapter=str(adapter), as_adapter=True)
    model = KNOWN[family].make(**GRANTED.get(family, {}))
    config = load.load_config(str(base))
    arch, wanted = arch_of(config), shapes(model)
    merged = dict(gguf_read.weights(gguf_read.read_file(tmp_path / "merged.gguf"), arch, config, wanted))
    changes = dict(gguf_read.updates(gguf_read.read_file(tmp_path / "lora.gguf"), arch, config, wanted))
    plain = dict(model.named_parameters())
    assert changes.keys() == {name for name in plain if not torch.equal(plain[name], merged[name])} != set()
    for name, change in changes.items():
        assert torch.allclose(plain[name] + change, merged[name], atol=1e-6), name


def test_tensors_that_are_missing_or_too_many_are_named_at_once(tmp_path: Path, tiny_model: Path) -> None:
    base = made("llama", tmp_path, tiny_model)
    written(tmp_path / "m.gguf", model=str(base))
    wrong = rewritten(tmp_path / "m.gguf", tmp_path / "wrong.gguf", tensors={
        "blk.0.ffn_up.weight": None, "extra.weight": torch.zeros(2), "output_norm.weight": torch.zeros(7),
    })  # fmt: skip
    model, config = KNOWN["llama"].make(), load.load_config(str(base))
    with pytest.raises(ModelError, match=r"missing blk\.0\.ffn_up.*left over extra.*misshaped output_norm.*\[7\]"):
        list(gguf_read.weights(gguf_read.read_file(wrong), arch_of(config), config, shapes(model)))


def test_a_lora_that_does_not_fit_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    base = made("llama", tmp_path, tiny_model)
    adapter, _ = adapted("llama", base, tmp_path / "adapter", rank=4)
    written(tmp_path / "lora.gguf", model=str(base), adapter=str(adapter), as_adapter=True)
    model, config = KNOWN["llama"].make(), load.load_config(str(base))
    for change, said in (
        ({"blk.0.attn_q.weight.lora_a": None}, r"half a pair blk\.0\.attn_q"),
        ({"x.weight.lora_a": torch.zeros(4, 2), "x.weight.lora_b": torch.zeros(2, 4)}, r"no such layer x\.weight"),
        ({"blk.0.attn_q.weight.lora_b": torch.zeros(9, 4)}, r"misshaped blk\.0\.attn_q"),
    ):
        file = gguf_read.read_file(rewritten(tmp_path / "lora.gguf", tmp_path / "wrong.gguf", tensors=change))
        with pytest.raises(AdapterError, match=said):
            list(gguf_read.updates(file, arch_of(config), config, shapes(model)))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        (
            "rope.freq_base",
            500000.0,
            "llama.rope.freq_base is 500000.0 in the file, and the trained model's is 1",
        ),
        ("attention.layer_norm_rms_epsilon", 1e-5, "layer_norm_rms_epsilon is 9.99"),
        ("attention.head_count_kv", 4, "head_count_kv is 4"),
        ("rope.scaling.type", "yarn", "rope.scaling.type is yarn in the file, and the trained model's is linear"),
        ("rope.scaling.factor", 4.0, "rope.scaling.factor is 4.0"),
        ("attention.scale", 0.5, "attention.scale is 0.5 in the file, and the trained model's is not there"),
        ("attention.head_count", None, "head_count is not there in the file"),
        ("rope.freq_base", None, ""),  # what llama.cpp takes then is the same
        ("attention.head_count_kv", [2, 2], ""),  # a value for each layer
        ("context_length", 9, ""),
    ],
)
def test_a_hyperparameter_that_is_another(key: str, value: Any, said: str, tmp_path: Path, tiny_model: Path) -> None:
    base = made("llama", tmp_path, tiny_model)
    written(tmp_path / "m.gguf", model=str(base))
    config = load.load_config(str(base))
    file = gguf_read.read_file(rewritten(tmp_path / "m.gguf", tmp_path / "wrong.gguf", keys={f"llama.{key}": value}))
    found = " | ".join(gguf_read.other_hyperparameters(file, arch_of(config), config, 128))
    assert (said in found) if said else found == ""


def test_other_rope_factors_are_named(tmp_path: Path, tiny_model: Path) -> None:
    rope = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32, "rope_theta": 10000.0,
    }  # fmt: skip
    base = made("llama", tmp_path, tiny_model, rope_parameters=rope)
    written(tmp_path / "m.gguf", model=str(base))
    config = load.load_config(str(base))
    for change, said in (({}, ""), ({"rope_freqs.weight": torch.ones(4)}, "other factors"),
                         ({"rope_freqs.weight": None}, "is not in the file")):  # fmt: skip
        file = gguf_read.read_file(rewritten(tmp_path / "m.gguf", tmp_path / "wrong.gguf", tensors=change))
        found = gguf_read.other_hyperparameters(file, arch_of(config), config, 128)
        assert (said in found[0]) if said else found == []


def test_numbers_that_were_not_measured_are_no_kind(tmp_path: Path, tiny_model: Path) -> None:
    class Tensor:
        tensor_type = gguf.GGMLQuantizationType.IQ2_XS
        shape = (32, 32)

    with pytest.raises(TruetuneError, match="holds weights as IQ2_XS"):
        assert gguf_read.GGUFFile(tmp_path / "m.gguf", {}, {"a": Tensor()}).kind


def test_rows_come_apart_as_they_came_together() -> None:
    rows = torch.arange(24.0).reshape(12, 2)
    assert torch.equal(halves_apart(side_by_side(rows, 3), 3), rows)
    assert not torch.equal(halves_apart(rows, 3), rows)


OWN = {
    "model": "gpt2", "pre": "gpt-2", "tokens": ["a", "b", "<x>", "[PAD3]"], "token_type": [1, 1, 3, 5],
    "merges": ["a b"], "eos_token_id": 2, "add_bos_token": False, "add_space_prefix": False,
}  # fmt: skip


def vocabulary(**changes: Any) -> Vocabulary:
    known = {name: value for name, value in (OWN | changes).items() if value is not None}
    return Vocabulary({f"tokenizer.ggml.{name}": value for name, value in known.items()})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, ""),
        ({"add_space_prefix": None, "add_bos_token": None}, ""),  # as llama.cpp takes them
        ({"tokens": ["a", "b", "<x>", "any name"]}, ""),  # a row without a token
        ({"tokens": ["a", "c", "<x>", "[PAD3]"]}, "1 tokens are others, such as 1: 'c', and was 'b'"),
        ({"tokens": ["a", "b"]}, "such as 2: not there"),
        ({"token_type": [1, 1, 1, 5]}, "'<x>' would be read as plain text"),
        ({"token_type": [1, 1, 4, 5]}, ""),
        ({"pre": "llama-bpe"}, "how texts are cut into words"),
        ({"merges": ["b a"]}, "joins pieces by other rules"),
        ({"add_eos_token": True}, "every prompt would end in the end token"),
        ({"model": "llama"}, "the kind of tokenizer"),
    ],
)
def test_a_tokenizer_that_reads_otherwise(changes: dict[str, Any], said: str) -> None:
    found = " | ".join(differences(vocabulary(**changes), vocabulary()))
    assert (said in found) if said else found == ""


def test_scores_count_by_their_order_where_pieces_are_joined() -> None:
    own = {"model": "llama", "merges": None, "add_space_prefix": True, "scores": [-1.0, -0.0, -9.0, -9.0]}
    ours = vocabulary(**own)
    assert differences(vocabulary(**own | {"scores": [-7.0, -3.0, 0.0, 0.0]}), ours) == []
    assert "scores differ" in differences(vocabulary(**own | {"scores": [-0.0, -1.0, -9.0, -9.0]}), ours)[0]
    unigrams = own | {"model": "t5"}
    changed = vocabulary(**unigrams | {"scores": [-1.5, -0.0, -9.0, -9.0]})
    assert "scores differ" in differences(changed, vocabulary(**unigrams))[0]


def test_where_a_text_begins_and_an_answer_ends() -> None:
    plain = vocabulary()
    assert (plain.opening, plain.framed("ab"), plain.stop_ids) == ("", "ab", {2})
    opening = vocabulary(add_bos_token=True, bos_token_id=2)
    assert opening.framed("ab") == opening.framed("<x>ab") == "<x>ab"
    assert vocabulary(pre="llama-bpe", add_bos_token=None, bos_token_id=2).opening == "<x>"
    known = vocabulary(tokens=["a", "b", "<x>", "<|im_end|>"], eot_token_id=0, eom_token_id=1)
    assert known.stop_ids == {0, 1, 2, 3}
    assert vocabulary(model="llama", eos_token_id=None).get("eos_token_id") == 2
