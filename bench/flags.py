"""Flags that several benches have, each with one meaning."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection
from dataclasses import fields
from pathlib import Path

from bench.measure import WARM_STEPS, Setting
from bench.runs import ROOT
from bench.shapes import SHAPES


def names_of(known: Collection[str]) -> Callable[[str], list[str]]:
    """The type of a flag that takes some of ``known``, comma-separated: each once, in the order given."""

    def parse(text: str) -> list[str]:
        names = list(dict.fromkeys(name for name in text.split(",") if name))
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: known are {', '.join(known)}")
        return names

    return parse


def add_setting(parser: argparse.ArgumentParser, *, shape: str = "of a model with random weights") -> None:
    """What ``setting_of`` reads, the rows and the threads.

    Args:
        shape: help of ``--shape``.
    """
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m", help=shape)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--rank", type=int, default=8, help="alpha is twice the rank")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=12, help=f"the first {WARM_STEPS} are not timed")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--data", type=Path, help="alpaca rows, json or jsonl")
    parser.add_argument("--threads", type=int, help="of every process (default: each system's own choice)")


def add_places(parser: argparse.ArgumentParser, *, environments: str) -> None:
    """Where a bench keeps what it makes, and whether it prints its table.

    Args:
        environments: help of ``--environments``.
    """
    parser.add_argument("--work", type=Path, default=ROOT / "out-bench", help="models, rows, runs, environments")
    parser.add_argument("--environments", type=Path, help=environments)
    parser.add_argument("--json", action="store_true", help="the last line alone, without the table")


def check_setting(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse, as argparse does, what no run could be made of."""
    if options.steps <= WARM_STEPS or options.rounds < 1:
        parser.error(f"--steps: more than {WARM_STEPS}, --rounds: at least 1")
    if options.data and not options.data.is_file():
        parser.error(f"--data: no file {options.data}")


def settle_places(options: argparse.Namespace) -> None:
    """Make ``work`` and ``environments`` whole paths; an interpreter's links must stay as they are."""
    options.work = options.work.resolve()
    options.environments = (options.environments or options.work / "environments").absolute()


def setting_of(options: argparse.Namespace) -> Setting:
    """What ``add_setting`` has asked for."""
    return Setting(**{item.name: getattr(options, item.name) for item in fields(Setting)})
