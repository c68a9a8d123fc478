"""An adapter and its base, brought together: on another base it would answer nonsense with a straight face."""

from __future__ import annotations

from pathlib import Path

from truetune.adapters.files import AdapterFile
from truetune.errors import AdapterError
from truetune.models import load


def check_base(file: AdapterFile, base: Path, *, allow_other: bool) -> None:
    """Compare the base's weights with those the adapter was trained on, where its card names them.

    Raises:
        AdapterError: they differ, and nobody said that this is meant.
    """
    known = (file.card.get("base") or {}).get("weights_sha256")
    if not known or allow_other:
        return
    found = load.weight_hash(base)
    if found and found != known:
        raise AdapterError(
            f"{file.folder} was trained on other weights than those in {base}",
            ("trained on", f"{file.card['base'].get('name')} ({known[:12]})"),
            ("found", f"{base} ({found[:12]})"),
            ("way out", "pass the base it was trained on, or --allow-other-base if the difference is meant"),
        )
