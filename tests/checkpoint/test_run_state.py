"""Checkpoints: what is kept, what is found, what is filled back."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import nn

from truetune.checkpoint.run_state import (
    Progress,
    drop_newer,
    newest,
    read_progress,
    restore,
    save,
)
from truetune.errors import CheckpointError
from truetune.optim.adamw import adamw


def trained(steps: int = 3) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = adamw(dict(model.named_parameters()), lr=0.1, weight_decay=0.1)
    advance(model, optimizer, steps)
    return model, optimizer


def advance(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        model(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def saved(out: Path, *steps: int, best: dict[int, int] | None = None, keep: int = 2) -> list[str]:
    model, optimizer = trained()
    for step in steps:
        save(out, model, optimizer, Progress(step=step, best_step=(best or {}).get(step)), base=None, keep=keep)
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def test_model_and_optimizer_come_back_to_the_bit(tmp_path: Path) -> None:
    model, optimizer = trained()
    path = save(tmp_path, model, optimizer, Progress(step=3), base=None, keep=2)
    advance(model, optimizer, 2)
    other, its_optimizer = trained(0)
    restore(path, other, its_optimizer)
    advance(other, its_optimizer, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_the_counters_come_back(tmp_path: Path) -> None:
    model, optimizer = trained()
    progress = Progress(7, 100, 40, 5, 1.25, 3.0, {"data": "abc", "packing": True})
    path = save(tmp_path, model, optimizer, progress, base=None, keep=2)
    assert asdict(read_progress(path)) == asdict(progress)


def test_only_safetensors_and_json_are_written(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    assert {p.suffix for p in tmp_path.rglob("*") if p.is_file()} == {".safetensors", ".json"}


def test_the_newest_few_stay(tmp_path: Path) -> None:
    assert saved(tmp_path, 1, 2, 3, 4) == ["step-000003", "step-000004"]


def test_the_best_stays_as_well(tmp_path: Path) -> None:
    assert saved(tmp_path, 1, 2, 3, 4, 5, best=dict.fromkeys((2, 3, 4, 5), 2)) == [
        "step-000002", "step-000004", "step-000005"]  # fmt: skip


def test_the_best_of_the_one_before_stays_until_it_goes(tmp_path: Path) -> None:
    """Were the newest damaged, the run would go on from the one before, and need that one's best."""
    best = {1: 1, 2: 1, 3: 1, 4: 4}
    assert saved(tmp_path, 1, 2, 3, 4, best=best) == ["step-000001", "step-000003", "step-000004"]
    assert saved(tmp_path, 5, best={5: 4}) == ["step-000004", "step-000005"]


def test_a_newer_checkpoint_does_not_push_out_the_one_just_saved(tmp_path: Path) -> None:
    saved(tmp_path, 8, 9)
    assert "step-000003" in saved(tmp_path, 3, keep=1)


def test_numbers_beyond_a_million_are_newer(tmp_path: Path) -> None:
    saved(tmp_path, 999_999, 1_000_000)
    assert newest(tmp_path)[0] == tmp_path / "checkpoints" / "step-1000000"


def test_what_is_no_checkpoint_is_neither_found_nor_removed(tmp_path: Path) -> None:
    for name in ("step-best", "step-000002 (copy)", "notes"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert len(saved(tmp_path, 1, 2, 3, keep=1)) == 4
    assert newest(tmp_path) == (tmp_path / "checkpoints" / "step-000003", [])


def test_leftovers_of_a_killed_save_go(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / ".step-000001.tmp-99").mkdir(parents=True)
    assert saved(tmp_path, 2) == ["step-000002"]


def test_later_checkpoints_can_be_dropped(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 3, keep=5)
    assert drop_newer(tmp_path, 1) == ["step-000002", "step-000003"]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]


def test_no_checkpoints_is_none(tmp_path: Path) -> None:
    assert newest(tmp_path) == (None, [])


@pytest.mark.parametrize("text", ["", "[]", '{"stepp": 1}'])
def test_counters_that_can_t_be_read_are_an_error_of_ours(text: str, tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"state\.json can't be read"):
        read_progress(tmp_path)


def test_another_model_s_checkpoint_is_refused(tmp_path: Path) -> None:
    model, optimizer = trained()
    path = save(tmp_path, model, optimizer, Progress(step=1), base=None, keep=1)
    with pytest.raises(CheckpointError, match="other tensors than this model trains"):
        restore(path, nn.Linear(4, 3, bias=False))


def test_state_is_readable_json(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    assert json.loads((tmp_path / "checkpoints" / "step-000001" / "state.json").read_text())["step"] == 1
