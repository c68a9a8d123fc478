"""The bench of quantised bases without a peer: flags, ratios, how processes are asked and watched, the last line."""

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench.measure import Outcome, Setting
from bench.peers import answers
from bench.quant import __main__ as command
from bench.quant import big, big_checkpoint, findings, kernels, load, ours, step
from bench.quant.findings import AIMS, PEER, Bench, Findings
from bench.quant.rounds import by_rounds
from bench.runs import FailedRunError
from bench.shapes import Shape
from bench.workers import Worker, by_turns, seconds_of

import truetune
from bench import environments
from truetune.ops import dispatch
from truetune.quant.base import QuantLinear

SETTING = Setting(shape="tiny", dtype="bfloat16", dropout=0.0, rank=4, batch_size=2, max_length=64, steps=4)
SMALL = Shape(hidden=64, inner=128, layers=2, heads=2, kv_heads=2, head_dim=32, vocab=512, context=128)

# A process that answers with its own clock, and dies when it is asked to.
ANSWERS = """
import json, sys
for line in sys.stdin:
    request = json.loads(line)
    if request["job"] == "die":
        sys.exit("had enough")
    print(json.dumps({"seconds": request["of"]["n"], "calls": 1}), flush=True)
"""


@pytest.fixture(autouse=True)
def _without_compiling() -> Iterator[None]:
    """What is tested here is the bench."""
    with dispatch.forced("reference"):
        yield


def bench_in(work: Path, python: Path | None = None) -> Bench:
    return Bench(
        work=work, env=dict(os.environ), peer_env={}, python=python, data=work / "rows.json", setting=SETTING,
        load_shape="tiny", limit="1GB", weights=((64, 64),), values=4096, rounds=1, seconds=0.0, say=lambda _: None,
    )  # fmt: skip


def talking(folder: Path, name: str = "fake") -> Worker:
    return Worker(name, [sys.executable, "-c", ANSWERS], os.environ, folder)


def test_the_defaults_are_the_published_setting() -> None:
    options = command.parse([])
    assert options.parts == ["quantize", "dequantize", "optim", "load", "step"]
    assert (options.weights, options.values) == (((2048, 2048), (8192, 2048)), 2_097_152)
    assert (options.load_shape, options.shape, options.dropout) == ("llama-3.2-1b", "smollm2-135m", 0.05)
    assert options.peers
    assert options.environments == options.work / "environments"


def test_parts_are_named_once_each_in_the_order_given() -> None:
    assert command.parse(["--parts", "big,load,big"]).parts == ["big", "load"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--parts", "load,stop"], "stop: known are quantize, dequantize, optim, load, step, big"),
        (["--weights", "2048"], "2048: expected ROWSxCOLUMNS"),
        (["--weights", "3x3"], "3x3: expected ROWSxCOLUMNS, a multiple of 64"),
        (["--peers", "peft"], "invalid choice: 'peft'"),
        (["--steps", "2"], "--steps: more than 2"),
        (["--rounds", "0"], "--rounds: at least 1"),
        (["--data", "nowhere.json"], "--data: no file nowhere.json"),
    ],
)
def test_a_wrong_flag_is_refused(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command.parse(flags)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_a_missing_environment_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / f"{PEER}.txt").write_text("no-such-package-anywhere==1\n", encoding="utf-8")
    monkeypatch.setattr(environments, "PEERS", tmp_path)
    assert command.main(["--work", str(tmp_path / "work")]) == 2
    seen = capsys.readouterr()
    assert "no environment for bitsandbytes" in seen.err
    assert "--install" in seen.err
    assert seen.out == ""
    assert not (tmp_path / "work").exists()


def test_this_interpreter_is_the_peers_where_it_has_what_is_pinned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"{PEER}.txt").write_text("torch==1.0\n", encoding="utf-8")
    monkeypatch.setattr(environments, "PEERS", tmp_path)
    found = environments.interpreter(tmp_path, PEER)
    assert found == Path(sys.executable)
    assert environments.versions_in(found, PEER) == {"torch": torch.__version__}


