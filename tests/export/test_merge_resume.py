"""A merge that was killed goes on where it was; what it writes is listed with its hashes."""

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import truetune
from truetune.checkpoint.atomic import faults
from truetune.checkpoint.disk import alone
from truetune.errors import OutputError
from truetune.export.merge import Edit, MergeReport, merge_checkpoint
from truetune.recipes.adapter_base import identity_of
from truetune.recipes.merge_forecast import Forecast, forecast

NAMES = [f"w{number}" for number in range(4)]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    draws = torch.Generator().manual_seed(0)
    save_file({name: torch.randn(16, 16, generator=draws) for name in NAMES}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    return folder


def merge(
    base: Path,
    seen: list[str],
    *,
    stop: Callable[[str], None] = lambda _: None,
    key: str = "a",
    written: Callable[[int], None] = lambda _: None,
) -> MergeReport:
    """Double every tensor, one a shard; ``stop`` is asked before each, ``written`` told how many are on disk."""

    def doubled(name: str) -> Callable[[Tensor], Tensor]:
        def apply(weight: Tensor) -> Tensor:
            stop(name)
            seen.append(name)
            return weight * 2

        return apply

    edits = {name: Edit(name, doubled(name)) for name in NAMES}
    return merge_checkpoint(
        base,
        base.parent / "out",
        edits,
        max_shard_bytes=1024,
        identity=key,
        progress=lambda done, _: written(done // 1024),
    )


def killed_at(base: Path, name: str, *, key: str = "a") -> Path:
    """Merge in a process of its own that is gone, without any farewell, when it comes to write a tensor."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of newer interpreters, where other threads are about
        child = os.fork()
    if child == 0:
        merge(base, [], written=lambda count: os._exit(9) if NAMES[count] == name else None, key=key)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    (partial,) = base.parent.glob(".out.*.partial")
    return partial


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")


def result(base: Path) -> dict[str, Tensor]:
    return {name: t for path in (base.parent / "out").glob("*.safetensors") for name, t in load_file(path).items()}


def check_result(base: Path) -> None:
    before, after = load_file(base / "model.safetensors"), result(base)
    assert all(torch.equal(after[name], before[name] * 2) for name in NAMES)
    assert faults(base.parent / "out") == []
    assert sorted(path.name for path in base.parent.iterdir()) == ["base", "out"]
    assert not [path for path in (base.parent / "out").iterdir() if path.name.startswith(".")]


@needs_fork
def test_finished_shards_are_kept_after_a_kill(base: Path) -> None:
    partial = killed_at(base, "w2")
    assert len(list(partial.glob("model-*.safetensors"))) == 2
    seen: list[str] = []
    assert merge(base, seen).kept == 2
    assert seen == ["w2", "w3"]
    check_result(base)


@needs_fork
def test_a_shard_that_is_not_what_it_was_is_made_again(base: Path) -> None:
    partial = killed_at(base, "w2")
    shard = partial / "model-00001-of-00004.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    seen: list[str] = []
    assert merge(base, seen).kept == 1
    assert seen == ["w0", "w2", "w3"]
    check_result(base)


@needs_fork
@pytest.mark.parametrize("what", ["the edits", "the base"])
def test_another_merge_takes_nothing_over(what: str, base: Path) -> None:
    partial = killed_at(base, "w2")
    if what == "the base":
        os.utime(base / "model.safetensors", ns=(1, 1))
    seen: list[str] = []
    assert merge(base, seen, key="b" if what == "the edits" else "a").kept == 0
    assert seen == NAMES
    assert partial.is_dir()  # another merge's work is not this one's to remove


@pytest.mark.parametrize("count", [0, 1, 3])
def test_who_is_stopped_by_hand_loses_no_finished_shard(count: int, base: Path) -> None:
    def stop(written: int) -> None:
        if written == count:
            raise KeyboardInterrupt

    def at_once(name: str) -> None:
        if count == 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(base, [], stop=at_once, written=stop)
    assert len(list(base.parent.glob(".out.*.partial"))) == bool(count)
    assert not list(base.parent.glob(".out.*.partial/.model*"))
    assert merge(base, []).kept == count
    check_result(base)


def test_an_error_leaves_nothing(base: Path) -> None:
    def fail(name: str) -> None:
        if name == "w2":
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        merge(base, [], stop=fail)
    assert [path.name for path in base.parent.iterdir()] == ["base"]


def test_two_at_once_do_not_write_the_same(base: Path) -> None:
    def second(name: str) -> None:
        if name == "w1":
            with pytest.raises(OutputError, match="another process is writing"):
                merge(base, [])

    merge(base, [], stop=second)
    check_result(base)


def test_a_held_folder_is_free_again_afterwards(tmp_path: Path) -> None:
    for _ in range(2):
        with alone(tmp_path):
            pass


def test_the_list_has_the_hash_of_every_file(base: Path) -> None:
    merge(base, [])
    listed = json.loads((base.parent / "out" / "MANIFEST.json").read_text(encoding="utf-8"))["files"]
    there = {path.name for path in (base.parent / "out").iterdir()} - {"MANIFEST.json"}
    assert set(listed) == there
    assert faults(base.parent / "out") == []
    with (base.parent / "out" / "config.json").open("a", encoding="utf-8") as file:
        file.write(" ")
    assert faults(base.parent / "out") == ["config.json has 24 bytes, expected 23"]


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(tiny_model: Path, tmp_path: Path) -> Path:
    model = truetune.load(str(tiny_model))
    truetune.attach(model, truetune.LoRA(rank=2))
    truetune.save_adapter(model, str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def test_a_merge_says_what_it_needs_before_it_starts(
    tiny_model: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = truetune.merge(str(tiny_model), str(adapter), str(tmp_path / "out"))
    text = capsys.readouterr().err
    assert text.index("needs ") < text.index("done ")
    assert made["forecast"]["disk_mb"] == pytest.approx(made["bytes"] / 1e6, abs=0.1)
    assert faults(tmp_path / "out") == []
    truetune.merge(str(tmp_path / "out"), str(adapter), str(tmp_path / "twice"), allow_mismatch="base")
    assert faults(tmp_path / "twice") == []  # the list of the base is not taken for its own


def test_what_a_killed_attempt_left_is_not_missed_by_its_repeat(
    adapter: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files have all their room from the start, and the repeat begins by clearing them away."""
    out = tmp_path / "out"
    size = (tiny_model / "model.safetensors").stat().st_size
    usage = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OutputError, match="too little room"):
        forecast(tiny_model, out, {}, packed=False)
    (tmp_path / ".out.0123456789abcdef.partial").mkdir()
    (tmp_path / ".out.0123456789abcdef.partial" / ".model.safetensors.1.partial").write_bytes(bytes(size))
    assert forecast(tiny_model, out, {}, packed=False).disk_mb == pytest.approx(size / 1e6, rel=0.1)


def test_a_forecast_reads_well() -> None:
    assert str(Forecast(1200, 14_000, 240)) == "needs 1.2 GB of memory, 14.0 GB of disk, about 4 min"
    assert str(Forecast(384.4, 0.1, 0.1)) == "needs 384 MB of memory, 1 MB of disk, a few seconds"


def test_an_adapter_s_identity_is_its_content(adapter: Path) -> None:
    before = identity_of([adapter], "x")
    assert identity_of([adapter], "y") != before
    (adapter / "adapter_model.safetensors").write_bytes(b"other")
    assert identity_of([adapter], "x") != before
