"""GGUF files: read back equal, and loaded by another program's rules the same model."""

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from conftest import SHARED
from families import FAMILIES, distance, logits
from gguf_models import GRANTED, KNOWN, adapted, made, tokenizer_files, written
from proof_runs import change_json
from truetune.data.template import Template
from truetune.errors import ModelError, OutputError, TruetuneError
from truetune.export.gguf import read_keys
from truetune.export.gguf_arch import arch_of
from truetune.export.gguf_cuts import check_tokenizer, left_out
from truetune.export.gguf_rope import rope_factors, side_by_side
from truetune.export.gguf_tokenizer import Specials, TokenType, tokenizer_keys
from truetune.export.gguf_vocabulary import Vocabulary
from truetune.models.tokenizer import ChatTokenizer
from truetune.recipes.gguf_words import core_of, reader_of, words_of

gguf = pytest.importorskip("gguf", reason="the gguf extra is not installed")
STORIES = SHARED / "models" / "stories260K"


def dense(tensor: Any) -> Tensor:
    """A tensor of the reader, in float32."""
    values = gguf.dequantize(tensor.data, tensor.tensor_type)
    return torch.from_numpy(numpy.array(values, dtype=numpy.float32))


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    keys, tensors = read_keys(path)
    return keys, {tensor.name: dense(tensor) for tensor in tensors}


@pytest.mark.parametrize("family", KNOWN)
def test_another_reader_computes_the_same(family: str, tmp_path: Path, tiny_model: Path) -> None:
    """transformers undoes what llama.cpp's layout needs by rules of its own; the logits must come out equal."""
    if family == "gemma":
        pytest.skip("transformers reads no GGUF of this architecture; its tensors are compared below")
    base = made(family, tmp_path, tiny_model)
    change_json(base / "tokenizer_config.json", pad_token="<|endoftext|>")  # else another default, beyond the table
    written(tmp_path / "m.gguf", model=str(base))
    there = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32, attn_implementation="eager"
    )
    here = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    for name in ("sliding_window", "layer_types"):  # which it does not read from a GGUF
        if hasattr(here.config, name) and not hasattr(there.config, name):
            setattr(there.config, name, getattr(here.config, name))
    ids = torch.arange(2, 6)[None]  # within the shortest window
    assert distance(logits(there, ids), logits(here, ids)) < 1e-5


@pytest.mark.parametrize("family", KNOWN)
def test_every_tensor_is_there_with_its_values(family: str, tmp_path: Path, tiny_model: Path) -> None:
    base = made(family, tmp_path, tiny_model)
    written(tmp_path / "m.gguf", model=str(base))
    keys, tensors = read(tmp_path / "m.gguf")
    model = KNOWN[family].make(**GRANTED.get(family, {}))
    config, arch = model.config, keys["general.architecture"]
    held = dict(model.named_parameters())  # a tied head once
    assert len(tensors) == len(held)
    assert sum(t.numel() for t in tensors.values()) == sum(p.numel() for p in held.values())
    table = next(p for name, p in held.items() if name.endswith(("embed_tokens.weight", "wte.weight")))
    assert torch.equal(tensors["token_embd.weight"], table)
    assert keys[f"{arch}.block_count"] == 2
    assert keys[f"{arch}.attention.head_count"] == 4
    assert keys[f"{arch}.embedding_length"] == 32
    if family != "gpt2":
        assert keys[f"{arch}.attention.head_count_kv"] == 2
        assert keys[f"{arch}.attention.layer_norm_rms_epsilon"] == pytest.approx(config.rms_norm_eps)
        assert keys[f"{arch}.rope.freq_base"] == pytest.approx(10000.0)
        norm = model.model.norm.weight
        assert torch.equal(tensors["output_norm.weight"], norm + 1 if family.startswith("gemma") else norm)
    if family.startswith("llama"):
        query = held["model.layers.1.self_attn.q_proj.weight"]
        # First values of a head are rows 0-3 there, second ones rows 4-7; here they alternate.
        assert torch.equal(tensors["blk.1.attn_q.weight"][:8], query[[0, 4, 1, 5, 2, 6, 3, 7]])
        assert torch.equal(tensors["blk.1.attn_v.weight"], held["model.layers.1.self_attn.v_proj.weight"])


