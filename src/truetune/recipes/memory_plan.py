"""How a run fits into the memory it may take: what its backward computes again, and whether its base stays on disk."""

from __future__ import annotations

import contextlib
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

import torch

from truetune.checkpoint.mapped import file_mappings
from truetune.checkpoint.tensors import open_index
from truetune.config.sft import TrainConfig
from truetune.errors import ConfigError, ModelError
from truetune.models import load, streaming
from truetune.models.families import decoder_parts
from truetune.models.layers import decoder_layers
from truetune.models.precision import name_of
from truetune.quant.packed import Packed
from truetune.recipes.setup import Setup
from truetune.train.estimate import Demand, Economy, Estimate, estimate_memory, text_shape
from truetune.train.memory import resident_mb

# Share of the free memory that a plan may count on.
_FITS = 0.9
# Share of a base that may lie in its files in another form than it is used in, as norms in float32 may.
_COPIED = 0.1
# MB of activations that are kept beside a packed base where nothing is asked for: who packs a base has come for memory.
_BESIDE_PACKED = 1000.0
# Micro-batches are proposed in steps of this many tokens.
_TOKENS = 64


@dataclass(frozen=True)
class MemoryPlan:
    """What was decided, and what that takes."""

    economy: Economy
    estimate: Estimate


@dataclass(frozen=True)
class _Forecast:
    """What a run takes, by how it saves memory.

    Attributes:
        model: the skeleton, with what is trained.
    """

    model: Any
    config: Any
    demand: Demand

    def at(self, economy: Economy) -> Estimate:
        return estimate_memory(self.model, self.config, self.demand, economy)

    def with_micro_tokens(self, tokens: int) -> _Forecast:
        return replace(self, demand=replace(self.demand, micro_tokens=tokens))


def check_device(config: TrainConfig, device: str) -> None:
    """Refuse what can't be kept, before any data is read.

    Raises:
        ConfigError: a limit on a GPU.
    """
    if config.max_memory is not None and device != "cpu":
        raise ConfigError(
            f"--max-memory {config.max_memory}: streams the base to a CPU only, and this run computes on {device}",
            ("way out", "--device cpu; or leave it out, and take --quant nf4 or --recompute full on the GPU"),
        )


def memory_plan(
    setup: Setup, model: Any, *, micro_tokens: int, share: float, available: float | None, copied: float | None
) -> MemoryPlan:
    """Keep as much as fits: first layers are computed again, as few as possible; then the base is left on disk.

    Args:
        model: the skeleton, with what is trained.
        micro_tokens: of the largest micro-batch.
        share: of its tokens that carry a loss.
        available: MB that are free, where that is known.
        copied: from ``copied_mb``.
    Raises:
        ModelError: ``--max-memory`` is too little for this run, or for a base in this form.
    """
    layers = decoder_layers(model)
    parts = setup.precision.autocast is None and bool(layers) and all(map(decoder_parts, layers))
    demand = Demand(
        storage=setup.precision.storage, micro_tokens=micro_tokens, trained_share=share,
        process=resident_mb(setup.device), fused=parts and setup.config.packing is not False, copied=copied or 0.0,
        optim=setup.config.optim,
    )  # fmt: skip
    forecast = _Forecast(model, setup.model_config, demand)
    limit = setup.config.memory_limit_mb
    if recorded := _recorded(setup):
        return MemoryPlan(recorded, forecast.at(recorded))
    room = limit if limit is not None else None if available is None else _FITS * available
    if limit is None and setup.device == "cpu" and any(isinstance(m, Packed) for m in model.modules()):
        whole = forecast.at(Economy(recompute="cheap"))
        lean = whole.total - whole.activations + _BESIDE_PACKED
        room = lean if room is None else min(room, lean)
    resident = _least(setup, forecast, len(layers), room)
    if limit is None or resident.estimate.total <= limit:
        return resident
    _check_streamable(setup, model, resident.estimate, copied)
    streamed = _least(setup, forecast, len(layers), limit, streamed=True)
    if streamed.estimate.total > limit:
        raise _too_little(setup, forecast, streamed)
    return streamed


def copied_mb(setup: Setup, model: Any) -> float | None:
    """MB of the base's dense and packed tensors that its files hold in another form than they are used in.

    Args:
        model: the skeleton, before anything is put on it.
    Returns:
        None where the files aren't here yet.
    """
    folder = load.known_copy(setup.config.model, revision=setup.config.revision)
    if folder is None:
        return None
    try:
        entries = open_index(folder)
    except ModelError:
        if not load.is_local(setup.config.model):
            return None
        entries = {}  # pickled weights
    return streaming.copied_bytes(model, entries, setup.precision.storage) / 1e6


@contextlib.contextmanager
def streamed(setup: Setup, model: Any, *, is_streamed: bool) -> Iterator[None]:
    """Stream the loaded base, if that was decided.

    Raises:
        ModelError: loading made copies of the base after all.
    """
    if not is_streamed:
        yield
        return
    with streaming.streamed(model) as streams:
        whole = streaming.frozen_bytes(model)
        if streams.nbytes < (1 - 2 * _COPIED) * whole:
            raise ModelError(
                f"--max-memory {setup.config.max_memory}: only {streams.nbytes / 1e9:.1f} of the base's "
                f"{whole / 1e9:.1f} GB could be left on disk: this model's weights are changed while they are loaded",
                ("way out", "leave --max-memory out, or take a smaller model"),
            )
        yield


def _recorded(setup: Setup) -> Economy | None:
    """The decision of the run that is resumed, while nothing else is asked for."""
    config, facts = setup.config, setup.facts
    names = [field.name for field in fields(Economy)]
    same = config.recompute == "auto" and facts.get("max_memory") == config.max_memory
    return Economy(**{name: facts[name] for name in names}) if same and all(name in facts for name in names) else None


