"""Packed weights under the names and in the bytes of bitsandbytes' checkpoints (version 0.50), both ways.

A 4-bit weight ``P`` is ``P`` (uint8 [n/2, 1]), ``P.absmax``, ``P.quant_map``, ``P.quant_state.bitsandbytes__nf4`` (JSON
in bytes) and, double quantised, ``P.nested_absmax`` and ``P.nested_quant_map``. An 8-bit one is ``P`` (int8 [out, in])
with ``SCB`` and ``weight_format`` beside it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from truetune.errors import QuantizationError
from truetune.ops import codebooks
from truetune.ops.blockwise_4bit import Nested, Packed4
from truetune.ops.codebooks import Kind4

STATE = ".quant_state.bitsandbytes__"
NESTED_BLOCK = 256
# The offset's digits vary; the JSON is filled up with spaces, so that a file can be laid out before it is computed.
_STATE_BYTES = 320


def packed_weights(names: Collection[str]) -> dict[str, str]:
    """Name of each packed weight among a checkpoint's tensors → its kind: ``int8``, or as its 4-bit state says.

    Stacks of experts' matrices are among them (``quant.experts``), whose names need not end in ``weight``.
    """
    states = (name.partition(STATE) for name in names if STATE in name)
    found = {weight: kind for weight, _, kind in states}
    scales = [name.removesuffix(".SCB") for name in names if name.endswith(".SCB")]
    found |= {stem if stem in names else f"{stem}.weight": "int8" for stem in scales}
    return {weight: kind for weight, kind in found.items() if weight in names}


def parts_of(weight: str, names: Iterable[str]) -> dict[str, str]:
    """Part of a packed linear layer, as ``QuantLinear.fill`` takes it → what it is called among ``names``.

    Args:
        weight: the name there of the layer's weight (``….q_proj.weight``).
    """
    stem = weight.removesuffix("weight")
    return {name.removeprefix(stem): name for name in names if name.startswith(stem) and name != f"{stem}bias"}


def of_packed4(packed: Packed4) -> dict[str, Tensor]:
    """Suffix of the weight's name → tensor."""
    nested = packed.nested
    facts: dict[str, Any] = {
        "quant_type": packed.kind,
        "blocksize": packed.blocksize,
        "dtype": str(packed.dtype).removeprefix("torch."),
        "shape": list(packed.shape),
    }
    result = {"": packed.codes.view(-1, 1), ".quant_map": codebooks.four_bit(packed.kind)}
    if nested is None:
        assert packed.absmax is not None
        result[".absmax"] = packed.absmax
    else:
        facts |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": nested.offset.item()}
        result[".absmax"] = nested.codes
        result[".nested_absmax"] = nested.absmax
        result[".nested_quant_map"] = codebooks.dynamic(signed=True)
    text = json.dumps(facts).ljust(_STATE_BYTES).encode()
    result[STATE + packed.kind] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return result


