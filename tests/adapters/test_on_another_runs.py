"""``truetune sft --on-top-of ADAPTER``: a run on top of a frozen adapter, from its flags to the merged model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from training_runs import cut_after, differences, run_sft, write_rows
from truetune.adapters import files
from truetune.config.merge import MergeConfig
from truetune.config.resolve import resolve
from truetune.config.sft import SFTConfig
from truetune.errors import CheckpointError, TruetuneError
from truetune.recipes import merge
from truetune.recipes.verify import prove
from truetune.train.log import Screen


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")


@pytest.fixture(scope="module")
def first(tiny_model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("first") / "run"
    run_sft(tiny_model, data, out, max_steps=4, template="alpaca", system="Be short.", val_data=str(data))
    return out / "adapter"


def test_a_run_starts_where_the_first_ended_and_is_proven(
    tiny_model: Path, data: Path, first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from truetune.config.verify import VerifyConfig

    out = tmp_path / "run"
    found = run_sft(tiny_model, data, out, on_top_of=str(first), val_data=str(data), max_steps=4, dtype="float32")
    ended = files.read(first).card["metrics"]["held_out_loss"]
    assert found["val_loss_before"] == pytest.approx(ended, abs=1e-3)
    assert found["val_loss"] < found["val_loss_before"] - 0.01
    card = files.read(out / "adapter").card
    assert (card["template"]["name"], card["system"]) == ("alpaca", "Be short.")
    assert f"on top of {first}" in " ".join(capsys.readouterr().err.split())
    settings = {"model": str(tiny_model), "adapter": str(out / "adapter"), "out": str(tmp_path / "merged")}
    merge.run(resolve(MergeConfig, file=None, flags=settings))
    asked = resolve(VerifyConfig, file=None, flags={"run": str(out), "artefacts": [str(tmp_path / "merged")]}).config
    assert prove(asked, Screen()).facts["verdict"] == "faithful"
    one = {"adapter": [str(out / "adapter")], "out": str(tmp_path / "one"), "to": "adapter"}
    merge.run(resolve(MergeConfig, file=None, flags=one))
    assert files.read(tmp_path / "one").config["peft_type"] == "LORA"
    assert files.read(tmp_path / "one").settings.rank == 8  # type: ignore[attr-defined]


def test_resuming_such_a_run_is_exact_and_going_on_keeps_the_first(
    tiny_model: Path, data: Path, first: Path, tmp_path: Path
) -> None:
    flags: dict[str, Any] = {"on_top_of": str(first), "save_every": 1, "keep": 9, "dropout": 0.1, "max_steps": 3}
    run_sft(tiny_model, data, tmp_path / "whole", **flags)
    out = cut_after(tmp_path / "whole", 2, tmp_path / "resumed")
    run_sft(tiny_model, data, out, resume="auto", **flags)
    assert differences(tmp_path / "whole", out) == []
    settings = {"model": str(tiny_model), "data": (str(data),), "out": str(tmp_path / "more"), "max_steps": 1}
    from truetune.recipes import sft

    sft.run(resolve(SFTConfig, file=None, flags={**settings, "adapter": str(out / "adapter")}))
    kept, begun = files.read(tmp_path / "more" / "adapter").beneath, files.read(first)
    assert kept is not None
    assert (kept.folder, kept.config) == (first, begun.config)
    moved = {key: tensor + 1 for key, tensor in begun.tensors.items()}
    other = tmp_path / "other"
    files.write(files.AdapterFile(other, begun.config, moved, begun.card), other)
    again = cut_after(tmp_path / "whole", 1, tmp_path / "again")
    (again / "run.yaml").write_text((again / "run.yaml").read_text().replace(str(first), str(other)))
    with pytest.raises(CheckpointError, match="the adapter that stays beneath is not what this run was started on"):
        run_sft(tiny_model, data, again, resume="auto", **flags | {"on_top_of": str(other)})


@pytest.mark.parametrize(
    "flags",
    [{"method": "dora"}, {"method": "vera"}, {"method": "adalora", "target_rank": 2}, {"init": "pissa"},
     {"init": "gaussian"}, {"method": "ia3"}, {"method": "prefix"}, {"method": "bottleneck"}, {"trainable": ["norm"]}],
    ids=lambda flags: " ".join(map(str, flags.values())),
)  # fmt: skip
def test_every_method_is_planned_on_top_without_weights(
    flags: dict[str, Any], tiny_model: Path, data: Path, first: Path, tmp_path: Path
) -> None:
    for quant in ("none", "nf4"):
        found = run_sft(
            tiny_model,
            data,
            tmp_path / "run",
            on_top_of=str(first),
            dry_run=True,
            quant=quant,
            dtype="float32",
            **flags,
        )
        assert found["trainable_parameters"] > 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"adapter": "x"}, "--on-top-of and --adapter"),
        ({"method": "full"}, "--on-top-of: --method full trains the base's own weights"),
        ({"method": "lisa"}, "--on-top-of: --method lisa"),
        ({"method": "freeze"}, "--on-top-of: --method freeze"),
        ({"new_tokens": ["<t>"]}, "--on-top-of and --new-tokens"),
        ({"init": "loftq", "quant": "nf4"}, "--on-top-of and --init loftq"),
    ],
)
def test_what_can_not_be_on_top_is_refused_at_once(flags: dict[str, Any], said: str) -> None:
    with pytest.raises(TruetuneError, match=said):
        resolve(SFTConfig, file=None, flags={"model": "m", "data": ("d",), "out": "o", "on_top_of": "a", **flags})