def _least(setup: Setup, forecast: _Forecast, layers: int, room: float | None, *, streamed: bool = False) -> MemoryPlan:
    """As few layers again as fit into ``room``; where none do, all but the last, which costs nothing to keep."""
    asked = setup.config.recompute
    if asked != "auto":
        economy = Economy(recompute=asked, streamed=streamed)
        return MemoryPlan(economy, forecast.at(economy))
    ways = [Economy(recompute="cheap", full_layers=count, streamed=streamed) for count in range(max(1, layers))]
    first = bisect_left(ways, True, key=lambda way: room is None or forecast.at(way).total <= room)
    economy = ways[min(first, len(ways) - 1)]
    return MemoryPlan(economy, forecast.at(economy))


def _check_streamable(setup: Setup, model: Any, resident: Estimate, copied: float | None) -> None:
    """That the base can stay on disk at all."""
    config, storage = setup.config, setup.precision.storage
    short = f"--max-memory {config.max_memory}: this run takes {_gb(resident.total)} with its base in memory, and "
    more = f"--max-memory {_gb(resident.total, up=True)}"
    if not file_mappings():
        raise ModelError(f"{short}only on Linux can the base stay on disk", ("way out", more))
    if config.trains_model:
        raise ModelError(
            f"{short}--method {config.method} trains the base itself, which can't stay on disk",
            ("way out", f"--method lora, or {more}"),
        )
    if config.quant != "none":
        raise ModelError(
            f"{short}a base that is quantised while it is loaded can't stay on disk",
            ("way out", f"{_quantize(setup, config.quant)}\nthen --model {_packed_name(setup)} without --quant"),
        )
    whole = streaming.frozen_bytes(model) / 1e6
    if copied is not None and copied > _COPIED * whole:
        stored = _stored_dtype(setup)
        reason = f"in {name_of(stored)}, not in {name_of(storage)}" if stored != storage else "in another form"
        ways = [f"--dtype {_plain(stored)}"] if stored != storage else []
        if not load.check_readable(config.model, setup.model_config):
            ways.append(f"{_quantize(setup, 'nf4')}, and --model {_packed_name(setup)}")
        raise ModelError(
            f"{short}{_gb(copied)} of that lies on disk {reason}: what stays there must lie there as it is used",
            ("way out", "\n".join([*ways, more])),
        )


def _quantize(setup: Setup, kind: str) -> str:
    """The command that packs this base."""
    config, storage = setup.config, setup.precision.storage
    words = ["truetune quantize", config.model, _packed_name(setup), f"--quant {kind}"]
    words += [f"--revision {config.revision}"] if config.revision else []
    words += ["--double-quant"] if config.double_quant else []
    words += [f"--quant-skip {' '.join(config.quant_skip)}"] if config.quant_skip else []
    words += [f"--dtype {_plain(storage)}"] if _stored_dtype(setup) != storage else []
    return " ".join(words)


def _stored_dtype(setup: Setup) -> torch.dtype:
    """What the files are in; ``setup.model_config`` has since been used to build a model of another dtype."""
    return load.checkpoint_dtype(load.load_config(setup.config.model, revision=setup.config.revision))


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _packed_name(setup: Setup) -> str:
    kind = setup.config.quant if setup.config.quant != "none" else "nf4"
    return f"{Path(setup.config.model).name}-{kind}"


def _too_little(setup: Setup, forecast: _Forecast, plan: MemoryPlan) -> ModelError:
    """What a streamed run takes at least, and which setting would bring it under the limit."""
    config, least, limit = setup.config, plan.estimate, cast(float, setup.config.memory_limit_mb)
    longest = setup.prepared.train.longest()
    again = replace(plan.economy, recompute="cheap", full_layers=text_shape(setup.model_config)["layers"] - 1)
    micro_tokens = forecast.demand.micro_tokens
    counts = range(_TOKENS, micro_tokens, _TOKENS)
    fitting = bisect_left(
        counts, True, key=lambda tokens: forecast.with_micro_tokens(tokens).at(plan.economy).total > limit
    )
    tokens = counts[fitting - 1] if fitting else 0
    ways = []
    if config.recompute != "auto" and forecast.at(again).total <= limit:
        ways.append("--recompute auto")
    if tokens >= longest:
        ways.append(f"--micro-tokens {tokens}")
    elif tokens:
        ways.append(f"--max-length {tokens} --micro-tokens {tokens}: the longest row has {longest:,} tokens")
    if least.weights > least.total - limit and not load.check_readable(config.model, setup.model_config):
        ways.append(f"{_quantize(setup, 'nf4')}, and --model {_packed_name(setup)}")
    parts = {
        "the process itself": least.process,
        "weights in memory at a time": least.weights,
        "what is trained": least.trained,
        f"activations of {micro_tokens:,} tokens": least.activations,
    }
    return ModelError(
        f"--max-memory {config.max_memory}: this run takes {_gb(least.total)}, though its base stays on disk",
        ("of that", ", ".join(f"{_gb(size)} {what}" for what, size in parts.items())),
        ("way out", "\n".join([*ways, f"--max-memory {_gb(least.total, up=True)}"])),
    )


def _gb(megabytes: float, *, up: bool = False) -> str:
    """``1.4 GB`` or ``580 MB``; as a setting, rounded up: ``1.5GB``."""
    if up:
        return f"{-(-megabytes // 100) / 10:.1f}GB" if megabytes > 900 else f"{-(-megabytes // 10) * 10:.0f}MB"
    return f"{megabytes / 1e3:.1f} GB" if megabytes >= 1000 else f"{megabytes:.0f} MB"