def test_the_peers_trainer_is_the_one_of_the_other_bench() -> None:
    with_it, without = environments.pins(PEER), environments.pins("peft")
    assert {name: with_it[name] for name in without} == without
    assert set(with_it) - set(without) == {"bitsandbytes"}


def test_a_ratio_is_taken_within_each_round() -> None:
    assert findings.ratio([2.0, 40.0, 6.0], [1.0, 10.0, 2.0]) == 3.0  # the ratio of medians would be 2.5 or less
    assert findings.ratio([], [1.0]) is None


def test_the_least_of_ratios_is_unknown_where_one_is() -> None:
    assert findings.least([3.0, 2.0]) == 2.0
    assert findings.least([3.0, None]) is None
    assert findings.least([]) is None


def test_aims_are_held_against_what_was_measured() -> None:
    figures = {
        "quantize_speedup_vs_bitsandbytes": 14.9, "load_s": 4.0, "step_time_ratio_int8": 0.91, "step_tok_s_nf4": 1.0,
        "big_limited_same_adapter": False, "packed_load_s": None,
    }  # fmt: skip
    assert findings.missed(figures) == [
        "quantize_speedup_vs_bitsandbytes",
        "step_time_ratio_int8",
        "big_limited_same_adapter",
    ]


def test_the_table_has_a_line_per_figure_with_its_aim() -> None:
    lines = findings.table({"load_s": 2.5, "quantize_same_bits": True, "packed_load_s": None}).splitlines()[1:]
    assert [line.split() for line in lines] == [
        ["load_s", "2.5", "≤", "4"],
        ["quantize_same_bits", "yes"],
        ["packed_load_s", "–", "≤", "1"],
    ]


def test_kernels_are_compared_cell_by_cell_and_the_worst_cell_counts() -> None:
    cells = {
        "64x64": {"native": {"rounds_ms": [1.0, 2.0]}, "bitsandbytes": {"rounds_ms": [3.0, 6.0]}, "same_bits": True},
        "64x128": {"native": {"rounds_ms": [1.0, 1.0]}, "bitsandbytes": {"rounds_ms": [2.0, 2.0]}, "same_bits": False},
    }
    pairs = [("", "native", PEER), ("reference_", "reference", PEER)]
    found = kernels.compared(Findings(details=cells), "quantize", pairs).figures
    assert found == {
        "quantize_speedup_vs_bitsandbytes": 2.0,
        "quantize_reference_speedup_vs_bitsandbytes": None,
        "quantize_same_bits": False,
    }


def test_the_names_that_checks_rely_on() -> None:
    one = [Outcome(tok_s=100.0, peak_mb=1000.0, first_step_s=4.0, loss=2.5)]
    half = [Outcome(tok_s=50.0, peak_mb=4000.0, first_step_s=4.0, loss=2.5)]
    found = step.figures({"bf16": one, "nf4": one, "int8": half, PEER: half})
    assert found == {
        "step_tok_s_nf4": 100.0, "step_peak_mb_nf4": 1000.0,
        "step_time_ratio_nf4": 1.0, "step_memory_ratio_nf4": 1.0,
        "step_time_ratio_int8": 2.0, "step_memory_ratio_int8": 4.0,
        "step_speedup_vs_bitsandbytes": 2.0, "step_memory_ratio_vs_bitsandbytes": 4.0,
        "step_speedup_vs_bitsandbytes_checkpointing": None, "step_memory_ratio_vs_bitsandbytes_checkpointing": None,
    }  # fmt: skip


def test_loads_are_compared_by_the_call_and_by_memory_of_no_file() -> None:
    quick, slow = load.Loaded(1.0, 3.0, 0.1, 400.0, 2000.0), load.Loaded(8.0, 11.0, 0.1, 1200.0, 3000.0)
    runs = {load.OURS: [quick], load.PACKED: [quick], PEER: [slow]}
    found = load.figures(runs)
    assert {name: found[name] for name in AIMS if name in found} == {
        "load_s": 1.0, "load_anonymous_mb": 400.0, "packed_load_s": 1.0,
    }  # fmt: skip
    assert (found["load_speedup_vs_bitsandbytes"], found["load_memory_ratio_vs_bitsandbytes"]) == (8.0, 3.0)
    assert found["packed_load_speedup_vs_bitsandbytes"] is None


