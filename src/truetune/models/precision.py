"""One dtype policy for training, evaluating, generating and merging."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from truetune.errors import ConfigError
from truetune.ops.probe import gemm_rate

Trains = Literal["nothing", "adapter", "parts", "base"]


@dataclass(frozen=True)
class Precision:
    """How a model is stored and computed.

    Attributes:
        storage: dtype of the frozen weights.
        autocast: dtype of the matrix products where weights of another dtype take part in them; None where none do.
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
    setting: str,
    checkpoint: torch.dtype,
    *,
    device: str,
    trains: Trains = "nothing",
    because: str = "as asked",
    bf16_is_fast: bool | None = None,
) -> Precision:
    """Decide by the setting, the checkpoint's dtype and what this machine does fast.

    Weights that are themselves trained are kept in float32, because bf16 is too coarse to add small updates to; their
    matrix products still run in the chosen dtype. An adapter widens itself, and the parts of the base that it trains.

    Args:
        setting: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
        trains: ``parts`` is an adapter with parts of the base, ``base`` all of it.
        because: the reason to give for a setting that is not ``auto``.
        bf16_is_fast: whether this device computes bf16 fast, when it is known already.
    Raises:
        ConfigError: float16 on a CPU, which computes it slowly and overflows, or for training.
    """
    _check_float16(setting, device, trains)
    if setting != "auto":
        compute, reason = getattr(torch, setting), because
    elif checkpoint == torch.float32:
        compute, reason = torch.float32, "the checkpoint's own"
    else:
        fast = bf16_is_fast if bf16_is_fast is not None else _bf16_is_fast(device)
        compute = torch.bfloat16 if fast else torch.float32
        reason = _auto_reason(checkpoint, compute, device)
    if compute != torch.float32 and trains == "base":
        return Precision(torch.float32, compute, f"{reason}; trained weights stay in float32")
    if compute != torch.float32 and trains == "parts":
        return Precision(compute, compute, f"{reason}; the trained parts stay in float32")
    return Precision(compute, None, reason)


def _check_float16(setting: str, device: str, trains: Trains) -> None:
    if setting != "float16":
        return
    way_out = ("way out", "--dtype bfloat16 or float32, or auto")
    if device == "cpu":
        raise ConfigError("--dtype float16: CPUs compute it slowly, and training in it overflows", way_out)
    if trains != "nothing":
        raise ConfigError(
            "--dtype float16: its small gradients vanish and its large ones overflow; this version does not scale the "
            "loss against that",
            way_out,
        )


def _auto_reason(checkpoint: torch.dtype, compute: torch.dtype, device: str) -> str:
    if compute == checkpoint and device != "cpu":
        return "the checkpoint's own"
    why = "wider in range"
    if device == "cpu":
        why = "fastest here by probe"
    elif compute == torch.float32:
        why = "this device has no bf16"
    return why if compute == checkpoint else f"{why}, in place of the checkpoint's {name_of(checkpoint)}"


def _bf16_is_fast(device: str) -> bool:
    return _bf16_wins() if device == "cpu" else torch.cuda.is_bf16_supported(including_emulation=False)


def _bf16_wins() -> bool:
    """Whether bf16 products are at least as fast as float32's on this CPU."""
    return gemm_rate(torch.bfloat16, "cpu") >= gemm_rate(torch.float32, "cpu")


def name_of(dtype: torch.dtype) -> str:
    """``bf16``, ``fp32``, …"""
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, str(dtype))
