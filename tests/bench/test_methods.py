"""The bench of methods: flags, both sides' settings, what is computed from the rounds, a small run for real."""

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from bench.methods import __main__ as command
from bench.methods import llama, ours, theirs, turns, verdict
from bench.methods.pairs import METHODS, Pair, Setting, pairs
from bench.peers.answers import measured
from bench.shapes import Shape

from bench import environments
from peft_peer import unwarned
from truetune.config.methods import METHODS as KNOWN
from truetune.ops import dispatch

SMALL = Shape(hidden=32, inner=48, layers=3, heads=4, kv_heads=2, head_dim=8, vocab=64, context=128)
SETTING = Setting(shape=SMALL, dtype="float32", rows=2, tokens=24, rank=4, dropout=0.0)
WITH_PEER = [name for name, pair in pairs(SETTING).items() if pair.peft]


@pytest.fixture(autouse=True)
def _without_compiling() -> Iterator[None]:
    """What is tested here is the bench."""
    with dispatch.forced("reference"):
        yield
    ours._open.close()


def bench_in(folder: Path, **changes: Any) -> turns.Bench:
    made = turns.Bench(
        setting=SETTING, env={**os.environ, "TRUETUNE_KERNELS": "reference"}, peer_env=dict(os.environ), python=None,
        folder=folder, rounds=2, seconds=0.0, say=lambda _: None,
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


def found(ours: list[float], peft: list[float], lora: list[float]) -> turns.Found:
    """A method whose rounds took so many seconds on each side."""
    rounds = {
        system: [{"seconds": 2 * s, "cpu_seconds": s, "peak_mb": 100.0 * s, "trained": 7} for s in seconds]
        for system, seconds in ((turns.OURS, ours), (turns.PEER, peft), (turns.LORA, lora))
    }
    return turns.Found("dora", tokens=80, rounds=rounds)


def test_every_method_of_ours_is_measured() -> None:
    assert set(METHODS) == set(KNOWN)
    assert {name for name in KNOWN if KNOWN[name].peft} == set(WITH_PEER)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--methods", "lora,lara"], "lara: known are lora, dora"),
        (["--rounds", "0"], "--rounds: at least 1"),
        (["--tokens", "1"], "--tokens: at least 2"),
        (["--shape", "huge"], "invalid choice: 'huge'"),
    ],
)
def test_a_wrong_flag_is_refused(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command.parse(flags)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_a_missing_peer_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "peft.txt").write_text("no-such-package-anywhere==1\n", encoding="utf-8")
    monkeypatch.setattr(environments, "PEERS", tmp_path)
    assert command.main(["--work", str(tmp_path / "work")]) == 2
    assert "no environment for peft" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("method", METHODS)
def test_a_step_of_ours_learns(method: str) -> None:
    pair = pairs(SETTING)[method]
    job = ours.step(method, pair.ours, dataclasses.asdict(SETTING), pair.needs_biases)
    before = job.call()
    for _ in range(3):
        job.call()
    assert job.call() < before


@pytest.mark.parametrize("method", WITH_PEER)
def test_both_sides_train_as_many_parameters_on_the_same_tokens(method: str) -> None:
    pair = pairs(SETTING)[method]
    assert pair.peft is not None
    mine = measured(ours.step(method, pair.ours, dataclasses.asdict(SETTING), False), 0.0)
    with unwarned():
        other = measured(theirs.step(*pair.peft, dataclasses.asdict(SETTING)), 0.0)
    assert mine["trained"] == other["trained"] > 0
    fused = {"vera": 0, "llama-adapter": 2}  # of these a layer with an adapter runs as its own code says
    assert mine["fused"] == fused.get(method, SMALL.layers)
    if method not in ("ptuning", "adalora"):  # a network that starts anywhere; a loss with its penalty in it
        assert abs(mine["loss"] - other["loss"]) < 0.15


def test_the_first_loss_of_lora_is_the_peers() -> None:
    pair = pairs(SETTING)["lora"]
    assert pair.peft is not None
    mine = ours.step("lora", pair.ours, dataclasses.asdict(SETTING), False).call()
    with unwarned():
        other = theirs.step(*pair.peft, dataclasses.asdict(SETTING)).call()
    assert abs(mine - other) < 1e-5


