"""Figures of the server in the text form that Prometheus reads."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

_BOUNDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # seconds


@dataclass
class Histogram:
    """Durations, counted by bounds."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(_BOUNDS) + 1))
    total: float = 0.0

    def observe(self, seconds: float) -> None:
        """Count one."""
        self.counts[bisect.bisect_left(_BOUNDS, seconds)] += 1
        self.total += seconds

    def lines(self, name: str) -> Iterator[str]:
        """Its samples."""
        for i, bound in enumerate((*map(str, _BOUNDS), "+Inf"), 1):
            yield f'{name}_bucket{{le="{bound}"}} {sum(self.counts[:i])}'
        yield f"{name}_sum {self.total:.6f}"
        yield f"{name}_count {sum(self.counts)}"


@dataclass
class Metrics:
    """What is counted since the start; from the event loop's thread alone."""

    requests: Counter[tuple[str, int]] = field(default_factory=Counter)  # route, status
    prompt_tokens: Counter[str] = field(default_factory=Counter)  # by model
    answer_tokens: Counter[str] = field(default_factory=Counter)
    cancelled: int = 0
    first: Histogram = field(default_factory=Histogram)
    whole: Histogram = field(default_factory=Histogram)

    def text(self, engine: Mapping[str, Any], *, taken: int) -> str:
        """All of it.

        Args:
            engine: its own figures.
            taken: answers that run or wait.
        """
        lines = [
            *_family("requests_total", "counter", "requests by route and status"),
            *(f'truetune_requests_total{{route="{r}",code="{c}"}} {n}' for (r, c), n in sorted(self.requests.items())),
            *_family("prompt_tokens_total", "counter", "tokens of prompts, by model"),
            *(f'truetune_prompt_tokens_total{{model="{m}"}} {n}' for m, n in sorted(self.prompt_tokens.items())),
            *_family("answer_tokens_total", "counter", "tokens of answers, by model"),
            *(f'truetune_answer_tokens_total{{model="{m}"}} {n}' for m, n in sorted(self.answer_tokens.items())),
            *_family("cancelled_total", "counter", "requests whose client left before the end"),
            f"truetune_cancelled_total {self.cancelled}",
            *_family("first_token_seconds", "histogram", "from the request to the first piece of its answer"),
            *self.first.lines("truetune_first_token_seconds"),
            *_family("answer_seconds", "histogram", "from the request to the end of its answer"),
            *self.whole.lines("truetune_answer_seconds"),
        ]
        gauges = {
            "answers": ("answers that run or wait", taken),
            "rows_running": ("answers that are computed", engine["running"]),
            "rows_waiting": ("answers that wait for their turn", engine["waiting"]),
            "kv_tokens": ("tokens whose keys and values are held", engine["kv_tokens"]),
            "adapters_loaded": ("adapters in memory", len(engine["adapters_loaded"])),
            "adapters_bytes": ("their memory", engine["adapters_bytes"]),
        }
        for name, (about, value) in gauges.items():
            lines += [*_family(name, "gauge", about), f"truetune_{name} {value}"]
        return "\n".join(lines) + "\n"


def _family(name: str, kind: str, about: str) -> tuple[str, str]:
    return f"# HELP truetune_{name} {about}", f"# TYPE truetune_{name} {kind}"
