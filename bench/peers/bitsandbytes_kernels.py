"""bitsandbytes' functions, asked one by one (``answers.py``). Runs in the peer's own environment."""

from __future__ import annotations

from answers import Job, digest, parameters, serve, state_bytes, weight
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.optim import AdamW8bit


def quantize(shape: list[int], dtype: str, double: bool) -> Job:
    """A weight to NF4."""
    dense = weight(shape, dtype)
    return Job(
        lambda: quantize_4bit(dense, blocksize=64, compress_statistics=double, quant_type="nf4"),
        lambda result: {"digest": digest(result[0])},
    )


def dequantize(shape: list[int], dtype: str, double: bool) -> Job:
    """And back, into the type it came from."""
    codes, state = quantize_4bit(weight(shape, dtype), blocksize=64, compress_statistics=double, quant_type="nf4")
    return Job(lambda: dequantize_4bit(codes, state), lambda result: {"digest": digest(result)})


def optim(tensors: int, values: int) -> Job:
    """A step of AdamW with moments in 8 bits."""
    optimizer = AdamW8bit(parameters(tensors, values), lr=1e-4)
    return Job(optimizer.step, lambda _: {"state_bytes": state_bytes(optimizer)})


if __name__ == "__main__":
    serve({"quantize": quantize, "dequantize": dequantize, "optim": optim})
