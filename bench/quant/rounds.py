"""Runs that are processes of their own, by turns; ``bench/workers.py`` does the same for single operations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from bench.quant.findings import Bench
from bench.runs import FailedRunError

Run = TypeVar("Run")


def by_rounds(
    bench: Bench, systems: Mapping[str, Callable[[int], Run]], told: Callable[[Run], str], not_run: dict[str, str]
) -> dict[str, list[Run]]:
    """Let every system run once per round, one after the other, and say how it went.

    Args:
        systems: what runs one, given the round. Round 0 is not counted: it brings the files into the page cache.
        told: a run, for the log.
        not_run: systems that fail are added, with the reason, and left out from there on.
    Returns:
        System → its runs, of those that never failed.
    """
    found: dict[str, list[Run]] = {}
    for turn in range(bench.rounds + 1):
        for system, run in systems.items():
            if system in not_run:
                continue
            try:
                one = run(turn)
            except FailedRunError as error:
                not_run[system] = str(error)
                found.pop(system, None)
                bench.say(f"not run: {system}: {error}")
                continue
            bench.say(f"{f'round {turn}/{bench.rounds}' if turn else 'warm-up':<12} {system:<28} {told(one)}")
            if turn:
                found.setdefault(system, []).append(one)
    return found
