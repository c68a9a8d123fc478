"""An adapter goes with its base, however the two are named and wherever they come from."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import truetune
from truetune.adapters import files
from truetune.cli.main import main
from truetune.errors import AdapterError, ModelError
from truetune.models import load
from truetune.recipes.adapter_base import check_base


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUETUNE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def hub(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Puts the tiny model into a cache of the Hub, as ``org/tiny``; returns the snapshot's folder."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(name: str) -> Path:
        repository = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("c" * 40, encoding="utf-8")
        (repository / "blobs").mkdir()
        return Path(shutil.copytree(tiny_model, repository / "snapshots" / ("c" * 40)))

    return put


def with_adapter(model: str, folder: Path) -> Path:
    live = truetune.load(model)
    truetune.attach(live, truetune.LoRA(rank=2))
    truetune.save_adapter(live, str(folder))
    return folder


def change(model: Path) -> None:
    path = model / "model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})


def test_a_saved_adapter_names_its_base(tiny_model: Path, tmp_path: Path) -> None:
    card = json.loads((with_adapter(str(tiny_model), tmp_path / "a") / "truetune.json").read_text(encoding="utf-8"))
    assert card["base"] == {
        "name": str(tiny_model), "revision": None, "weights_sha256": load.weight_hash(tiny_model),
        "architecture": "LlamaForCausalLM",
    }  # fmt: skip


def test_other_weights_under_the_same_name_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    adapter = with_adapter(str(base), tmp_path / "a")
    change(base)
    with pytest.raises(AdapterError, match="was trained on other weights"):
        truetune.load_adapter(truetune.load(str(base)), str(adapter))
    truetune.load_adapter(truetune.load(str(base)), str(adapter), allow_other_base=True)


def test_a_base_that_is_cut_short_is_no_other_base(tiny_model: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    file = files.read(with_adapter(str(base), tmp_path / "a"))
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cut off"):
        check_base(file, str(base), base)


def test_a_base_of_the_hub_is_known_by_its_weights(hub: Callable[[str], Path], tmp_path: Path) -> None:
    snapshot = hub("org/tiny")
    adapter = with_adapter("org/tiny", tmp_path / "a")
    base = json.loads((adapter / "truetune.json").read_text(encoding="utf-8"))["base"]
    assert (base["name"], base["revision"]) == ("org/tiny", "c" * 40)
    assert base["weights_sha256"] == load.weight_hash(snapshot)
    ask = ["generate", "--model", "org/tiny", "--adapter", str(adapter), "--prompt", "x", "--max-new-tokens", "1"]
    assert main(ask) == 0
    change(snapshot)
    assert main(ask) == 2
    assert main([*ask, "--allow-other-base"]) == 0


def test_training_on_the_hub_writes_the_hash(hub: Callable[[str], Path], alpaca_file: Path, tmp_path: Path) -> None:
    snapshot = hub("org/tiny")
    argv = ["sft", "--model", "org/tiny", "--data", str(alpaca_file), "--out", str(tmp_path / "o"), "--max-steps", "1"]
    assert main(argv) == 0
    card = json.loads((tmp_path / "o" / "adapter" / "truetune.json").read_text(encoding="utf-8"))
    assert card["base"]["weights_sha256"] == load.weight_hash(snapshot)
    assert card["facts"]["base"] == "c" * 40


@pytest.mark.parametrize(
    ("trained_on", "fits"),
    [
        ("org/base", True), ("Org/Base", True), ("/elsewhere/base", True), ("org/another", False), ("../base/", True),
        ("/root/.cache/huggingface/hub/models--org--base/snapshots/abc", True), (r"C:\models\base", True), (None, True),
        ("/elsewhere/another", False),
    ],
)  # fmt: skip
def test_without_a_hash_the_names_are_compared(
    trained_on: str | None, fits: bool, tiny_model: Path, tmp_path: Path
) -> None:
    """An adapter of PEFT's says no more than a name; a folder may be a copy, so its last part has to do."""
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    adapter = with_adapter(str(base), tmp_path / "a")
    (adapter / "truetune.json").unlink()
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    text = json.dumps(config | {"base_model_name_or_path": trained_on})
    (adapter / "adapter_config.json").write_text(text, encoding="utf-8")
    argv = ["merge", "--model", str(base), "--adapter", str(adapter), "--out", str(tmp_path / "out")]
    assert main(argv) == (0 if fits else 2)
    if not fits:
        assert main([*argv, "--allow-other-base"]) == 0


def test_two_models_of_the_hub_need_the_same_owner(hub: Callable[[str], Path], tmp_path: Path) -> None:
    hub("org/tiny")
    hub("other/tiny")
    adapter = with_adapter("org/tiny", tmp_path / "a")
    (adapter / "truetune.json").unlink()
    with pytest.raises(AdapterError, match="another base than other/tiny, by its name"):
        truetune.load_adapter(truetune.load("other/tiny"), str(adapter))


# --- quantised bases -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["sft", "generate", "merge"])
def test_a_quantised_base_is_refused_by_name(
    command: str, tiny_model: Path, alpaca_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    adapter = with_adapter(str(base), tmp_path / "a")
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    settings = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (base / "config.json").write_text(json.dumps(config | settings), encoding="utf-8")
    flags = {
        "sft": ["--data", str(alpaca_file), "--out", str(tmp_path / "out"), "--dry-run"],
        "generate": ["--prompt", "x"],
        "merge": ["--adapter", str(adapter), "--out", str(tmp_path / "out")],
    }[command]
    assert main([command, "--model", str(base), *flags]) == 2
    text = capsys.readouterr().err
    assert "are quantised (gptq" in text
    assert "pass the unquantised base" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_an_edit_of_packed_numbers_is_refused(dtype: torch.dtype, tiny_model: Path, tmp_path: Path) -> None:
    """A checkpoint may be quantised and not say so."""
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    adapter = with_adapter(str(base), tmp_path / "a")
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors = load_file(base / "model.safetensors")
    save_file(tensors | {name: tensors[name].to(dtype)}, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AdapterError, match=rf"not plain floating-point(.|\n)*{name}"):
        truetune.merge(str(base), str(adapter), str(tmp_path / "out"), allow_other_base=True)
    assert not (tmp_path / "out").exists()


def test_an_empty_quantisation_is_none(tiny_model: Path, tmp_path: Path) -> None:
    config = load.load_config(str(tiny_model))
    load.check_dense("m", config)
    config.quantization_config = {}
    load.check_dense("m", config)
    config.quantization_config = {"bits": 4}
    with pytest.raises(ModelError, match="are quantised"):
        load.check_dense("m", config)
