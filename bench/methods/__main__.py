"""A training step of every method beside PEFT's: ``python -m bench.methods --methods lora,dora,ia3``.

Systems take turns, each in a process of its own. See ``bench/README.md``. The last line is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import environments, flags, report
from bench.methods.pairs import METHODS, Setting
from bench.methods.turns import Bench, Found, files, steps
from bench.methods.verdict import figures, missed, table
from bench.report import say
from bench.runs import KEEP_FREED_MEMORY, NOT_FOR_PEERS, environment
from bench.shapes import SHAPES, Shape

PEER = "peft"
SEVEN_B = Shape(
    hidden=4096, inner=11008, layers=32, heads=32, kv_heads=32, head_dim=128, vocab=32_000, context=4096, rope_theta=1e4
)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 measured, 2 the peer is missing or a flag is wrong, 3 ours failed somewhere."""
    options = parse(argv)
    python = environments.interpreter(options.environments, PEER) if options.peers else None
    if options.peers and python is None:
        say(
            f"error: no environment for {PEER} in {options.environments}, and none in this interpreter\n"
            "  way out   python -m bench.sft --peers peft --install makes one\n"
            "  or        --peers none measures ours alone"
        )
        return 2
    options.work.mkdir(parents=True, exist_ok=True)
    bench = _bench(options, python)
    found = [steps(bench, method) for method in options.methods]
    if options.files:
        found.append(files(bench, dataclasses.asdict(SEVEN_B), options.rank))
    facts = facts_of(found, bench, options)
    if python and (versions := environments.versions_in(python, PEER)):
        facts["peers"] = {PEER: versions}
    if not options.json:
        print(table(found))
    print(json.dumps(facts))
    return 3 if any(one.failed for one in found) else 0


def facts_of(found: Sequence[Found], bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    """The last line: figures at the top, every round under ``details``, and under which conditions."""
    top = figures(found)
    return {
        "bench": "methods",
        **top,
        "missed": missed(top, found),
        "not_run": {f"{one.name}: {system}": why for one in found for system, why in one.not_run.items()},
        "rounds": options.rounds,
        **dataclasses.asdict(bench.setting),
        "shape_name": options.shape,
        "details": {one.name: one.rounds for one in found},
        "threads": options.threads,
        **report.conditions(),
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags, checked; ``environments`` is filled in."""
    parser = argparse.ArgumentParser(prog="python -m bench.methods", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--methods", type=flags.names_of(METHODS), default=list(METHODS), help=f"of {','.join(METHODS)}"
    )
    parser.add_argument("--peers", choices=(PEER, "none"), default=PEER, help="whether to run it beside us")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.0, help="that a system's steps are measured for, each round")
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m", help="of a model with random weights")
    parser.add_argument("--layers", type=int, default=4, help="of it that are left")
    parser.add_argument("--vocab", type=int, default=4096, help="of it that is left: the head is no part of a method")
    parser.add_argument(
        "--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="auto: as ours chooses"
    )
    parser.add_argument("--rows", type=int, default=16, help="of a step, as a run has without being told")
    parser.add_argument("--tokens", type=int, default=96, help="of every row: nothing is padded")
    parser.add_argument("--rank", type=int, default=8, help="of lora and dora; alpha is twice the rank")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--threads", type=int, default=1, help="of every process")
    parser.add_argument("--files", action=argparse.BooleanOptionalAction, default=True,
                        help="also save and load an adapter of Llama-2-7B's shape")  # fmt: skip
    flags.add_places(parser, environments=f"folder with {PEER}/, an environment; else this one's")
    options = parser.parse_args(argv)
    for flag in ("rounds", "layers", "rows", "rank", "threads"):
        if getattr(options, flag) < 1:
            parser.error(f"--{flag}: at least 1")
    if options.tokens < 2 or options.vocab < 3:
        parser.error("--tokens: at least 2, --vocab: at least 3")
    options.peers = options.peers != "none"
    flags.settle_places(options)
    return options


def _bench(options: argparse.Namespace, python: Path | None) -> Bench:
    env = environment(options.work, options.threads)
    peer_env = {"GLIBC_TUNABLES": KEEP_FREED_MEMORY} | {k: v for k, v in env.items() if k not in NOT_FOR_PEERS}
    whole = SHAPES[options.shape]
    shape = dataclasses.replace(whole, layers=min(whole.layers, options.layers), vocab=min(whole.vocab, options.vocab))
    setting = Setting(
        shape=shape, dtype=options.dtype, rows=options.rows, tokens=options.tokens, rank=options.rank,
        dropout=options.dropout,
    )  # fmt: skip
    return Bench(
        setting=setting, env=env, peer_env=peer_env, python=python, folder=options.work / "runs-methods",
        rounds=options.rounds, seconds=options.seconds, say=say,
    ).with_dtype()  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
