"""A checkpoint of packed random weights, written without ever having been dense.

``python -m bench.quant.big_checkpoint LAYERS TOKENIZER FOLDER`` makes Llama-2-7B's shape with so many of its 32 layers;
the tokenizer is copied from another model's folder.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from bench.shapes import Shape
from truetune.checkpoint.header import PlannedTensor
from truetune.checkpoint.shards import ShardWriter
from truetune.config.quant import QuantRecipe
from truetune.export.quantize import config_of
from truetune.models.load import skeleton
from truetune.ops.blockwise_4bit import NESTED, Nested, Packed4
from truetune.quant import bnb_state
from truetune.quant.replace import quantisable

LLAMA_2_7B = Shape(
    hidden=4096,
    inner=11_008,
    layers=32,
    heads=32,
    kv_heads=32,
    head_dim=128,
    vocab=32_000,
    context=4096,
    rope_theta=1e4,
)
RECIPE = QuantRecipe(kind="nf4", double=True)
# A block's largest value: about what it is among 64 of normal weights with a deviation of 0.02.
_SCALE, _SPREAD = 0.05, 0.01


def make(shape: Shape, tokenizer: Path, folder: Path) -> None:
    """Write ``folder``, one tensor at a time, every layer with numbers of its own; the head is not tied.

    Raises:
        OutputError: the disk has too little space.
    """
    torch.manual_seed(0)
    config = LlamaConfig(**shape.config() | {"tie_word_embeddings": False})
    config.architectures = ["LlamaForCausalLM"]
    model = skeleton(config, dtype=torch.bfloat16)
    config.quantization_config = config_of(RECIPE, model, torch.bfloat16)
    packed = {f"{path}.weight" for path in quantisable(model)}
    shapes: Mapping[str, Any] = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    folder.mkdir(parents=True)
    plan = [tensor for name, size in shapes.items() for tensor in _planned(name, size, name in packed)]
    with ShardWriter(folder, plan) as writer:
        for name, size in shapes.items():
            for part, tensor in _packed(name, size) if name in packed else [(name, _dense(size))]:
                writer.write(part, tensor)
    for file in tokenizer.glob("tokenizer*.json"):
        shutil.copy(file, folder)
    (folder / "config.json").write_text(json.dumps(config.to_dict(), default=str), encoding="utf-8")


def _planned(name: str, size: tuple[int, ...], is_packed: bool) -> Iterator[PlannedTensor]:
    if not is_packed:
        yield PlannedTensor(name, torch.bfloat16, size)
        return
    rows, columns = size
    parts = bnb_state.planned4("nf4", (rows, columns), blocksize=RECIPE.blocksize, double=RECIPE.double)
    for suffix, (dtype, values) in parts.items():
        yield PlannedTensor(name + suffix, dtype, (values,) if suffix else (values, 1))


def _packed(name: str, size: tuple[int, ...]) -> Iterator[tuple[str, Tensor]]:
    values = size[0] * size[1]
    blocks = values // RECIPE.blocksize
    nested = Nested(_bytes(blocks), torch.full((-(-blocks // NESTED),), _SPREAD), torch.tensor(_SCALE))
    weight = Packed4(_bytes(values // 2), None, nested, "nf4", RECIPE.blocksize, size, torch.bfloat16)
    yield from ((name + suffix, tensor) for suffix, tensor in bnb_state.of_packed4(weight).items())


def _dense(size: tuple[int, ...]) -> Tensor:
    """Norms are 1, the tables random."""
    return torch.ones(size, dtype=torch.bfloat16) if len(size) == 1 else torch.randn(size).mul_(0.02).bfloat16()


def _bytes(count: int) -> Tensor:
    """Random ones, drawn eight at a time."""
    wide = torch.randint(-(2**63), 2**63 - 1, (-(-count // 8),))
    return wide.view(torch.uint8)[:count].clone()


if __name__ == "__main__":
    make(dataclasses.replace(LLAMA_2_7B, layers=int(sys.argv[1])), Path(sys.argv[2]), Path(sys.argv[3]))