@pytest.mark.parametrize(("kind", "number"), [("f32", 0), ("f16", 1), ("bf16", 32), ("q8_0", 7)])
def test_each_type_holds_what_it_can(kind: str, number: int, tmp_path: Path, tiny_model: Path) -> None:
    base = made("llama", tmp_path, tiny_model)
    result = written(tmp_path / "m.gguf", model=str(base), gguf_type=kind)
    keys, tensors = read(tmp_path / "m.gguf")
    assert keys["general.file_type"] == number
    weight = KNOWN["llama"].make().state_dict()["model.layers.0.mlp.gate_proj.weight"]
    found = tensors["blk.0.ffn_gate.weight"]
    # Half a unit in the last place of the largest value: 11 and 8 bits, and half a step of 127.
    bound = {"f32": 0.0, "f16": 2**-11, "bf16": 2**-8, "q8_0": 1 / 250}[kind] * weight.abs().max()
    assert (found - weight).abs().max() <= bound
    assert kind == "f32" or not torch.equal(found, weight)
    assert torch.equal(tensors["output_norm.weight"], KNOWN["llama"].make().model.norm.weight)
    assert result["kept_wider"] == (["blk.0.ffn_down.weight", "blk.1.ffn_down.weight"] if kind == "q8_0" else [])


def test_the_checkpoint_keeps_its_own_type(tmp_path: Path, tiny_model: Path) -> None:
    base = made("qwen2", tmp_path, tiny_model, torch.bfloat16)
    assert written(tmp_path / "m.gguf", model=str(base))["type"] == "bf16"
    _, tensors = read(tmp_path / "m.gguf")
    exact = KNOWN["qwen2"].make().to(torch.bfloat16).state_dict()["model.layers.0.mlp.up_proj.weight"].float()
    assert torch.equal(tensors["blk.0.ffn_up.weight"], exact)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_an_adapter_beside_its_base_is_the_merged_model(family: str, tmp_path: Path, tiny_model: Path) -> None:
    base = made(family, tmp_path, tiny_model)
    adapter, _ = adapted(family, base, tmp_path / "adapter", rank=4, rank_pattern=("v_proj=2",) * (family != "gpt2"))
    written(tmp_path / "merged.gguf", model=str(base), adapter=str(adapter))
    written(tmp_path / "base.gguf", model=str(base))
    written(tmp_path / "lora.gguf", model=str(base), adapter=str(adapter), as_adapter=True)
    (_, whole), (_, plain) = read(tmp_path / "merged.gguf"), read(tmp_path / "base.gguf")
    keys, lora = read(tmp_path / "lora.gguf")
    assert keys["general.type"] == "adapter"
    assert keys["adapter.type"] == "lora"
    assert keys["general.architecture"] == family
    changed = {name.removesuffix(".lora_a") for name in lora if name.endswith(".lora_a")}
    assert changed == {name for name in whole if not torch.equal(whole[name], plain[name])}
    for name in changed:
        a, b = lora[f"{name}.lora_a"], lora[f"{name}.lora_b"]
        scale = keys["adapter.lora.alpha"] / len(a)  # as llama.cpp reckons it
        assert torch.allclose(plain[name] + scale * b @ a, whole[name], atol=1e-6)
    assert not list(tmp_path.glob(".*"))  # the merged model on the way is gone


def test_what_llama_cpp_takes_only_merged_is_refused_as_an_adapter(tmp_path: Path, tiny_model: Path) -> None:
    base = made("llama", tmp_path, tiny_model)
    adapter, _ = adapted("llama", base, tmp_path / "adapter", rank=4, trainable=("head",))
    with pytest.raises(TruetuneError, match="parts of the base that were trained in full"):
        written(tmp_path / "lora.gguf", model=str(base), adapter=str(adapter), as_adapter=True)
    assert not (tmp_path / "lora.gguf").exists()


@pytest.mark.parametrize("family", ["bloom", "opt"])
def test_an_unknown_architecture_is_refused_by_name(family: str, tmp_path: Path) -> None:
    FAMILIES[family].make().save_pretrained(tmp_path / "base")
    with pytest.raises(ModelError, match="ForCausalLM can't be written as a GGUF"):
        written(tmp_path / "m.gguf", model=str(tmp_path / "base"))


def test_another_activation_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    base = made("llama", tmp_path, tiny_model, hidden_act="relu")
    with pytest.raises(ModelError, match=r"computes LlamaForCausalLM otherwise(.|\n)*silu(.|\n)*relu"):
        written(tmp_path / "m.gguf", model=str(base))


def test_a_full_disk_leaves_no_folder(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kept").mkdir()
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(total=1, used=1, free=0))
    for folder in ("new", "kept"):
        with pytest.raises(OutputError, match="full"):
            written(tmp_path / folder / "m.gguf", model=str(tiny_model))
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


