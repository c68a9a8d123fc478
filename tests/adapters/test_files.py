"""Adapter folders: what is written, and that nothing is ever half read."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import truetune
from families import FAMILIES, logits, perturb
from truetune.adapters import files
from truetune.adapters.inject import adapters, attach, attachment
from truetune.config.lora import LoRA
from truetune.errors import AdapterError

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A trained adapter of a tiny Llama on q_proj and v_proj, 8 tensors."""
    model = FAMILIES["llama"].make()
    truetune.attach(model, LoRA(rank=2, targets=("q_proj", "v_proj")))
    perturb(model)
    truetune.save_adapter(model, str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def change_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(folder / files.WEIGHTS)
    for key, tensor in changes.items():
        tensors.pop(key, None)
        if tensor is not None:
            tensors[key] = tensor
    save_file(tensors, folder / files.WEIGHTS)


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / files.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


SETTINGS = [
    LoRA(rank=2),
    LoRA(rank=2, targets=("all-linear", "embed_tokens")),
    LoRA(rank=2, targets=("lm_head",), trainable=("norm",)),
    LoRA(rank=2, trainable=("embedding", "head")),
]


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma2"])
@pytest.mark.parametrize("settings", SETTINGS, ids=["linear", "table", "head and norms", "full"])
def test_every_trained_parameter_has_one_key_and_every_key_one_parameter(family: str, settings: LoRA) -> None:
    model = FAMILIES[family].make()
    truetune.attach(model, settings)
    keys = files.state(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len({id(p) for p in keys.values()}) == len(keys) == len(trained)
    assert {id(p) for p in keys.values()} == {id(p) for p in trained}


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma2", "phi"])
@pytest.mark.parametrize("settings", SETTINGS, ids=["linear", "table", "head and norms", "full"])
def test_a_saved_adapter_loads_to_the_same_bits(family: str, settings: LoRA, tmp_path: Path) -> None:
    model, again = FAMILIES[family].make(), FAMILIES[family].make()
    truetune.attach(model, settings)
    perturb(model)
    truetune.save_adapter(model, str(tmp_path))
    truetune.load_adapter(again, str(tmp_path))
    assert torch.equal(logits(model), logits(again))
    assert files.state(model).keys() == files.state(again).keys()


def test_an_adapter_loads_onto_a_bf16_base_that_then_runs(tmp_path: Path) -> None:
    """Parts trained in full take the base's dtype: a float32 norm among bf16 layers would stop the forward."""
    model, again = FAMILIES["llama"].make(), FAMILIES["llama"].make().bfloat16()
    truetune.attach(model, LoRA(rank=2, trainable=("norm", "head", "embedding")))
    perturb(model)
    truetune.save_adapter(model, str(tmp_path))
    truetune.load_adapter(again, str(tmp_path))
    assert logits(again).dtype == torch.bfloat16


def test_saving_a_model_without_adapter_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"carries no adapter(.|\n)*truetune\.attach"):
        truetune.save_adapter(FAMILIES["llama"].make(), str(tmp_path))


# --- files that do not fit ----------------------------------------------------------------------------------------


def test_all_missing_extra_and_misshaped_tensors_are_named_at_once(saved: Path) -> None:
    change_tensors(
        saved,
        **{
            f"{Q0}.lora_A.weight": None,
            f"{Q0}.lora_B.weight": torch.zeros(31, 2),
            "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": torch.zeros(2, 32),
        },
    )
    model = FAMILIES["llama"].make()
    before = logits(model)
    with pytest.raises(AdapterError, match="does not fit this model: 3 of 8 tensors") as caught:
        truetune.load_adapter(model, str(saved))
    for line in (
        rf"missing    {Q0}.lora_A.weight [2, 32]",
        r"extra      base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight [2, 32]",
        rf"misshaped  {Q0}.lora_B.weight: found [31, 2], expected [32, 2]",
    ):
        assert line in str(caught.value)
    assert attachment(model) is None
    assert list(adapters(model)) == []
    assert torch.equal(logits(model), before)


def test_a_refused_adapter_leaves_a_tied_model_tied_and_loadable(tmp_path: Path) -> None:
    source = FAMILIES["llama-tied"].make()
    truetune.attach(source, LoRA(rank=2, targets=("q_proj",), trainable=("head",)))
    perturb(source)
    truetune.save_adapter(source, str(tmp_path))
    model = FAMILIES["llama-tied"].make()
    change_config(tmp_path, ensure_weight_tying=False)
    with pytest.raises(AdapterError, match=r"extra +base_model\.model\.model\.embed_tokens"):
        truetune.load_adapter(model, str(tmp_path))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    change_config(tmp_path, ensure_weight_tying=True)
    truetune.load_adapter(model, str(tmp_path))
    assert torch.equal(logits(model), logits(source))


def test_a_tied_head_that_differs_from_its_table_is_refused(tmp_path: Path) -> None:
    model = FAMILIES["llama-tied"].make()
    truetune.attach(model, LoRA(rank=2, targets=("embed_tokens",)))
    perturb(model)
    truetune.save_adapter(model, str(tmp_path))
    change_tensors(tmp_path, **{"base_model.model.lm_head.lora_A.weight": torch.zeros(2, 32)})
    again = FAMILIES["llama-tied"].make()
    with pytest.raises(AdapterError, match=r"lm_head\.lora_A\.weight differs from the embedding table's"):
        truetune.load_adapter(again, str(tmp_path))
    assert attachment(again) is None


def test_an_adapter_beside_another_table_than_the_models_is_refused(tmp_path: Path) -> None:
    """PEFT stores the frozen table beside its adapter: it has to be the one the model has."""
    model = FAMILIES["llama"].make()
    truetune.attach(model, LoRA(rank=2, targets=("embed_tokens",)))
    truetune.save_adapter(model, str(tmp_path))
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    table = FAMILIES["llama"].make().model.embed_tokens.weight.detach()
    change_tensors(tmp_path, **{key: table.clone()})
    truetune.load_adapter(FAMILIES["llama"].make(), str(tmp_path))
    change_tensors(tmp_path, **{key: table + 1})
    with pytest.raises(AdapterError, match=r"extra +.*embed_tokens\.base_layer\.weight"):
        truetune.load_adapter(FAMILIES["llama"].make(), str(tmp_path))


def test_an_adapter_for_other_layers_is_refused(saved: Path) -> None:
    with pytest.raises(AdapterError, match="no layer called 'q_proj, v_proj'"):
        truetune.load_adapter(FAMILIES["gpt2"].make(), str(saved))


# --- files that can't be read -------------------------------------------------------------------------------------


def test_an_unknown_field_is_refused_by_name_unless_it_is_off(saved: Path) -> None:
    change_config(saved, use_nextgen=False, next_config={}, next_rank=None)
    truetune.load_adapter(FAMILIES["llama"].make(), str(saved))
    change_config(saved, use_nextgen=True, next_rank=3)
    with pytest.raises(AdapterError, match=r"fields +next_rank = 3\n +use_nextgen = True"):
        truetune.load_adapter(FAMILIES["llama"].make(), str(saved))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 0}, r"r +found 0"),
        ({"r": "many"}, r"r +found 'many'"),
        ({"lora_alpha": -1, "lora_dropout": 2}, r"lora_alpha +found -1(.|\n)*lora_dropout +found 2"),
        ({"target_modules": None}, "target_modules = None"),
        ({"target_modules": 3}, "target_modules"),
        ({"peft_type": "LOHA"}, "found LOHA, expected one of LORA"),
    ],
)
def test_an_impossible_value_is_refused_by_its_name(saved: Path, changes: dict[str, Any], message: str) -> None:
    change_config(saved, **changes)
    with pytest.raises(AdapterError, match=message):
        truetune.load_adapter(FAMILIES["llama"].make(), str(saved))


