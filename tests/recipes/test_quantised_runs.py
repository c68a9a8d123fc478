"""Training, asking and merging with packed bases: as the commands do it, and to the bit where they go on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from packed import KINDS, packed_layers, quantize
from training_runs import cut_after, differences, log, run_sft, write_rows
from truetune.adapters import files
from truetune.cli.main import main
from truetune.config.quant import QuantRecipe
from truetune.errors import ConfigError, ModelError, QuantizationError
from truetune.export.onto import recipe_of
from truetune.models.load import load_model

FLAGS: dict[str, dict[str, Any]] = {
    kind: {"quant": recipe.kind, "double_quant": recipe.double} for kind, recipe in KINDS.items()
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")


@pytest.fixture(scope="module")
def packed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in NF4. Read only."""
    return quantize(tiny_model, tmp_path_factory.mktemp("packed") / "tiny-nf4", KINDS["nf4"])


@pytest.fixture(scope="module")
def trained(tiny_model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``trained(kind)``: an adapter that was trained beside the packed tiny model."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            out = tmp_path_factory.mktemp("runs") / kind
            run_sft(tiny_model, rows, out, lr=0.05, **FLAGS[kind])
            made[kind] = out / "adapter"
        return made[kind]

    return make


def ask(capsys: pytest.CaptureFixture[str], model: Path, *flags: str) -> tuple[str, str]:
    """``(the answer, what was said beside it)``."""
    capsys.readouterr()
    argv = ["generate", "--model", str(model), "--prompt", "Count up to 3", "--max-new-tokens", "12", "--json"]
    assert main([*argv, *flags]) == 0
    shown = capsys.readouterr()
    return json.loads(shown.out.rstrip("\n").rpartition("\n")[2])["text"], shown.err


# --- training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_learns_beside_packed_weights_and_says_which(
    kind: str, tiny_model: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_sft(tiny_model, rows, tmp_path / "o", lr=0.03, **FLAGS[kind])
    losses = [row["loss"] for row in log(tmp_path / "o")]
    assert sum(losses[-3:]) / 3 < sum(losses[:3]) / 3 - 0.15
    said = capsys.readouterr().err
    assert f"linear layers in {KINDS[kind]}; the head, embeddings and norms as they are" in said
    assert "2 of 2 layers fused" in said
    card = json.loads((tmp_path / "o" / "adapter" / "truetune.json").read_text())
    assert recipe_of(card) == replace(KINDS[kind], experts=True)
    assert recipe_of({"quantisation": None}) is None


@pytest.mark.parametrize(("kind", "packing"), [("nf4", True), ("int8", True), ("nf4", False)])
def test_a_resumed_run_is_the_run_to_the_bit(
    kind: str, packing: bool, tiny_model: Path, rows: Path, tmp_path: Path
) -> None:
    """Beside a held-out evaluation after every step, which must not touch a packed weight."""
    settings = {**FLAGS[kind], "dropout": 0.2, "packing": packing, "val_split": 0.3, "eval_every": 1,
                "save_every": 1, "keep": 100, "epochs": 1}  # fmt: skip
    run_sft(tiny_model, rows, tmp_path / "whole", **settings)
    out = cut_after(tmp_path / "whole", 1, tmp_path / "resumed")
    run_sft(tiny_model, rows, out, resume="auto", **settings)
    assert differences(tmp_path / "whole", out) == []
    assert len(log(out)) > 4
    run_sft(tiny_model, rows, tmp_path / "other", **{**settings, "quant": "fp4"})
    assert "log.jsonl" in differences(tmp_path / "whole", tmp_path / "other")


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_evaluating_in_between_changes_no_step(kind: str, tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    settings = {**FLAGS[kind], "val_split": 0.3}
    run_sft(tiny_model, rows, tmp_path / "often", eval_every=1, **settings)
    run_sft(tiny_model, rows, tmp_path / "once", **settings)
    one, other = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("often", "once"))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_packed_files_train_as_packing_on_the_way_does(
    tiny_model: Path, packed: Path, rows: Path, tmp_path: Path
) -> None:
    run_sft(tiny_model, rows, tmp_path / "way", **FLAGS["nf4"])
    run_sft(packed, rows, tmp_path / "files")
    one, other = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("way", "files"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    stored = recipe_of(files.read(tmp_path / "files" / "adapter").card)
    assert stored == QuantRecipe(kind="nf4", skip=("lm_head",), of_checkpoint=True)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("part", ["norm", "head", "embedding"])
def test_parts_of_the_base_train_in_bf16_beside_packed_layers(
    part: str, kind: str, make_tiny: Callable[..., Path], rows: Path, tmp_path: Path
) -> None:
    base = make_tiny(tmp_path / "base", dtype="bfloat16", tie_word_embeddings=False)
    run_sft(base, rows, tmp_path / "o", dtype="bfloat16", trainable=(part,), **FLAGS[kind])
    losses = [row["loss"] for row in log(tmp_path / "o")]
    assert losses[-1] < losses[0]


def test_a_plan_counts_packed_weights(tiny_model: Path, packed: Path, rows: Path, tmp_path: Path) -> None:
    plans = {kind: run_sft(tiny_model, rows, tmp_path / "o", dry_run=True, **FLAGS[kind]) for kind in ("nf4", "int8")}
    plans["dense"] = run_sft(tiny_model, rows, tmp_path / "o", dry_run=True)
    plans["files"] = run_sft(packed, rows, tmp_path / "o", dry_run=True)
    assert {plan["parameters"] for plan in plans.values()} == {plans["dense"]["parameters"]}
    assert {plan["trainable_parameters"] for plan in plans.values()} == {plans["dense"]["trainable_parameters"]}


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"quant": "nf4", "method": "full"}, ConfigError, r"--quant nf4: packed weights can't be trained"),
        ({"quant": "nf4", "quant_skip": ("up",)}, QuantizationError, r"no layer to pack called 'up'(.|\n)*up_proj"),
        ({"quant": "int8", "double_quant": True}, ConfigError, "--double-quant goes with"),
        ({"quant": "nf5"}, ConfigError, "nf5"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused_before_training(
    settings: dict[str, Any], error: type[Exception], message: str, tiny_model: Path, rows: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        run_sft(tiny_model, rows, tmp_path / "o", **settings)
    assert not (tmp_path / "o" / "log.jsonl").exists()


@pytest.mark.parametrize("dry_run", [True, False])
def test_packed_files_are_neither_packed_again_nor_trained_in_full(
    dry_run: bool, packed: Path, rows: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"--quant int8: .*quantised already \(nf4\)"):
        run_sft(packed, rows, tmp_path / "o", quant="int8", dry_run=dry_run)
    with pytest.raises(ModelError, match=r"are quantised \(nf4\), and this needs dense ones"):
        run_sft(packed, rows, tmp_path / "o", method="full", dry_run=dry_run)


# --- asking -------------------------------------------------------------------------------------------------------


def test_a_packed_base_answers_the_same_from_memory_and_from_files(
    tiny_model: Path, packed: Path, trained: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = ("--adapter", str(trained("nf4")))
    one, said = ask(capsys, tiny_model, "--quant", "nf4", *adapter)
    other, _ = ask(capsys, packed, *adapter, "--allow-other-base")
    assert one == other != ask(capsys, tiny_model, "--quant", "nf4")[0]
    assert "was trained on" not in said


@pytest.mark.parametrize(
    ("kind", "flags", "remark"),
    [
        ("nf4", (), "trained on nf4 weights, and these are dense: --quant nf4 packs them as then"),
        ("nf4-double", (), "these are dense: --quant nf4 --double-quant packs"),
        ("nf4", ("--quant", "int8"), "trained on nf4 weights, and these are int8"),
        ("nf4-double", ("--quant", "nf4"), "trained on nf4, double quantised weights, and these are nf4"),
        ("int8", ("--quant", "int8"), None),
        ("nf4-double", ("--quant", "nf4", "--double-quant"), None),
    ],
)
def test_an_adapter_beside_other_weights_than_its_own_is_remarked_on(
    kind: str,
    flags: tuple[str, ...],
    remark: str | None,
    tiny_model: Path,
    trained: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, said = ask(capsys, tiny_model, "--adapter", str(trained(kind)), *flags)
    assert ("the adapter was trained on" in said) == (remark is not None)
    assert remark is None or remark in " ".join(said.split())


def test_an_adapter_of_dense_weights_on_packed_ones_is_remarked_on(
    tiny_model: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_sft(tiny_model, rows, tmp_path / "o")
    _, said = ask(capsys, tiny_model, "--adapter", str(tmp_path / "o" / "adapter"), "--quant", "fp4")
    assert "trained on dense weights, and these are fp4" in " ".join(said.split())


# --- writing ------------------------------------------------------------------------------------------------------


def test_the_command_quantises(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    argv = [
        "quantize",
        str(tiny_model),
        str(out),
        "--quant",
        "nf4",
        "--double-quant",
        "--quant-skip",
        "o_proj,layers.0",
    ]
    assert main([*argv, "--json"]) == 0
    shown = capsys.readouterr()
    result = json.loads(shown.out.rstrip("\n").rpartition("\n")[2])
    assert (result["packed"], result["out"]) == (6, str(out))
    assert result["bytes"] == sum(path.stat().st_size for path in out.glob("*.safetensors")) - _headers(out)
    assert f"{result['relative_error']:.1%} of their norm" in shown.err
    assert (out / "tokenizer.json").is_file()
    assert len(packed_layers(load_model(str(out), dtype=torch.float32))) == 6
    assert main(argv) == 2
    assert "already holds a model" in capsys.readouterr().err


def _headers(folder: Path) -> int:
    return sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_command_merges_onto_either_and_measures_it(
    kind: str,
    tiny_model: Path,
    trained: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tuned, _ = ask(capsys, tiny_model, "--quant", KINDS[kind].kind, "--adapter", str(trained(kind)))
    found = {}
    for onto in ("original", "dequantized"):
        out = tmp_path / onto
        argv = ["merge", "--model", str(tiny_model), "--adapter", str(trained(kind)), "--out", str(out)]
        assert main([*argv, "--onto", onto, "--quant", "nf4", "--json"]) == 0
        shown = capsys.readouterr()
        found[onto] = json.loads(shown.out.rstrip("\n").rpartition("\n")[2])
        said = " ".join(shown.err.split())
        assert f"merged onto the {onto} weights" in said
        assert f"{found[onto]['drift']:.2%} of the model as it was trained" in said
        assert f"{found[onto]['drift_packed']:.2%} of the model as it was trained" in said
        assert len(packed_layers(load_model(str(out), dtype=torch.float32))) == 14
    assert found["dequantized"]["drift"] < 1e-6 < 1e-4 < found["original"]["drift"] < 0.2
    assert main([*argv[:-1], str(tmp_path / "dense")]) == 0
    merged, _ = ask(capsys, tmp_path / "dense")
    assert kind == "int8" or merged == tuned  # int8 rounds inputs as well, and may choose another token