LAYERS = ["full_attention", "full_attention"]
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
PART = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "part of a head": ("qwen2", {"rope_parameters": PART}, "rotates whole heads of this architecture, and .* 50%"),
    "llama3 elsewhere": ("qwen3", {"rope_parameters": LLAMA3}, "of kind 'llama3'"),
    "yarn's ramp": ("llama", {"rope_parameters": YARN | {"beta_fast": 16.0}}, "this model has 16"),
    "yarn's cut": ("llama", {"rope_parameters": YARN | {"truncate": False}}, "32, 1, False"),
    "a head's width": ("qwen2", {"head_dim": 16}, "a width of 8"),
    "biases": ("qwen3", {"attention_bias": True}, "adds biases"),
    "a head of its own": ("gemma", {"tie_word_embeddings": False}, "takes the table"),
    "a scale": ("gemma2", {"query_pre_attn_scalar": 64}, "scales queries by 256"),
    "a cap": ("gemma2", {"query_pre_attn_scalar": 256, "attn_logit_softcapping": None}, "caps logits"),
    "windows": ("gemma2", {"query_pre_attn_scalar": 256, "layer_types": LAYERS}, "every other layer"),
    "gpt2's scale": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scales attention"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_detail_that_llama_cpp_computes_otherwise_is_refused(what: str, tmp_path: Path) -> None:
    family, changes, said = REFUSED[what]
    config = KNOWN[family].config(**KNOWN[family].settings | GRANTED.get(family, {}) | changes)
    config.architectures = [type(KNOWN[family].make(**GRANTED.get(family, {}))).__name__]
    with pytest.raises(ModelError, match=said):
        arch_of(config)


def test_gemma_2_with_46_layers_has_a_scale_of_its_own() -> None:
    settings = KNOWN["gemma2"].settings | {"num_hidden_layers": 46, "architectures": ["Gemma2ForCausalLM"]}
    assert arch_of(KNOWN["gemma2"].config(**settings, query_pre_attn_scalar=8)).name == "gemma2"  # 32 / 4 heads
    with pytest.raises(ModelError, match="scales queries by 8"):
        arch_of(KNOWN["gemma2"].config(**settings, query_pre_attn_scalar=256))


