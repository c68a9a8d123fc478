"""A plain LoRA merged by files alone: the very bytes of the other way, without torch, and only where it is certain."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import truetune
from families import FAMILIES, perturb
from truetune.adapters import files
from truetune.checkpoint.bodies import PIECE_BYTES
from truetune.checkpoint.header import PlannedTensor
from truetune.checkpoint.shards import ShardWriter
from truetune.config.lora import LoRA
from truetune.config.merge import MergeConfig
from truetune.config.resolve import resolve
from truetune.errors import AdapterError
from truetune.export.merge import RowEdit, merge_checkpoint
from truetune.models.load import weight_hash
from truetune.ops import dispatch
from truetune.recipes.merge_files import planned

PLAIN = ["llama", "llama-tied", "qwen2"]

needs_native = pytest.mark.skipif(dispatch.library_here() is None, reason="the native kernels can't be had here")
pytestmark = needs_native


def make(
    folder: Path, *, family: str = "llama", dtype: torch.dtype = torch.bfloat16, lora: LoRA | None = None, **card: Any
) -> None:
    """``base`` and ``adapter``, which is trained."""
    FAMILIES[family].make().to(dtype).save_pretrained(folder / "base", max_shard_size="60KB")
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype="auto")
    truetune.attach(model, lora or LoRA(rank=4, alpha=8), seed=3)
    perturb(model)
    files.save(model, folder / "adapter", base=str(folder / "base"), card=card)


def config_of(folder: Path, out: str = "out", **flags: Any) -> MergeConfig:
    given = {"model": str(folder / "base"), "adapter": str(folder / "adapter"), "out": str(folder / out)}
    return resolve(MergeConfig, file=None, flags=given | flags).config


def merged(folder: Path, out: str, **flags: Any) -> dict[str, bytes]:
    truetune.merge(str(folder / "base"), str(folder / "adapter"), str(folder / out), **flags)
    return {path.name: path.read_bytes() for path in (folder / out).iterdir()}


def both_ways(folder: Path, **flags: Any) -> None:
    """By files alone, and by the model's modules in plain torch: the same files to the bit."""
    work = planned(config_of(folder))
    assert work is not None
    assert work.edits
    assert all(isinstance(edit, RowEdit) for edit in work.edits.values())
    alone = merged(folder, "alone", **flags)
    with dispatch.forced("reference"):
        assert planned(config_of(folder)) is None
        assert merged(folder, "whole", **flags) == alone
    assert alone["config.json"] == (folder / "base" / "config.json").read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", PLAIN)
