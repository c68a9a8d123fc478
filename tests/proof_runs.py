"""A tiny run, the model merged from it, and the verdict of ``verify`` on what a test made of that model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

import truetune
from training_runs import run_sft, write_rows
from truetune.config.resolve import resolve
from truetune.config.verify import VerifyConfig
from truetune.recipes import verify

Tensors = dict[str, Tensor]


def trained(base: Path, folder: Path, **flags: Any) -> Path:
    """A run in ``folder/run`` that learned enough to be told from its base; the merged model is ``folder/merged``."""
    rows = write_rows(folder / "rows.jsonl")
    settings: dict[str, Any] = {"val_split": 0.3, "epochs": 3, "lr": 3e-2, "alpha": 8}
    run_sft(base, rows, folder / "run", **(settings | flags))
    truetune.merge(str(base), str(folder / "run" / "adapter"), str(folder / "merged"))
    return folder / "run"


def facts(run: Path, *artefacts: Path, **settings: Any) -> dict[str, Any]:
    """What ``truetune verify`` finds; four prompts of each kind, answers of eight tokens."""
    flags = {"run": str(run), "artefacts": tuple(map(str, artefacts)), "prompts": 4, "max_new_tokens": 8}
    return verify.run(resolve(VerifyConfig, file=None, flags=flags | settings))


def row_of(found: dict[str, Any], artefact: Path, loader: str = "truetune") -> dict[str, Any]:
    """The line of the table that is about an artefact."""
    (row,) = [r for r in found["artefacts"] if (r["name"], r["loader"]) == (str(artefact), loader)]
    return row


def verdict(run: Path, artefact: Path, **settings: Any) -> tuple[str, str]:
    """The verdict on one artefact and its reasons; the adapter itself must be found the same."""
    found = facts(run, artefact, **settings)
    assert row_of(found, run / "adapter")["verdict"] == "faithful"
    row = row_of(found, artefact)
    return row["verdict"], " | ".join(row["reasons"])


def copy_of(model: Path, to: Path) -> Path:
    return Path(shutil.copytree(model, to))


def change_tensors(model: Path, change: Callable[[Tensors], Tensors]) -> Path:
    path = model / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    return model


def change_json(path: Path, **values: Any) -> None:
    """Set keys, or with None remove them."""
    known = json.loads(path.read_text(encoding="utf-8")) | values
    path.write_text(json.dumps({k: v for k, v in known.items() if v is not None}), encoding="utf-8")