def test_a_window_that_llama_cpp_leaves_out_bounds_the_text(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = made("mistral", tmp_path, tiny_model)  # a window of 4
    written(tmp_path / "m.gguf", model=str(base))
    assert read_keys(tmp_path / "m.gguf")[0]["llama.context_length"] == 4
    assert "no sliding window for llama: up to 4 tokens" in capsys.readouterr().err
    whole = made("mistral", tmp_path / "whole", tiny_model, sliding_window=None)
    written(tmp_path / "whole.gguf", model=str(whole))
    assert read_keys(tmp_path / "whole.gguf")[0]["llama.context_length"] == 64
    part = made("qwen2", tmp_path / "part", tiny_model, use_sliding_window=True, sliding_window=8, max_window_layers=1)
    written(tmp_path / "part.gguf", model=str(part))
    assert read_keys(tmp_path / "part.gguf")[0]["qwen2.context_length"] == 8


def test_another_rope_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    base = made("llama", tmp_path, tiny_model, rope_parameters=rope)
    with pytest.raises(ModelError, match="of kind 'dynamic'"):
        written(tmp_path / "m.gguf", model=str(base))


def test_llama_3_frequencies_are_those_of_transformers() -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_theta": 500000.0,
    }  # fmt: skip
    config = FAMILIES["llama"].config(**FAMILIES["llama"].settings | {"head_dim": 64, "rope_parameters": rope})
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    factors = rope_factors(config)
    assert factors is not None
    plain = 500000.0 ** -(torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    assert torch.allclose(plain / factors, theirs.double(), rtol=1e-5)
    assert 1.0 == factors[0] < factors[-1] == 8.0


def test_pairs_of_a_rotation_come_side_by_side() -> None:
    rows = torch.arange(8)[:, None]  # two heads of width four
    assert side_by_side(rows, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_values_beyond_float16_are_refused(tmp_path: Path, tiny_model: Path) -> None:
    model = KNOWN["llama"].make()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e6
    model.save_pretrained(tmp_path / "base")
    tokenizer_files(tiny_model, tmp_path / "base")
    with pytest.raises(ModelError, match="float16 can't"):
        written(tmp_path / "m.gguf", model=str(tmp_path / "base"), gguf_type="f16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_a_file_that_is_there_is_not_touched(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "m.gguf").write_text("mine")
    with pytest.raises(OutputError, match="is there already"):
        written(tmp_path / "m.gguf", model=str(tiny_model))
    assert (tmp_path / "m.gguf").read_text() == "mine"


def test_a_byte_level_tokenizer_says_all_of_itself(tmp_path: Path, tiny_model: Path) -> None:
    written(tmp_path / "m.gguf", model=str(tiny_model))
    keys, _ = read_keys(tmp_path / "m.gguf")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    own = {key.removeprefix("tokenizer.ggml."): value for key, value in keys.items() if "tokenizer" in key}
    assert own["model"] == "gpt2"
    assert own["pre"] == "gpt-2"
    assert own["tokens"] == tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    assert own["token_type"][-3:] == [TokenType.CONTROL] * 3
    assert set(own["token_type"][:-3]) == {TokenType.NORMAL}
    assert own["eos_token_id"] == tokenizer.eos_token_id
    assert own["eot_token_id"] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert own["add_bos_token"] is False
    assert own["tokenizer.chat_template"] == tokenizer.chat_template


@pytest.mark.skipif(not STORIES.is_dir(), reason="needs ../shared/models/stories260K")
def test_sentencepiece_joins_as_its_scores_say(tmp_path: Path) -> None:
    """Joining what scores highest, as llama.cpp does, gives the ids that the tokenizer gives."""
    written(tmp_path / "m.gguf", model=str(STORIES))
    keys, _ = read_keys(tmp_path / "m.gguf")
    assert keys["tokenizer.ggml.model"] == "llama"
    tokens, scores = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.scores"]
    types = keys["tokenizer.ggml.token_type"]
    assert types[:4] == [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, TokenType.BYTE]
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    for text in ("Once upon a time, there was a cat.", "Lily said: 'No!'", "zebra quiz\nnew line"):
        with_blank = " " * keys["tokenizer.ggml.add_space_prefix"] + text
        assert joined(with_blank, tokens, scores) == tokenizer(text, add_special_tokens=False)["input_ids"]


def joined(text: str, tokens: list[str], scores: list[float]) -> list[int]:
    """SentencePiece's BPE, the slow and obvious way."""
    ids = {token: number for number, token in enumerate(tokens)}
    parts = list(text.replace(" ", "▁"))
    while pairs := [(-scores[ids[a + b]], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ids]:
        _, at = min(pairs)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [n for part in parts for n in ([ids[part]] if part in ids else [ids[f"<0x{b:02X}>"] for b in part.encode()])]


UNIGRAM: dict[str, Any] = {
    "model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["▁a", -1.5], ["b", -2.5]]},
    "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAEC"},
    "pre_tokenizer": {"type": "Metaspace", "prepend_scheme": "always"},
    "added_tokens": [{"id": 3, "content": "<tool>", "special": False}],
}
NONE = Specials(None, None, None, None, False, False)


def test_unigrams_keep_their_scores() -> None:
    keys = tokenizer_keys(UNIGRAM, 5, NONE, None)
    own = {key.removeprefix("tokenizer.ggml."): value for key, value in keys.items()}
    assert own["model"] == "t5"
    assert own["tokens"] == ["<unk>", "▁a", "b", "<tool>", "[PAD4]"]
    assert own["scores"][:3] == [0.0, -1.5, -2.5]
    types = (TokenType.UNKNOWN, TokenType.NORMAL, TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.UNUSED)
    assert own["token_type"] == list(types)
    assert own["precompiled_charsmap"] == [0, 1, 2]
    assert own["add_space_prefix"] is True


JOINED = [
    UNIGRAM["normalizer"],
    {"type": "Strip", "strip_left": False, "strip_right": True},
    {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"},
]


def test_blanks_in_a_row_become_one_where_llama_cpp_can_be_told() -> None:
    key = "tokenizer.ggml.remove_extra_whitespaces"
    whole = UNIGRAM | {"normalizer": {"type": "Sequence", "normalizers": JOINED}}
    assert tokenizer_keys(whole, 5, NONE, None)[key] is True
    assert left_out(whole, prefixed=True) == []
    for lacking in (JOINED[1:], JOINED[:1] + JOINED[2:]):  # the characters' table; the blanks at the end
        part = UNIGRAM | {"normalizer": {"type": "Sequence", "normalizers": lacking}}
        assert key not in tokenizer_keys(part, 5, NONE, None)
        assert left_out(part, prefixed=True)[-2:] == [
            "Replace  {2,}", "no second blank in front of a text that begins with one",
        ]  # fmt: skip


DIGITS = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, {"type": "Metaspace"}]}
BLANK = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"}
PIECES = {"type": "BPE", "vocab": {"<0x00>": 0, "a": 1}, "merges": []}


@pytest.mark.parametrize(
    ("found", "model", "cut"),
    [
        ("Digits", PIECES, DIGITS),
        ("Digits", UNIGRAM["model"], DIGITS),
        ("byte_fallback", {**UNIGRAM["model"], "byte_fallback": True}, UNIGRAM["pre_tokenizer"]),
        ("end_of_word_suffix", {**PIECES, "end_of_word_suffix": "</w>"}, None),
        ("what has no piece is unknown", {**PIECES, "vocab": {"a": 0}}, None),
    ],
)
def test_pieces_of_another_kind_are_refused(found: str, model: Any, cut: Any) -> None:
    """llama.cpp would cut "12" otherwise, call unknown what has bytes, or end where it looks for bytes."""
    with pytest.raises(ModelError, match="has no name for") as error:
        check_tokenizer({"model": model, "pre_tokenizer": cut})
    assert found in str(error.value)
    check_tokenizer({"model": PIECES, "pre_tokenizer": BLANK})  # as Gemma's


def test_a_cut_without_a_name_is_refused() -> None:
    core = {
        "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": r"\w+"}}, {"type": "ByteLevel", "use_regex": False},
        ]},
    }  # fmt: skip
    with pytest.raises(ModelError, match=r"in a way that llama\.cpp has no name for"):
        tokenizer_keys(core, 1, NONE, None)
    with pytest.raises(ModelError, match="kind WordLevel"):
        tokenizer_keys({"model": {"type": "WordLevel"}}, 1, NONE, None)


