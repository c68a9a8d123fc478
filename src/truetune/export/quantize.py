"""Write a checkpoint with packed weights, tensor by tensor, in bitsandbytes' format, which transformers loads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from truetune.checkpoint.header import TensorEntry
from truetune.checkpoint.shards import ShardWriter
from truetune.checkpoint.tensors import name_in_checkpoint, open_index
from truetune.config.quant import QuantRecipe
from truetune.errors import ModelError
from truetune.export.expert_files import matrices_of
from truetune.export.new_folder import appearing, check_out, side_contents
from truetune.export.packing import Dense, Errors, Experts, Item, Layer
from truetune.ops.allocator import return_freed_memory
from truetune.quant.replace import linear_layers, planned_stacks, quantisable
from truetune.quant.stack import OWN, Stack


@dataclass(frozen=True)
class QuantizeReport:
    """What was written: packed and dense tensors, bytes of weights before and after, the error of packing."""

    packed: int
    dense: int
    bytes_before: int
    nbytes: int
    relative_error: float  # |W - dequantised| / |W| over all packed weights (Frobenius)


def quantize_checkpoint(
    base: Path,
    out: Path,
    model: nn.Module,
    recipe: QuantRecipe,
    *,
    dtype: torch.dtype,
    max_shard_bytes: int = 5_000_000_000,
    progress: Callable[[int, int], None] | None = None,
) -> QuantizeReport:
    """Write ``base`` with packed linear layers to the new folder ``out``, holding one tensor at a time.

    Args:
        model: the base's skeleton on the meta device: it says which tensor is a linear layer's weight.
        dtype: of the tensors that stay dense, and what the packed ones dequantise to.
        progress: called after each tensor with the bytes written so far and in all.
    Raises:
        ModelError: no readable safetensors weights, or none of a linear layer under its own name.
        QuantizationError: weights that are not finite or of another shape than the model's, or a name of
            ``recipe.skip`` that no layer has.
        OutputError: ``out`` is the base, or not empty, or the disk is full or not writable.
    """
    return_freed_memory()
    entries = open_index(base)
    check_out(base, out)
    items = _items(model, recipe, entries, dtype)
    packed = sum(not isinstance(item, Dense) for item in items)
    if not packed:
        raise ModelError(f"{base}: holds no weight of a linear layer to quantise")
    plan = [planned for item in items for planned in item.planned()]
    total = sum(tensor.nbytes for tensor in plan)
    files = side_contents(base, {"quantization_config": config_of(recipe, model, dtype), "dtype": _name(dtype)}, {})
    errors, done = Errors(), 0
    with (
        appearing(out.resolve(), files, total) as partial,
        ShardWriter(partial, plan, max_shard_bytes=max_shard_bytes) as writer,
    ):
        for item in items:
            for name, tensor in item.made(errors):
                writer.write(name, tensor)
                done += tensor.nbytes
            if progress is not None:
                progress(done, total)
    before = sum(entry.nbytes for entry in entries.values())
    return QuantizeReport(packed, len(items) - packed, before, total, errors.relative)


def config_of(recipe: QuantRecipe, model: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
    """``quantization_config`` of ``config.json``, as transformers reads it; with packed experts it is our own."""
    experts = planned_stacks(model, recipe, dtype=dtype)
    chosen, four = {*quantisable(model, recipe), *experts}, recipe.kind != "int8"
    could = [path for path, _ in linear_layers(model)]
    could += planned_stacks(model, replace(recipe, skip=()), dtype=dtype)
    return {
        "quant_method": OWN if experts else "bitsandbytes",
        **({"kind": recipe.kind} if experts else {"load_in_4bit": four, "load_in_8bit": not four}),
        "bnb_4bit_quant_type": recipe.kind if four else "fp4",
        "bnb_4bit_use_double_quant": recipe.double,
        "bnb_4bit_compute_dtype": _name(dtype),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_threshold": recipe.threshold,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_skip_modules": [path for path in could if path not in chosen],
    }


def _items(model: nn.Module, recipe: QuantRecipe, entries: Mapping[str, TensorEntry], dtype: torch.dtype) -> list[Item]:
    """What becomes of the tensors, in the order of the files."""
    prefix = str(getattr(model, "base_model_prefix", ""))
    where: dict[str, Item | None] = {}
    for path in quantisable(model, recipe):
        name = name_in_checkpoint(f"{path}.weight", entries, prefix)
        if name is None:
            raise _not_there(f"{path}.weight")
        where[name] = Layer(entries[name], path, model.get_submodule(path), recipe, dtype)
    for path, stack in planned_stacks(model, recipe, dtype=dtype).items():
        where |= _of_stack(path, stack, entries, prefix)
    found = (where.get(name, Dense(entry, dtype)) for name, entry in entries.items())
    return [item for item in found if item is not None]


def _of_stack(path: str, stack: Stack, entries: Mapping[str, TensorEntry], prefix: str) -> dict[str, Item | None]:
    """In the place of the first of its tensors the stack, of the others nothing."""
    if name := name_in_checkpoint(path, entries, prefix):
        stack.check(entries[name].shape)
        return {name: Experts(name, stack, whole=entries[name])}
    matrices = matrices_of(path, stack, entries, prefix)
    if not matrices:
        raise _not_there(path)
    first, *others = [entry.name for files in matrices for entry in files]
    return {first: Experts(path, stack, matrices=matrices), **dict.fromkeys(others)}


def _not_there(name: str) -> ModelError:
    return ModelError(
        f"the files have no tensor {name}",
        ("likely", "transformers renames or joins this model's weights while loading, which quantising tensor by "
         "tensor can't follow"),
        ("way out", "--quant with sft or generate, which packs them after that"),
    )  # fmt: skip


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