def test_the_last_line_names_figures_what_was_missed_and_what_did_not_run(tmp_path: Path) -> None:
    options = command.parse(["--parts", "load", "--work", str(tmp_path)])
    found = {"load": Findings(figures={"load_s": 5.0}, details={"x": 1}, not_run={PEER: "gone"})}
    facts = json.loads(json.dumps(command.facts_of(found, options)))
    assert (facts["bench"], facts["load_s"], facts["missed"]) == ("quant", 5.0, ["load_s"])
    assert facts["not_run"] == {"load: bitsandbytes": "gone"}
    assert facts["details"] == {"load": {"x": 1}}
    assert {"parts", "rounds", "shape", "rank", "threads", "load_average", "torch", "cpu", "date"} <= set(facts)


def test_a_part_of_ours_that_fails_is_named_and_fails_the_bench(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text("[]", encoding="utf-8")
    found, failed = command.measure(replace(bench_in(tmp_path), load_shape="none"), ["load"])
    assert failed
    assert "bench.shapes" in found["load"].not_run["load"]


def test_workers_are_asked_by_turns_and_one_that_dies_is_left_out(tmp_path: Path) -> None:
    not_run: dict[str, str] = {}
    told: list[tuple[object, ...]] = []
    with talking(tmp_path, "a") as a, talking(tmp_path, "b") as b:
        asked = {"a": (a, "time", {"n": 2.0}), "b": (b, "die", {})}
        found = by_turns(asked, rounds=3, seconds=0.0, not_run=not_run, told=lambda *one: told.append(one[:2]))
        again = by_turns(asked | {"a": (a, "time", {"n": 4.0})}, rounds=1, seconds=0.0, not_run=not_run)
    assert seconds_of(found) == {"a": 2.0}
    assert len(found["a"]) == 3
    assert seconds_of(again) == {"a": 4.0}
    assert told == [(1, "a"), (2, "a"), (3, "a")]
    assert not_run["b"].startswith("b ended at die")
    assert not_run["b"].endswith("had enough")


def test_our_own_process_answers(tmp_path: Path) -> None:
    env = {**os.environ, kernels.VARIABLE: "reference"}
    of = {"shape": [64, 64], "dtype": "bfloat16", "double": True}
    with Worker("reference", [sys.executable, "-m", "bench.quant.ours"], env, tmp_path) as worker:
        answer = worker.ask("dequantize", of, seconds=0.0)
        naive = worker.ask("naive", of, seconds=0.0)
        with pytest.raises(FailedRunError, match="KeyError: 'nothing'"):
            worker.ask("nothing", {}, seconds=0.0)
    assert answer["calls"] == answers.LEAST_CALLS
    assert answer["seconds"] > 0
    assert answer["digest"] == naive["digest"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_naive_version_computes_the_same(dtype: str) -> None:
    packed, naive = ours.dequantize([64, 64], dtype, False), ours.naive([64, 64], dtype, False)
    assert torch.equal(packed.call(), naive.call())


def test_a_step_of_the_optimizer_moves_all_parameters_and_keeps_two_bytes_of_each() -> None:
    job = ours.optim(2, 1 << 16)
    found = answers.measured(job, 0.0)
    # Two codes a value, a float32 scale for 256 of them in each, and both maps of 256 once.
    assert found["state_bytes"] >= 2 * (1 << 16) + 2 * 4 * (1 << 16) // 256
    assert found["state_bytes"] < 2.1 * (1 << 16)


def test_our_variants_are_commands_that_the_product_understands(tmp_path: Path) -> None:
    from truetune.cli.flags import parse
    from truetune.config.sft import SFTConfig

    kinds = {}
    for name, (system, runs) in variants(tmp_path, None).items():
        line = runs._command(system, tmp_path, tmp_path / "log", 3)
        assert line[:4] == [sys.executable, "-m", "truetune", "sft"]
        flags, _, _ = parse("sft", SFTConfig, line[4:])
        config = SFTConfig(**flags)
        kinds[name] = (config.quant, config.double_quant, config.max_steps)
    assert kinds == {"bf16": ("none", False, 3), "nf4": ("nf4", True, 3), "int8": ("int8", False, 3)}


def test_the_peer_is_told_how_to_quantise_and_whether_to_recompute(tmp_path: Path) -> None:
    told = {}
    for name, (system, runs) in list(variants(tmp_path, Path("/peer/python")).items())[len(step.FLAGS) :]:
        python, script, task = runs._command(system, tmp_path, tmp_path / "log", 3)
        assert python == "/peer/python"
        assert Path(script).is_file()
        setting = json.loads(Path(task).read_text(encoding="utf-8"))["setting"]
        told[name] = (setting["quant"], setting["checkpointing"], setting["rank"])
    assert told == {"bitsandbytes": ("nf4", False, 4), "bitsandbytes_checkpointing": ("nf4", True, 4)}


def variants(work: Path, python: Path | None) -> Mapping[str, tuple[str, step.QuantRuns]]:
    (work / "rows.json").write_text("[]", encoding="utf-8")
    bench = bench_in(work, python)
    return step.variants(step.shared(bench), bench)


def test_a_load_is_timed_by_its_own_marks_and_its_memory_seen_from_outside(tmp_path: Path) -> None:
    code = (
        "import json, sys, time\n"
        "start = time.time(); taken = bytearray(80_000_000); time.sleep(0.2); done = time.time()\n"
        "more = bytearray(160_000_000); time.sleep(0.1)\n"
        "marks = {'imported': start, 'loaded': done, 'answered': time.time(), 'peak_mb': 1.0}\n"
        "json.dump(marks, open(sys.argv[1], 'w'))"
    )
    began = time.perf_counter()
    found = load.measured([sys.executable, "-c", code], os.environ, tmp_path / "run")
    assert 0.2 <= found.load_s <= found.process_s <= time.perf_counter() - began
    assert found.forward_s >= 0.1
    if sys.platform == "linux":
        assert 80 < found.anonymous_mb < 160  # what comes after the load is not counted


def test_a_load_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(FailedRunError, match=r"(?s)code 1.*no such model"):
        load.measured([sys.executable, "-c", "raise SystemExit('no such model')"], os.environ, tmp_path / "run")


def test_the_big_checkpoint_is_one_that_loads_packed(tiny_model: Path, tmp_path: Path) -> None:
    big_checkpoint.make(SMALL, tiny_model, tmp_path / "big")
    model = truetune.load(str(tmp_path / "big"), dtype="bfloat16")
    packed = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert len(packed) == 7 * SMALL.layers
    first, second = (layer.mlp.up_proj.dense().float() for layer in model.model.layers)
    assert not torch.equal(first, second)  # or one layer taken for another would not be noticed
    assert 0.005 < first.std() < 0.05
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    assert (tmp_path / "big" / "tokenizer.json").is_file()


def test_long_rows_are_of_one_length_and_lose_no_text_between_them(tmp_path: Path) -> None:
    source = [{"instruction": "?", "output": f"{n:05d}" * 200} for n in range(20)]
    (tmp_path / "rows.json").write_text(json.dumps(source), encoding="utf-8")
    rows = [
        json.loads(line)
        for line in big.long_rows(tmp_path / "rows.json", tmp_path / "long.jsonl").read_text("utf-8").splitlines()
    ]
    assert len(rows) == 9
    assert {len(row["output"]) for row in rows} == {big.CHARACTERS}
    assert "\n".join(row["output"] for row in source).startswith("".join(row["output"] for row in rows))


def test_processes_take_turns_and_the_first_round_is_not_counted(tmp_path: Path) -> None:
    seen: list[str] = []

    def good(turn: int) -> int:
        seen.append(f"good {turn}")
        return turn

    def bad(turn: int) -> int:
        seen.append(f"bad {turn}")
        if turn == 2:
            raise FailedRunError("broke")
        return turn

    not_run: dict[str, str] = {}
    bench = replace(bench_in(tmp_path), rounds=3)
    found = by_rounds(bench, {"good": good, "bad": bad}, str, not_run)
    assert seen == ["good 0", "bad 0", "good 1", "bad 1", "good 2", "bad 2", "good 3"]
    assert found == {"good": [1, 2, 3]}
    assert not_run == {"bad": "broke"}