@pytest.mark.parametrize("to", ["gguf", "ollama"])
def test_a_tokenizer_that_can_t_be_written_is_refused_before_anything_is(
    to: str, tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = made("llama", tmp_path, tiny_model)
    adapter, _ = adapted("llama", base, tmp_path / "adapter", rank=4)
    cut = {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "a"}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ]}  # fmt: skip
    change_json(base / "tokenizer.json", pre_tokenizer=cut)
    with pytest.raises(ModelError, match="has no name for"):
        written(tmp_path / "out", model=str(base), adapter=str(adapter), to=to, as_adapter=to == "ollama")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
    assert "merge" not in capsys.readouterr().err
    written(tmp_path / "lora.gguf", model=str(base), adapter=str(adapter), as_adapter=True)  # it holds no tokenizer


def test_an_adapter_whose_model_can_t_be_written_is_not_left_alone(tmp_path: Path, tiny_model: Path) -> None:
    base = made("llama", tmp_path, tiny_model)
    adapter, _ = adapted("llama", base, tmp_path / "adapter", rank=4)
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="float16 can't"):
        written(tmp_path / "out", model=str(base), adapter=str(adapter), to="ollama", as_adapter=True,
                gguf_type="f16", allow_mismatch=("base",))  # fmt: skip
    assert not list((tmp_path / "out").rglob("*.gguf"))


def pieces() -> ChatTokenizer:
    """SentencePiece's BPE with a blank in front of the first text alone, as transformers has Llama 2's."""
    core = Tokenizer(models.BPE(vocab={"<s>": 0, "▁": 1, "a": 2, "▁a": 3, "<0x00>": 4}, merges=[("▁", "a")]))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.add_special_tokens(["<s>"])
    return ChatTokenizer(PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="<s>"))


def test_a_blank_in_front_of_the_first_text_alone() -> None:
    """llama.cpp puts it in front of every text between special tokens, or of none."""
    tokenizer = pieces()
    assert tokenizer.encode(["a<s>a"]) == [[3, 0, 2]]
    for template, prefix in (("<s>{{ messages[0].content }}", False), ("{{ messages[0].content }}", True)):
        keys = words_of(tokenizer, Template("own", template), {}, 5)
        assert keys["tokenizer.ggml.add_space_prefix"] is prefix
        remarks = left_out(core_of(tokenizer), prefixed=prefix)
        assert remarks == ["no second blank in front of a text that begins with one",
                           "a blank in front of the first text alone"] * prefix  # fmt: skip
        cut = reader_of(Vocabulary(keys), tokenizer)
        assert cut("a<s>a") == ([3, 0, 3] if prefix else [2, 0, 2])
        assert (cut("<s>a a") == tokenizer.encode(["<s>a a"])[0]) is not prefix


def test_more_tokens_than_rows_are_refused() -> None:
    with pytest.raises(ModelError, match="has a token 3, and the model's table only 3 rows"):
        tokenizer_keys(UNIGRAM, 3, NONE, None)
