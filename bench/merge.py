"""What ``truetune merge`` costs on a model of random weights, beside ``cp`` of the base and PEFT's merge.

    python -m bench.merge [--shape 1b|7b] [--peers peft] [--environments FOLDER] [--runs 3] [--folder DIR] [--json]

Each merge runs in a fresh process, from its start to its end, imports and all: wall time, processor time (what a shared
machine tells best) and peak (VmHWM, the kernel's own high-water mark), which is also given over that of a process that
imports the same modules and does nothing. Runs take turns, and medians are reported. The last line is JSON.

``floor_s`` is what the work can't do without: ``cp``, and the low-rank products at the best rate of ``F.linear`` in
float32, on as many threads. ``work_s`` is what a merge takes over the bare imports. When a merge ends, its files are on
disk and their SHA-256 is known, which is not so of a copy: so there is one that is synced too (``synced_floor_s``), and
``sha256_s`` is what hashing that much takes one thread, whoever does it.

On a machine that others use as well, the wall says little. So one more merge of ours in each round tells its processor
seconds apart: imports, plan (with a try of the disk), what reads, adds and writes (``write_cpu_s``), having it brought
to disk (``sync_cpu_s``), and the thread that hashes. ``write_over_floor`` is what reads, adds and writes beside the
processor seconds of ``cp`` and of the bare products on one thread.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import environments
from bench.shapes import SHAPES, Shape

RANK = 16
_7B = Shape(hidden=4096, inner=11008, layers=32, heads=32, kv_heads=32, head_dim=128, vocab=32_000, context=4096)


@dataclass(frozen=True)
class Model:
    """A Llama to merge into."""

    shape: Shape
    tied: bool

    def flops(self) -> float:
        """Of the low-rank products s B A of all linear layers."""
        return 2.0 * RANK * self.shape.layers * sum(rows * columns for rows, columns in self.shape.linears())

    def largest(self) -> int:
        """Bytes of the largest tensor, in bf16."""
        shape = self.shape
        return 2 * max(shape.vocab * shape.hidden, *(rows * columns for rows, columns in shape.linears()))


MODELS = {
    "1b": Model(SHAPES["llama-3.2-1b"], tied=True),
    "7b": Model(_7B, tied=False),
    "tiny": Model(SHAPES["tiny"], tied=True),
}

# argv: base, adapter, out; none of them: only the imports.
_PEAK = """
import sys
{imports}
if len(sys.argv) > 1:
    {work}
