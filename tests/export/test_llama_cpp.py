"""llama.cpp itself reads what was written: the same tokens, the same logits, the same answers as transformers."""

import base64
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from conftest import SHARED
from families import distance, logits
from gguf_models import KNOWN, adapted, made, written
from proof_runs import facts, row_of, trained
from truetune.errors import ConfigError
from truetune.models.tokenizer import ChatTokenizer

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
STORIES = SHARED / "models" / "stories260K"
F32 = 0
# llama.cpp looks GELU up in a table of float16.
BOUNDS = {"gemma": 2e-3, "gemma2": 2e-3, "gpt2": 2e-3}


def opened(path: Path, lora: Path | None = None) -> Any:
    return llama_cpp.Llama(
        str(path), n_ctx=128, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False, type_k=F32, type_v=F32,
        lora_path=str(lora) if lora else None,
    )  # fmt: skip


def scores(theirs: Any, ids: list[int]) -> torch.Tensor:
    theirs.reset()
    theirs.eval(ids)
    return torch.from_numpy(theirs.scores[: len(ids)].copy())


def rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}, "max_position_embeddings": 128}


LONG = {"factor": 4.0, "original_max_position_embeddings": 32}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in KNOWN} | {
    "llama, linear": ("llama", rope("linear", factor=4.0)),
    "llama, yarn": ("llama", rope("yarn", **LONG)),
    "llama, yarn with a factor of its own": ("llama", rope("yarn", attention_factor=0.7, **LONG)),
    "llama, yarn with two scales": ("llama", rope("yarn", mscale=1.0, mscale_all_dim=0.5, **LONG)),
    "qwen2, yarn": ("qwen2", rope("yarn", **LONG)),
    "qwen3, yarn": ("qwen3", rope("yarn", **LONG)),
    "llama, llama3": ("llama", rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0, **LONG)),
    "phi3, part of a head": ("phi3", rope("default", partial_rotary_factor=0.5)),
    "llama, another theta": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, wider heads": ("llama", {"head_dim": 16}),
    "llama, another eps": ("llama", {"rms_norm_eps": 0.1}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "gemma2, wide window": ("gemma2", {"sliding_window": 6}),
    "gpt2, a head of its own": ("gpt2", {"tie_word_embeddings": False}),
}  # fmt: skip


@pytest.mark.parametrize("what", VARIANTS)
def test_its_logits_are_those_of_transformers(what: str, tmp_path: Path, tiny_model: Path) -> None:
    family, changes = VARIANTS[what]
    base = made(family, tmp_path, tiny_model, **changes)
    written(tmp_path / "m.gguf", model=str(base))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    length = 4 if family == "mistral" else 40  # the shortest window that it leaves out
    ids = torch.randint(2, 120, (1, length), generator=torch.Generator().manual_seed(1))
    assert distance(scores(opened(tmp_path / "m.gguf"), ids[0].tolist())[None], logits(model, ids)) < BOUNDS.get(
        family, 1e-4
    )


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2"])
def test_an_adapter_on_the_base_and_merged_is_the_same(family: str, tmp_path: Path, tiny_model: Path) -> None:
    base = made(family, tmp_path, tiny_model)
    adapter, expected = adapted(family, base, tmp_path / "adapter", rank=4)
    for name, flags in (("base", {}), ("merged", {"adapter": str(adapter)}),
                        ("lora", {"adapter": str(adapter), "as_adapter": True})):  # fmt: skip
        written(tmp_path / f"{name}.gguf", model=str(base), **flags)
    ids = list(range(2, 6))
    merged, plain = scores(opened(tmp_path / "merged.gguf"), ids), scores(opened(tmp_path / "base.gguf"), ids)
    both = scores(opened(tmp_path / "base.gguf", tmp_path / "lora.gguf"), ids)
    assert distance(merged[None], expected) < BOUNDS.get(family, 1e-4)
    assert distance(both[None], expected) < BOUNDS.get(family, 1e-4)
    assert distance(plain[None], expected) > 1e-2  # the adapter says something


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0"])
@pytest.mark.skipif(not STORIES.is_dir(), reason="needs ../shared/models/stories260K")
def test_its_answers_are_ours(kind: str, tmp_path: Path) -> None:
    written(tmp_path / "m.gguf", model=str(STORIES), gguf_type=kind)
    theirs = opened(tmp_path / "m.gguf")
    tokenizer, model = AutoTokenizer.from_pretrained(STORIES), AutoModelForCausalLM.from_pretrained(STORIES)
    ids = tokenizer("Once upon a time, Lily", return_tensors="pt").input_ids
    assert theirs.tokenize(b"Once upon a time, Lily") == ids[0].tolist()
    count = 60 if kind == "f32" else 16  # rounding chooses another word sooner or later
    ours = model.generate(ids, max_new_tokens=count, do_sample=False)[0, ids.shape[1] :].tolist()
    assert list(itertools.islice(theirs.generate(ids[0].tolist(), temp=0.0), count)) == ours


TEXTS = (
    "Hello world", "two  blanks   three", "Zürich, 数字123。", "def f(x):\n\treturn x**2\n\n\n", "1,234.5 I'm DON'T",
    "emoji 😀👍🏽 \u200b", "a\r\nb", "Привет עברית", "<|im_start|>user\nhi<|im_end|>\n",
    "[INST] hi [/INST] ok</s>\nnext",
)  # fmt: skip


