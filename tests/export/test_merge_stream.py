"""The streaming merge: right tensors, right files, all or nothing, and the memory of one tensor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2Model, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from truetune.checkpoint.header import PlannedTensor
from truetune.checkpoint.shards import ShardWriter
from truetune.checkpoint.tensors import load, name_in_checkpoint, open_index
from truetune.errors import ModelError, OutputError
from truetune.export.merge import Addition, Edit, merge_checkpoint

TENSORS = {
    "embed.weight": torch.arange(12.0).reshape(4, 3).to(torch.bfloat16),
    "layer.0.weight": torch.arange(9.0).reshape(3, 3),
    "layer.1.weight": -torch.arange(9.0).reshape(3, 3),
    "steps": torch.tensor(7),
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    plan = [PlannedTensor(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()]
    with ShardWriter(folder, plan, max_shard_bytes=64) as writer:
        for name, tensor in TENSORS.items():
            writer.write(name, tensor)
    (folder / "config.json").write_text('{"model_type": "toy", "tie_word_embeddings": true}')
    return folder


def edits_of(*edits: Edit | Addition) -> dict[str, Edit | Addition]:
    return {edit.name: edit for edit in edits}


def read(folder: Path) -> dict[str, Tensor]:
    return {name: load(entry) for name, entry in open_index(folder).items()}


def doubled(weight: Tensor) -> Tensor:
    return weight * 2


def tree(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# --- tensors ------------------------------------------------------------------------------------------------------


def test_edited_tensors_change_and_the_others_keep_their_bits(base: Path, tmp_path: Path) -> None:
    report = merge_checkpoint(base, tmp_path / "out", edits_of(Edit("layer.0.weight", doubled)))
    merged = read(tmp_path / "out")
    assert torch.equal(merged.pop("layer.0.weight"), TENSORS["layer.0.weight"] * 2)
    assert merged.keys() == TENSORS.keys() - {"layer.0.weight"}
    assert all(
        torch.equal(merged[name], TENSORS[name]) and merged[name].dtype == TENSORS[name].dtype for name in merged
    )
    assert (report.copied, report.edited, report.added, report.dropped) == (3, 1, 0, 0)
    assert report.nbytes == sum(tensor.nbytes for tensor in TENSORS.values())


def test_the_base_is_not_touched(base: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in base.iterdir()}
    merge_checkpoint(base, tmp_path / "out", edits_of(Edit("steps", torch.Tensor.zero_)))
    assert {path: path.read_bytes() for path in base.iterdir()} == before


def test_tensors_are_added_dropped_and_replaced(base: Path, tmp_path: Path) -> None:
    head = Addition("head.weight", torch.float16, (4, 3), lambda: torch.ones(4, 3, dtype=torch.float16))
    resized = Addition("embed.weight", torch.bfloat16, (5, 3), lambda: torch.zeros(5, 3, dtype=torch.bfloat16))
    out = tmp_path / "out"
    report = merge_checkpoint(base, out, edits_of(head, resized), drop=["steps", "embed.weight"])
    merged = read(out)
    assert merged.keys() == {"embed.weight", "layer.0.weight", "layer.1.weight", "head.weight"}
    assert merged["head.weight"].dtype == torch.float16
    assert merged["embed.weight"].shape == (5, 3)
    assert (report.copied, report.edited, report.added, report.dropped) == (2, 0, 2, 2)


def test_a_dtype_changes_only_when_asked(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"layer\.0\.weight.*float16"):
        merge_checkpoint(base, tmp_path / "out", edits_of(Edit("layer.0.weight", torch.Tensor.half)))
    asked = Edit("layer.0.weight", torch.Tensor.half, dtype=torch.float16)
    merge_checkpoint(base, tmp_path / "out", edits_of(asked))
    assert read(tmp_path / "out")["layer.0.weight"].dtype == torch.float16


def test_shards_are_cut_anew_and_progress_ends_at_the_whole(base: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    merge_checkpoint(
        base, tmp_path / "out", {}, max_shard_bytes=10_000, progress=lambda done, total: seen.append((done, total))
    )
    assert "model.safetensors" in tree(tmp_path / "out")
    assert len(seen) == len(TENSORS)
    assert seen[-1] == (104, 104)


# --- files --------------------------------------------------------------------------------------------------------


def test_files_of_the_model_come_along_and_others_stay(base: Path, tmp_path: Path) -> None:
    kept = {
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "vocab.txt",
        "merges.txt",
        "chat_template.jinja",
        "additional_chat_templates/tool_use.jinja",
        "modeling_toy.py",
        "LICENSE",
    }
    left = {
        "README.md",
        "README.txt",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "consolidated.safetensors",
        "optimizer.pt",
        "training_args.bin",
        "trainer_state.json",
        "adapter_config.json",
        "all_results.json",
        "model.gguf",
        "onnx/model.onnx",
        ".cache.json",
    }
    for name in kept | left:
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_bytes(name.encode())
    report = merge_checkpoint(base, tmp_path / "out", {}, max_shard_bytes=10_000)
    assert tree(tmp_path / "out") == kept | {"config.json", "model.safetensors"}
    assert set(report.files) == kept | {"config.json"}
    assert (tmp_path / "out" / "merges.txt").read_bytes() == b"merges.txt"


def test_config_keys_are_updated_and_the_rest_is_kept(base: Path, tmp_path: Path) -> None:
    merge_checkpoint(base, tmp_path / "out", {}, config_updates={"tie_word_embeddings": False, "vocab_size": 5})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {"model_type": "toy", "tie_word_embeddings": False, "vocab_size": 5}


def test_extra_files_go_before_those_of_the_base(base: Path, tmp_path: Path) -> None:
    (base / "tokenizer.json").write_text("old")
    (tmp_path / "mine").write_text("new")
    extra = {"tokenizer.json": tmp_path / "mine", "truetune.json": b"{}"}
    merge_checkpoint(base, tmp_path / "out", {}, extra_files=extra)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "new"
    assert (tmp_path / "out" / "truetune.json").read_text() == "{}"


@pytest.mark.parametrize("name", ["../x", "/x", "model.safetensors"])
def test_an_extra_file_cannot_escape_or_replace_the_weights(base: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="is no name for a file"):
        merge_checkpoint(base, tmp_path / "out", {}, extra_files={name: b""})


def test_files_behind_the_links_of_a_download_cache_are_copied(base: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in base.iterdir():
        (snapshot / path.name).symlink_to(path)
    merge_checkpoint(snapshot, tmp_path / "out", {})
    assert [path for path in (tmp_path / "out").iterdir() if path.is_symlink()] == []
    assert read(tmp_path / "out").keys() == TENSORS.keys()


# --- refusals -----------------------------------------------------------------------------------------------------


def test_all_unknown_tensors_are_listed_with_their_neighbours(base: Path, tmp_path: Path) -> None:
    edits = edits_of(Edit("layer.0.wieght", doubled), Edit("nothing_like_it", doubled), Edit("steps", doubled))
    with pytest.raises(ModelError, match="lacks 3 of the 4 tensors") as caught:
        merge_checkpoint(base, tmp_path / "out", edits, drop=["embed.wieght"])
    for text in (r"layer.0.wieght (did you mean layer.0.weight)", "nothing_like_it", "(did you mean embed.weight)"):
        assert text in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("edits", "drop", "message"),
    [
        ({"steps": Edit("embed.weight", doubled)}, (), "filed under 'steps'"),
        ({"steps": Edit("steps", doubled)}, ("steps",), "both edited and dropped"),
        ({"steps": Addition("steps", torch.int64, (), lambda: torch.tensor(1))}, (), "the base has it"),
    ],
    ids=["other name", "edited and dropped", "added twice"],
)
def test_edits_that_contradict_each_other_are_refused(
    base: Path, tmp_path: Path, edits: dict[str, Edit | Addition], drop: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        merge_checkpoint(base, tmp_path / "out", edits, drop=drop)


def test_the_base_is_never_the_output(base: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(base)
    for out in (base, base / ".." / "base", tmp_path / "link"):
        with pytest.raises(OutputError, match="is the base itself"):
            merge_checkpoint(base, out, {})


def test_a_folder_in_use_is_refused_with_the_way_out(base: Path, tmp_path: Path) -> None:
    merge_checkpoint(base, tmp_path / "out", {})
    with pytest.raises(OutputError, match=r"already holds a model(.|\n)*config\.json(.|\n)*way out"):
        merge_checkpoint(base, tmp_path / "out", {})
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.md").write_text("mine")
    with pytest.raises(OutputError, match=r"is not empty(.|\n)*todo\.md"):
        merge_checkpoint(base, tmp_path / "notes", {})
    with pytest.raises(OutputError, match="is a file"):
        merge_checkpoint(base, tmp_path / "notes" / "todo.md", {})


def test_an_empty_folder_and_missing_parents_will_do(base: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "a" / "b"):
        merge_checkpoint(base, out, {})
        assert read(out).keys() == TENSORS.keys()


@pytest.mark.parametrize("config", [None, "{"])
def test_a_base_without_a_readable_config_is_no_model(base: Path, tmp_path: Path, config: str | None) -> None:
    (base / "config.json").unlink() if config is None else (base / "config.json").write_text(config)
    with pytest.raises(ModelError, match=r"config\.json: no readable config"):
        merge_checkpoint(base, tmp_path / "out", {})


def test_pickled_weights_are_refused_with_the_way_to_convert_them(base: Path, tmp_path: Path) -> None:
    for path in base.glob("model*"):
        path.unlink()
    (base / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin(.|\n)*convert"):
        merge_checkpoint(base, tmp_path / "out", {})


# --- all or nothing -----------------------------------------------------------------------------------------------


def raising(error: BaseException) -> Callable[[Tensor], Tensor]:
    def apply(_: Tensor) -> Tensor:
        raise error

    return apply


@pytest.mark.parametrize("error", [RuntimeError("in the edit"), KeyboardInterrupt(), FileNotFoundError("adapter")])
def test_a_failing_edit_leaves_nothing_and_is_not_reworded(base: Path, tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)) as caught:
        merge_checkpoint(base, tmp_path / "out", edits_of(Edit("layer.1.weight", raising(error))))
    assert caught.value is error
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_an_edit_that_changes_the_shape_leaves_nothing(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"layer\.1\.weight.*\(2, 3\), planned was .*\(3, 3\)"):
        merge_checkpoint(base, tmp_path / "out", edits_of(Edit("layer.1.weight", lambda weight: weight[:2])))
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_out_does_not_exist_until_it_is_complete(base: Path, tmp_path: Path) -> None:
    there: list[bool] = []
    out = tmp_path / "out"
    merge_checkpoint(base, out, {}, progress=lambda done, total: there.append(out.exists()))
    assert there == [False] * len(TENSORS)
    assert out.exists()


def test_a_base_that_breaks_on_the_way_leaves_nothing(base: Path, tmp_path: Path) -> None:
    def cut(weight: Tensor) -> Tensor:
        for path in base.glob("*.safetensors"):
            os.truncate(path, 100)
        return weight

    with pytest.raises(ModelError, match="ends inside"):
        merge_checkpoint(base, tmp_path / "out", edits_of(Edit("embed.weight", cut)))
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("a small disk can only be mounted by root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_too_small_a_disk_is_refused_before_any_tensor_is_read(base: Path, small_disk: Path) -> None:
    (base / "tokenizer.json").write_bytes(bytes(100_000))  # counts, too
    edits = edits_of(Edit("embed.weight", raising(AssertionError("read"))))
    with pytest.raises(OutputError, match=r"needed +100,\d+ bytes(.|\n)*free +65,536 bytes"):
        merge_checkpoint(base, small_disk / "out", edits)
    assert list(small_disk.iterdir()) == []


# --- memory -------------------------------------------------------------------------------------------------------

# The high-water mark of the kernel is reset after the imports (clear_refs), so it starts at what is resident then.
# ru_maxrss would not do: a child inherits its parent's mark across exec, and pytest's own is higher than this merge's.
# Left to itself, glibc keeps freed tensors in a heap with holes, and the mark was anything from 54 to 134 MB.
MEASURED_MERGE = """
import sys
from pathlib import Path
import torch
from truetune.checkpoint.tensors import open_index
from truetune.export.merge import Edit, merge_checkpoint

