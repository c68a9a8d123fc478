"""One dtype policy for training, evaluating, generating and merging."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from truetune.errors import ConfigError
from truetune.ops.probe import gemm_rate


@dataclass(frozen=True)
class Precision:
    """How a model is stored and computed.

    Attributes:
        storage: dtype of the frozen weights.
        autocast: dtype of the matrix products when it differs from the storage; None when it does not.
        reason: one sentence for the log.
    """

    storage: torch.dtype
    autocast: torch.dtype | None
    reason: str

    def context(self, device: str) -> torch.autocast:
        """A fresh context to run the model in."""
        return torch.autocast(device, dtype=self.autocast or torch.bfloat16, enabled=self.autocast is not None)


def choose_device(setting: str) -> str:
    """``cpu`` or ``cuda``; ``auto`` takes CUDA where there is one.

    Raises:
        ConfigError: cuda on a machine, or with a torch, that has none.
    """
    has_cuda = torch.cuda.is_available()
    if setting == "cuda" and not has_cuda:
        built = torch.version.cuda is not None
        raise ConfigError(
            "--device cuda: there is no CUDA device here"
            if built
            else "--device cuda: this torch was built without it",
            ("way out", "--device cpu, or auto" if built else "--device cpu, or a torch with CUDA from pytorch.org"),
        )
    return ("cuda" if has_cuda else "cpu") if setting == "auto" else setting


def choose_precision(
    setting: str, checkpoint: torch.dtype, *, device: str, trains_base: bool, cpu_bf16_is_fast: bool | None = None
) -> Precision:
    """Decide by the setting, the checkpoint's dtype and what this machine does fast.

    Weights that are themselves trained are kept in float32, because bf16 is too coarse to add small updates to; their
    matrix products still run in the chosen dtype.

    Args:
        setting: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
        cpu_bf16_is_fast: the answer of the probe, when it is known already.
    Raises:
        ConfigError: float16 on a CPU, which computes it slowly and overflows.
    """
    if setting == "float16" and device == "cpu":
        raise ConfigError(
            "--dtype float16: CPUs compute it slowly, and training in it overflows",
            ("way out", "--dtype bfloat16 or float32, or auto"),
        )
    if setting != "auto":
        compute, reason = getattr(torch, setting), "as asked"
    elif checkpoint == torch.float32:
        compute, reason = torch.float32, "the checkpoint's own"
    else:
        fast = cpu_bf16_is_fast if cpu_bf16_is_fast is not None else device != "cpu" or _bf16_wins()
        compute = torch.bfloat16 if fast else torch.float32
        reason = "fastest here by probe" if device == "cpu" else "the checkpoint's own"
    if trains_base and compute != torch.float32:
        return Precision(torch.float32, compute, f"{reason}; trained weights stay in float32")
    return Precision(compute, None, reason)


def _bf16_wins() -> bool:
    """Whether bf16 products are at least as fast as float32's on this CPU."""
    return gemm_rate(torch.bfloat16) >= gemm_rate(torch.float32)


def name_of(dtype: torch.dtype) -> str:
    """``bf16``, ``fp32``, …"""
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, str(dtype))
