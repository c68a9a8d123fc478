"""A merge that is planned with the model's modules: every method, packed bases, several adapters, new tokens."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from truetune.adapters.files import AdapterFile
from truetune.config.merge import MergeConfig
from truetune.config.quant import QuantRecipe
from truetune.export.onto import Drift
from truetune.export.quantize import quantize_checkpoint
from truetune.models import load
from truetune.models.tokenizer import ChatTokenizer
from truetune.recipes import merge_adapters
from truetune.recipes.adapter_base import check_base
from truetune.recipes.merge_plan import config_of, plan_merge
from truetune.recipes.merge_work import Work
from truetune.recipes.new_tokens import files_of, tokenizer_of
from truetune.train.log import Screen


def run(config: MergeConfig, screen: Screen) -> Work | dict[str, Any]:
    """What to write into a model; where one adapter is made of several, that is done, and what was made is told.

    Raises:
        AdapterError, ConfigError, ModelError: as ``plan_merge``; or the adapters are of another base.
    """
    named = load.local_copy(config.model, revision=config.revision) if config.model else None
    parents = merge_adapters.read_all(config)
    name = config.model or merge_adapters.named_base(parents)
    base = named or load.local_copy(name, revision=config.revision)
    config = config.model_copy(update={"model": name})
    for parent in parents.values():
        check_base(parent, name, base, allowed=config.allowed)
    if config.to == "adapter":
        return merge_adapters.run(config, parents, load.load_config(str(base)), screen)
    return _into_base(config, parents, name, base, screen)


def _into_base(config: MergeConfig, parents: Mapping[str, AdapterFile], name: str, base: Path, screen: Screen) -> Work:
    """The base under ``name`` with one adapter in it, or with what several are together."""
    file = next(iter(parents.values()))
    model_config = config_of(config, file, base)
    if config.combines:
        file = merge_adapters.combined(config, parents, model_config, screen)
    if config.verify:
        from truetune.recipes.verify import check_provable  # which imports all that answers are made with

        check_provable(file, name)
    plan = plan_merge(config, file, base, model_config)
    return Work(
        name=name,
        base=base,
        file=file,
        folders=tuple(parent.folder for parent in parents.values()),
        edits=plan.changes.edits,
        config_updates=plan.changes.config,
        drop=plan.drop,
        onto=plan.onto,
        drift=plan.drift,
        tokenizer=tokenizer_files(config, file, screen),
    )


def pack(
    dense: Path, out: Path, recipe: QuantRecipe, config: MergeConfig, screen: Screen, *, drift: Drift | None
) -> None:
    """Pack the merged model, and remove the dense one that was written on the way."""
    try:
        model_config = load.load_config(str(dense))
        dtype = load.checkpoint_dtype(model_config)
        model = load.skeleton(model_config, dtype=dtype)
        with screen.bar("packing") as progress:
            report = quantize_checkpoint(
                dense,
                out,
                model,
                recipe,
                dtype=dtype,
                max_shard_bytes=int(config.max_shard_gb * 1e9),
                progress=progress,
            )
    finally:
        shutil.rmtree(dense, ignore_errors=True)
    far = f"; they are within {drift.repacked:.2%} of the model as it was trained" if drift and drift.repacked else ""
    screen.note(f"packed ({recipe}): {report.nbytes / 1e6:,.0f} MB, which changed the merged weights by "
                f"{report.relative_error:.1%} of their norm{far}")  # fmt: skip


def tokenizer_files(config: MergeConfig, file: AdapterFile, screen: Screen) -> dict[str, bytes | Path]:
    """Those of the tokenizer with the tokens that the adapter brings; none where it brings none."""
    if not file.settings.token_rows:
        return {}
    own = ChatTokenizer.load(str(config.model), revision=config.revision)
    before = len(own.hf)
    tokenizer = tokenizer_of(file, own, screen)
    return files_of(tokenizer) if len(tokenizer.hf) > before else {}