def peak() -> int:
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

base, out = Path(sys.argv[1]), Path(sys.argv[2])
edits = {n: Edit(n, lambda w: (w.float() + 1).to(w.dtype)) for n in open_index(base) if n.endswith("proj")}
open("/proc/self/clear_refs", "w").write("5")
start = peak()
merge_checkpoint(base, out, edits)
merge = peak() - start
held = torch.ones(200 << 20, dtype=torch.uint8)
print(merge, peak() - start)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the high-water mark is read from Linux's /proc")
def test_merging_300_mb_takes_the_memory_of_one_tensor(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    names = [f"layer.{n}.{kind}" for n in range(15) for kind in ("proj", "other")]
    plan = [PlannedTensor(name, torch.bfloat16, (2500, 2000)) for name in names]  # 10 MB each, 20 MB in float32
    tensor = torch.ones(2500, 2000, dtype=torch.bfloat16)
    with ShardWriter(base, plan, max_shard_bytes=100_000_000) as writer:
        for name in names:
            writer.write(name, tensor)
    (base / "config.json").write_text("{}")
    command = [sys.executable, "-c", MEASURED_MERGE, str(base), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    merge, control = map(int, done.stdout.split())
    assert control > 200e6  # the gauge sees what is held
    assert merge < 70e6  # stored 10 + float32 copy 20 + sum 20, then result 10; 54 with what torch loads on first use
    merged = open_index(tmp_path / "out")
    assert torch.equal(load(merged["layer.7.proj"]), tensor + 1)
    assert torch.equal(load(merged["layer.7.other"]), tensor)


# --- real models --------------------------------------------------------------------------------------------------


def llama(folder: Path) -> str:
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="10KB")
    return "model.layers.1.self_attn.q_proj.weight"


def gpt2(folder: Path) -> str:
    """Saved as the bare body, like the published GPT-2: its files lack the prefix ``transformer.``."""
    GPT2Model(GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2)).save_pretrained(folder)
    return "transformer.h.1.attn.c_attn.weight"


