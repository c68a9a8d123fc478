"""The exception tree and the one way to word a mistake.

A message has four parts: what was found, what was expected, the nearest valid value, the way out.
The command line prints ``str(error)`` and exits with ``exit_code``; nobody sees a traceback for a mistake of theirs.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class TruetuneError(Exception):
    """A user's mistake or a refused input.

    Args:
        message: what was found, one line.
        notes: ``(label, text)`` pairs, printed as an aligned block under the message; empty texts are left out.
    """

    exit_code = 2

    def __init__(self, message: str, *notes: tuple[str, str]) -> None:
        self.message = message
        self.notes = tuple((label, text) for label, text in notes if text)
        super().__init__(self.render())

    def render(self) -> str:
        """The whole block as the terminal shows it, without the leading ``error:``."""
        width = max((len(label) for label, _ in self.notes), default=0)
        lines = []
        for label, text in self.notes:
            lead = f"  {label:<{width}}   " if label else "  "
            lines.append(lead + text.replace("\n", "\n" + " " * len(lead)))
        return "\n".join([self.message, *lines])


class ConfigError(TruetuneError):
    """A flag, key or value that is unknown, impossible, or at odds with another."""


class DataError(TruetuneError):
    """A data file or row that can't be trained on."""


class TemplateError(TruetuneError):
    """No chat template, or one that does not render what training needs."""


class ModelError(TruetuneError):
    """A model or tokenizer folder that can't be loaded."""


class AdapterError(TruetuneError):
    """An adapter that does not fit: missing, extra or misshaped tensors, another base, an unsupported field."""


class QuantizationError(TruetuneError):
    """Values that can't be quantised (who knows their tensor's name puts it in front), or codes that do not fit."""


class OutputError(TruetuneError):
    """A folder that can't be written: another run's, read-only, or a full disk."""


class CheckpointError(TruetuneError):
    """A checkpoint that is damaged, or belongs to another run."""


class NonFiniteError(TruetuneError):
    """The loss or the gradient is no longer a number; the run stopped before the weights were touched."""

    exit_code = 3


class OutOfMemoryError(TruetuneError):
    """The smallest piece of a step does not fit in memory."""

    exit_code = 3

    def __init__(self, tokens: int) -> None:
        super().__init__(
            f"out of memory with a single example of {tokens:,} tokens at a time",
            ("kept", "every checkpoint that was complete before is still there"),
            ("way out", "--recompute full --resume auto; or a lower --max-length or a smaller model in another --out"),
        )


class StoppedError(TruetuneError):
    """The run was asked to stop by a signal and has saved its state.

    ``exit_code`` is 128 + the signal's number, as a shell expects.
    """

    def __init__(self, signal_number: int, message: str, *notes: tuple[str, str]) -> None:
        super().__init__(message, *notes)
        self.exit_code = 128 + signal_number


def nearest(word: str, options: Iterable[str]) -> str:
    """The option that looks most like ``word`` (case aside), or ``""`` when none comes close."""
    by_lower = {option.lower(): option for option in options}
    matches = difflib.get_close_matches(word.lower(), sorted(by_lower), n=1)
    return by_lower[matches[0]] if matches else ""


def beside(path: Path) -> str:
    """What lies where ``path`` was looked for and has almost its name, or ``""``."""
    try:
        close = nearest(path.name, (entry.name for entry in path.parent.iterdir()))
    except OSError:
        return ""
    return str(path.parent / close) if close else ""


def why_unread(error: Exception) -> str:
    """What the system said when a file was opened, read as text or written, without its number and path."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return "it is not UTF-8" if isinstance(error, UnicodeError) else str(error)


def counted(number: int, one: str, many: str = "") -> str:
    """``1 row``, ``3,512 rows``; ``many`` where that is not ``one`` and an s."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"
