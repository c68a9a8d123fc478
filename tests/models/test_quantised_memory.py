"""The memory that packed loading and quantising take: what is packed in the end, and one dense weight."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from packed import KINDS, packed_layers
from truetune.checkpoint.header import PlannedTensor
from truetune.checkpoint.shards import ShardWriter
from truetune.models.load import load_config, skeleton
from truetune.quant.replace import replace

ALLOWED = 40  # MB beside what is packed: 13 was seen in loading, one dense weight among it, and 23 in writing
# Loads or writes a small model first, so that what Python and torch load on first use is not counted.
MEASURED = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from truetune.config.quant import QuantRecipe
from truetune.export.quantize import quantize_checkpoint
from truetune.models.load import load_config, load_model, skeleton

def mb(field):
    return int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0]) / 1e3

small, base, out = sys.argv[1:]
recipe = QuantRecipe(kind="nf4")

def write(folder, out):
    model = skeleton(load_config(folder), dtype=torch.bfloat16)
    quantize_checkpoint(Path(folder), Path(out), model, recipe, dtype=torch.bfloat16)

def measured(job):
    start = mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    _held = job()
    return mb("VmHWM") - start

load_model(small, dtype=torch.bfloat16, quant=recipe)
write(small, out + "-small")
load_model(small, dtype=torch.bfloat16)
found = {"dense": measured(lambda: [p.sum() for p in load_model(base, dtype=torch.bfloat16).parameters()])}
found["write"] = measured(lambda: write(base, out))
found["load"] = measured(lambda: load_model(base, dtype=torch.bfloat16, quant=recipe))
found["files"] = measured(lambda: load_model(out, dtype=torch.bfloat16))
print(json.dumps(found))
"""


def write_base(folder: Path, *, hidden: int, inner: int, layers: int) -> Path:
    config = LlamaConfig(
        vocab_size=100, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=8,
        architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(folder)
    shapes = skeleton(load_config(str(folder)), dtype=torch.bfloat16).state_dict()
    plan = [PlannedTensor(name, torch.bfloat16, tuple(tensor.shape)) for name, tensor in shapes.items()]
    values = torch.randn(hidden * inner, generator=torch.Generator().manual_seed(0)).bfloat16()
    with ShardWriter(folder, plan, max_shard_bytes=100_000_000) as writer:
        for tensor in plan:
            writer.write(tensor.name, values[: torch.Size(tensor.shape).numel()].view(tensor.shape))
    return folder


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the high-water mark is read from Linux's /proc")
def test_packing_takes_the_memory_of_what_is_packed_and_of_one_tensor(tmp_path: Path) -> None:
    """A dense weight is 6 MB here, and all together are 160."""
    small = write_base(tmp_path / "small", hidden=64, inner=128, layers=1)
    base = write_base(tmp_path / "base", hidden=1024, inner=3072, layers=6)
    model = skeleton(load_config(str(base)), dtype=torch.bfloat16)
    dense = sum(parameter.nbytes for parameter in model.parameters()) / 1e6
    replace(model, KINDS["nf4"], dtype=torch.bfloat16)
    packed = sum(layer.packed_bytes for layer in packed_layers(model).values()) / 1e6
    command = [sys.executable, "-c", MEASURED, str(small), str(base), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["dense"] > 0.9 * dense  # the gauge sees what is held
    assert packed + ALLOWED < 0.6 * dense
    assert found["write"] < ALLOWED
    assert found["load"] < packed + ALLOWED
    assert found["files"] < packed + ALLOWED
