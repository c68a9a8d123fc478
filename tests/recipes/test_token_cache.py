"""Tokens from an earlier run: the same in every respect as those made now, and never those of other data."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import CHATML
from truetune.cli.main import main
from truetune.config.options import group_of
from truetune.config.sft import PretrainConfig, SFTConfig
from truetune.data import token_cache
from truetune.data.token_set import TokenSet
from truetune.errors import TruetuneError
from truetune.models.tokenizer import ChatTokenizer
from truetune.recipes.data import Prepared, prepare_pretrain, prepare_sft
from truetune.train.log import Screen

DATED = "{{- '<|im_start|>date ' + strftime_now('%d %b %Y') + '<|im_end|>\\n' }}" + CHATML


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRUETUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model's files without its weights, to be changed at will."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors")))


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Rows with all there is to be told of: a repeated one, a faulty one, a long one, and a file that is no data."""
    rows = [{"instruction": f"Add {n} and 1.", "output": f"{n + 1}"} for n in range(40)]
    write(
        tmp_path / "data" / "rows.jsonl",
        [*rows, rows[0], {"instruction": "x"}, {"instruction": "y", "output": "z" * 300}],
    )
    (tmp_path / "data" / "notes.md").write_text("about the rows")
    return tmp_path / "data"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write(tmp_path / "text.jsonl", [{"text": "the quick brown fox " * n} for n in range(2, 12)])


def sft(model: Path, data: Path, /, **changed: Any) -> SFTConfig:
    usual = {"max_length": 220, "on_overlong": "drop", "max_bad_rows": 1, "val_split": 0.2}
    return SFTConfig(**{"model": str(model), "data": (str(data),), **usual, **changed})


def pretrain(model: Path, data: Path) -> PretrainConfig:
    return PretrainConfig(model=str(model), data=(str(data),), max_length=50, max_bad_rows=1, val_split=0.2)


def prepared(config: SFTConfig | PretrainConfig, **more: Any) -> Prepared:
    prepare: Callable[..., Prepared] = prepare_sft if isinstance(config, SFTConfig) else prepare_pretrain
    limit = config.max_length or 256
    return prepare(config, ChatTokenizer.load(config.model), max_length=limit, screen=Screen(), **more)


def assert_same(one: Prepared, other: Prepared) -> None:
    for name in ("train", "held_out"):
        ours, theirs = getattr(one, name), getattr(other, name)
        assert (ours is None) == (theirs is None)
        if isinstance(ours, TokenSet):
            assert list(ours.origins) == list(theirs.origins)
            for part in ("tokens", "trained", "offsets"):
                assert torch.equal(getattr(ours, part), getattr(theirs, part))
    bare = replace(other, train=one.train, held_out=one.held_out, cached=one.cached)
    assert one == bare
    assert json.dumps(one.report) == json.dumps(other.report)  # the order of the reasons too
    assert (one.digest, one.held_out_digest) == (other.digest, other.held_out_digest)


@pytest.mark.parametrize(
    "changed",
    [{}, {"val_split": 0.0}, {"on_overlong": "truncate"}, {"train_on": "all"}, {"system": "Be short."},
     {"template": "DATED"}, {"val_split": 0.0, "val_data": "SAME"}],
)  # fmt: skip
def test_a_second_run_has_and_says_the_same(
    changed: dict[str, Any], model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "dated.jinja").write_text(DATED)
    named = {"DATED": str(tmp_path / "dated.jinja"), "SAME": (str(data / "rows.jsonl"),)}
    config = sft(model, data, **{key: named.get(value, value) for key, value in changed.items()})
    first, said = prepared(config), capsys.readouterr().err
    second, said_again = prepared(config), capsys.readouterr().err
    assert (first.cached, second.cached) == (False, True)
    assert_same(first, second)
    assert said == said_again
    assert "1 file is not data" in said
    assert "repeats row" in said
    assert ("left out" in said) == (config.on_overlong == "drop")
    assert ("are trained on too" in said) == bool(config.val_data)
    assert ("tells the date" in said) == (first.date is not None) == (config.template != "auto")


def test_blocks_of_text_come_back_as_they_were(model: Path, text: Path) -> None:
    config = pretrain(model, text)
    first, second = prepared(config), prepared(config)
    assert (first.cached, second.cached) == (False, True)
    assert_same(first, second)
    assert second.template is None


def test_rows_of_text_need_no_template(make_tiny: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "bare", chat_template=None)
    config = sft(model, text)
    assert [prepared(config).cached for _ in range(2)] == [False, True]
    assert prepared(config).template is None


CHANGES: dict[str, dict[str, Any]] = {
    "format": {"format": "alpaca"},
    "template": {"template": "alpaca"},
    "system": {"system": "Be short."},
    "on_overlong": {"on_overlong": "truncate"},
    "train_on": {"train_on": "last"},
    "max_length": {"max_length": 219},
    "val_split": {"val_split": 0.3},
    "val_data": {"val_split": 0.0, "val_data": ("HELD",)},
    "max_bad_rows": {"max_bad_rows": 2},
    "data": {"data": ("DATA", "HELD")},
    "registry": {"registry": "data.yaml"},
    "columns": {"columns": ("instruction=instruction",)},
    "thinking": {"thinking": "drop"},
    "tools": {"tools": "drop"},
    "system_messages": {"system_messages": "drop"},
}


def test_every_setting_about_data_is_tried() -> None:
    about = {name for name, info in SFTConfig.model_fields.items() if group_of(info) == "dataset"}
    # The second wants a code model, see data/test_fim.py; the third wants texts, see below.
    assert set(CHANGES) == about - {"packing", "fim_rate", "text_blocks"}


