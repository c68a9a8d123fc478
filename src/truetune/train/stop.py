"""Ctrl-C and SIGTERM: finish the step, save, leave. A second one leaves at once."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

from typing_extensions import Self


class StopRequest:
    """While active, remembers the first SIGINT or SIGTERM instead of dying of it."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._remember)
        except ValueError:  # not in the main thread: whoever runs us there handles signals
            pass
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
