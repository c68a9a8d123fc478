"""Every file of ../shared/data/broken through the whole command: refused by row and reason, or trained with a word."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from truetune.cli.main import main

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "broken"
pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no sample data at {SHARED}")
Sft = Callable[..., tuple[int, str]]


@pytest.fixture
def sft(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Sft:
    """``(exit code, what was said)`` of a run of one step on a broken file."""

    def run(name: str, *flags: str) -> tuple[int, str]:
        out = tmp_path / "out"
        argv = ["sft", "--model", str(tiny_model), "--data", str(SHARED / f"{name}.jsonl"), "--out", str(out)]
        small = ["--max-steps", "1", "--batch-size", "2", "--rank", "1", "--max-length", "256"]
        code = main([*argv, *small, *flags])
        said = capsys.readouterr().err
        assert "Traceback" not in said
        assert (code == 0) == out.exists()
        return code, said

    return run


REFUSED = {
    "bad_json_line": ["row 7: not valid JSON: unterminated string at column 78", "11 of 12 rows are fine",
                      "--max-bad-rows 1"],
    "empty_output": ["2 of 10 rows", "row 3: `output` is empty", "row 6: `output` holds white space only"],
    "missing_field": ["3 of 10 rows", "row 2: `output` is missing", "row 5: `instruction` is missing",
                      "row 10: `output` is missing; is `Output` meant?"],
    "wrong_type": ["6 of 10 rows", "row 2: `output` is a number", "row 4: `instruction` is a list",
                   "row 6: `output` is null", "row 7: the row is a list", "row 9: the row is text",
                   "row 10: `output` is an object"],
    "mixed_formats": ["6 of 8 rows", "row 2: looks like messages, but row 1 set the format",
                      "row 3: looks like sharegpt",
                      "row 4: looks like prompt-completion", "row 5: looks like text", "row 6: a preference row",
                      "row 8: looks like messages"],
    "unknown_role": ["4 of 6 rows", "row 2: unknown role 'narrator' (message 2)", "row 4: unknown role 'User'",
                     "perhaps 'user'", "row 5:", "sharegpt", "row 6: message 1: `role` is missing"],
    "latin1": ["2 of 5 rows", "row 2: not UTF-8: first invalid byte 0xE9 at file offset 137, byte 57",
               "row 4: not UTF-8", "byte 87", "iconv -f latin1"],
    "empty": ["empty.jsonl: no rows: the file is empty"],
    "only_system": ["3 of 5 rows", "row 2: only a system message", "row 4: 2 system messages and nothing else",
                    "row 5: no assistant message"],
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_faulty_file_is_refused_with_every_row_and_reason(sft: Sft, name: str) -> None:
    code, said = sft(name)
    assert code == 2
    assert f"{name}.jsonl" in said
    for part in REFUSED[name]:
        assert part in said


@pytest.mark.parametrize(
    ("name", "bad", "read"), [("bad_json_line", 1, 12), ("missing_field", 3, 10), ("latin1", 2, 5)]
)
def test_faulty_rows_may_be_left_out_by_their_number(sft: Sft, tmp_path: Path, name: str, bad: int, read: int) -> None:
    code, said = sft(name, "--max-bad-rows", str(bad))
    assert code == 0
    assert f"{read} rows · {read - bad} used" in said
    listed = (tmp_path / "out" / "data" / "rejects.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(listed) == bad
    report = json.loads((tmp_path / "out" / "data" / "report.json").read_text(encoding="utf-8"))
    assert report["read"] == report["used"] + sum(report["rejected"].values()) == read


def test_a_byte_order_mark_and_crlf_are_no_fault(sft: Sft) -> None:
    code, said = sft("bom_crlf")
    assert code == 0
    assert "6 rows · 6 used" in said
    assert "warning" not in said


def test_repeated_rows_are_named_and_kept(sft: Sft) -> None:
    code, said = sft("duplicate_rows")
    assert code == 0
    assert "10 rows · 10 used" in said
    assert "3 rows say what another row says already" in said
    for row, first in ((4, 1), (7, 2), (9, 2)):
        assert f"row {row} repeats row {first}" in said


def test_a_huge_row_is_named_with_its_length_and_left_out(sft: Sft, tmp_path: Path) -> None:
    code, said = sft("huge_row")
    assert code == 0
    assert "3 rows · 2 used · 1 left out: 1 over_length" in said
    assert "over 256 tokens" in said
    assert "huge_row.jsonl, row 2 (20" in said
    (line,) = (tmp_path / "out" / "data" / "rejects.jsonl").read_text(encoding="utf-8").splitlines()
    reject = json.loads(line)
    assert reject["row"] == 2
    assert int(reject["detail"].split(" tokens")[0].replace(",", "")) > 200_000


def test_a_huge_row_is_refused_when_asked_to(sft: Sft) -> None:
    code, said = sft("huge_row", "--on-overlong", "error")
    assert code == 2
    assert "huge_row.jsonl, row 2: 2" in said
    assert "--on-overlong drop" in said