def test_fields_that_are_left_out_have_pefts_defaults(saved: Path) -> None:
    path = saved / files.CONFIG
    minimal = {"peft_type": "LORA", "target_modules": ["q_proj"]}
    path.write_text(json.dumps(minimal))
    lora = files.read(saved).settings
    assert (lora.rank, lora.alpha, lora.dropout, lora.use_rslora, lora.trainable) == (8, 8, 0, False, ())


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_a_truncated_file_is_an_error_that_names_it(saved: Path, size: int) -> None:
    path = saved / files.WEIGHTS
    os.truncate(path, size if size >= 0 else path.stat().st_size - 1)
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors can't be read(.|\n)*cut short"):
        truetune.load_adapter(FAMILIES["llama"].make(), str(saved))


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[]", b""])
def test_a_broken_config_is_an_error_that_names_it(saved: Path, content: bytes) -> None:
    (saved / files.CONFIG).write_bytes(content)
    with pytest.raises(AdapterError, match=r"adapter_config\.json"):
        files.read(saved)


def test_a_folder_that_is_no_adapter_points_to_one_nearby(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=rf"is no adapter(.|\n)*pass {saved}"):
        files.read(tmp_path)
    with pytest.raises(AdapterError, match=rf"there is no folder(.|\n)*did you mean +{saved}"):
        files.read(saved.with_name(saved.name + "s"))
    with pytest.raises(AdapterError, match=r"is a file(.|\n)*the folder that holds"):
        files.read(saved / files.CONFIG)
    (saved / files.WEIGHTS).unlink()
    with pytest.raises(AdapterError, match=r"has no adapter_model\.safetensors"):
        files.read(saved)


