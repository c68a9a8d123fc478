"""What ``truetune merge`` costs on a synthetic Llama of about 1 GB, beside ``cp`` of the base and PEFT's merge.

    python bench/merge.py [--peers peft] [--runs 3] [--layers 8] [--json]

Each merge runs in a fresh process, from its start to its end, imports and all: wall time, processor time (what a shared
machine tells best) and peak (VmHWM, the kernel's own high-water mark), which is also given over that of a process that
imports the same modules and does nothing. Runs are interleaved, and medians are reported. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

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
_KEYS = ("seconds", "cpu_s", "peak_mb", "peak_over_imports_mb")


def make(folder: Path, *, layers: int) -> None:
    """``base`` (random bf16 weights, one tensor in memory at a time) and ``adapter`` (r 16 on all linear layers)."""
    config = LlamaConfig(
        vocab_size=32_000, hidden_size=2048, intermediate_size=5504, num_hidden_layers=layers, num_attention_heads=16,
        architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(folder / "base")
    model = skeleton(config, dtype=torch.bfloat16)
    draws = torch.Generator().manual_seed(0)
    plan = [PlannedTensor(name, p.dtype, tuple(p.shape)) for name, p in model.named_parameters()]
    with ShardWriter(folder / "base", plan) as writer:
        for tensor in plan:
            writer.write(tensor.name, torch.randn(tensor.shape, generator=draws).mul_(0.02).bfloat16())
    attached = attach(model, LoRA(rank=16, alpha=32))
    (folder / "adapter").mkdir()
    tensors = {key: torch.randn(p.shape, generator=draws).mul_(0.02) for key, p in state(model).items()}
    save_file(tensors, folder / "adapter" / WEIGHTS, metadata={"format": "pt"})
    (folder / "adapter" / CONFIG).write_text(json.dumps(to_peft(model, attached, base=str(folder / "base"))))


def watched(command: list[str]) -> tuple[float, float, str]:
    """(wall seconds, processor seconds, what it printed) of a process from its start to its end."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed:\n{done.stderr[-3000:]}")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


def measure(name: str, folder: Path) -> tuple[float, ...]:
    """``_KEYS`` of one run; a copy has no peak worth telling."""
    out = folder / f"out-{name}"
    shutil.rmtree(out, ignore_errors=True)
    os.sync()  # so that nobody waits for what another one left to be written
    if name == "cp":
        return (*watched(["cp", "-r", "--reflink=never", str(folder / "base"), str(out)])[:2], 0.0, 0.0)
    command = [sys.executable, "-c", CHILDREN[name]]
    bare = float(watched(command)[2].split()[-1])
    wall, cpu, said = watched([*command, str(folder / "base"), str(folder / "adapter"), str(out)])
    peak = float(said.split()[-1])
    return wall, cpu, peak / 1e6, (peak - bare) / 1e6


def run(folder: Path, names: list[str], runs: int) -> dict[str, dict[str, Any]]:
    """Interleaved runs, each from a cold start of the process and a warm page cache; medians."""
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in names}
    for _ in range(runs):
        for name in names:
            wall, cpu, peak, over = row = measure(name, folder)
            found[name].append(row)
            print(f"{name:9} {wall:6.1f} s   cpu {cpu:6.1f} s   peak {peak:7,.0f} MB   over imports {over:7,.0f} MB")
    medians = {n: [round(statistics.median(v), 2) for v in zip(*rows, strict=True)] for n, rows in found.items()}
    return {name: dict(zip(_KEYS, values, strict=True)) for name, values in medians.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", default="", help="comma-separated; peft is known")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--layers", type=int, default=8, help="8 make 1.07 GB")
    parser.add_argument("--json", action="store_true", help="accepted as in the other benches; JSON comes anyway")
    options = parser.parse_args()
    peers = [peer for peer in options.peers.split(",") if peer]
    with tempfile.TemporaryDirectory(prefix="truetune-merge-") as temporary:
        folder = Path(temporary)
        make(folder, layers=options.layers)
        size = sum(path.stat().st_size for path in (folder / "base").glob("*.safetensors"))
        results = run(folder, ["cp", "truetune", *peers], options.runs)
    ours, copy = results.pop("truetune"), results.pop("cp")
    line: dict[str, Any] = {"bench": "merge", "base_mb": round(size / 1e6, 1), "runs": options.runs, **ours}
    line |= {"cp_seconds": copy["seconds"], "cp_cpu_s": copy["cpu_s"]}
    for peer, theirs in results.items():
        line |= {f"peer_{peer}_{key}": value for key, value in theirs.items()}
        line[f"memory_ratio_vs_{peer}"] = round(theirs["peak_over_imports_mb"] / ours["peak_over_imports_mb"], 2)
        line[f"speedup_vs_{peer}"] = round(theirs["seconds"] / ours["seconds"], 2)
        line[f"cpu_ratio_vs_{peer}"] = round(theirs["cpu_s"] / ours["cpu_s"], 2)
    print(json.dumps(line))


if __name__ == "__main__":
    main()
