"""Data that is larger than memory: block by block and in files, what comes out is what comes out of memory."""

import gzip
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from truetune.config.sft import PretrainConfig, SFTConfig
from truetune.data import read_blocks, shards_pool
from truetune.data.shards import MappedSet
from truetune.data.shards_made import ShardMaker
from truetune.data.token_set import TokenSet
from truetune.errors import TruetuneError
from truetune.models.tokenizer import ChatTokenizer
from truetune.recipes import data as recipe
from truetune.recipes.data import Prepared, prepare_pretrain, prepare_sft
from truetune.train.log import Screen

ALWAYS, NEVER = -1, 1 << 60
FORMS = ["jsonl", "jsonl.gz", "json", "csv"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRUETUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(read_blocks, "SIZE", 700)
    monkeypatch.setattr(read_blocks, "_ROWS", 9)
    monkeypatch.setattr(shards_pool, "cores", lambda: 1)
    return tmp_path / "cache"


def rows(count: int = 60) -> list[dict[str, Any]]:
    """Rows with a repeated one, a nearly repeated one, and some that are too long."""
    made = [
        {"instruction": f"Add {n} and {n * n}.", "output": f"It is {n + n * n}" + "!" * (n % 7)} for n in range(count)
    ]
    words = "the cat sat on the mat and looked at the dog that slept beside the old warm stove all day long"
    made[20], made[41] = dict(made[3]), dict(made[3])
    made[25] = {"instruction": words, "output": "yes"}
    made[50] = {"instruction": words.replace("old", "new"), "output": "yes"}
    made[33] = {"instruction": "Shout.", "output": "A" * 300}
    return made


def write(path: Path, found: list[dict[str, Any]]) -> Path:
    lines = "".join(json.dumps(row) + "\n" for row in found)
    if path.suffix == ".json":
        path.write_text(json.dumps(found))
    elif path.suffix == ".csv":
        path.write_text("instruction,output\n" + "".join(f"{r['instruction']},{r['output']}\n" for r in found))
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(lines)
    return path


def sft(model: Path, *paths: Path, **changed: Any) -> SFTConfig:
    usual: dict[str, Any] = {"on_overlong": "drop", "max_bad_rows": 3, "val_split": 0.2}
    return SFTConfig(model=str(model), data=tuple(map(str, paths)), **{**usual, **changed})


def prepared(config: SFTConfig | PretrainConfig, large: bool) -> Prepared:
    prepare: Callable[..., Prepared] = prepare_sft if isinstance(config, SFTConfig) else prepare_pretrain
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "LARGE", ALWAYS if large else NEVER)
        return prepare(config, ChatTokenizer.load(config.model), max_length=150, screen=Screen())


def assert_same(one: TokenSet | None, other: TokenSet | None) -> None:
    if one is None or other is None:
        assert one is other
        return
    assert list(one.origins) == list(other.origins)
    for part in ("tokens", "trained", "offsets"):
        assert torch.equal(getattr(one, part), getattr(other, part))
    assert one.trained_count() == other.trained_count()
    assert one.highest() == other.highest()


