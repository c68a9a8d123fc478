"""How long a text may be: what the model was made for, and what a run takes of that."""

from __future__ import annotations

from typing import Any

from truetune.errors import ConfigError

DEFAULT_LENGTH = 2048  # tokens of an example, where neither the user nor the model sets a lower limit


def context_length(config: Any) -> int | None:
    """The longest text the model was made for, where its config says."""
    for name in ("max_position_embeddings", "n_positions", "seq_length"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def usable_length(config: Any, asked: int | None, *, virtual: int = 0) -> int:
    """The longest example to train on: what was asked for, else the model's context, at most ``DEFAULT_LENGTH``.

    Args:
        virtual: positions that the tuning method takes for itself in front of every example.
    Raises:
        ConfigError: more than the model's context; it would be trained on positions it has never seen, or has none for.
    """
    whole = context_length(config)
    context = whole and max(whole - virtual, 0)
    if whole and not context:
        raise ConfigError(f"--virtual-tokens {virtual}: the model was made for at most {whole:,} tokens")
    if asked and context and asked > context:
        beside = f", and --virtual-tokens takes {virtual}" if virtual else ""
        raise ConfigError(
            f"--max-length {asked}: the model was made for at most {whole:,} tokens (max_position_embeddings){beside}",
            ("way out", f"--max-length {context}; or raise it in config.json, if the model is known to stand that"),
        )
    return asked or min(context or DEFAULT_LENGTH, DEFAULT_LENGTH)
