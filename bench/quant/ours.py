"""truetune's side of the kernels, asked one by one: ``TRUETUNE_KERNELS=native python -m bench.quant.ours``."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.peers.answers import Job, digest, parameters, serve, state_bytes, weight
from truetune.ops import codebooks
from truetune.ops.blockwise_4bit import Packed4, dequantize_4bit, quantize_4bit


def quantize(shape: list[int], dtype: str, double: bool) -> Job:
    """A weight to NF4."""
    dense = weight(shape, dtype)
    return Job(lambda: quantize_4bit(dense, double=double), lambda packed: {"digest": digest(packed.codes)})


def dequantize(shape: list[int], dtype: str, double: bool) -> Job:
    """And back, into the type it came from."""
    packed = quantize_4bit(weight(shape, dtype), double=double)
    return Job(lambda: dequantize_4bit(packed), lambda result: {"digest": digest(result)})


def naive(shape: list[int], dtype: str, double: bool) -> Job:
    """The same by the formula, as one would write it down first."""
    packed = quantize_4bit(weight(shape, dtype), double=double)
    return Job(lambda: by_the_formula(packed), lambda result: {"digest": digest(result)})


def by_the_formula(packed: Packed4) -> Tensor:
    """codebook[code] · absmax; for whole blocks."""
    nibbles = torch.stack([packed.codes >> 4, packed.codes & 15], dim=1).view(-1)
    values = codebooks.four_bit(packed.kind)[nibbles.long()].view(-1, packed.blocksize)
    return (values * packed.scales()[:, None]).to(packed.dtype).view(packed.shape)


def optim(tensors: int, values: int) -> Job:
    """A step of AdamW with moments in 8 bits."""
    from truetune.optim import AdamW8bit

    optimizer = AdamW8bit(parameters(tensors, values), lr=1e-4)
    return Job(optimizer.step, lambda _: {"state_bytes": state_bytes(optimizer)})


if __name__ == "__main__":
    serve({"quantize": quantize, "dequantize": dequantize, "naive": naive, "optim": optim})
