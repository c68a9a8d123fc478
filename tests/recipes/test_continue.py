"""Going on from an adapter: the very weights, the same method; what contradicts it is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from training_runs import cut_after, differences, log, run_pretrain, run_sft, write_rows
from truetune.adapters import files
from truetune.config.methods import METHODS
from truetune.config.resolve import resolve
from truetune.config.sft import SFTConfig
from truetune.errors import AdapterError, ConfigError, TruetuneError
from truetune.recipes import sft

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 3, "alpha": 6.0, "rank_pattern": ["q_proj=2"], "dropout": 0.1},
    "parts": {"trainable": ["norm"]},
    "pissa": {"init": "pissa"},
    "dora": {"method": "dora"},
    "adalora": {"method": "adalora", "rank": 4, "target_rank": 1, "prune_every": 1, "prune_until": 0.5, "lr": 5e-2},
    "vera": {"method": "vera", "rank": 8, "lr": 5e-2},
    "ia3": {"method": "ia3", "lr": 5e-2},
    "bitfit": {"method": "bitfit"},
    "prompt": {"method": "prompt", "virtual_tokens": 3},
    "ptuning": {"method": "ptuning", "virtual_tokens": 3},
    "prefix": {"method": "prefix", "virtual_tokens": 2, "projection": True},
    "llama-adapter": {"method": "llama-adapter", "adapter_layers": 1},
    "bottleneck": {"method": "bottleneck"},
}


@pytest.fixture(scope="module")
def base(make_tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("base") / "model", attention_bias=True)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")


@pytest.fixture(scope="module")
def first(base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of LoRA, to go on from."""
    out = tmp_path_factory.mktemp("first") / "run"
    run_sft(base, rows, out, max_steps=4, **KINDS["lora"])
    return out / "adapter"


def go_on(base: Path, rows: Path, adapter: Path, out: Path, **flags: Any) -> dict[str, Any]:
    settings = {"model": str(base), "data": (str(rows),), "adapter": str(adapter), "out": str(out)}
    given = {"batch_size": 4, "max_steps": 3, "lr": 1e-2} | flags
    return sft.run(resolve(SFTConfig, file=None, flags=settings | given))


def same(one: Path, other: Path) -> bool:
    a, b = load_file(one / files.WEIGHTS), load_file(other / files.WEIGHTS)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("kind", KINDS)
def test_every_method_goes_on_from_its_weights(kind: str, base: Path, rows: Path, tmp_path: Path) -> None:
    """Without a step to speak of, nothing moves: the start is what the first run ended in, held-out loss included."""
    held = {"val_data": str(rows)}
    ended = run_sft(base, rows, tmp_path / "a", max_steps=6, **held, **KINDS[kind])
    adapter = tmp_path / "a" / "adapter"
    still = go_on(base, rows, adapter, tmp_path / "still", max_steps=1, lr=1e-30, **held)
    assert still["val_loss_before"] == pytest.approx(ended["val_loss"], abs=1e-6)
    assert ended["val_loss"] != pytest.approx(ended["val_loss_before"], abs=1e-4)
    assert same(adapter, tmp_path / "still" / "adapter") or kind in ("prefix", "adalora")
    configs = [json.loads((path / files.CONFIG).read_text()) for path in (adapter, tmp_path / "still" / "adapter")]
    if kind != "adalora":  # which writes the steps of its run
        assert configs[0] == configs[1]
    go_on(base, rows, adapter, tmp_path / "moved", **({"lr": 5e-2} if kind == "ia3" else {}))
    assert not same(adapter, tmp_path / "moved" / "adapter")


@pytest.mark.parametrize("kind", ["lora", "adalora", "prefix", "parts"])
def test_resuming_such_a_run_is_exact(kind: str, base: Path, rows: Path, tmp_path: Path) -> None:
    run_sft(base, rows, tmp_path / "a", max_steps=4, **KINDS[kind])
    settings = {"save_every": 1, "keep": 100, "max_steps": 5, "dropout": 0.1} if kind == "lora" else {
        "save_every": 1, "keep": 100, "max_steps": 5}  # fmt: skip
    go_on(base, rows, tmp_path / "a" / "adapter", tmp_path / "whole", **settings)
    out = cut_after(tmp_path / "whole", 2, tmp_path / "resumed")
    go_on(base, rows, tmp_path / "a" / "adapter", out, resume="auto", **settings)
    assert differences(tmp_path / "whole", out) == []
    by_file = cut_after(tmp_path / "whole", 3, tmp_path / "by-file")
    sft.run(resolve(SFTConfig, file=str(by_file / "run.yaml"), flags={"resume": "auto", "out": str(by_file)}))
    assert differences(tmp_path / "whole", by_file) == []