def planned4(
    kind: Kind4, shape: tuple[int, int], *, blocksize: int, double: bool
) -> dict[str, tuple[torch.dtype, int]]:
    """Suffix → ``(dtype, values)`` of what ``of_packed4`` will give for a weight of this shape; codes are [.., 1]."""
    values = shape[0] * shape[1]
    blocks = -(-values // blocksize)
    wide = torch.float32
    result = {"": (torch.uint8, -(-values // 2)), ".quant_map": (wide, 16)}
    if double:
        result[".absmax"] = (torch.uint8, blocks)
        result[".nested_absmax"] = (wide, -(-blocks // NESTED_BLOCK))
        result[".nested_quant_map"] = (wide, 256)
    else:
        result[".absmax"] = (wide, blocks)
    result[STATE + kind] = (torch.uint8, _STATE_BYTES)
    return result


def packed4_of(tensors: Mapping[str, Tensor], path: str) -> Packed4:
    """The reverse of ``of_packed4``; ``quant_storage`` of another dtype holds the same bytes.

    Raises:
        QuantizationError: parts are missing, of the wrong size, or of a form that this version doesn't know.
    """
    name = path or "weight"
    state = next((key for key in tensors if key.startswith(STATE)), None)
    if state is None or "" not in tensors or ".absmax" not in tensors:
        raise QuantizationError(
            f"{name}: not a whole 4-bit weight",
            ("found", ", ".join(sorted(f"weight{key}" for key in tensors))),
            ("expected", f"weight, weight.absmax and weight{STATE}nf4 or …fp4"),
        )
    facts = _facts(tensors[state], name)
    kind, blocksize, shape = facts["quant_type"], facts["blocksize"], tuple(facts["shape"])
    if f"{STATE}{kind}" != state or kind not in ("nf4", "fp4"):
        raise QuantizationError(f"{name}: quantised as {kind!r}", ("expected", "nf4 or fp4"))
    _check_map(tensors, ".quant_map", codebooks.four_bit(kind), name)
    codes = tensors[""].contiguous().view(torch.uint8).view(-1)
    values = shape[0] * shape[1] if len(shape) == 2 else -1
    blocks = -(-values // blocksize)
    if len(codes) != -(-values // 2) or tensors[".absmax"].numel() != blocks:
        raise QuantizationError(
            f"{name}: {len(codes):,} bytes of codes and {tensors['.absmax'].numel():,} scales",
            ("expected", f"{-(-values // 2):,} and {blocks:,} for {list(shape)} in blocks of {blocksize}"),
        )
    nested = _nested_of(tensors, facts, blocks, name)
    absmax = None if nested else tensors[".absmax"].float()
    return Packed4(codes=codes, absmax=absmax, nested=nested, kind=kind, blocksize=blocksize, shape=shape,
                   dtype=getattr(torch, facts["dtype"]))  # fmt: skip


def _nested_of(tensors: Mapping[str, Tensor], facts: Mapping[str, Any], blocks: int, name: str) -> Nested | None:
    if (".nested_absmax" in tensors) != ("nested_offset" in facts):
        raise QuantizationError(
            f"{name}: not a whole 4-bit weight: its scales are quantised",
            ("expected", "weight.nested_absmax, and a nested_offset in its quantisation state"),
        )
    if "nested_offset" not in facts:
        return None
    _check_map(tensors, ".nested_quant_map", codebooks.dynamic(signed=True), name)
    absmax, size, offset = tensors[".nested_absmax"].float(), facts.get("nested_blocksize"), facts["nested_offset"]
    if size != NESTED_BLOCK:
        raise QuantizationError(f"{name}: scales quantised in blocks of {size}, not {NESTED_BLOCK}")
    if absmax.numel() != -(-blocks // NESTED_BLOCK):
        raise QuantizationError(
            f"{name}: {absmax.numel():,} scales of scales", ("expected", f"{-(-blocks // NESTED_BLOCK):,}")
        )
    return Nested(tensors[".absmax"], absmax, torch.tensor(float(offset)))


def _facts(state: Tensor, name: str) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = json.loads(bytes(state.tolist()))
        if not isinstance(getattr(torch, facts["dtype"]), torch.dtype):
            raise TypeError("dtype")
        if not all(type(size) is int and size > 0 for size in (facts["blocksize"], *facts["shape"])):
            raise ValueError(f"sizes {facts['shape']} in blocks of {facts['blocksize']}")
        _ = facts["quant_type"], float(facts.get("nested_offset", 0))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise QuantizationError(
            f"{name}: its quantisation state is no JSON that bitsandbytes writes: {error}"
        ) from None
    return facts


def _check_map(tensors: Mapping[str, Tensor], key: str, expected: Tensor, name: str) -> None:
    found = tensors.get(key)
    # Triton kernels wrote FP4 values rounded to four digits.
    if found is not None and not torch.allclose(found.float().cpu(), expected, rtol=0.0, atol=2e-4):
        raise QuantizationError(
            f"{name}: its codes stand for other values than the standard ones ({key})",
            ("way out", "quantise the original model again: truetune quantize MODEL OUT --quant nf4"),
        )
