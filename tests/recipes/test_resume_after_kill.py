"""Runs that are stopped by signals, kindly and not: what is left is whole, and going on gives the same bits."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from training_runs import checkpoints, differences, write_rows
from truetune.checkpoint.atomic import is_valid
from truetune.checkpoint.run_state import newest, read_progress

TESTS = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def arguments(model: Path, data: Path, steps: int, save_every: int) -> list[str]:
    settings = {"model": model, "data": data, "batch-size": 4, "rank": 4, "lr": 0.05, "dropout": 0.2,
                "max-steps": steps, "save-every": save_every, "val-split": 0.3, "eval-every": 15,
                "select": "best"}  # fmt: skip
    return ["sft", *(text for key, value in settings.items() for text in (f"--{key}", str(value)))]


def started(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "truetune", *command], stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )


def finish(command: list[str]) -> None:
    process = started(command)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said


@pytest.fixture(scope="module")
def stopped(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows and a run of 150 steps that nobody disturbed."""
    folder = tmp_path_factory.mktemp("stopped")
    write_rows(folder / "rows.jsonl")
    finish([*arguments(tiny_model, folder / "rows.jsonl", 150, 0), "--out", str(folder / "whole")])
    return folder


@pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_a_signal_saves_leaves_with_its_code_and_the_rest_is_the_same(
    number: signal.Signals, stopped: Path, tiny_model: Path
) -> None:
    out = stopped / number.name
    command = [*arguments(tiny_model, stopped / "rows.jsonl", 150, 0), "--out", str(out)]
    process = started(command)
    until = time.monotonic() + 60
    while not ((out / "log.jsonl").exists() and '"step": 7' in (out / "log.jsonl").read_text()):
        assert time.monotonic() < until
        time.sleep(0.005)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "the state is saved" in said
    assert "Traceback" not in said
    path, damaged = newest(out)
    assert path is not None
    assert damaged == []
    step = read_progress(path).step
    assert f"stopped after step {step} of 150" in said
    assert 7 <= step < 150
    finish([*command, "--resume", "auto"])
    assert differences(stopped / "whole", out) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_twenty_kills_change_nothing(tiny_model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl")
    command = arguments(tiny_model, data, 60, 1)
    chained = subprocess.run(
        [sys.executable, str(TESTS / "kill_chain.py"), str(tmp_path / "out"), "20", "0", *command],
        capture_output=True, text=True, env=ENVIRONMENT, timeout=240,
    )  # fmt: skip
    assert chained.returncode == 0, chained.stderr
    counts = json.loads(chained.stdout.splitlines()[-1])
    assert counts["killed"] == 20
    assert counts["in_a_save"] >= 5  # ten were aimed at a save; some come a moment too late
    finish([*command, "--out", str(tmp_path / "whole")])
    for out in [tmp_path / "out", *tmp_path.glob("out.done-*")]:
        assert differences(tmp_path / "whole", out) == []
        assert checkpoints(out) == checkpoints(tmp_path / "whole")
        assert all(is_valid(out / "checkpoints" / name) for name in checkpoints(out))
        assert [p.name for p in out.rglob(".*")] == [".lock"]  # nothing half written is left behind