# --- the older file -----------------------------------------------------------------------------------------------


def test_an_older_pickled_adapter_is_read_when_it_holds_tensors_only(saved: Path) -> None:
    tensors = load_file(saved / files.WEIGHTS)
    (saved / files.WEIGHTS).unlink()
    torch.save(tensors, saved / "adapter_model.bin")
    read = files.read(saved).tensors
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[key], tensors[key]) for key in tensors)


class _Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("trapped",)


@pytest.mark.parametrize("content", [{"a": _Trap()}, ["no", "dict"], {"a": 1}, None])
def test_a_pickle_that_holds_anything_else_is_refused_unopened(
    saved: Path, content: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(saved)
    (saved / files.WEIGHTS).unlink()
    if content is None:
        (saved / "adapter_model.bin").write_bytes(b"cut")
    else:
        torch.save(content, saved / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"adapter_model\.bin"):
        files.read(saved)
    assert not (saved / "trapped").exists()


def test_loading_onto_a_model_that_carries_an_adapter_is_refused(tmp_path: Path) -> None:
    model = FAMILIES["llama"].make()
    attach(model, LoRA(rank=2))
    files.save(model, tmp_path, base=None)
    with pytest.raises(AdapterError, match="already carries an adapter"):
        files.load(model, files.read(tmp_path))


def test_bias_all_on_a_model_without_biases_loads(tmp_path: Path) -> None:
    model = FAMILIES["llama"].make()
    attach(model, LoRA(rank=2))
    files.save(model, tmp_path, base=None)
    config = json.loads((tmp_path / files.CONFIG).read_text(encoding="utf-8")) | {"bias": "all"}
    (tmp_path / files.CONFIG).write_text(json.dumps(config), encoding="utf-8")
    other = FAMILIES["llama"].make()
    files.load(other, files.read(tmp_path))
    assert attachment(other) is not None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_adapter_that_is_not_finite_is_refused_by_the_tensors_name(saved: Path, bad: float) -> None:
    tensors = load_file(saved / files.WEIGHTS)
    name = sorted(tensors)[1]
    tensors[name].view(-1)[3] = bad
    save_file(tensors, saved / files.WEIGHTS)
    with pytest.raises(AdapterError, match=rf"holds NaN or infinity in {re.escape(name)}"):
        files.read(saved)


def test_whole_numbers_are_no_factors(saved: Path) -> None:
    tensors = load_file(saved / files.WEIGHTS)
    name = sorted(tensors)[1]
    save_file(tensors | {name: tensors[name].int()}, saved / files.WEIGHTS)
    with pytest.raises(AdapterError, match=rf"holds int32 in {re.escape(name)}"):
        files.read(saved)
