"""What goes beside the weights of a trained model: the template that trained it, and its stop tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from truetune.errors import ModelError
from truetune.recipes.adapter_base import Named

GENERATION = "generation_config.json"


def extra_files(base: Path, file: Named) -> dict[str, bytes | Path]:
    """The template that trained the adapter, and the stop tokens it taught, go with the merged model."""
    extra: dict[str, bytes | Path] = {}
    template, system = file.card.get("template"), file.card.get("system")
    # The base's own is there already, unless it was trained with a system message or the date of a day.
    if template and (template["name"] != "own" or system is not None or file.card.get("date")):
        from truetune.data.template import with_default_system  # and with it all that renders

        extra["chat_template.jinja"] = with_default_system(template["source"], system).encode()
    if settings := with_stops(base, file.card.get("stop_ids", ())):
        extra[GENERATION] = settings
    return extra


def with_stops(folder: Path, stops: Iterable[int]) -> bytes:
    """A model's generation settings, with stop tokens that they lack; empty where they lack none.

    Raises:
        ModelError: its settings are no JSON.
    """
    generation = _generation(folder)
    known = generation.get("eos_token_id")
    known = known if isinstance(known, list) else [known] if known is not None else []
    new = [stop for stop in stops if stop not in known]
    return json.dumps(generation | {"eos_token_id": [*known, *new]}, indent=2).encode() if new else b""


def _generation(base: Path) -> dict[str, Any]:
    """The base's generation settings; where it has none, what transformers would take from its config."""
    for name in (GENERATION, "config.json"):
        if (base / name).is_file():
            try:
                found: dict[str, Any] = json.loads((base / name).read_text(encoding="utf-8"))
            except ValueError as error:
                raise ModelError(f"{base / name}: not valid JSON: {error}") from None
            special = ("bos_token_id", "eos_token_id", "pad_token_id")
            return found if name == GENERATION else {k: found[k] for k in special if k in found}
    return {}