def test_a_resumed_run_finds_the_same_adapter_or_refuses(base: Path, rows: Path, tmp_path: Path) -> None:
    run_sft(base, rows, tmp_path / "a", max_steps=2)
    adapter = tmp_path / "a" / "adapter"
    go_on(base, rows, adapter, tmp_path / "out", save_every=1, keep=9)
    out = cut_after(tmp_path / "out", 1, tmp_path / "cut")
    file = files.read(adapter)
    moved = {key: tensor + 1 for key, tensor in file.tensors.items()}
    files.write(files.AdapterFile(adapter, file.config, moved, file.card), adapter)
    with pytest.raises(TruetuneError, match="the adapter that it goes on from is not what"):
        go_on(base, rows, adapter, out, save_every=1, keep=9, resume="auto")


def test_two_short_runs_learn_as_one_goes_on_learning(base: Path, rows: Path, first: Path, tmp_path: Path) -> None:
    go_on(base, rows, first, tmp_path / "out", max_steps=8)
    start, end = log(first.parent), log(tmp_path / "out")
    assert end[0]["loss"] < start[0]["loss"] - 0.05
    assert end[-1]["loss"] < end[0]["loss"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"rank": 8}, r"--rank: 8, and the adapter has 3"),
        ({"alpha": 1.0, "rank": 8}, r"--alpha: 1.0, and the adapter has 6(.|\n)*--rank: 8"),
        ({"method": "dora"}, r"--method: dora, and the adapter has lora"),
        ({"method": "full"}, r"--method: full, and the adapter has lora"),
        ({"init": "gaussian"}, r"--init: gaussian, which the adapter is beyond"),
        ({"use_rslora": True}, r"--use-rslora: True"),
        ({"targets": ["q_proj"]}, r"--targets: q_proj: 2 layers, and the adapter is on 14"),
        ({"layers": [0]}, r"--layers: 0: 7 layers"),
        ({"trainable": ["norm"]}, r"--trainable: norm, and the adapter has none"),
        ({"new_tokens": ["<new>"]}, r"--new-tokens: <new>"),
    ],
)
def test_what_contradicts_the_adapter_is_refused_by_name(
    given: dict[str, Any], said: str, base: Path, rows: Path, first: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        go_on(base, rows, first, tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_what_says_the_same_is_no_contradiction(base: Path, rows: Path, first: Path, tmp_path: Path) -> None:
    same_settings = {"method": "lora", "rank": 3, "alpha": 6.0, "targets": ["all-linear"], "dropout": 0.0}
    go_on(base, rows, first, tmp_path / "out", **same_settings)
    config = json.loads((tmp_path / "out" / "adapter" / files.CONFIG).read_text())
    assert (config["r"], config["rank_pattern"], config["lora_dropout"]) == (3, {"q_proj": 2}, 0.0)


def test_another_base_is_refused(rows: Path, first: Path, make_tiny: Callable[..., Path], tmp_path: Path) -> None:
    other = make_tiny(tmp_path / "other", attention_bias=True, rope_theta=5.0, num_hidden_layers=1)
    with pytest.raises(AdapterError, match=r"trained on other weights(.|\n)*--model with the base"):
        go_on(other, rows, first, tmp_path / "out")


def test_its_template_and_system_message_are_taken_unless_others_are_named(
    base: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_sft(base, rows, tmp_path / "a", max_steps=1, template="alpaca", system="Be short.")
    adapter = tmp_path / "a" / "adapter"
    capsys.readouterr()
    go_on(base, rows, adapter, tmp_path / "b")
    said = capsys.readouterr().err
    cards = [files.read(path).card for path in (adapter, tmp_path / "b" / "adapter")]
    assert (cards[1]["template"], cards[1]["system"]) == (cards[0]["template"], "Be short.")
    assert f"from {adapter}" in " ".join(said.split())
    go_on(base, rows, adapter, tmp_path / "c", template="chatml", system="Be long.")
    said = " ".join(capsys.readouterr().err.split())
    assert "trained with the template alpaca; from here on it learns chatml" in said
    card = files.read(tmp_path / "c" / "adapter").card
    assert (card["template"]["name"], card["system"]) == ("chatml", "Be long.")


def test_pretraining_goes_on_from_an_adapter_as_well(base: Path, first: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": "one two three " * n}) + "\n" for n in range(3, 12)), encoding="utf-8")
    found = run_pretrain(base, text, tmp_path / "out", adapter=str(first), max_steps=2, max_length=60)
    assert found["steps"] == 2
    assert not same(first, tmp_path / "out" / "adapter")
    assert METHODS[files.read(tmp_path / "out" / "adapter").settings.kind].peft == "LORA"
