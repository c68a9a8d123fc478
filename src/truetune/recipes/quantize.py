"""``truetune quantize``: a base with packed weights, written tensor by tensor."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from truetune.config.quant import QuantRecipe
from truetune.config.quantize import QuantizeConfig
from truetune.config.resolve import Resolved
from truetune.errors import counted
from truetune.export.quantize import quantize_checkpoint
from truetune.models import load
from truetune.models.precision import name_of
from truetune.train.log import Screen
from truetune.train.memory import peak_mb


def run(resolved: Resolved[QuantizeConfig]) -> dict[str, Any]:
    """Quantise as the config says; returns what ``--json`` prints."""
    config, screen = resolved.config, Screen()
    began = time.perf_counter()
    recipe = config.recipe()
    assert recipe is not None
    load.check_dense(config.path, load.load_config(config.path, revision=config.revision))
    base = load.local_copy(config.path, revision=config.revision)
    model_config = load.load_config(str(base))
    dtype = load.storage_dtype(config.dtype, model_config)
    model = load.skeleton(model_config, dtype=dtype)
    screen.say("model", f"{config.path} → {recipe}, the rest in {name_of(dtype)}")
    _say_experts(model, recipe, dtype, screen)
    with screen.bar("writing") as progress:
        report = quantize_checkpoint(
            base,
            Path(config.out).expanduser(),
            model,
            recipe,
            dtype=dtype,
            max_shard_bytes=int(config.max_shard_gb * 1e9),
            progress=progress,
        )
    screen.say(
        "done",
        f"{config.out}: {report.bytes_before / 1e6:,.0f} → {report.nbytes / 1e6:,.0f} MB · "
        f"{counted(report.packed, 'weight')} packed, {report.dense} as they were · "
        f"{time.perf_counter() - began:.0f} s · peak {peak_mb():,.0f} MB",
    )
    screen.note(f"packing changed the weights by {report.relative_error:.1%} of their norm")
    return {
        "out": config.out,
        "packed": report.packed,
        "dense": report.dense,
        "bytes_before": report.bytes_before,
        "bytes": report.nbytes,
        "relative_error": report.relative_error,
        "peak_mb": round(peak_mb(), 1),
        "seconds": round(time.perf_counter() - began, 2),
    }


def _say_experts(model: Any, recipe: QuantRecipe, dtype: Any, screen: Screen) -> None:
    """Who reads packed experts, and what of the model stays dense."""
    if load.packs_experts(model, recipe):
        screen.warn("experts in a form that truetune alone reads: bitsandbytes packs linear layers and nothing else")
        screen.note("for transformers with bitsandbytes: --quant-skip experts, which leaves them dense")
    planned = load.skeleton(model.config, dtype=dtype)
    load.plan_quantised(planned, recipe, dtype=dtype)
    if remark := load.stacks_remark(planned):
        screen.warn(remark)
