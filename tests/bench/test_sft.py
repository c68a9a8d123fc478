"""The bench of training without a peer: flags, what is computed from logs, the names that the last line promises."""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from bench.measure import Outcome, Setting, Step
from bench.shapes import SHAPES

from bench import environments, measure, ours, report, runs, sft

SETTING = Setting(shape="tiny", dtype="float32", dropout=0.0, rank=4, batch_size=2, max_length=64, steps=4)
OUTCOMES = {
    "truetune": Outcome(tok_s=300.0, peak_mb=2000.0, first_step_s=4.0, loss=2.5),
    "peft": Outcome(tok_s=100.0, peak_mb=5000.0, first_step_s=6.0, loss=2.5),
}


def lines(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_the_defaults_are_the_published_setting() -> None:
    options = sft.parse([])
    assert (options.shape, options.dtype, options.dropout, options.rank) == ("smollm2-135m", "bfloat16", 0.05, 8)
    assert (options.batch_size, options.max_length, options.steps, options.rounds) == (4, 512, 12, 2)
    assert options.peers == []
    assert options.environments == options.work / "environments"


def test_peers_are_named_once_each_in_the_order_given() -> None:
    assert sft.parse(["--peers", "ms-swift,peft,peft"]).peers == ["ms-swift", "peft"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--peers", "peft,pft"], "pft: known are peft, litgpt, ms-swift"),
        (["--steps", "2"], "--steps: more than 2"),
        (["--rounds", "0"], "--rounds: at least 1"),
        (["--data", "nowhere.json"], "--data: no file nowhere.json"),
    ],
)
def test_a_wrong_flag_is_refused(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        sft.parse(flags)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_a_missing_environment_says_how_to_get_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sft.main(["--peers", "peft", "--work", str(tmp_path / "work")]) == 2
    seen = capsys.readouterr()
    assert "no environment for peft" in seen.err
    assert "--install" in seen.err
    assert seen.out == ""
    assert not (tmp_path / "work").exists()


def test_every_peer_has_a_script_and_pins_torch() -> None:
    for peer, script in environments.SCRIPTS.items():
        assert (environments.PEERS / script).is_file()
        assert environments.pins(peer)["torch"] == "2.13.0"


def test_an_environment_is_held_against_its_pins() -> None:
    found = {"torch": "2.13.0+cpu", "transformers": "5.23.0", "peft": "0.20.0"}
    assert environments.other_versions("peft", found) == ["peft 0.20.0, not 0.21.2"]


def test_the_first_steps_are_not_timed() -> None:
    steps = [Step(100.0, 9.0), Step(100.0, 8.0), Step(2.0, 7.0), Step(3.0, 6.0)]
    assert measure.tokens_per_second(steps, [1, 1, 20, 30]) == 10.0


def test_a_log_that_is_too_short_is_no_measurement() -> None:
    with pytest.raises(ValueError, match="3 steps in the log, 4 asked for"):
        measure.tokens_per_second([Step(1.0, 1.0)] * 3, [1] * 4)


def test_a_peers_steps_are_the_times_between_its_lines(tmp_path: Path) -> None:
    log = lines(tmp_path / "log", *({"end": end, "loss": end / 2} for end in (10.0, 12.0, 15.0)))
    assert measure.steps_of_peer(log, [1, 1, 1]) == [Step(0.0, 5.0), Step(2.0, 6.0), Step(3.0, 7.5)]


def test_a_peer_that_counts_other_tokens_is_refused(tmp_path: Path) -> None:
    log = lines(tmp_path / "log", {"end": 1.0, "loss": 1.0, "tokens_so_far": 90})
    with pytest.raises(ValueError, match="trained on 90 tokens, not on 100"):
        measure.steps_of_peer(log, [100])


def test_our_steps_come_from_the_log_and_its_tokens_must_be_the_peers(tmp_path: Path) -> None:
    rows = [{"step": 1, "loss": 3.0, "tokens": 50, "tok_s": 25.0}, {"step": 2, "val_loss": 1.0, "val_tokens": 9}]
    log = lines(tmp_path / "log.jsonl", *rows)
    assert ours.steps(log, [50]) == [Step(2.0, 3.0)]
    with pytest.raises(ValueError, match="not those of the rows"):
        ours.steps(log, [51])


def test_medians_are_taken_of_each_figure_by_itself() -> None:
    found = measure.medians([Outcome(1, 30, 5, 1), Outcome(3, 10, 4, 2), Outcome(2, 20, 9, 3)])
    assert found == Outcome(2, 20, 5, 2)


def test_the_names_that_checks_rely_on() -> None:
    found = report.figures(OUTCOMES, ["peft", "ms-swift"], ceiling=600.0)
    assert found == {
        "tok_s": 300.0, "peak_mb": 2000.0, "first_step_s": 4.0, "gemm_share": 0.5,
        "speedup_vs_peft": 3.0, "memory_ratio_vs_peft": 2.5, "first_step_ratio_vs_peft": 1.5,
        "speedup_vs_ms_swift": None, "memory_ratio_vs_ms_swift": None, "first_step_ratio_vs_ms_swift": None,
    }  # fmt: skip


def test_the_table_has_a_line_per_system_and_its_share_of_our_speed() -> None:
    head, mine, theirs = report.table(OUTCOMES, ceiling=600.0).splitlines()
    assert head.split()[:2] == ["system", "tok/s"]
    assert mine.split() == ["truetune", "300.0", "1.00", "50.0%", "2,000", "4.0", "2.5000"]
    assert theirs.split() == ["peft", "100.0", "0.33", "16.7%", "5,000", "6.0", "2.5000"]
    assert len({len(line) for line in (head, mine, theirs)}) == 1


def test_the_least_work_of_a_known_model_is_the_published_one() -> None:
    shape = SHAPES["smollm2-135m"]
    body = 106_168_320  # 30 layers of 3,538,944 weights
    assert shape.flops_per_token(0.0) == 4 * body
    assert math.isclose(shape.flops_per_token(1.0), 4 * (body + 576 * 49_152))


def test_our_command_is_one_that_the_product_understands(tmp_path: Path) -> None:
    from truetune.cli.flags import parse
    from truetune.config.sft import SFTConfig

    command = ours.command(SETTING, model=tmp_path, data=tmp_path, out=tmp_path / "out", steps=3, recompute=None)
    assert command[:4] == [sys.executable, "-m", "truetune", "sft"]
    flags, _, as_json = parse("sft", SFTConfig, command[4:])
    assert as_json
    config = SFTConfig(**flags)
    assert (config.rank, config.alpha, config.max_steps, config.save_every, config.batch_size) == (4, 8, 3, 0, 2)


def test_recompute_is_handed_on_only_when_given(tmp_path: Path) -> None:
    command = ours.command(SETTING, model=tmp_path, data=tmp_path, out=tmp_path, steps=3, recompute="full")
    assert command[command.index("--recompute") + 1] == "full"


def test_rows_are_written_in_the_order_of_our_plan(tiny_model: Path, alpaca_file: Path, tmp_path: Path) -> None:
    ours.write_rows(
        Setting(**{**SETTING.__dict__, "max_length": 256, "steps": 7}), model=tiny_model, data=alpaca_file,
        folder=tmp_path,
    )  # fmt: skip
    rows = measure.read_lines(tmp_path / "rows.jsonl")
    alpaca = json.loads((tmp_path / "alpaca" / "train.json").read_text(encoding="utf-8"))
    turns = [row["messages"] for row in measure.read_lines(tmp_path / "messages.jsonl")]
    assert len(rows) == len(alpaca) == len(turns) == 14  # 12 rows, and 2 of the second pass
    assert {row["output"] for row in alpaca[:12]} == {f"It is {n + n * n}" + "!" * n for n in range(12)}
    assert alpaca[:12] != [json.loads(line) for line in alpaca_file.read_text(encoding="utf-8").splitlines()]
    for row, value, (user, answer) in zip(rows, alpaca, turns, strict=True):
        assert value["instruction"] in user["content"]
        assert answer["content"] == value["output"]
        learned = [label for label in row["labels"] if label != ours.IGNORED]
        assert row["input_ids"][-len(learned) :] == learned
        assert len(learned) == len(value["output"]) + 1  # one token a byte, and the end


def test_tokens_are_counted_per_step_and_the_first_of_a_row_is_never_learned(tmp_path: Path) -> None:
    rows = [{"input_ids": [1, 2, 3], "labels": [1, -100, 3]}, {"input_ids": [4], "labels": [4]}]
    path = lines(tmp_path / "rows.jsonl", *rows, {"input_ids": [5, 6], "labels": [-100, 6]})
    assert ours.token_counts(path, 2) == ([4, 2], [1, 1])


def test_a_process_is_watched_from_outside(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = (
        "import pathlib, time; taken = b'x' * 60_000_000; time.sleep(0.2)\n"
        f"pathlib.Path({str(log)!r}).write_text('first\\n'); time.sleep(0.2); print('said'); raise SystemExit(5)"
    )
    found = measure.watch([sys.executable, "-c", code], log, env={}, folder=tmp_path)
    assert found.code == 5
    assert found.tail == "said"
    assert found.first_step_s is not None
    assert 0.2 <= found.first_step_s <= found.seconds - 0.1
    assert found.peak_mb > 60


def test_a_process_without_a_step_has_no_first_one(tmp_path: Path) -> None:
    found = measure.watch([sys.executable, "-c", "pass"], tmp_path / "none", env={}, folder=tmp_path)
    assert (found.code, found.first_step_s) == (0, None)


def test_a_stuck_process_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "LONGEST", 0.2)
    began = time.perf_counter()
    with pytest.raises(TimeoutError):
        measure.watch([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "x", env={}, folder=tmp_path)
    assert time.perf_counter() - began < 30


def test_all_processes_get_the_same_threads_and_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    env = runs.environment(tmp_path, 3)
    assert (env["OMP_NUM_THREADS"], env["MKL_NUM_THREADS"], env["HF_HUB_OFFLINE"]) == ("3", "3", "1")
    assert "GOMP_SPINCOUNT" in env
    assert env["TRUETUNE_CACHE"].startswith(str(tmp_path))


def test_the_users_own_threads_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert runs.environment(tmp_path, None)["OMP_NUM_THREADS"] == "5"


def test_without_given_rows_the_standard_library_is_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "ALPACA", tmp_path / "none.json")
    (tmp_path / "stdlib.json").write_text("[]", encoding="utf-8")  # made before: it takes a while
    assert runs.data_file(None, tmp_path) == tmp_path / "stdlib.json"
    given = lines(tmp_path / "rows.jsonl", {})
    assert runs.data_file(given, tmp_path) == given
