"""Write a checkpoint with packed weights, tensor by tensor, in bitsandbytes' format, which transformers loads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from truetune.checkpoint.header import PlannedTensor, TensorEntry
from truetune.checkpoint.shards import ShardWriter
from truetune.checkpoint.tensors import load, name_in_checkpoint, open_index
from truetune.config.quant import QuantRecipe
from truetune.errors import ModelError
from truetune.export.difference import squared
from truetune.export.new_folder import appearing, check_out, side_contents
from truetune.ops.allocator import return_freed_memory
from truetune.ops.frozen import is_conv1d
from truetune.quant import bnb_state
from truetune.quant.replace import quantisable, quantised


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
        QuantizationError: weights that are not finite, or a name of ``recipe.skip`` that no layer has.
        OutputError: ``out`` is the base, or not empty, or the disk is full or not writable.
    """
    return_freed_memory()
    entries = open_index(base)
    check_out(base, out)
    layers = _layers(model, recipe, entries)
    if not layers:
        raise ModelError(f"{base}: holds no weight of a linear layer to quantise")
    plan = [planned for entry in entries.values() for planned in _planned(entry, layers, recipe, dtype)]
    total = sum(tensor.nbytes for tensor in plan)
    files = side_contents(base, {"quantization_config": config_of(recipe, model, dtype), "dtype": _name(dtype)}, {})
    errors, done = [0.0, 0.0], 0
    with (
        appearing(out.resolve(), files, total) as partial,
        ShardWriter(partial, plan, max_shard_bytes=max_shard_bytes) as writer,
    ):
        for entry in entries.values():
            for name, tensor in _made(entry, layers, recipe, dtype, errors):
                writer.write(name, tensor)
                done += tensor.nbytes
            if progress is not None:
                progress(done, total)
    before = sum(entry.nbytes for entry in entries.values())
    relative = (errors[0] / errors[1]) ** 0.5 if errors[1] else 0.0
    return QuantizeReport(len(layers), len(entries) - len(layers), before, total, relative)


def config_of(recipe: QuantRecipe, model: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
    """``quantization_config`` of ``config.json``, as transformers reads it."""
    chosen = set(quantisable(model, recipe))
    linear = (path for path, module in model.named_modules() if type(module) is nn.Linear or is_conv1d(module))
    four = recipe.kind != "int8"
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": four,
        "load_in_8bit": not four,
        "bnb_4bit_quant_type": recipe.kind if four else "fp4",
        "bnb_4bit_use_double_quant": recipe.double,
        "bnb_4bit_compute_dtype": _name(dtype),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_threshold": recipe.threshold,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_skip_modules": [path for path in linear if path not in chosen],
    }


def _layers(model: nn.Module, recipe: QuantRecipe, entries: Mapping[str, TensorEntry]) -> dict[str, tuple[str, Any]]:
    """Name of a stored weight → ``(path, layer)``."""
    prefix = getattr(model, "base_model_prefix", "")
    named = {path: name_in_checkpoint(f"{path}.weight", entries, prefix) for path in quantisable(model, recipe)}
    if missing := [path for path, name in named.items() if name is None]:
        raise ModelError(
            f"the files have no tensor {missing[0]}.weight" + (f", and {len(missing) - 1} more" if missing[1:] else ""),
            ("likely", "transformers renames or joins this model's weights while loading, which quantising tensor by "
             "tensor can't follow"),
            ("way out", "--quant with sft or generate, which packs them after that"),
        )  # fmt: skip
    return {name: (path, model.get_submodule(path)) for path, name in named.items() if name}


def _planned(
    entry: TensorEntry, layers: Mapping[str, Any], recipe: QuantRecipe, dtype: torch.dtype
) -> Iterator[PlannedTensor]:
    if entry.name not in layers:
        yield PlannedTensor(entry.name, dtype if entry.dtype.is_floating_point else entry.dtype, entry.shape)
        return
    rows, columns = entry.shape[::-1] if is_conv1d(layers[entry.name][1]) else entry.shape
    stem = entry.name.removesuffix("weight")
    if recipe.kind == "int8":
        yield PlannedTensor(entry.name, torch.int8, (rows, columns))
        yield PlannedTensor(f"{stem}SCB", torch.float32, (rows,))
        yield PlannedTensor(f"{stem}weight_format", torch.uint8, ())
        return
    parts = bnb_state.planned4(recipe.kind, (rows, columns), blocksize=recipe.blocksize, double=recipe.double)
    for suffix, (part_dtype, values) in parts.items():
        yield PlannedTensor(entry.name + suffix, part_dtype, (values, 1) if not suffix else (values,))


def _made(
    entry: TensorEntry, layers: Mapping[str, Any], recipe: QuantRecipe, dtype: torch.dtype, errors: list[float]
) -> Iterator[tuple[str, Tensor]]:
    dense = load(entry)
    if entry.name not in layers:
        yield entry.name, dense.to(dtype) if dense.is_floating_point() else dense
        return
    path, skeleton = layers[entry.name]
    layer = quantised(skeleton, recipe, path, dtype=dtype)
    layer.pack(dense.to(dtype))
    error, norm = squared(layer.frozen_weight().dense(), dense.T if is_conv1d(skeleton) else dense)
    errors[0], errors[1] = errors[0] + error, errors[1] + norm
    stem = entry.name.removesuffix("weight")
    yield from ((stem + name, tensor) for name, tensor in layer.packed().items())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