@pytest.mark.parametrize("name", ["gpt2", "minimind", "tinyllama", "mistral"])
@pytest.mark.skipif(not STORIES.is_dir(), reason="needs ../shared/models")
def test_it_cuts_texts_as_the_tokenizer_does(name: str, tmp_path: Path) -> None:
    """Behind the token that begins a text, as every prompt does where the tokenizer has one."""
    base = Path(shutil.copytree(SHARED / "models" / "tokenizers" / name, tmp_path / "base"))
    hf = AutoTokenizer.from_pretrained(base)
    shape = KNOWN["llama"].settings | {"num_hidden_layers": 1, "vocab_size": len(hf)}
    LlamaForCausalLM(LlamaConfig(**shape, bos_token_id=None, eos_token_id=None, pad_token_id=None)).save_pretrained(
        base
    )
    written(tmp_path / "m.gguf", model=str(base))
    theirs, tokenizer = opened(tmp_path / "m.gguf"), ChatTokenizer.load(str(base))
    for text in TEXTS:
        whole = tokenizer.bos_token + text
        ours = tokenizer.encode([whole])[0]
        assert theirs.tokenize(whole.encode(), add_bos=False, special=True) == ours, text


def charsmap() -> str:
    """A line feed and a tab become a blank: a double array as SentencePiece's, of one level."""
    root, leaf = 256, 512
    units = [0] * 1024
    units[0] = root << 10
    for at, character in enumerate((9, 10)):
        node = root ^ character
        units[node] = (node ^ (leaf + 2 * at)) << 10 | 1 << 8 | character
        units[leaf + 2 * at] = 1 << 31
    table = b"".join(unit.to_bytes(4, "little") for unit in units)
    return base64.b64encode(len(table).to_bytes(4, "little") + table + b" \0").decode()


def unigrams(scheme: str, *, joined: bool) -> dict[str, Any]:
    """``tokenizer.json`` of unigrams that were trained on ``TEXTS``."""
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    if joined:
        table = {"type": "Precompiled", "precompiled_charsmap": charsmap()}
        ends = {"type": "Strip", "strip_left": False, "strip_right": True}
        blanks = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
        whole = json.loads(core.to_str()) | {"normalizer": {"type": "Sequence", "normalizers": [table, ends, blanks]}}
        core = Tokenizer.from_str(json.dumps(whole))
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=special, unk_token="<unk>", show_progress=False)
    core.train_from_iterator([text for text in TEXTS[:6] for _ in range(9)], trainer)
    return dict(json.loads(core.to_str()))


@pytest.mark.parametrize(("scheme", "joined"), [("never", False), ("always", False), ("always", True)])
def test_it_finds_the_unigrams_that_the_tokenizer_does(scheme: str, joined: bool, tmp_path: Path) -> None:
    core, base = unigrams(scheme, joined=joined), tmp_path / "base"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(core)), bos_token="<s>",
                                        eos_token="</s>", unk_token="<unk>")  # fmt: skip
    shape = KNOWN["llama"].settings | {"num_hidden_layers": 1, "vocab_size": len(tokenizer)}
    LlamaForCausalLM(LlamaConfig(**shape, bos_token_id=1, eos_token_id=2)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    written(tmp_path / "m.gguf", model=str(base))
    theirs, ours = opened(tmp_path / "m.gguf"), ChatTokenizer.load(str(base))
    # A blank in front of one that is there already is told of, where no blanks are joined.
    first = [" lead", "  two before", "two behind  ", "\tx\n"] if joined or scheme == "never" else []
    for text in (*TEXTS, *first):
        for whole in (text, "<s>" + text):
            assert theirs.tokenize(whole.encode(), add_bos=False, special=True) == ours.encode([whole])[0], whole


def test_verify_asks_it(tmp_path: Path, tiny_model: Path) -> None:
    run = trained(tiny_model, tmp_path)
    for name, flags in (("whole.gguf", {}), ("both", {"to": "ollama", "as_adapter": True})):
        written(tmp_path / name, adapter=str(run), **flags)
    found = facts(run, tmp_path / "whole.gguf", tmp_path / "both", against="llama.cpp")
    assert found["exit_code"] == 0
    for name in ("whole.gguf", "both"):
        row = row_of(found, tmp_path / name, "llama.cpp")
        assert (row["prompts"], row["answers"], row["kind"]) == ([8, 8], [8, 8], "gguf-f32")
        assert row["logits"]["max_delta"] < 1e-4
    changed = tmp_path / "changed.gguf"
    changed.write_bytes((tmp_path / "whole.gguf").read_bytes()[:-4000])
    found = facts(run, changed, against="llama.cpp")
    assert row_of(found, changed, "llama.cpp")["verdict"] == "unknown"


def test_a_lora_alone_can_t_be_asked(tmp_path: Path, tiny_model: Path) -> None:
    run = trained(tiny_model, tmp_path)
    written(tmp_path / "lora.gguf", adapter=str(run), as_adapter=True)
    found = facts(run, tmp_path / "lora.gguf", against="llama.cpp")
    assert found["exit_code"] == 2
    assert "is a LoRA alone" in row_of(found, tmp_path / "lora.gguf", "llama.cpp")["reasons"][0]
    with pytest.raises(ConfigError, match="no GGUF among the artefacts"):
        facts(run, tmp_path / "merged", against="llama.cpp")
