"""A real server under load: ``python -m bench.serve``.

``truetune serve`` with the embedded base and many LoRA adapters; clients that all stream at once, each its own
adapter, then one short request after another, whose memory is watched. Two figures count: the longest waits between
tokens beside the usual one, and what the process holds at the end beside what it held after the first requests.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil
import torch

import truetune
from truetune.adapters.inject import adapters

BASE = Path(truetune.__file__).parent / "assets" / "base"
PROMPT = 'def largest(values):\n    """Return the largest of the values."""\n'


def main() -> int:
    """Measure, and print one JSON object as the last line."""
    options = _options()
    with tempfile.TemporaryDirectory(prefix="truetune-serve-") as temporary:
        folder = Path(temporary)
        _write_adapters(folder, options.adapters)
        with _Server(folder, options.rows) as server:
            facts = _streams(server, options) | _many(server, options)
    print(json.dumps({"bench": "serve", **vars(options), **facts}))
    return 0 if not facts["failed"] else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.serve", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--adapters", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=64, help="of each streamed answer")
    parser.add_argument("--requests", type=int, default=10_000, help="short ones, for the memory; 0 leaves them out")
    parser.add_argument("--rows", type=int, default=64, help="answers that the server computes together")
    return parser.parse_args()


def _write_adapters(folder: Path, count: int) -> None:
    model = truetune.load(str(BASE))
    truetune.attach(model, truetune.LoRA(rank=8, alpha=16))
    for number in range(count):
        draw = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for _, layer in adapters(model):
                for _, parameter in layer.adapter_parameters():
                    parameter.copy_(0.02 * torch.randn(parameter.shape, generator=draw))
        truetune.save_adapter(model, str(folder / f"a{number:02}"))


class _Server:
    """The command itself, in a process of its own."""

    def __init__(self, folder: Path, rows: int) -> None:
        command = [sys.executable, "-m", "truetune", "serve", "--model", str(BASE), "--adapters", str(folder),
                   "--served-name", "base", "--port", "0", "--max-rows", str(rows), "--max-queue", "256"]  # fmt: skip
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.url = self._address()

    def _address(self) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if found := re.search(r"http://[\d.:]+/v1", line):
                threading.Thread(target=self.process.stdout.read, daemon=True).start()  # a full pipe would stop it
                return found[0]
        raise SystemExit("the server ended before it listened")

    def __enter__(self) -> _Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(60)

    @property
    def resident_mb(self) -> float:
        """What the process holds."""
        return psutil.Process(self.process.pid).memory_info().rss / 1e6


def _body(number: int, options: argparse.Namespace, **more: Any) -> dict[str, Any]:
    return {"model": f"a{number % options.adapters:02}", "prompt": f"{PROMPT}# {number}\n", "temperature": 1.0,
            "seed": number} | more  # fmt: skip


def _streams(server: _Server, options: argparse.Namespace) -> dict[str, Any]:
    """All clients at once, twice: the first answer of each adapter loads it, so the second round is what counts."""

    def ask(number: int) -> tuple[list[float], str]:
        body = _body(number, options, max_tokens=options.tokens, stream=True)
        times: list[float] = []
        with httpx.stream("POST", f"{server.url}/completions", json=body, timeout=300) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    times.append(time.perf_counter())
        return times, "" if answer.status_code == 200 else f"status {answer.status_code}"

    def tried(number: int) -> tuple[list[float], str]:
        try:
            return ask(number)
        except httpx.HTTPError as error:
            return [], str(error) or type(error).__name__

    with ThreadPoolExecutor(options.clients) as pool:
        first = list(pool.map(tried, range(options.clients)))
        began = time.perf_counter()
        answers = list(pool.map(tried, range(options.clients)))
    gaps = sorted(b - a for times, _ in answers for a, b in itertools.pairwise(times))
    failures = [why for _, why in (*first, *answers) if why]
    usual = statistics.median(gaps)
    return {
        "failed": len(failures),
        "failures": failures[:3],
        "starved": sum(not times for times, _ in answers),
        "gap_median_ms": round(1e3 * usual, 1),
        "gap_p99_ms": round(1e3 * gaps[int(0.99 * len(gaps))], 1),
        "gap_p99_ratio": round(gaps[int(0.99 * len(gaps))] / usual, 2),
        "seconds": round(time.perf_counter() - began, 1),
    }


def _many(server: _Server, options: argparse.Namespace) -> dict[str, Any]:
    """Short requests by eight clients; memory after a tenth of them, and at the end."""
    if not options.requests:
        return {}
    done, held, lock = 0, [server.resident_mb], threading.Lock()

    def ask(share: range) -> None:
        nonlocal done
        with httpx.Client(timeout=300) as client:
            for number in share:
                client.post(f"{server.url}/completions", json=_body(number, options, max_tokens=2)).raise_for_status()
                with lock:
                    done += 1
                    if done % max(1, options.requests // 10) == 0:
                        held.append(server.resident_mb)

    began = time.perf_counter()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, [range(first, options.requests, 8) for first in range(8)]))
    return {
        "requests_s": round(options.requests / (time.perf_counter() - began), 1),
        "resident_mb": [round(size) for size in held],
        "growth_mb": round(held[-1] - held[1], 1),
    }


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    raise SystemExit(main())
