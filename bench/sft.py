"""One training configuration, ours beside the installed peers: ``python -m bench.sft --peers peft,litgpt,ms-swift``.

Each run is a process of its own; the systems take turns, and medians are compared. See ``bench/README.md`` for what is
the same for all of them and what is not. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import environments, flags, report
from bench.measure import WARM_STEPS, Outcome, medians
from bench.report import OURS, say
from bench.runs import FailedRunError, Runs, data_file, environment
from bench.shapes import SHAPES


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 measured, 2 a peer's environment is missing or a flag is wrong, 3 our own run failed."""
    options = parse(argv)
    found = _environments(options)
    if absent := [peer for peer, versions in found.items() if versions is None]:
        say(
            f"error: no environment for {', '.join(absent)} in {options.environments}\n"
            "  way out   the same command with --install makes it there\n"
            "  or        --environments FOLDER, where a folder of the peer's name holds one"
        )
        return 2
    options.work.mkdir(parents=True, exist_ok=True)
    runs = Runs(
        setting=flags.setting_of(options), work=options.work,
        environments=options.environments, data=data_file(options.data, options.work), recompute=options.recompute,
        env=environment(options.work, options.threads),
    )  # fmt: skip
    try:
        outcomes, facts = measure(runs, options.peers, options.rounds)
    except FailedRunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    facts["peers"] = found
    if not options.json:
        print(report.table(outcomes, ceiling=facts["ceiling_tok_s"]))
    print(json.dumps(facts))
    return 0


def measure(runs: Runs, peers: list[str], rounds: int) -> tuple[dict[str, Outcome], dict[str, Any]]:
    """All runs, by turns.

    Returns:
        The medians of every system that ran, and what the JSON line holds.
    Raises:
        FailedRunError: ours failed. A peer that fails is left out, with the reason.
    """
    runs.prepare(peers, say)
    folder = runs.work / "runs"
    shutil.rmtree(folder, ignore_errors=True)
    not_run: dict[str, str] = {}
    found: dict[str, list[Outcome]] = {}
    ceilings = []
    for turn in range(rounds + 1):
        for system in (OURS, *peers):
            if system in not_run:
                continue
            try:
                outcome = _one(runs, system, folder, turn, rounds)
            except FailedRunError as error:
                if system == OURS:
                    raise
                not_run[system] = str(error)
                say(f"not run: {error}")
                continue
            if turn:
                found.setdefault(system, []).append(outcome)
        if turn:
            ceilings.append(runs.ceiling())
            say(f"ceiling of {runs.setting.dtype} products here: {ceilings[-1]['gflops']:,.0f} GFLOP/s")
    found = {system: done for system, done in found.items() if system not in not_run}
    outcomes = {system: medians(done) for system, done in found.items()}
    return outcomes, _facts(runs, peers, outcomes, ceilings) | {
        "rounds": rounds,
        "not_run": not_run,
        "medians": {system: report.rounded(one) for system, one in outcomes.items()},
        "runs": {system: [report.rounded(one) for one in done] for system, done in found.items()},
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags, checked; ``environments`` is filled in."""
    parser = argparse.ArgumentParser(prog="python -m bench.sft", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--peers", type=flags.names_of(environments.SCRIPTS), default=[], help=f"of {','.join(environments.SCRIPTS)}"
    )
    flags.add_setting(parser)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--recompute", help="handed to truetune alone")
    flags.add_places(parser, environments="folder with an environment per peer, by the peer's name")
    parser.add_argument("--install", action="store_true", help="make the environments that are missing")
    options = parser.parse_args(argv)
    flags.check_setting(parser, options)
    flags.settle_places(options)
    return options


def _environments(options: argparse.Namespace) -> dict[str, dict[str, str] | None]:
    """Peer → its installed versions, None where there is no complete environment."""
    found: dict[str, dict[str, str] | None] = {}
    for peer in options.peers:
        versions = environments.versions(options.environments, peer)
        if versions is None and options.install:
            environments.install(options.environments, peer)
            versions = environments.versions(options.environments, peer)
        if versions and (others := environments.other_versions(peer, versions)):
            say(f"warning: {peer} is not as pinned: {', '.join(others)}")
        found[peer] = versions
    return found


def _one(runs: Runs, system: str, folder: Path, turn: int, rounds: int) -> Outcome:
    """One run, and its line; turn 0 is short, warms the caches (files, compiled Python) and is discarded."""
    began = time.perf_counter()
    outcome = runs.one(system, folder / f"{turn}-{system}", steps=None if turn else WARM_STEPS + 1)
    what = f"round {turn}/{rounds}" if turn else "warm-up, not counted"
    say(
        f"{what}  {system:<9} {outcome.tok_s:8,.1f} tok/s  peak {outcome.peak_mb:7,.0f} MB  first step "
        f"{outcome.first_step_s:5.1f} s  loss {outcome.loss:.4f}  ({time.perf_counter() - began:.0f} s in all)"
    )
    return outcome


def _facts(
    runs: Runs, peers: list[str], outcomes: dict[str, Outcome], ceilings: list[dict[str, Any]]
) -> dict[str, Any]:
    """What was found, and under which conditions."""
    tokens, trained = (sum(counts[WARM_STEPS:]) for counts in runs.tokens)
    least = SHAPES[runs.setting.shape].flops_per_token(trained / tokens)
    # The highest of all rounds: what the machine can do is what it did once.
    gflops = max(one["gflops"] for one in ceilings)
    ceiling = gflops * 1e9 / least
    return {
        "bench": "sft",
        **report.figures(outcomes, peers, ceiling=ceiling),
        **asdict(runs.setting),
        "recompute": runs.recompute,
        "trained_share": round(trained / tokens, 3),
        "data": runs.data.name,
        "ceiling_gflops": gflops,
        "ceiling_tok_s": round(ceiling, 1),
        "threads": ceilings[-1]["threads"],
        **report.conditions(),
    }


if __name__ == "__main__":
    raise SystemExit(main())
