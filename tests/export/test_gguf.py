"""GGUF files: read back equal, and loaded by another program's rules the same model."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Phi3Config

from conftest import SHARED
from families import FAMILIES, Family, distance, logits, perturb
from proof_runs import change_json
from truetune.adapters import files
from truetune.adapters.inject import attach
from truetune.config.export import ExportConfig
from truetune.config.lora import LoRA
from truetune.config.resolve import resolve
from truetune.errors import ModelError, OutputError, TruetuneError
from truetune.export.gguf import read_keys
from truetune.export.gguf_arch import rope_factors, side_by_side
from truetune.export.gguf_tokenizer import Specials, TokenType, tokenizer_keys
from truetune.recipes import export

gguf = pytest.importorskip("gguf", reason="the gguf extra is not installed")
STORIES = SHARED / "models" / "stories260K"
PHI3 = Family(
    Phi3Config,
    {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "sliding_window": None,
    },
    ("qkv_proj",),
)  # fmt: skip
KNOWN = {name: FAMILIES[name] for name in ("llama", "llama-tied", "mistral", "qwen2", "qwen3", "gemma", "gemma2")}
KNOWN |= {"gpt2": FAMILIES["gpt2"], "phi3": PHI3}
# What transformers takes for granted of an architecture when it reads a GGUF of it.
GRANTED: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 128}, "gemma2": {"head_dim": 256}, "gpt2": {"n_positions": 1024},
}  # fmt: skip


def tokenizer_files(tiny_model: Path, folder: Path) -> None:
    """A byte-level tokenizer is larger than these models' tables; cut to fit."""
    core = json.loads((tiny_model / "tokenizer.json").read_text(encoding="utf-8"))
    kept = {token: number for token, number in core["model"]["vocab"].items() if number < 120}
    core["model"]["vocab"] = kept
    for number, token in enumerate(core["added_tokens"]):
        token["id"] = 120 + number
        kept[token["content"]] = 120 + number
    (folder / "tokenizer.json").write_text(json.dumps(core), encoding="utf-8")
    shutil.copy(tiny_model / "tokenizer_config.json", folder)


def made(family: str, folder: Path, tiny_model: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    model = KNOWN[family].make(**GRANTED.get(family, {}) | changes)
    model.to(dtype).save_pretrained(folder / "base")
    tokenizer_files(tiny_model, folder / "base")
    return folder / "base"


def written(out: Path, **flags: Any) -> dict[str, Any]:
    return export.run(resolve(ExportConfig, file=None, flags={"to": "gguf", "out": str(out), **flags}))


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


def adapted(family: str, base: Path, folder: Path, **settings: Any) -> tuple[Path, Tensor]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    attach(model, LoRA(**settings), seed=3)
    perturb(model)
    files.save(model, folder, base=str(base))
    return folder, logits(model, torch.arange(2, 6)[None])


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
    with pytest.raises(ModelError, match="computes LlamaForCausalLM with silu, and this model has relu"):
        written(tmp_path / "m.gguf", model=str(base))


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


UNIGRAM = {
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


def test_more_tokens_than_rows_are_refused() -> None:
    with pytest.raises(ModelError, match="has a token 3, and the model's table only 3 rows"):
        tokenizer_keys(UNIGRAM, 3, NONE, None)


def test_llama_cpp_answers_as_we_do(tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    if not STORIES.is_dir():
        pytest.skip("needs ../shared/models/stories260K")
    written(tmp_path / "m.gguf", model=str(STORIES))
    theirs = llama_cpp.Llama(str(tmp_path / "m.gguf"), n_ctx=128, verbose=False, n_threads=1)
    tokenizer, model = AutoTokenizer.from_pretrained(STORIES), AutoModelForCausalLM.from_pretrained(STORIES)
    ids = tokenizer("Once upon a time, Lily", return_tensors="pt").input_ids
    assert theirs.tokenize(b"Once upon a time, Lily") == ids[0].tolist()
    ours = model.generate(ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :].tolist()
    answer = theirs.generate(ids[0].tolist(), temp=0.0)
    assert [next(answer) for _ in ours] == ours
