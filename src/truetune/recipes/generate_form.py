"""``truetune generate --json-schema``: the file that says what an answer looks like."""

from __future__ import annotations

import json
from pathlib import Path

from truetune.config.generate import GenerateConfig
from truetune.errors import DataError, beside, why_unread
from truetune.generate import grammar


def form_of(config: GenerateConfig) -> str | None:
    """The grammar of the answers; None for any text.

    Raises:
        DataError: no such file, or no JSON schema in it.
    """
    if config.json_schema is None:
        return None
    path = Path(config.json_schema).expanduser()
    try:
        schema = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        found = f"--json-schema: {path} can't be read: {why_unread(error)}"
        raise DataError(found, ("did you mean", "" if path.exists() else beside(path))) from None
    if not isinstance(schema, dict):
        raise DataError(f"--json-schema: {path} holds no schema", ("expected", 'an object such as {"type": "object"}'))
    return grammar.whole(grammar.of_json(schema))
