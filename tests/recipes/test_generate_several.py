"""``truetune generate`` with several adapters says what their combination says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from training_runs import run_sft, write_rows
from truetune.cli.main import main
from truetune.config.generate import GenerateConfig
from truetune.recipes.generate import load_speaker
from truetune.train.log import Screen


@pytest.fixture(scope="module")
def adapters(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("runs")
    rows = write_rows(folder / "rows.jsonl")
    for number in (1, 2):
        run_sft(tiny_model, rows, folder / str(number), max_steps=4, lr=0.05, rank=number * 2, seed=number)
    return [str(folder / "1" / "adapter"), str(folder / "2" / "adapter")]


def scores(model: Path, *given: str) -> torch.Tensor:
    settings: dict[str, Any] = {"model": str(model), "prompt": "x", "adapter": given}
    speaker = load_speaker(GenerateConfig(**settings), Screen())
    ids = torch.tensor([speaker.prompt_ids("Count up to 3")])
    with torch.no_grad():
        found: torch.Tensor = speaker.model(input_ids=ids).logits
    return found


def test_a_sum_answers_as_the_adapter_that_merge_writes(
    tiny_model: Path, adapters: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = adapters
    out = tmp_path / "sum"
    assert main(["merge", "--adapter", one, f"{two}=0.5", "--to", "adapter", "--out", str(out)]) == 0
    both = scores(tiny_model, one, f"{two}=0.5")
    assert torch.allclose(both, scores(tiny_model, str(out)), atol=1e-5)
    assert not torch.allclose(both, scores(tiny_model, one), atol=1e-3)
    asked = ["generate", "--model", str(tiny_model), "--prompt", "Count up to 3", "--max-new-tokens", "8"]
    capsys.readouterr()
    answers = []
    for given in ([one, "--adapter", f"{two}=0.5"], [str(out)]):
        assert main([*asked, "--adapter", *given]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != "\n"


def test_a_weight_that_is_no_number_is_part_of_the_folders_name(
    tiny_model: Path, adapters: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["generate", "--model", str(tiny_model), "--prompt", "x"]
    assert main([*asked, "--adapter", f"{adapters[0]}=half"]) == 2
    assert f"there is no folder {adapters[0]}=half" in " ".join(capsys.readouterr().err.split())
    assert main([*asked, "--adapter", adapters[0], f"{adapters[0]}=2"]) == 2
    assert "given twice" in capsys.readouterr().err
