"""The Python API: what the commands do, as functions. Reached as ``truetune.load`` and so on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from truetune.adapters import files
from truetune.adapters import inject as _inject
from truetune.adapters import vocabulary as _vocabulary
from truetune.adapters.bank import Bank, bank_of
from truetune.config.adapter import AdapterConfig
from truetune.config.groups import bytes_of
from truetune.config.merge import MergeConfig
from truetune.config.quant import QuantGroup
from truetune.config.quantize import QuantizeConfig
from truetune.config.resolve import resolve
from truetune.config.sft import SFTConfig
from truetune.errors import AdapterError, ConfigError
from truetune.models import load as _load
from truetune.models.precision import choose_device, choose_precision
from truetune.models.tokenizer import ChatTokenizer
from truetune.recipes.adapter import base_name, check_base, describe_base
from truetune.train.log import Screen
from truetune.train.memory import resident_mb


def load(
    model: str,
    *,
    quant: str = "none",
    double_quant: bool = False,
    quant_skip: Sequence[str] = (),
    dtype: str = "auto",
    device: str = "cpu",
    revision: str | None = None,
    max_memory: str | None = None,
) -> Any:
    """Load a causal language model of transformers from a local folder or the Hub, in ``eval`` mode.

    Args:
        quant: ``none``, or ``int8``, ``nf4`` or ``fp4``: pack the linear layers, and stacks of experts' matrices, while
            they are read.
        double_quant: quantise the 4-bit blocks' scales as well.
        quant_skip: layers to leave unquantised, by whole parts of their names.
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
        device: ``auto``, ``cpu`` or ``cuda``.
        max_memory: such as ``1.5GB``: the model comes frozen, and if it would not fit into that beside what the process
            holds, it stays on disk and is read layer by layer, forward and backward (CPU). Activations come on top.
    Raises:
        truetune.errors.ConfigError: a setting that is none.
        truetune.errors.ModelError: what is wrong with it, and the way out.
    """
    device = choose_device(device)
    config = _load.load_config(model, revision=revision)
    precision = choose_precision(dtype, _load.checkpoint_dtype(config), device=device)
    flags = {"quant": quant, "double_quant": double_quant, "quant_skip": tuple(quant_skip)}
    recipe = resolve(QuantGroup, file=None, flags=flags).config.recipe()
    limit, held = _limit_mb(max_memory, device), resident_mb()
    loaded = _load.load_model(
        model, dtype=precision.storage, device=device, revision=revision, config=config, quant=recipe,
        warn=Screen().warn,
    )  # fmt: skip
    if limit is not None:
        from truetune.models.streaming import keep_on_disk

        keep_on_disk(loaded, limit_mb=limit, held_mb=held)
    return loaded


def _limit_mb(max_memory: str | None, device: str) -> float | None:
    if max_memory is None:
        return None
    if device != "cpu":
        raise ConfigError(f"max_memory: streams the base to a CPU only, and device is {device}")
    try:
        return bytes_of(max_memory) / 1e6
    except ValueError as error:
        raise ConfigError(f"max_memory: found {max_memory!r}", ("expected", str(error))) from None


def add_tokens(model: nn.Module, tokenizer: Any, tokens: Sequence[str]) -> list[int]:
    """Add tokens to a tokenizer of transformers, and rows for them to a model where it has none to spare.

    ``attach(model, LoRA(token_rows=ids))`` then trains their rows, which start at the mean of those that were there.

    Returns:
        The ids, in the order of ``tokens``; tokens that the tokenizer has already keep theirs.
    Raises:
        truetune.errors.AdapterError: the model carries an adapter, or its embedding table can't be made larger.
    """
    if _inject.attachment(model) is not None or bank_of(model) is not None:
        raise AdapterError("the model carries an adapter", ("way out", "add the tokens first, and then attach"))
    wrapped = ChatTokenizer(tokenizer)
    size, known = _vocabulary.rows_of_table(model), len(tokenizer)
    added = wrapped.add([token for token in dict.fromkeys(tokens) if not wrapped.has_token(token)])
    if added:
        after = max(size, *(number + 1 for number in added.values()))
        before = _vocabulary.new_tokens(model)
        together = {**(before.ids if before else {}), **added}
        first = (before.known, before.before) if before else (min(known, size), size)
        _vocabulary.admit(model, _vocabulary.NewTokens(together, *first, after))
    return [wrapped.id_of(token) or 0 for token in tokens]


def attach(model: nn.Module, config: AdapterConfig, *, seed: int = 0) -> _inject.Attachment:
    """Freeze a model and put a method's adapters on it (``truetune.LoRA``, ``IA3``, …); returns what was wrapped."""
    return _inject.attach(model, config, seed=seed)