print(next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
CHILDREN = {
    "truetune": _PEAK.format(
        imports="import truetune.recipes.merge; from truetune.cli.main import main",
        work="b, a, o = sys.argv[1:]; assert not main(['merge', '--model', b, '--adapter', a, '--out', o])",
    ),
    "peft": _PEAK.format(
        imports="import torch; from transformers import AutoModelForCausalLM as M; from peft import PeftModel as P\n"
        "from transformers.models.llama import modeling_llama",
        work="b, a, o = sys.argv[1:]; "
        "P.from_pretrained(M.from_pretrained(b, dtype='auto'), a).merge_and_unload().save_pretrained(o)",
    ),
}
STAGES = """
import json, os, sys, time
import truetune.recipes.merge
from truetune.checkpoint import shards
from truetune.cli.main import main
from truetune.recipes import merge_files, merge_work

took = dict(plan_cpu_s=0.0, sync_cpu_s=0.0)

def timed(name, inner):
    def run(*given, **more):
        began = time.thread_time()
        try:
            return inner(*given, **more)
        finally:
            took[name] += time.thread_time() - began
    return run

merge_files.planned = timed("plan_cpu_s", merge_files.planned)
merge_work.forecast = timed("plan_cpu_s", merge_work.forecast)
merge_work.identity_of = timed("plan_cpu_s", merge_work.identity_of)
shards.sync = timed("sync_cpu_s", shards.sync)
os.posix_fadvise = timed("sync_cpu_s", os.posix_fadvise)
began, imports = time.perf_counter(), time.process_time()
alone = time.thread_time()
b, a, o = sys.argv[1:]
assert not main(["merge", "--model", b, "--adapter", a, "--out", o])
thread = time.thread_time() - alone
took |= dict(write_cpu_s=thread - sum(took.values()), hash_cpu_s=time.process_time() - imports - thread)
print(json.dumps(dict(start_cpu_s=imports, merge_s=time.perf_counter() - began) | took))
"""
COPIES = {"cp": 'cp -r --reflink=never "$0" "$1"', "cp+sync": 'cp -r --reflink=never "$0" "$1" && sync "$1"/*'}
_KEYS = ("seconds", "cpu_s", "peak_mb", "peak_over_imports_mb", "import_s", "import_cpu_s")


def make(folder: Path, model: Model) -> None:
    """``base`` (random bf16 weights, one tensor in memory at a time) and ``adapter`` (r 16 on all linear layers)."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    from truetune.adapters.files import CONFIG, WEIGHTS, state
    from truetune.adapters.inject import attach
    from truetune.adapters.peft_config import to_peft
    from truetune.checkpoint.header import PlannedTensor
    from truetune.checkpoint.shards import ShardWriter
    from truetune.config.lora import LoRA
    from truetune.models.load import skeleton

    settings = {**model.shape.config(), "tie_word_embeddings": model.tied, "architectures": ["LlamaForCausalLM"]}
    config = LlamaConfig(**settings)
    config.save_pretrained(folder / "base")
    outline = skeleton(config, dtype=torch.bfloat16)
    draws = torch.Generator().manual_seed(0)
    plan = [PlannedTensor(name, p.dtype, tuple(p.shape)) for name, p in outline.named_parameters()]
    drawn: dict[tuple[int, ...], torch.Tensor] = {}  # one for each shape: layers may be alike, and drawing takes time
    with ShardWriter(folder / "base", plan) as writer:
        for tensor in plan:
            if tensor.shape not in drawn:
                drawn[tensor.shape] = torch.randn(tensor.shape, generator=draws).mul_(0.02).bfloat16()
            writer.write(tensor.name, drawn[tensor.shape])
    attached = attach(outline, LoRA(rank=RANK, alpha=2 * RANK))
    (folder / "adapter").mkdir()
    tensors = {key: torch.randn(p.shape, generator=draws).mul_(0.02) for key, p in state(outline).items()}
    save_file(tensors, folder / "adapter" / WEIGHTS, metadata={"format": "pt"})
    (folder / "adapter" / CONFIG).write_text(json.dumps(to_peft(outline, attached, base=str(folder / "base"))))


def product_rate(threads: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """FLOP/s of ``F.linear`` in float32, the best of some rounds."""
    import torch

    torch.set_num_threads(threads)
    x, weight = torch.randn(1024, 1024), torch.randn(1024, 1024)
    best = 0.0
    for _ in range(12):
        began = clock()
        torch.nn.functional.linear(x, weight)
        best = max(best, 2.0 * 1024**3 / (clock() - began))
    return best


def watched(command: list[str]) -> tuple[float, float, str]:
    """(wall seconds, processor seconds, what it printed) of a process from its start to its end."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed:\n{done.stderr[-3000:]}")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


def measure(name: str, folder: Path, python: Path) -> tuple[float, ...]:
    """``_KEYS`` of one run; a copy has neither imports nor a peak worth telling."""
    out = folder / f"out-{name}"
    shutil.rmtree(out, ignore_errors=True)
    os.sync()  # so that nobody waits for what another one left to be written
    try:
        if name in COPIES:
            return (*watched(["sh", "-c", COPIES[name], str(folder / "base"), str(out)])[:2], *[0.0] * 4)
        command = [str(python), "-c", CHILDREN[name]]
        import_s, import_cpu_s, said = watched(command)
        bare = float(said.split()[-1])
        wall, cpu, said = watched([*command, str(folder / "base"), str(folder / "adapter"), str(out)])
        peak = float(said.split()[-1])
        return wall, cpu, peak / 1e6, (peak - bare) / 1e6, import_s, import_cpu_s
    finally:
        shutil.rmtree(out, ignore_errors=True)  # at 7B it is as large as the disk may have room for


def stages(folder: Path, python: Path) -> dict[str, float]:
    """Processor seconds of one merge of ours, part by part, and what it waited for the disk."""
    out = folder / "out-stages"
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    try:
        places = (str(folder / "base"), str(folder / "adapter"), str(out))
        found: dict[str, float] = json.loads(watched([str(python), "-c", STAGES, *places])[2].splitlines()[-1])
    finally:
        shutil.rmtree(out, ignore_errors=True)
    print("stages    " + "   ".join(f"{name} {seconds:.2f}" for name, seconds in found.items()))
    return found


def run(folder: Path, pythons: dict[str, Path], runs: int) -> tuple[dict[str, dict[str, Any]], dict[str, float]]:
    """Runs by turns, each from a cold start of the process and a warm page cache; medians of all, and of our stages."""
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in pythons}
    parts: list[dict[str, float]] = []
    for _ in range(runs):
        for name, python in pythons.items():
            wall, cpu, peak, over, *_ = row = measure(name, folder, python)
            found[name].append(row)
            print(f"{name:9} {wall:6.1f} s   cpu {cpu:6.1f} s   peak {peak:7,.0f} MB   over imports {over:7,.0f} MB")
        parts.append(stages(folder, pythons["truetune"]))
    medians = {n: [round(statistics.median(v), 2) for v in zip(*rows, strict=True)] for n, rows in found.items()}
    apart = {name: round(statistics.median(part[name] for part in parts), 2) for name in parts[0]}
    return {name: dict(zip(_KEYS, values, strict=True)) for name, values in medians.items()}, apart