def test_the_result_is_that_of_the_other_way(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    make(tmp_path, family=family, dtype=dtype)
    both_ways(tmp_path, max_shard_gb=1e-4)
    before, after = load_all(tmp_path / "base"), load_all(tmp_path / "alone")
    assert [name for name in before if not torch.equal(before[name], after[name])] == [
        name for name in before if "_proj" in name and name.endswith("weight")
    ]


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


@pytest.mark.parametrize(
    "lora",
    [
        LoRA(rank=3, alpha=5, use_rslora=True),
        LoRA(rank=4, alpha=8, targets=("q_proj", "mlp.down_proj")),
        LoRA(rank=4, alpha=8, targets=(r"model\.layers\.0\..*up_proj",)),
        LoRA(rank=4, alpha=8, targets=("lm_head", "all-linear")),
    ],
)
def test_scale_and_targets_are_those_of_the_adapter(lora: LoRA, tmp_path: Path) -> None:
    make(tmp_path, lora=lora)
    both_ways(tmp_path)


def test_peft_writes_all_linear_as_a_word(tmp_path: Path) -> None:
    make(tmp_path)
    change(tmp_path, lambda settings: settings.update(target_modules="all-linear"))
    both_ways(tmp_path)


def test_an_adapter_in_bf16_is_the_same_numbers(tmp_path: Path) -> None:
    make(tmp_path)
    rewrite(tmp_path, lambda tensors: {key: tensor.bfloat16() for key, tensor in tensors.items()})
    both_ways(tmp_path)


@pytest.mark.parametrize("template", ["own", "alpaca"])
def test_no_torch_is_imported(template: str, tmp_path: Path) -> None:
    """Nor numpy, nor transformers: they are most of what a merge used to cost."""
    card = {"template": {"name": template, "source": "{{ messages }}", "sha256": ""}, "system": "Be brief."}
    make(tmp_path, **card, base={"name": str(tmp_path / "base")})
    script = (
        "import sys; from truetune.cli.main import main; code = main(sys.argv[1:]); "
        "print([name for name in ('torch', 'numpy', 'transformers', 'jinja2') if name in sys.modules]); sys.exit(code)"
    )
    folders = [str(tmp_path / name) for name in ("base", "adapter", "out")]
    flags = [text for pair in zip(("--model", "--adapter", "--out"), folders, strict=True) for text in pair]
    done = subprocess.run([sys.executable, "-c", script, "merge", *flags], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert "14 tensors change" in done.stderr


def change(folder: Path, how: Callable[[dict[str, Any]], object], name: str = files.CONFIG) -> None:
    path = folder / "adapter" / name
    found = json.loads(path.read_text())
    how(found)
    path.write_text(json.dumps(found))


def rewrite(folder: Path, how: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = folder / "adapter" / files.WEIGHTS
    save_file(how(load_file(path)), path)


@pytest.mark.parametrize(
    "settings",
    [
        {"rank_pattern": {"q_proj": 4}},
        {"alpha_pattern": {"q_proj": 9}},
        {"modules_to_save": ["norm"]},
        {"bias": "all"},
        {"use_dora": True},
        {"layers_to_transform": [0]},
        {"exclude_modules": ["k_proj"]},
        {"lora_bias": True},
        {"trainable_token_indices": [1]},
        {"ensure_weight_tying": True},
        {"target_modules": ["q_proj"]},
        {"target_modules": ["all-linear", "embed_tokens"]},
        {"target_modules": "("},
        {"init_lora_weights": "pissa"},
        {"what_is_this": 1},
        {"r": 5},
        {"peft_type": "IA3"},
    ],
    ids=lambda settings: str(next(iter(settings))),
)
def test_settings_that_mean_more_are_left_to_the_other_way(settings: dict[str, Any], tmp_path: Path) -> None:
    make(tmp_path)
    assert planned(config_of(tmp_path)) is not None
    change(tmp_path, lambda found: found.update(settings))
    assert planned(config_of(tmp_path)) is None


@pytest.mark.parametrize(
    "flags", [{"to": "adapter"}, {"quant": "nf4"}, {"verify": True}, {"onto": "original"}, {"combine": "svd"}], ids=str
)
def test_a_merge_that_is_asked_for_more_is_left_to_the_other_way(flags: dict[str, Any], tmp_path: Path) -> None:
    make(tmp_path)
    assert planned(config_of(tmp_path, **flags)) is None


def without_one(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(sorted(tensors.items())[1:])


def with_one_more(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**tensors, "base_model.model.lm_head.lora_A.weight": torch.ones(4, 4)}


def called_otherwise(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.replace("q_proj", "x_proj"): tensor for key, tensor in tensors.items()}


def wider(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: torch.cat([t, t], 1) if "lora_A" in k and "q_proj" in k else t for k, t in tensors.items()}


@pytest.mark.parametrize("how", [without_one, with_one_more, called_otherwise, wider])
def test_tensors_that_do_not_fit_are_refused_in_the_words_of_the_other_way(how: Any, tmp_path: Path) -> None:
    make(tmp_path)
    rewrite(tmp_path, how)
    assert planned(config_of(tmp_path)) is None
    with pytest.raises(AdapterError, match="does not fit this model"):
        merged(tmp_path, "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_in_fp16_or_trained_on_packed_weights_is_left_to_the_other_way(tmp_path: Path) -> None:
    make(tmp_path, quantisation=None)
    assert planned(config_of(tmp_path)) is not None
    change(tmp_path, lambda card: card.update(quantisation={"kind": "nf4", "skip": []}), files.CARD)
    assert planned(config_of(tmp_path)) is None
    change(tmp_path, lambda card: card.pop("quantisation"), files.CARD)
    rewrite(tmp_path, lambda tensors: {key: tensor.half() for key, tensor in tensors.items()})
    assert planned(config_of(tmp_path)) is None


def test_another_base_is_refused(tmp_path: Path) -> None:
    make(tmp_path, base={"name": "base", "weights_sha256": "0" * 64})
    with pytest.raises(AdapterError, match="trained on other weights"):
        merged(tmp_path, "out")
    assert merged(tmp_path, "out", allow_mismatch="base")
    change(tmp_path, lambda card: card["base"].update(weights_sha256=weight_hash(tmp_path / "base")), files.CARD)
    assert merged(tmp_path, "again")


@pytest.mark.parametrize("shape", [(5, PIECE_BYTES // 4 + 3), (3000, 500), (7, 1), (0, 4), (9,)], ids=str)
def test_rows_come_whole_and_in_order(shape: tuple[int, ...], tmp_path: Path) -> None:
    """Longer than a piece, many to a piece, none, and numbers that are rows of one."""
    tensor = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    (tmp_path / "base").mkdir()
    with ShardWriter(tmp_path / "base", [PlannedTensor("w", tensor.dtype, shape)]) as writer:
        writer.write("w", tensor)
    (tmp_path / "base" / "config.json").write_text("{}")
    told: list[tuple[int, int]] = []

    def apply(first: int, rows: memoryview) -> None:
        block = torch.frombuffer(rows, dtype=torch.float32).view(-1, *shape[1:])
        told.append((first, len(block)))
        block += torch.arange(first, first + len(block)).view(-1, *[1] * (len(shape) - 1))

    merge_checkpoint(tmp_path / "base", tmp_path / "out", {"w": RowEdit("w", apply)}, identity="a")
    ends = [0, *(first + count for first, count in told)]
    assert [first for first, _ in told] == ends[:-1]
    assert ends[-1] == shape[0]
    expected = tensor + torch.arange(shape[0]).view(-1, *[1] * (len(shape) - 1))
    assert torch.equal(load_all(tmp_path / "out")["w"], expected)


MEASURED = """
import sys
from truetune.cli.main import main

def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

import truetune.recipes.merge
open("/proc/self/clear_refs", "w").write("5")
before = peak()
assert main(["merge", "--model", sys.argv[1], "--adapter", sys.argv[2], "--out", sys.argv[3]]) == 0
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the high-water mark is read from Linux's /proc")
def test_memory_does_not_grow_with_the_tensors(tmp_path: Path) -> None:
    hidden, names = 4096, ("q_proj", "v_proj")
    plan: dict[str, tuple[int, ...]] = {f"model.layers.0.self_attn.{name}.weight": (hidden, hidden) for name in names}
    plan |= {"model.embed_tokens.weight": (10_000, hidden), "model.norm.weight": (hidden,)}
    (tmp_path / "base").mkdir()
    with ShardWriter(tmp_path / "base", [PlannedTensor(n, torch.bfloat16, size) for n, size in plan.items()]) as writer:
        for name, size in plan.items():
            writer.write(name, torch.ones(size, dtype=torch.bfloat16))
    config = {"model_type": "llama", "num_hidden_layers": 1, "vocab_size": 10_000, "dtype": "bfloat16"}
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    (tmp_path / "adapter").mkdir()
    stem = "base_model.model.model.layers.0.self_attn"
    tensors = {f"{stem}.{name}.lora_{part}.weight": torch.ones(size) for name in names
               for part, size in (("A", (8, hidden)), ("B", (hidden, 8)))}  # fmt: skip
    save_file(tensors, tmp_path / "adapter" / files.WEIGHTS)
    settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": list(names)}
    (tmp_path / "adapter" / files.CONFIG).write_text(json.dumps(settings))
    command = [sys.executable, "-c", MEASURED, *(str(tmp_path / name) for name in ("base", "adapter", "out"))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-1]) < 30e6  # tensors of 34 and 82 MB; 13 were seen
    after = load_all(tmp_path / "out")
    assert all(torch.equal(t, torch.full_like(t, 9.0 if "_proj" in name else 1.0)) for name, t in after.items())
