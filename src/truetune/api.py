"""The Python API: what the commands do, as functions. Reached as ``truetune.load`` and so on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from truetune.adapters import files
from truetune.adapters import inject as _inject
from truetune.config.adapter import AdapterConfig
from truetune.config.merge import MergeConfig
from truetune.config.quant import QuantGroup
from truetune.config.quantize import QuantizeConfig
from truetune.config.resolve import resolve
from truetune.config.sft import SFTConfig
from truetune.models import load as _load
from truetune.models.precision import choose_device, choose_precision
from truetune.recipes.adapter import base_name, check_base, describe_base


def load(
    model: str,
    *,
    quant: str = "none",
    double_quant: bool = False,
    dtype: str = "auto",
    device: str = "cpu",
    revision: str | None = None,
) -> Any:
    """Load a causal language model of transformers from a local folder or the Hub, in ``eval`` mode.

    Args:
        quant: ``none``, or ``int8``, ``nf4`` or ``fp4``: pack the linear layers while they are read.
        double_quant: quantise the 4-bit blocks' scales as well.
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
        device: ``auto``, ``cpu`` or ``cuda``.
    Raises:
        truetune.errors.ModelError: what is wrong with it, and the way out.
    """
    device = choose_device(device)
    config = _load.load_config(model, revision=revision)
    precision = choose_precision(dtype, _load.checkpoint_dtype(config), device=device)
    recipe = resolve(QuantGroup, file=None, flags={"quant": quant, "double_quant": double_quant}).config.recipe()
    return _load.load_model(
        model, dtype=precision.storage, device=device, revision=revision, config=config, quant=recipe
    )


def attach(model: nn.Module, config: AdapterConfig, *, seed: int = 0) -> _inject.Attachment:
    """Freeze a model and put a method's adapters on it (``truetune.LoRA``, ``IA3``, …); returns what was wrapped."""
    return _inject.attach(model, config, seed=seed)


def detach(model: nn.Module) -> None:
    """Take the adapters out again."""
    _inject.detach(model)


def trainable(model: nn.Module) -> dict[str, int]:
    """Parameters that are trained: name → count."""
    return _inject.trainable(model)


def save_adapter(model: nn.Module, folder: str, *, base: str | None = None) -> None:
    """Write the model's adapter in PEFT's format, and beside it which base it belongs to.

    Args:
        base: the folder or the Hub's name of the base, where the model does not know where it came from.
    """
    config = getattr(model, "config", None)
    origin = base or getattr(config, "_name_or_path", None)
    card = {"format": 1, "base": describe_base(origin, None, config)} if origin else None
    files.save(model, Path(folder), base=base_name(origin) if origin else None, card=card)


def load_adapter(model: nn.Module, folder: str, *, allow_other_base: bool = False) -> None:
    """Attach the adapter in ``folder``: ours or PEFT's.

    Raises:
        truetune.errors.AdapterError: any tensor missing, extra or misshaped, or another base; all named at once.
    """
    file = files.read(Path(folder))
    config = getattr(model, "config", None)
    if origin := getattr(config, "_name_or_path", ""):
        found = _load.known_copy(origin, revision=getattr(config, "_commit_hash", None))
        check_base(file, origin, found, allow_other=allow_other_base)
    files.load(model, file)


def sft(config: SFTConfig) -> dict[str, Any]:
    """The same run that ``truetune sft`` makes; returns what its ``--json`` prints."""
    from truetune.recipes.sft import run

    flags = {name: getattr(config, name) for name in config.model_fields_set}
    return run(resolve(SFTConfig, file=None, flags=flags))


def merge(model: str, adapter: str, out: str, **settings: Any) -> dict[str, Any]:
    """The same merge that ``truetune merge`` makes."""
    from truetune.recipes.merge import run

    return run(resolve(MergeConfig, file=None, flags={"model": model, "adapter": adapter, "out": out, **settings}))


def quantize(model: str, out: str, **settings: Any) -> dict[str, Any]:
    """The same checkpoint that ``truetune quantize`` writes."""
    from truetune.recipes.quantize import run

    return run(resolve(QuantizeConfig, file=None, flags={"path": model, "out": out, **settings}))