def both_ways(
    config: SFTConfig | PretrainConfig, cache: Path, capsys: pytest.CaptureFixture[str], workers: int = 1
) -> tuple[Prepared, Prepared, list[str]]:
    """From memory, and through files; and what was said each time."""
    made, said = [], []
    for large in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRUETUNE_CACHE", str(cache / str(large)))
            patch.setattr(shards_pool, "cores", lambda: workers)
            made.append(prepared(config, large))
        said.append(capsys.readouterr().err)
    assert isinstance(made[1].train, MappedSet)
    assert not isinstance(made[0].train, MappedSet)
    return made[0], made[1], said


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "changed", [{}, {"val_split": 0.0}, {"on_overlong": "truncate"}, {"val_split": 0.0, "val_data": "SAME"}]
)
def test_through_files_comes_what_comes_from_memory(
    form: str,
    changed: dict[str, Any],
    tiny_model: Path,
    tmp_path: Path,
    cache: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write(tmp_path / f"rows.{form}", rows())
    if "val_data" in changed:
        changed = {**changed, "val_data": (str(write(tmp_path / "held.jsonl", rows()[2:9])),)}
    one, other, said = both_ways(sft(tiny_model, path, **changed), cache, capsys)
    assert_same(one.train, other.train)
    assert_same(one.held_out, other.held_out)
    assert (one.digest, one.held_out_digest) == (other.digest, other.held_out_digest)
    assert replace(one, train=other.train, held_out=other.held_out) == other
    assert said[0] == said[1]
    assert "repeats row 4" in said[0]


def test_rows_that_a_share_leaves_out_are_counted_the_same(
    tiny_model: Path, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "rows.jsonl", rows())
    lines = path.read_text().splitlines()
    lines[7] = "{"
    path.write_text("\n".join(lines))
    config = sft(tiny_model, path).model_copy(update={"data": (f"{path}=0.5",)})
    one, other, _ = both_ways(config, cache, capsys)
    assert (one.rejects, one.report) == (other.rejects, other.report)
    assert_same(one.train, other.train)
    assert [str(reject.origin) for reject in other.rejects if reject.reason == "bad_json"] == [f"{path}, row 8"]
    assert other.report["rejected"]["sampled_out"] == other.rejects.by_choice > 10
    assert other.report["read"] == other.report["used"] + sum(other.report["rejected"].values())
    assert prepared(config, large=True).rejects == other.rejects  # from the cache


def test_several_files_and_processes_make_the_same(
    tiny_model: Path, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [write(tmp_path / f"{n}.{form}", rows()[n * 9 :]) for n, form in enumerate(FORMS)]
    one, other, said = both_ways(sft(tiny_model, *paths), cache, capsys, workers=2)
    assert_same(one.train, other.train)
    assert_same(one.held_out, other.held_out)
    assert one.report == other.report
    assert said[0] == said[1]


def test_faulty_rows_are_the_same_ones_in_the_same_order(
    tiny_model: Path, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "rows.jsonl", rows())
    lines = path.read_text().splitlines()
    lines[7], lines[30], lines[59] = "{", '{"instruction": "x"}', '{"instruction": "y", "output": "\\ud83d"}'
    path.write_text("\n".join(lines))
    one, other, _ = both_ways(sft(tiny_model, path), cache, capsys)
    assert one.rejects == other.rejects
    assert [reject.origin.row for reject in other.rejects[:3]] == [8, 60, 31]
    said = []
    for large in (False, True):
        with pytest.raises(TruetuneError) as caught:
            prepared(sft(tiny_model, path, max_bad_rows=1), large)
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert "3 of 60 rows can't be used" in said[0]
    assert not list((cache / "shards").iterdir())  # other rows will have another key


def test_what_is_dropped_from_rows_is_counted_in_files_too(
    tiny_model: Path, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    thought = [{"messages": [{"role": "user", "content": f"{n}?"},
                             {"role": "assistant", "reasoning_content": "hm" * (n % 2), "content": f"{n}!"}]}
               for n in range(40)]  # fmt: skip
    held = str(write(tmp_path / "held.jsonl", thought[30:]))
    path = write(tmp_path / "rows.jsonl", thought[:30])
    for changed in ({"val_split": 0.2}, {"val_split": 0.0, "val_data": (held,)}):
        one, other, _ = both_ways(sft(tiny_model, path, thinking="drop", **changed), cache, capsys)
        assert one.report == other.report
        assert other.report["dropped"] == {"thinking": 15 if "val_data" not in changed else 20}


def test_blocks_of_text_are_the_same(
    tiny_model: Path, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "text.jsonl", [{"text": f"document {n} " * (n % 9 + 1)} for n in range(80)])
    config = PretrainConfig(model=str(tiny_model), data=(str(path),), val_split=0.2)
    one, other, said = both_ways(config, cache, capsys)
    assert_same(one.train, other.train)
    assert_same(one.held_out, other.held_out)
    assert (one.report, said[0]) == (other.report, said[1])


def test_a_missing_template_is_told(make_tiny: Callable[..., Path], tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "bare", chat_template=None)
    with pytest.raises(TruetuneError, match="no chat template"):
        prepared(sft(model, write(tmp_path / "rows.jsonl", rows())), large=True)
    text = write(tmp_path / "text.jsonl", [{"text": "no template is needed"}] * 3)
    assert prepared(sft(model, text, val_split=0.0), large=True).template is None


def test_a_second_start_finds_the_files_and_damage_is_noticed(tiny_model: Path, tmp_path: Path, cache: Path) -> None:
    config = sft(tiny_model, write(tmp_path / "rows.jsonl", rows()))
    first, second = prepared(config, large=True), prepared(config, large=True)
    assert (first.cached, second.cached) == (False, True)
    assert replace(second, train=first.train, held_out=first.held_out, cached=False) == first
    assert_same(first.train, second.train)
    (entry,) = (cache / "tokens").iterdir()
    for name in sorted(path.name for path in entry.iterdir()):
        file = entry / name
        whole = file.read_bytes()
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert not prepared(config, large=True).cached, name
        assert prepared(config, large=True).cached


def stopped_after(count: int) -> Callable[..., Any]:
    """``ShardMaker.__call__`` that is stopped by Ctrl-C instead of making shard number ``count``."""
    make = ShardMaker.__call__

    def stopped(self: ShardMaker, task: Any, **options: Any) -> Any:
        if task.number == count:
            raise KeyboardInterrupt
        return make(self, task, **options)

    return stopped


def test_what_was_finished_before_a_stop_is_not_made_again(
    tiny_model: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = sft(tiny_model, write(tmp_path / "rows.jsonl", rows()))
    with monkeypatch.context() as patch:
        patch.setattr(ShardMaker, "__call__", stopped_after(4))
        with pytest.raises(KeyboardInterrupt):
            prepared(config, large=True)
    (work,) = (cache / "shards").iterdir()
    kept = sorted((work / "data").glob("*.safetensors"))
    assert [path.stem for path in kept] == ["000000", "000001", "000002", "000003"]
    kept[1].write_bytes(kept[1].read_bytes()[:-5])  # as by a disk that filled up
    made: list[int] = []
    whole = ShardMaker._made
    monkeypatch.setattr(ShardMaker, "_made", lambda self, task, **o: made.append(task.number) or whole(self, task, **o))
    again = prepared(config, large=True)
    assert made[:2] == [1, 4]
    monkeypatch.setenv("TRUETUNE_CACHE", str(tmp_path / "other"))
    assert_same(again.train, prepared(config, large=False).train)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="how a process dies")
def test_a_process_that_is_killed_is_an_error_that_says_so(
    tiny_model: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = sft(tiny_model, write(tmp_path / "rows.jsonl", rows()))
    make, parent = ShardMaker.__call__, os.getpid()

    def killed(self: ShardMaker, task: Any, **options: Any) -> Any:
        if task.number == 3:
            assert os.getpid() != parent
            os.kill(os.getpid(), signal.SIGKILL)
        return make(self, task, **options)

    monkeypatch.setattr(shards_pool, "cores", lambda: 2)
    with monkeypatch.context() as patch:
        patch.setattr(ShardMaker, "__call__", killed)
        with pytest.raises(shards_pool.WorkerDiedError, match="was killed") as caught:
            prepared(config, large=True)
    assert caught.value.exit_code == 3
    assert list((cache / "shards").iterdir())
    assert not prepared(config, large=True).cached


RANK = """
import sys
from truetune.config.sft import SFTConfig
from truetune.models.tokenizer import ChatTokenizer
from truetune.recipes import data
from truetune.train.log import Screen
data.LARGE = -1
config = SFTConfig(model=sys.argv[1], data=(sys.argv[2],), val_split=0.2, on_overlong="drop")
print(data.prepare_sft(config, ChatTokenizer.load(sys.argv[1]), max_length=150, screen=Screen()).cached)
"""


def test_of_several_processes_one_makes_the_tokens(tiny_model: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", rows())
    command = [sys.executable, "-c", RANK, str(tiny_model), str(path)]
    ranks = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert sorted(rank.communicate()[0].strip() for rank in ranks) == ["False", "True"]


def test_a_folder_that_cannot_be_made_is_done_without(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRUETUNE_CACHE", str(tmp_path / "file"))
    made = prepared(sft(tiny_model, write(tmp_path / "rows.jsonl", rows())), large=True)
    assert not isinstance(made.train, MappedSet)