@pytest.mark.parametrize("make", [llama, gpt2])
def test_transformers_loads_the_merged_model_and_gives_the_edited_logits(
    tmp_path: Path, make: Callable[[Path], str]
) -> None:
    def edit(weight: Tensor) -> Tensor:
        return weight * 3 + 0.1

    def logits(model: PreTrainedModel) -> Tensor:
        with torch.no_grad():
            return model.eval()(torch.arange(8)[None]).logits

    torch.manual_seed(0)
    parameter = make(tmp_path / "base")
    live = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    name = name_in_checkpoint(parameter, open_index(tmp_path / "base").keys(), live.base_model_prefix)
    assert name is not None
    merge_checkpoint(tmp_path / "base", tmp_path / "out", edits_of(Edit(name, edit)))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    unedited = logits(live)
    with torch.no_grad():
        live.get_parameter(parameter).copy_(edit(live.get_parameter(parameter)))
    assert torch.equal(logits(merged), logits(live))
    assert not torch.allclose(logits(merged), unedited, atol=1e-4)  # an edit that got lost would pass the line above


@pytest.mark.parametrize(
    ("parameter", "keys", "prefix", "expected"),
    [
        ("transformer.h.0.w", {"h.0.w"}, "transformer", "h.0.w"),
        ("transformer.h.0.w", {"transformer.h.0.w", "h.0.w"}, "transformer", "transformer.h.0.w"),
        ("h.0.w", {"transformer.h.0.w"}, "transformer", "transformer.h.0.w"),
        ("lm_head.weight", {"h.0.w"}, "transformer", None),
        ("transformers.h.0.w", {"h.0.w", ".h.0.w", "s.h.0.w"}, "transformer", None),
        ("h.0.w", {"h.0.w"}, "", "h.0.w"),
        ("h.0.w", {".h.0.w"}, "", None),
    ],
)
def test_a_parameter_is_found_with_and_without_the_prefix(
    parameter: str, keys: set[str], prefix: str, expected: str | None
) -> None:
    assert name_in_checkpoint(parameter, keys, prefix) == expected
