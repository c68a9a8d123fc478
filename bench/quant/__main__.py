"""Quantised bases and 8-bit optimizers beside bitsandbytes: ``python -m bench.quant --parts load,step``.

Systems take turns, and medians are compared. See ``bench/README.md`` for what is the same for all of them and what is
not. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import environments, flags, report
from bench.quant import kernels
from bench.quant.big import big
from bench.quant.findings import PEER, Bench, Findings, missed, table
from bench.quant.load import load
from bench.quant.step import step
from bench.report import say
from bench.runs import NOT_FOR_PEERS, FailedRunError, data_file, environment
from bench.shapes import SHAPES

PARTS: dict[str, Callable[[Bench], Findings]] = {
    "quantize": kernels.quantize, "dequantize": kernels.dequantize, "optim": kernels.optim, "load": load, "step": step,
    "big": big,
}  # fmt: skip
BY_DEFAULT = [name for name in PARTS if name != "big"]


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 measured, 2 the peer's environment is missing or a flag is wrong, 3 ours failed somewhere."""
    options = parse(argv)
    python = _interpreter(options)
    if options.peers and python is None:
        say(
            f"error: no environment for {PEER} in {options.environments}\n"
            "  way out   the same command with --install makes it there\n"
            "  or        --environments FOLDER, where a folder of that name holds one\n"
            "  or        --peers none measures ours alone"
        )
        return 2
    options.work.mkdir(parents=True, exist_ok=True)
    found, failed = measure(_bench(options, python), options.parts)
    versions = environments.versions_in(python, PEER) if python else None
    if versions and (others := environments.other_versions(PEER, versions)):
        say(f"warning: {PEER} is not as pinned: {', '.join(others)}")
    facts = facts_of(found, options) | {"peers": {PEER: versions} if versions else {}}
    if not options.json:
        print(table({name: value for one in found.values() for name, value in one.figures.items()}))
    print(json.dumps(facts))
    return 3 if failed else 0


def measure(bench: Bench, parts: Sequence[str]) -> tuple[dict[str, Findings], bool]:
    """Part → what it found, and whether ours failed in any of them."""
    found: dict[str, Findings] = {}
    for name in parts:
        bench.say(f"— {name} (load {', '.join(f'{one:.1f}' for one in os.getloadavg())})")
        try:
            found[name] = PARTS[name](bench)
        except FailedRunError as error:
            bench.say(f"not run: {name}: {error}")
            found[name] = Findings(not_run={name: str(error)})
    failed = any(not system.startswith(PEER) for one in found.values() for system in one.not_run)
    return found, failed


def facts_of(found: dict[str, Findings], options: argparse.Namespace) -> dict[str, Any]:
    """The last line: figures at the top, every cell under ``details``, and under which conditions."""
    figures = {name: value for one in found.values() for name, value in one.figures.items()}
    return {
        "bench": "quant",
        **figures,
        "missed": missed(figures),
        "not_run": {f"{part}: {system}": why for part, one in found.items() for system, why in one.not_run.items()},
        "parts": options.parts,
        "rounds": options.rounds,
        "weights": [f"{rows}x{columns}" for rows, columns in options.weights],
        "values": options.values,
        "load_shape": options.load_shape,
        **asdict(flags.setting_of(options)),
        "details": {part: one.details for part, one in found.items()},
        "threads": int(environment(options.work, options.threads).get("OMP_NUM_THREADS") or os.cpu_count() or 1),
        **report.conditions(),
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags, checked; ``environments`` is filled in."""
    parser = argparse.ArgumentParser(prog="python -m bench.quant", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--parts", type=flags.names_of(PARTS), default=BY_DEFAULT, help=f"of {','.join(PARTS)}; big takes minutes"
    )
    parser.add_argument("--peers", choices=(PEER, "none"), default=PEER, help="whether to run it beside us")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.3, help="that an operation is measured for, each round")
    parser.add_argument("--weights", type=_sizes, default=((2048, 2048), (8192, 2048)), help="ROWSxCOLUMNS,…")
    parser.add_argument("--values", type=int, default=1 << 21, help="parameters of the optimizer's step")
    parser.add_argument("--limit", default="1.5GB", help="of the part big, for its second run's --max-memory")
    parser.add_argument("--load-shape", choices=SHAPES, default="llama-3.2-1b", help="of the part load")
    flags.add_setting(parser, shape="of the part step; so are the rest:")
    flags.add_places(parser, environments=f"folder with {PEER}/, an environment; else this one's")
    parser.add_argument("--install", action="store_true", help="make the environment if it is missing")
    options = parser.parse_args(argv)
    flags.check_setting(parser, options)
    options.peers = options.peers != "none"
    flags.settle_places(options)
    return options


def _interpreter(options: argparse.Namespace) -> Path | None:
    """The peer's, installed if that was asked for; None where there is none, or none is wanted."""
    python = environments.interpreter(options.environments, PEER) if options.peers else None
    if not (options.peers and options.install and python is None):
        return python
    environments.install(options.environments, PEER)
    return environments.interpreter(options.environments, PEER)


def _bench(options: argparse.Namespace, python: Path | None) -> Bench:
    env = environment(options.work, options.threads)
    return Bench(
        work=options.work, env=env, peer_env={name: v for name, v in env.items() if name not in NOT_FOR_PEERS},
        python=python, data=data_file(options.data, options.work), setting=flags.setting_of(options),
        load_shape=options.load_shape, limit=options.limit, weights=options.weights, values=options.values,
        rounds=options.rounds, seconds=options.seconds, say=say,
    )  # fmt: skip


def _sizes(text: str) -> tuple[tuple[int, int], ...]:
    sizes = []
    for one in text.split(","):
        rows, _, columns = one.partition("x")
        if not (rows.isdigit() and columns.isdigit() and int(rows) * int(columns) % 64 == 0 != int(rows)):
            raise argparse.ArgumentTypeError(f"{one}: expected ROWSxCOLUMNS, a multiple of 64 values")
        sizes.append((int(rows), int(columns)))
    return tuple(sizes)


if __name__ == "__main__":
    raise SystemExit(main())
