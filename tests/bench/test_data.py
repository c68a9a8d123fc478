"""The bench of data without a peer: flags, the rows that are made, the names that the last line promises."""

import argparse
import json
from pathlib import Path

import pytest
from bench.data import __main__ as bench

from bench import environments


@pytest.fixture
def alpaca(tmp_path: Path) -> Path:
    rows = [{"instruction": f"Say {n}.", "input": "", "output": "one " * n} for n in range(1, 6)]
    path = tmp_path / "alpaca.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def test_rows_are_repeated_and_told_apart(alpaca: Path, tmp_path: Path) -> None:
    bench.write_rows(alpaca, tmp_path / "rows.jsonl", count=12)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len({row["instruction"] for row in rows}) == len(rows) == 12
    assert rows[7]["output"] == rows[2]["output"] == "one " * 3
    bench.write_rows(alpaca, tmp_path / "rows.jsonl", size=5000)
    assert 5000 <= (tmp_path / "rows.jsonl").stat().st_size < 5200


def test_the_prompts_are_those_of_our_template(tiny_model: Path) -> None:
    from truetune.data.schema import Message
    from truetune.data.template import resolve_template
    from truetune.models.tokenizer import ChatTokenizer

    tokenizer = ChatTokenizer.load(str(tiny_model))
    template = resolve_template("alpaca", tokenizer)
    for given in ("", "five"):
        asked = Message("user", f"Count.\n\n{given}".strip(), "Count.", given)
        prompt = bench.PROMPTS["with_input" if given else "without_input"].format(instruction="Count.", input=given)
        assert template.render(tokenizer, [asked], prompt=True) == prompt


@pytest.mark.parametrize(
    ("flags", "said"),
    [(["--rows", "0"], "at least 1"), (["--data", "nowhere.json"], "no file nowhere.json"),
     (["--peers", "datasets", "--ways", "fast"], "fast: known are datasets, ")],
)  # fmt: skip
def test_a_wrong_flag_is_refused(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        bench.parse(flags)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_a_tiny_run_has_the_names_that_checks_rely_on(
    tiny_model: Path, alpaca: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = bench.main(
        ["--rows", "40", "--rounds", "1", "--big-gb", "0.00001", "--tokenizer", str(tiny_model), "--length", "300",
         "--data", str(alpaca), "--work", str(tmp_path / "work"), "--json"]
    )  # fmt: skip
    (line,) = capsys.readouterr().out.splitlines()
    facts = json.loads(line)
    assert code == 0
    assert facts["rows"] == 40
    assert facts["rows_s"].keys() == {"truetune"}
    assert {"second_start_s", "fill", "big_peak_mb", "big_worker_peak_mb", "big_gb", "tokens"} <= facts.keys()
    assert 0.5 < facts["fill"] <= 1


def test_figures_are_medians_and_ratios_of_the_runs() -> None:
    ours = [
        {"rows": 100, "tokens": 5000, "seconds": seconds, "cpu_s": 3.0, "fill": 0.99} for seconds in (1.0, 9.0, 2.0)
    ]
    options = argparse.Namespace(rows=100, tokenizer=Path("gpt2"))
    found = {"truetune": ours, "datasets": [{"seconds": 5.0, "cpu_s": 4.0}]}
    facts = bench.facts_of(
        found, [{"prepare_s": seconds, "cached": seconds < 0.3} for seconds in (0.5, 0.1, 0.2)], options
    )
    assert not facts["second_from_cache"]
    assert facts["cpu_s"] == {"truetune": 3.0, "datasets": 4.0}
    assert facts["rows_s"] == {"truetune": 50.0, "datasets": 20.0}
    assert (facts["speedup_vs_datasets"], facts["second_start_s"], facts["fill"]) == (2.5, 0.2, 0.99)


def test_the_peer_is_pinned_and_has_its_script() -> None:
    assert environments.pins("datasets").keys() == {"torch", "transformers", "datasets"}
    assert (environments.PEERS / "datasets_tokenise.py").is_file()