def test_a_hollow_model_takes_no_memory_and_its_adapter_is_whole() -> None:
    shape = dataclasses.replace(SMALL, vocab=2048)
    model = llama.hollow(shape)
    assert {p.untyped_storage().nbytes() for p in model.parameters()} == {2}
    written = measured(ours.save(dataclasses.asdict(shape), 4), 0.0)
    read = measured(ours.load(dataclasses.asdict(shape), 4), 0.0)
    least = 4 * 4 * sum(rows + columns for rows, columns in shape.linears()) * shape.layers / 1e6
    assert least < written["mb"] < least + 0.05
    assert read["mb"] == written["mb"]


def test_the_peers_adapter_of_that_model_is_read_by_its_own_library() -> None:
    with unwarned():
        job = theirs.load(dataclasses.asdict(SMALL), 4)
        job.call()
        job.call()


def test_ratios_are_taken_within_a_round_and_by_the_processors_time() -> None:
    top = verdict.figures([found([1.0, 10.0, 2.0], [2.0, 40.0, 6.0], [0.5, 8.0, 1.0])])
    assert top["dora_speedup_vs_peft"] == 3.0
    assert top["dora_time_ratio_vs_lora"] == 2.0
    assert top["dora_tok_s"] == 20.0  # by the clock
    assert top["dora_memory_ratio_vs_peft"] == 3.0
    assert top["dora_same_trained"] is True


def test_what_is_slow_or_trains_something_else_is_missed() -> None:
    one = found([1.0], [0.9], [0.8])
    one.rounds[turns.PEER][0]["trained"] = 8
    assert verdict.missed(verdict.figures([one]), [one]) == [
        "dora_time_ratio_vs_lora", "dora_speedup_vs_peft", "dora_same_trained"
    ]  # fmt: skip
    good = found([1.0], [1.1], [0.9])
    assert verdict.missed(verdict.figures([good]), [good]) == []


def test_a_peer_that_failed_leaves_nothing_to_compare_with() -> None:
    one = turns.Found("dora", tokens=80, rounds=found([1.0], [], []).rounds, not_run={turns.PEER: "broke"})
    top = verdict.figures([one])
    assert (top["dora_speedup_vs_peft"], top["dora_same_trained"]) == (None, None)
    assert not one.failed
    assert verdict.table([one]).splitlines()[1].split() == ["dora", "40", "–", "–", "100", "–", "7", "–"]


def test_processes_take_turns_and_ours_that_dies_fails_the_bench(tmp_path: Path) -> None:
    bench = bench_in(tmp_path)
    good = turns.steps(bench, "ia3")
    assert {system: len(rounds) for system, rounds in good.rounds.items()} == {turns.OURS: 2, turns.LORA: 2}
    assert not good.failed
    assert good.each(turns.OURS, "peak_mb")[0] > 50
    broken = dataclasses.replace(bench, setting=dataclasses.replace(SETTING, dtype="none"))
    assert turns.steps(broken, "lora").failed


def test_the_last_line_has_all_figures_and_under_which_conditions(tmp_path: Path) -> None:
    options = command.parse(["--work", str(tmp_path), "--peers", "none", "--methods", "dora"])
    facts = json.loads(json.dumps(command.facts_of([found([1.0], [2.0], [1.0])], bench_in(tmp_path), options)))
    assert (facts["bench"], facts["dora_speedup_vs_peft"], facts["missed"]) == ("methods", 2.0, [])
    assert {"rounds", "rows", "tokens", "rank", "dtype", "threads", "details", "not_run", "cpu", "date"} <= set(facts)


def test_the_peers_name_for_each_method_is_a_class_of_its_library() -> None:
    for pair in pairs(SETTING).values():
        assert pair.peft is None or issubclass(getattr(peft, pair.peft[0]), peft.PeftConfig)
    assert isinstance(pairs(SETTING)["full"], Pair)
    assert torch.get_default_dtype() == torch.float32  # a model in bf16 sets it for a while