def detach(model: nn.Module, *, name: str | None = None) -> None:
    """Take the adapters out again; the base is as it was.

    Args:
        name: of the one that goes, of several that were loaded by name; the others stay.
    Raises:
        truetune.errors.AdapterError: there is no adapter of that name.
    """
    bank = bank_of(model)
    if name is not None:
        (bank or Bank(model)).remove(name)
    elif bank is not None:
        bank.clear()
    else:
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


def load_adapter(model: nn.Module, folder: str, *, name: str = "default", allow_other_base: bool = False) -> None:
    """Load the adapter in ``folder``, ours or PEFT's, and compute with it.

    For tokens that the adapter brings, the embedding table and the head grow, which is said on standard error; such an
    adapter is alone on its model.

    Args:
        name: tells it from others on the same model; ``set_adapter`` switches between them.
    Raises:
        truetune.errors.AdapterError: any tensor missing, extra or misshaped, or another base; all named at once.
    """
    file = files.read(Path(folder))
    config = getattr(model, "config", None)
    if origin := getattr(config, "_name_or_path", ""):
        found = _load.known_copy(origin, revision=getattr(config, "_commit_hash", None))
        check_base(file, origin, found, allowed={"base"} if allow_other_base else ())
    bank = bank_of(model)
    if bank is None and files.brings_rows(model, file):  # alone: adapters of one model share its vocabulary
        before = _vocabulary.rows_of_table(model)
        files.load(model, file)
        Screen().note(
            f"the embedding table grew from {before:,} to {_vocabulary.rows_of_table(model):,} rows for {folder}"
        )
        return
    bank = bank or Bank(model)
    bank.add(name, file)
    bank.use(name)


def set_adapter(model: nn.Module, names: str | Sequence[str] | None, *, weights: Sequence[float] | None = None) -> None:
    """Compute with one of the adapters that were loaded, with the sum of several, or with the bare base (``None``).

    Switching to one copies no weight. A sum is defined for methods that add to what layers make: LoRA, AdaLoRA, VeRA,
    and parts of the base that were trained in full.

    Args:
        weights: what the contribution of each is multiplied by; 1 by default.
    Raises:
        truetune.errors.AdapterError: no adapter of that name, or a method that has no sum, with the reason.
    """
    bank = bank_of(model)
    if bank is None and names:
        bank = Bank(model)
    if bank is not None:
        bank.use(names, weights)


def list_adapters(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The adapters on a model: name → method, layers, parameters, and the weight it is in use with (None: it is not).

    One that was attached for training is called ``default``.
    """
    bank, attached = bank_of(model), _inject.attachment(model)
    if bank is not None:
        return bank.described()
    if attached is None:
        return {}
    count = sum(trainable(model).values())
    return {
        "default": {"method": attached.config.kind, "layers": len(attached.sites), "parameters": count, "weight": 1.0}
    }


def sft(config: SFTConfig) -> dict[str, Any]:
    """The same run that ``truetune sft`` makes; returns what its ``--json`` prints."""
    from truetune.recipes.sft import run

    flags = {name: getattr(config, name) for name in config.model_fields_set}
    return run(resolve(SFTConfig, file=None, flags=flags))


def merge(model: str | None, adapter: str | Sequence[str], out: str, **settings: Any) -> dict[str, Any]:
    """The same merge that ``truetune merge`` makes: into the base, or with ``to="adapter"`` of adapters into one.

    Args:
        adapter: a folder, or several, each with its weight: ``["a=0.7", "b=0.3"]``.
        settings: ``combine="cat"`` and the others of the command.
    """
    from truetune.recipes.merge import run

    flags: dict[str, Any] = {"adapter": adapter, "out": out} | ({} if model is None else {"model": model})
    return run(resolve(MergeConfig, file=None, flags=flags | settings))


def quantize(model: str, out: str, **settings: Any) -> dict[str, Any]:
    """The same checkpoint that ``truetune quantize`` writes."""
    from truetune.recipes.quantize import run

    return run(resolve(QuantizeConfig, file=None, flags={"path": model, "out": out, **settings}))