def test_blocks_of_text_are_not_taken_for_texts(model: Path, text: Path) -> None:
    whole, blocks = (sft(model, text, text_blocks=joined, max_length=100) for joined in (False, True))
    assert [prepared(config).cached for config in (whole, blocks, blocks)] == [False, False, True]
    assert set(prepared(blocks).train.lengths.tolist()[:-1]) == {100}
    ours, theirs = prepared(blocks), prepared(pretrain(model, text).model_copy(update={"max_length": 100}))
    assert torch.equal(ours.train.tokens, theirs.train.tokens)


@pytest.mark.parametrize("field", CHANGES)
def test_another_setting_is_not_answered_from_the_cache(field: str, model: Path, data: Path, tmp_path: Path) -> None:
    held = write(tmp_path / "held.jsonl", [{"instruction": "Sum?", "output": "None."}])
    names = {"HELD": str(held), "DATA": str(data)}
    change = {k: tuple(names.get(x, x) for x in v) if isinstance(v, tuple) else v for k, v in CHANGES[field].items()}
    prepared(sft(model, data))
    config = sft(model, data, **change)
    assert [prepared(config).cached for _ in range(2)] == [False, True]


def test_what_comes_after_the_tokens_is_answered_from_the_cache(model: Path, data: Path) -> None:
    prepared(sft(model, data))
    assert prepared(sft(model, data, packing=False, epochs=9.0, rank=2, lr=0.1)).cached


def test_the_two_commands_do_not_share(model: Path, text: Path) -> None:
    assert not prepared(sft(model, text)).cached
    assert not prepared(pretrain(model, text)).cached


def edit(path: Path, old: str, new: str) -> None:
    content = path.read_text(encoding="utf-8")
    assert old in content
    path.write_text(content.replace(old, new, 1), encoding="utf-8")


def test_one_other_byte_is_other_data(model: Path, data: Path, tmp_path: Path) -> None:
    config = sft(model, data)
    before = prepared(config)
    edit(data / "rows.jsonl", "Add 7", "Add 8")
    after = prepared(config)
    assert not after.cached
    assert after.digest != before.digest
    (data / "more.txt").write_text("one more document")
    assert not prepared(sft(model, data, max_bad_rows=2)).cached
    (data / "more.txt").unlink()
    (data / "other.md").write_text("passed over as well")
    assert not prepared(config).cached  # the screen says another thing


def test_one_other_byte_of_a_template_file_is_another_template(model: Path, data: Path, tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text(CHATML)
    config = sft(model, data, template=str(file))
    before = prepared(config)
    edit(file, "'\\n' + m.content", "'\\n\\n' + m.content")
    after = prepared(config)
    assert not after.cached
    assert after.digest != before.digest


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("tokenizer.json", '"add_prefix_space": false', '"add_prefix_space": true'),
        ("tokenizer_config.json", "<|endoftext|>", "<|im_end|>"),
        ("chat_template.jinja", "'\\n' + m.content", "'\\n\\n' + m.content"),
        ("generation_config.json", "{", "{ "),
    ],
)
def test_another_tokenizer_is_not_answered_from_the_cache(
    file: str, old: str, new: str, model: Path, data: Path
) -> None:
    config = sft(model, data)
    prepared(config)
    assert prepared(config).cached
    edit(model / file, old, new)
    assert not prepared(config).cached


def test_a_template_that_tells_the_date_is_another_one_tomorrow(model: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "dated.jinja").write_text(DATED)
    config = sft(model, data, template=str(tmp_path / "dated.jinja"))
    first = prepared(config, date="2030-01-01")
    assert not prepared(config, date="2030-01-02").cached
    again = prepared(config, date="2030-01-01")
    assert (again.cached, again.date, again.template) == (True, "2030-01-01", first.template)


@pytest.mark.parametrize(("what", "value"), [("FORMAT", -1), ("__version__", "0.0.0")])
def test_what_another_version_made_is_made_again(
    what: str, value: object, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = sft(model, data)
    prepared(config)
    monkeypatch.setattr(token_cache, what, value)
    assert not prepared(config).cached


@pytest.mark.parametrize("change", [{"max_bad_rows": 0}, {"on_overlong": "error"}, {"data": ("nowhere.jsonl",)}])
def test_a_mistake_is_told_every_time(change: dict[str, Any], model: Path, data: Path, folder: Path) -> None:
    config = sft(model, data, **change)
    said = []
    for _ in range(2):
        with pytest.raises(TruetuneError) as caught:
            prepared(config)
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert not folder.exists()


def test_a_damaged_entry_changes_nothing(
    model: Path, data: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = sft(model, data)
    first, said = prepared(config), capsys.readouterr().err
    (entry,) = folder.iterdir()
    entry.write_bytes(entry.read_bytes()[:-3])
    second, said_again = prepared(config), capsys.readouterr().err
    assert (second.cached, said_again) == (False, said)
    assert_same(first, second)
    assert prepared(config).cached


def test_the_screen_says_where_the_tokens_are_from(
    tiny_model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["sft", "--model", str(tiny_model), "--data", str(data), "--out", str(tmp_path / "out"), "--dry-run",
               "--on-overlong", "drop", "--max-bad-rows", "1", "--max-length", "220"]  # fmt: skip
    said = []
    for _ in range(2):
        assert main(command) == 0
        lines = capsys.readouterr().err.partition("model   ")[0].splitlines()
        said.append([line for line in lines if not line.startswith("truetune: ")])  # kernels, compiled by the first
    note = next(line for line in said[0] if "tokens ·" in line)
    assert said[1] == [line + " (tokens from the cache)" if line == note else line for line in said[0]]
