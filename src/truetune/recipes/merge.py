"""``truetune merge``: fold adapters into their base, tensor by tensor, or make one adapter of several."""

from __future__ import annotations

from typing import Any

from truetune.config.merge import MergeConfig
from truetune.config.resolve import Resolved
from truetune.recipes import merge_files
from truetune.recipes.merge_work import Work, write
from truetune.train.log import Screen


def run(resolved: Resolved[MergeConfig]) -> dict[str, Any]:
    """Merge as the config says; returns what ``--json`` prints."""
    config, screen = resolved.config, Screen()
    work: Work | dict[str, Any] | None = merge_files.planned(config)
    if work is None:
        from truetune.recipes import merge_model  # with torch and all methods: two seconds of a processor

        work = merge_model.run(config, screen)
    return write(work, config, screen) if isinstance(work, Work) else work
