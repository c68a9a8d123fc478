"""Tokens per second of answers, ours beside ``transformers.generate`` and PEFT: ``python -m bench.generate``.

    python -m bench.generate [--peers transformers,peft] [--rounds 3] [--threads N] [--json]

Greedy answers to random prompts on SmolLM2-135M's shape in bf16, four LoRA adapters of rank 8 on all linear maps, never
merged. All systems run by turns in this process, on the same weights and threads, once before anything counts; a ratio
is taken within each round, and the median of those counts. The time of an answer includes that of its prompt.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.generate.systems import ADAPTERS, Ours, Peft, Transformers, model_of, prompts, write_adapters
from bench.shapes import SHAPES

# name: (rows, adapters of the rows, the systems beside ours)
CASES: dict[str, tuple[int, Sequence[str], Sequence[str]]] = {
    "single": (1, ADAPTERS[:1], ("transformers", "peft")),
    "batch8": (8, ADAPTERS[:1] * 8, ("transformers", "peft")),
    "mixed": (8, ADAPTERS * 2, ("peft",)),
}
WANTED = {
    "single_vs_transformers": 2.0, "batch8_vs_peft": 2.0, "mixed_vs_peft": 3.5, "mixed_time_vs_batch8": 1.15,
    "switch_ms": 10.0,
}  # fmt: skip
AT_MOST = ("mixed_time_vs_batch8", "switch_ms")


def main() -> int:
    options = _options()
    if options.threads:
        torch.set_num_threads(options.threads)
    peers = [peer for peer in options.peers.split(",") if peer]
    shape = SHAPES[options.shape]
    model = model_of(shape, options.dtype)
    with tempfile.TemporaryDirectory(prefix="truetune-generate-") as temporary:
        folder = Path(temporary)
        write_adapters(model, folder, options.rank)
        systems: dict[str, Any] = {"truetune": Ours(model, folder, tokens=16 * (options.prompt + options.new))}
        systems |= {"transformers": Transformers(model)} if "transformers" in peers else {}
        systems |= {"peft": Peft(model, folder)} if "peft" in peers else {}
        rounds = [_round(systems, options, shape.vocab, number) for number in range(options.rounds + 1)][1:]
        switch = systems["truetune"].switch_ms()
    found = _figures(rounds, options.new) | {"switch_ms": round(switch, 2)}
    found["missed"] = [name for name, wanted in WANTED.items() if name in found and _misses(name, found[name], wanted)]
    if not options.json:
        _say(found)
    print(json.dumps({"bench": "generate", **vars(options), "threads": torch.get_num_threads(), **found}))
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", default="", help="comma-separated: transformers, peft")
    parser.add_argument("--shape", default="smollm2-135m", choices=list(SHAPES))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 leaves its own choice")
    parser.add_argument("--json", action="store_true", help="leave the table out")
    options = parser.parse_args()
    if wrong := set(filter(None, options.peers.split(","))) - {"transformers", "peft"}:
        parser.error(f"unknown peer {', '.join(sorted(wrong))}; known are transformers, peft")
    return options


def _round(systems: Mapping[str, Any], options: argparse.Namespace, vocab: int, number: int) -> dict[str, float]:
    """Seconds by ``case/system``; round 0 warms up, with short answers."""
    found = {}
    for case, (rows, names, beside) in CASES.items():
        for name in ("truetune", *beside):
            if name in systems:
                ids = prompts(rows, options.prompt, vocab, seed=1000 * number + rows)
                found[f"{case}/{name}"] = systems[name].answer(ids, names, options.new if number else 4)
    line = " · ".join(f"{key} {seconds:.1f} s" for key, seconds in found.items())
    print(f"{time.strftime('%H:%M:%S')} round {number}: {line}", file=sys.stderr)
    return found


def _figures(rounds: Sequence[Mapping[str, float]], new: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key in rounds[0]:
        case, _, system = key.partition("/")
        name = f"tok_s_{case}" if system == "truetune" else f"tok_s_{case}_{system}"
        found[name] = round(statistics.median(CASES[case][0] * new / r[key] for r in rounds), 1)
    for key in rounds[0]:
        case, _, system = key.partition("/")
        if system != "truetune":
            ratios = [r[key] / r[f"{case}/truetune"] for r in rounds]
            found[f"{case}_vs_{system}"] = round(statistics.median(ratios), 2)
    mixed = [r["mixed/truetune"] / r["batch8/truetune"] for r in rounds]
    return found | {"mixed_time_vs_batch8": round(statistics.median(mixed), 3)}


def _misses(name: str, found: float, wanted: float) -> bool:
    return found > wanted if name in AT_MOST else found < wanted


def _say(found: Mapping[str, Any]) -> None:
    for name, value in found.items():
        wanted = f"   {'at most' if name in AT_MOST else 'at least'} {WANTED[name]}" if name in WANTED else ""
        print(f"{name:<28} {value}{wanted}")


if __name__ == "__main__":
    sys.exit(main())