def hash_rate() -> float:
    """Bytes per processor second of SHA-256, the best of some rounds."""
    data, best = bytes(32 << 20), 0.0
    for _ in range(4):
        began = time.process_time()
        hashlib.sha256(data)
        best = max(best, len(data) / (time.process_time() - began))
    return best


def findings(
    model: Model, size: int, results: dict[str, dict[str, Any]], apart: dict[str, float], threads: int
) -> dict[str, Any]:
    """What the bars are about, from the medians of all."""
    rate, alone = product_rate(threads), product_rate(1, time.process_time)
    ours, copy, synced = (results.pop(name) for name in ("truetune", "cp", "cp+sync"))
    floor, work = copy["seconds"] + model.flops() / rate, ours["seconds"] - ours["import_s"]
    line = {
        **ours,
        "peak_bar_mb": round(2 * model.largest() / 1e6 + 300, 1),
        "cp_seconds": copy["seconds"],
        "cp_cpu_s": copy["cpu_s"],
        "work_s": round(work, 2),
        "floor_s": round(floor, 2),
        "work_over_floor": round(work / floor, 2),
        "cp_synced_s": synced["seconds"],
        "synced_floor_s": round(synced["seconds"] + model.flops() / rate, 2),
        "sha256_s": round(size / hash_rate(), 2),
        "work_cpu_s": round(ours["cpu_s"] - ours["import_cpu_s"], 2),
        "products_s": round(model.flops() / rate, 2),
        "products_cpu_s": round(model.flops() / alone, 2),
        **apart,
        "write_over_floor": round(apart["write_cpu_s"] / (copy["cpu_s"] + model.flops() / alone), 2),
    }
    for peer, theirs in results.items():
        line |= {f"peer_{peer}_{key}": value for key, value in theirs.items()}
        line[f"memory_ratio_vs_{peer}"] = round(theirs["peak_over_imports_mb"] / ours["peak_over_imports_mb"], 2)
        line[f"speedup_vs_{peer}"] = round(theirs["seconds"] / ours["seconds"], 2)
        line[f"cpu_ratio_vs_{peer}"] = round(theirs["cpu_s"] / ours["cpu_s"], 2)
    return line


@contextlib.contextmanager
def fixture(folder: Path | None, shape: str) -> Iterator[Path]:
    """A folder with a base and an adapter; one that is named is kept, and found again."""
    with tempfile.TemporaryDirectory(prefix="truetune-merge-") as temporary:
        place = folder / shape if folder else Path(temporary)
        if not (place / "adapter").is_dir():
            # In a process of its own: what a child's peak would begin with.
            subprocess.run([sys.executable, "-m", "bench.merge", "--make", str(place), "--shape", shape], check=True)
        yield place


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=MODELS, default="1b", help="1b makes 2.1 GB; 7b 13.5, and needs twice that")
    parser.add_argument("--peers", default="", help="comma-separated; peft is known")
    parser.add_argument("--environments", type=Path, default=Path("out-bench/environments"), help="of the peers")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of every merge")
    parser.add_argument("--folder", type=Path, help="keep the base and the adapter here for the next time")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="accepted as in the other benches; JSON comes anyway")
    options = parser.parse_args()
    model = MODELS[options.shape]
    if options.make:
        options.make.mkdir(parents=True, exist_ok=True)
        make(options.make, model)
        return
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    pythons = {**dict.fromkeys(COPIES, Path("sh")), "truetune": Path(sys.executable)}
    for peer in filter(None, options.peers.split(",")):
        python = environments.interpreter(options.environments.absolute(), peer)
        if python is None:
            raise SystemExit(f"no environment for {peer} in {options.environments}: --environments FOLDER")
        pythons[peer] = python
    with fixture(options.folder, options.shape) as folder:
        size = sum(path.stat().st_size for path in (folder / "base").glob("*.safetensors"))
        results, apart = run(folder, pythons, options.runs)
    line = {"bench": "merge", "shape": options.shape, "base_mb": round(size / 1e6, 1), "runs": options.runs}
    print(json.dumps(line | findings(model, size, results, apart, options.threads)))


if __name__ == "__main__":
    main()
