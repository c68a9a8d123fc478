"""The outline of a model by its files, beside the model that transformers makes of its config."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from truetune.adapters.inject import tied_paths
from truetune.checkpoint.tensors import open_index
from truetune.models.by_files import TIED, plain_config
from truetune.models.load import load_config, skeleton
from truetune.models.outline import outline

SMALL = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 32, "pad_token_id": None, "dtype": "bfloat16",
}  # fmt: skip


def made(folder: Path, kind: str, **settings: object) -> Path:
    config = AutoConfig.for_model(kind, **{**SMALL, **settings})
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def layers(model: nn.Module) -> dict[str, tuple[object, ...]]:
    """Path → all that an adapter asks of a layer."""
    found: dict[str, tuple[object, ...]] = {}
    for path, module in model.named_modules():
        kind = next((kind for kind in (nn.Linear, nn.Embedding) if isinstance(module, kind)), None)
        if kind:
            weight, bias = module.weight, getattr(module, "bias", None)
            found[path] = (kind, weight.shape, weight.dtype, None if bias is None else (bias.shape, bias.dtype))
    return found


@pytest.mark.parametrize("tied", [None, True, False])
@pytest.mark.parametrize("kind", sorted(TIED))
def test_it_is_what_transformers_makes(kind: str, tied: bool | None, tmp_path: Path) -> None:
    folder = made(tmp_path, kind, **({} if tied is None else {"tie_word_embeddings": tied}))
    entries = open_index(folder)
    config = plain_config(folder, entries)
    assert config is not None
    ours, theirs = outline(config, entries), skeleton(load_config(str(folder)), dtype=torch.bfloat16)
    assert layers(ours) == layers(theirs)
    assert len(layers(ours)) > 8
    assert {n for n, _ in ours.named_parameters()} == {n for n, _ in theirs.named_parameters()}
    assert tied_paths(ours) == tied_paths(theirs)
    assert bool(tied_paths(ours)) is (TIED[kind] if tied is None else tied)
    assert (ours.base_model_prefix, config.dtype) == (theirs.base_model_prefix, torch.bfloat16)


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "gpt2"}, {"quantization_config": {"quant_method": "x"}}, {"auto_map": {}}, {"dtype": "int8"},
        {"num_hidden_layers": 3}, {"vocab_size": 41}, {"tie_word_embeddings": True}, {"tie_word_embeddings": "no"},
    ],
)  # fmt: skip
def test_what_is_not_certain_is_left_to_transformers(change: dict[str, object], tmp_path: Path) -> None:
    folder = made(tmp_path, "llama")
    entries = open_index(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert plain_config(folder, entries) is None
    path.write_text("{")
    assert plain_config(folder, entries) is None


def test_names_that_transformers_would_change_are_left_to_it(tmp_path: Path) -> None:
    entries = open_index(made(tmp_path, "llama"))
    assert plain_config(tmp_path, entries)
    bare = {name.removeprefix("model."): entry for name, entry in entries.items()}
    assert plain_config(tmp_path, bare) is None
    name = "model.layers.0.input_layernorm.weight"
    assert plain_config(tmp_path, {**entries, name.replace("weight", "gamma"): entries[name]}) is None


def test_a_merge_of_a_plain_base_imports_no_transformers(tmp_path: Path) -> None:
    """Its import takes longer than the merge of a billion weights."""
    base = made(tmp_path / "base", "llama")
    (tmp_path / "make.py").write_text(
        "import sys, torch, truetune as tt\nmodel = tt.load(sys.argv[1])\n"
        "tt.attach(model, tt.LoRA(rank=2))\nfor n, p in model.named_parameters():\n"
        "    if p.requires_grad: torch.nn.init.normal_(p)\ntt.save_adapter(model, sys.argv[2])\n"
    )
    (tmp_path / "merge.py").write_text(
        "import sys\nfrom truetune.cli.main import main\n"
        "code = main(['merge', '--model', sys.argv[1], '--adapter', sys.argv[2], '--out', sys.argv[3]])\n"
        "sys.exit(code or 9 * ('transformers' in sys.modules))\n"
    )
    for script, *names in (("make.py", "adapter"), ("merge.py", "adapter", "out")):
        command = [sys.executable, *map(str, (tmp_path / script, base, *(tmp_path / name for name in names)))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    merged, stored = (open_index(tmp_path / name) for name in ("out", "base"))
    assert list(merged) == list(stored)
