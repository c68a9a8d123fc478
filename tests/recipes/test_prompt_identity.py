"""A system message or a date that was put into the prompts of a run is in those of everything that comes of it."""

import json
import shutil
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from conftest import CHATML
from training_runs import differences, run_sft, write_rows
from truetune.cli.main import main
from truetune.config.generate import GenerateConfig
from truetune.data.mask import encode_rows
from truetune.data.schema import Message, Origin, Row
from truetune.data.template import resolve_template
from truetune.models.tokenizer import ChatTokenizer
from truetune.recipes.generate import load_speaker
from truetune.train.log import Screen

SYSTEM = 'Answer "briefly".\nNo {{ jokes }}.'
DATED = "{{- '<|im_start|>date ' + strftime_now('%d %b %Y') + '<|im_end|>\\n' }}" + CHATML


class Tomorrow(datetime):
    @classmethod
    def now(cls, tz: Any = None) -> "Tomorrow":
        return super().now(tz) + timedelta(days=1)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl")


def prompt_ids(model: Path, *, system: str | None = None, **flags: Any) -> list[int]:
    return load_speaker(GenerateConfig(model=str(model), prompt="x", **flags), Screen()).prompt_ids("Count.", system)


def by_transformers(model: Path, *before: dict[str, str]) -> list[int]:
    turns = [*before, {"role": "user", "content": "Count."}]
    ids: list[int] = AutoTokenizer.from_pretrained(model).apply_chat_template(
        turns, add_generation_prompt=True, return_dict=False
    )
    return ids


def trained_ids(model: Path, template: str, system: str) -> list[int]:
    """The prompt's ids as training makes them."""
    encoder = ChatTokenizer.load(str(model))
    row = Row(Origin("f", 1), (Message("user", "Count.", instruction="Count.", input=""), Message("assistant", "1")))
    examples, _ = encode_rows([row], resolve_template(template, encoder), encoder, train_on="last", system=system)
    ids, flags = (t.tolist() for t in examples.example(0))
    return list(ids[: flags.index(True)])


@pytest.mark.parametrize("template", ["auto", "alpaca"])
def test_the_system_message_of_a_run_is_served_by_adapter_and_merged_model(
    template: str, tiny_model: Path, data: Path, tmp_path: Path
) -> None:
    out, merged = tmp_path / "out", tmp_path / "merged"
    run_sft(tiny_model, data, out, system=SYSTEM, template=template, max_steps=1)
    expected = trained_ids(tiny_model, template, SYSTEM)
    assert json.loads((out / "adapter" / "truetune.json").read_text())["system"] == SYSTEM
    assert prompt_ids(tiny_model, adapter=str(out / "adapter")) == expected
    argv = ["merge", "--model", str(tiny_model), "--adapter", str(out / "adapter"), "--out", str(merged)]
    assert main(argv) == 0
    assert prompt_ids(merged) == by_transformers(merged) == expected
    other = trained_ids(tiny_model, template, "Another.")
    assert prompt_ids(tiny_model, adapter=str(out / "adapter"), system="Another.") == other
    assert prompt_ids(merged, system="Another.") == other
    assert by_transformers(merged, {"role": "system", "content": "Another."}) == other


def test_the_system_message_of_a_full_run_is_served(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    run_sft(tiny_model, data, tmp_path / "out", system=SYSTEM, method="full", max_steps=1)
    model = tmp_path / "out" / "model"
    assert prompt_ids(model) == by_transformers(model) == trained_ids(tiny_model, "auto", SYSTEM)


def test_without_a_system_message_the_card_says_so(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    run_sft(tiny_model, data, tmp_path / "out", max_steps=1)
    card = json.loads((tmp_path / "out" / "adapter" / "truetune.json").read_text())
    assert (card["system"], card["date"]) == (None, None)


def test_an_adapter_of_bare_text_continues_bare_text(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The base has a chat template, which the adapter has never seen."""
    data, adapter = tmp_path / "texts.jsonl", tmp_path / "out" / "adapter"
    data.write_text("".join(json.dumps({"text": f"Once {n}."}) + "\n" for n in range(6)))
    run_sft(tiny_model, data, tmp_path / "out", max_steps=1)
    bare = ChatTokenizer.load(str(tiny_model)).encode(["Count."])[0]
    capsys.readouterr()
    assert prompt_ids(tiny_model, adapter=str(adapter)) == bare
    assert "trained on bare text" in capsys.readouterr().err
    assert prompt_ids(tiny_model, adapter=str(adapter), template="chatml") != bare
    argv = ["merge", "--model", str(tiny_model), "--adapter", str(adapter), "--out", str(tmp_path / "merged")]
    assert main(argv) == 0
    assert "trained on bare text" in capsys.readouterr().err


def test_a_date_in_the_template_is_that_of_the_run_for_good(
    make_tiny: Callable[..., Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that goes on the next day, and the prompts that are served then, tell the day it was started."""
    model, today = make_tiny(tmp_path / "model", chat_template=DATED), datetime.now().date()
    run_sft(model, data, tmp_path / "whole", save_every=3)
    run_sft(model, data, tmp_path / "halves", save_every=3)
    for left in sorted((tmp_path / "halves" / "checkpoints").iterdir())[1:]:
        shutil.rmtree(left)
    (tmp_path / "halves" / "report.md").unlink()
    monkeypatch.setattr("truetune.recipes.data.datetime", Tomorrow)
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Tomorrow)
    run_sft(model, data, tmp_path / "halves", save_every=3, resume="auto")
    assert differences(tmp_path / "whole", tmp_path / "halves") == []
    adapter, merged = tmp_path / "halves" / "adapter", tmp_path / "merged"
    card = json.loads((adapter / "truetune.json").read_text())
    assert card["date"] == card["facts"]["date"] == today.isoformat()
    assert main(["merge", "--model", str(model), "--adapter", str(adapter), "--out", str(merged)]) == 0
    told = f"date {today:%d %b %Y}<|im_end|>"
    served: Sequence[list[int]] = [prompt_ids(model, adapter=str(adapter)), prompt_ids(merged), by_transformers(merged)]
    assert all(told in ChatTokenizer.load(str(model)).decode(ids) for ids in served)


def test_a_full_run_keeps_its_date(
    make_tiny: Callable[..., Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_tiny(tmp_path / "model", chat_template=DATED)
    run_sft(model, data, tmp_path / "out", method="full", max_steps=1)
    before = by_transformers(tmp_path / "out" / "model")
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Tomorrow)
    assert by_transformers(tmp_path / "out" / "model") == before
    assert by_transformers(model) != before
