"""Tiny models of the architectures that are written as GGUF, an adapter on one, and a GGUF with something changed."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Phi3Config

from families import FAMILIES, Family, logits, perturb
from truetune.adapters import files
from truetune.adapters.inject import attach
from truetune.config.export import ExportConfig
from truetune.config.lora import LoRA
from truetune.config.resolve import resolve
from truetune.export.gguf import read_keys
from truetune.recipes import export

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


def adapted(family: str, base: Path, folder: Path, **settings: Any) -> tuple[Path, Tensor]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    attach(model, LoRA(**settings), seed=3)
    perturb(model)
    files.save(model, folder, base=str(base))
    return folder, logits(model, torch.arange(2, 6)[None])


def rewritten(
    source: Path, to: Path, *, keys: Mapping[str, Any] | None = None, tensors: Mapping[str, Tensor | None] | None = None
) -> Path:
    """A copy of a file of float32 with keys and tensors that are others, or with None gone."""
    known, held = read_keys(source)
    known = {key: value for key, value in (known | dict(keys or {})).items() if value is not None}
    bodies: dict[str, Any] = {tensor.name: tensor.data.copy() for tensor in held}
    bodies |= {name: body if body is None else body.numpy() for name, body in (tensors or {}).items()}
    to.unlink(missing_ok=True)
    writer = gguf.GGUFWriter(to, known.pop("general.architecture"))
    adders = {bool: writer.add_bool, str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}
    for key, value in known.items():
        adders.get(type(value), writer.add_array)(key, value)
    for name, body in bodies.items():
        if body is not None:
            writer.add_tensor(name, body)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return to
