"""An adapter on top of a frozen one: as if the first were part of the base, in every method and on every base."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from families import FAMILIES, distance, logits, perturb
from method_checks import CLOSE, NAMES, base, check_padding, learn
from packed import dense_twin
from peft_peer import read_by_peft
from truetune.adapters import files, tensors
from truetune.adapters.bank import Bank
from truetune.adapters.beneath import Beneath
from truetune.adapters.inject import adapters, attach, attachment, detach
from truetune.config.adapter import AdapterConfig
from truetune.config.lora import AdaLoRA, DoRA, LoRA, VeRA
from truetune.config.methods import METHODS
from truetune.config.other_methods import IA3, BitFit, Bottleneck, LlamaAdapter, Prefix, Prompt, PTuning
from truetune.errors import AdapterError
from truetune.export.serving import check_servable
from truetune.generate import loaded
from virtual_checks import text_logits

FIRST: dict[str, AdapterConfig] = {
    "lora": LoRA(rank=3, alpha=6, targets=("all-linear",), use_rslora=True),
    "adalora": AdaLoRA(rank=3, target_rank=2),
    "vera": VeRA(rank=8),
}
SECOND: dict[str, AdapterConfig] = {
    "lora": LoRA(rank=2),
    "dora": DoRA(rank=2),
    "adalora": AdaLoRA(rank=3, target_rank=2),
    "vera": VeRA(rank=8),
    "ia3": IA3(),
    "bitfit": BitFit(),
    "prompt": Prompt(virtual_tokens=3),
    "ptuning": PTuning(virtual_tokens=3),
    "prefix": Prefix(virtual_tokens=3),
    "llama-adapter": LlamaAdapter(adapter_layers=1),
    "bottleneck": Bottleneck(reduction=4.0),
}
MERGEABLE = [name for name in SECOND if METHODS[name].mergeable]


def made(folder: Path, family: str, config: AdapterConfig, form: str = "float32") -> files.AdapterFile:
    """A first adapter, moved from where it starts."""
    model = base(family, form)
    attach(model, config, seed=5)
    perturb(model, seed=7)
    files.save(model, folder, base=None)
    return files.read(folder)


def both(family: str, first: files.AdapterFile, config: AdapterConfig, form: str = "float32") -> Any:
    """A model with the second on top, moved too."""
    model = base(family, form)
    files.attach_on(model, first, config=config, seed=1)
    perturb(model, seed=9)
    return model


def merged_first(family: str, folder: Path, form: str = "float32") -> Any:
    """The base with the first in its weights: what the second adapter takes for its base."""
    plain, model = dense_twin(base(family, form)), base(family, form)
    files.load(model, files.read(folder))
    fold(plain, model)
    return plain


def fold(plain: nn.Module, model: nn.Module) -> None:
    held = tensors.to_file(model)
    changes, replaced = tensors.changes(model, held), tensors.replaced_tensors(model, held)
    with torch.no_grad():
        for path, parameter in plain.named_parameters():
            parameter.copy_(replaced.get(path, parameter))
            if path in changes:
                parameter.copy_(changes[path](parameter))


@pytest.mark.parametrize("method", SECOND)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_it_is_an_adapter_of_the_model_that_the_first_makes(family: str, method: str, tmp_path: Path) -> None:
    if method == "bitfit" and family == "llama":
        family = "qwen2"  # which has biases
    first = made(tmp_path / "first", family, FIRST["lora"])
    model, plain = both(family, first, SECOND[method]), merged_first(family, tmp_path / "first")
    files.save(model, tmp_path / "second", base=None)
    attach(plain, SECOND[method], seed=1)
    perturb(plain, seed=9)
    # What starts from the weight (the lengths of DoRA's rows) starts from that of the first.
    assert distance(text_logits(model), text_logits(plain)) <= CLOSE
    again = base(family)
    files.load(again, files.read(tmp_path / "second"))
    assert torch.equal(text_logits(again), text_logits(model))
    if method in MERGEABLE:
        whole = base(family)
        fold(whole, model)
        assert distance(logits(whole), logits(model)) <= CLOSE


@pytest.mark.parametrize("kind", FIRST)
@pytest.mark.parametrize("form", ["float32", "bfloat16", "int8", "nf4"])
def test_it_learns_on_any_base(form: str, kind: str, tmp_path: Path) -> None:
    family = dict(zip(("float32", "bfloat16", "int8", "nf4"), NAMES, strict=True))[form]
    first = made(tmp_path / "first", family, FIRST[kind])
    model = base(family, form)
    files.attach_on(model, first, config=LoRA(rank=2), seed=1)
    one = base(family, form)
    files.load(one, first)
    assert distance(logits(model), logits(one)) <= (CLOSE if form in ("float32", "nf4") else 0.05)
    before = {path: layer.a.clone() for path, layer in adapters(model) if isinstance(layer, Beneath)}
    losses = learn(model, LoRA(rank=2), lr=2e-2)
    assert losses[-1] < losses[0] - 0.01
    assert all(torch.equal(before[path], layer.a) for path, layer in adapters(model) if isinstance(layer, Beneath))
    files.save(model, tmp_path / "second", base=None)
    again = base(family, form)
    files.load(again, files.read(tmp_path / "second"))
    assert torch.equal(logits(again), logits(model))
    check_padding(again, form)
    if form in ("float32", "nf4"):
        plain = dense_twin(base(family, form))
        fold(plain, model)
        assert distance(logits(plain), logits(model)) <= CLOSE
    detach(again)
    assert torch.equal(logits(again), logits(base(family, form)))


@pytest.mark.parametrize("bias", [True, False], ids=["a bias beside B", "none"])
def test_a_third_stands_on_the_second(bias: bool, tmp_path: Path) -> None:
    first = made(tmp_path / "1", "gpt2", LoRA(rank=2, lora_bias=bias))
    model = both("gpt2", first, LoRA(rank=3, targets=("c_attn",)))
    files.save(model, tmp_path / "2", base=None)
    top = both("gpt2", files.read(tmp_path / "2"), LoRA(rank=2, targets=("c_fc", "c_attn")))
    files.save(top, tmp_path / "3", base=None)
    again = base("gpt2")
    files.load(again, files.read(tmp_path / "3"))
    assert torch.equal(logits(again), logits(top))
    whole = base("gpt2")
    fold(whole, top)
    assert distance(logits(whole), logits(top)) <= CLOSE
    kept = files.read(tmp_path / "3").beneath
    assert kept is not None
    assert kept.beneath is not None
    assert kept.beneath.folder == tmp_path / "1"


def test_it_takes_turns_with_others_and_adds_up(tmp_path: Path) -> None:
    first = made(tmp_path / "first", "llama", FIRST["lora"])
    other = made(tmp_path / "other", "llama", LoRA(rank=2, targets=("q_proj",)))
    model = both("llama", first, LoRA(rank=2, targets=("q_proj", "up_proj")))
    files.save(model, tmp_path / "second", base=None)
    live, plain = logits(model), logits(base("llama"))
    detach(model)
    bank = Bank(model)
    bank.add("both", files.read(tmp_path / "second"))
    bank.add("other", other)
    bank.use("both")
    assert torch.equal(logits(model), live)
    bank.use(["both", "other"], [1.0, 0.5])
    whole = base("llama")
    for folder, weight in (("second", 1.0), ("other", 0.5)):
        one, start = base("llama"), dict(base("llama").named_parameters())
        files.load(one, files.read(tmp_path / folder))
        changes = tensors.changes(one, tensors.to_file(one))
        with torch.no_grad():
            for path, change in changes.items():
                whole.get_parameter(path).add_((change(start[path]) - start[path]) * weight)
    assert distance(logits(model), logits(whole)) <= CLOSE
    bank.use(None)
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_it_is_served_by_its_name_and_leaves_nothing_behind(method: str, tmp_path: Path) -> None:
    first = made(tmp_path / "first", "llama", FIRST["lora"])
    model = both("llama", first, SECOND[method])
    files.save(model, tmp_path / "second", base=None)
    live, served = logits(model), base("llama")
    plain = logits(served)
    file = files.read(tmp_path / "second", mapped=False)
    adapter = loaded.fit(served, file, name="second", owner="1", stamp=())
    assert (adapter.terms is not None) == (method == "lora")  # which shares rows with others
    if adapter.terms is None:
        for _ in range(2):
            with adapter.mounted(served):
                assert torch.equal(logits(served), live)
            assert torch.equal(logits(served), plain)


def _without_its_first(folder: Path) -> None:
    shutil.rmtree(folder / files.BENEATH)


def _with_another_first(folder: Path) -> None:
    file = files.read(folder)
    assert file.beneath is not None
    moved = {key: tensor + 1 for key, tensor in file.beneath.tensors.items()}
    files.write(files.AdapterFile(folder, file.beneath.config, moved, {}), folder / files.BENEATH)


def _without_its_card(folder: Path) -> None:
    (folder / files.CARD).unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            _without_its_first,
            r"on top of another adapter, and that is not there(.|\n)*lora of .*first \([0-9a-f]{12}\)",
        ),
        (_with_another_first, r"beneath is not the adapter that .* was trained on top of"),
        (_without_its_card, r"truetune.json does not name it"),
    ],
)
def test_without_its_first_it_is_refused(damage: Callable[[Path], None], said: str, tmp_path: Path) -> None:
    model = both("llama", made(tmp_path / "first", "llama", FIRST["lora"]), LoRA(rank=2))
    files.save(model, tmp_path / "second", base=None)
    damage(tmp_path / "second")
    with pytest.raises(AdapterError) as raised:
        files.read(tmp_path / "second")
    assert re.search(said, str(raised.value))


def test_the_file_names_the_first_and_peft_refuses_it(tmp_path: Path) -> None:
    first = made(tmp_path / "first", "llama", FIRST["lora"])
    files.save(both("llama", first, LoRA(rank=2)), tmp_path / "second", base=None)
    card = json.loads((tmp_path / "second" / files.CARD).read_text())
    assert card["beneath"]["folder"] == str(tmp_path / "first")
    assert card["beneath"]["method"] == "lora"
    with pytest.raises((KeyError, ValueError, TypeError)):
        read_by_peft("llama", tmp_path / "second")
    assert peft.PeftConfig.from_pretrained(str(tmp_path / "first")).r == 3


@pytest.mark.parametrize(
    ("config", "because"),
    [
        (DoRA(rank=2), "what dora makes of some layers"),
        (IA3(), "what ia3 makes"),
        (Prompt(virtual_tokens=2), "what prompt makes"),
        (LoRA(rank=2, trainable=("norm",)), "parts of the base"),
        (LoRA(rank=2, targets=("q_proj", "embed_tokens")), "what lora makes of some layers"),
    ],
)
def test_a_first_that_is_no_update_is_refused_and_nothing_is_left(
    config: AdapterConfig, because: str, tmp_path: Path
) -> None:
    first = made(tmp_path / "first", "llama", config)
    model = base("llama")
    before = logits(model)
    with pytest.raises(AdapterError, match="no adapter that another can be trained on top of") as raised:
        files.attach_on(model, first, config=LoRA(rank=2), seed=0)
    assert because in str(raised.value)
    assert attachment(model) is None
    assert not list(adapters(model))
    if not config.trainable:  # those are filled in place
        assert torch.equal(logits(model), before)


def test_an_adapter_of_another_base_can_not_be_beneath(tmp_path: Path) -> None:
    first = made(tmp_path / "first", "gpt2", LoRA(rank=2))
    model = FAMILIES["llama"].make()
    with pytest.raises(AdapterError):
        files.attach_on(model, first, config=LoRA(rank=2), seed=0)
    assert not list(adapters(model))


def test_a_server_that_takes_one_adapter_is_given_none_of_the_two(tmp_path: Path) -> None:
    first = made(tmp_path / "first", "llama", FIRST["lora"])
    files.save(both("llama", first, LoRA(rank=2)), tmp_path / "second", base=None)
    with pytest.raises(AdapterError, match=r"on top of another adapter(.|\n)*--to adapter makes one of both"):
        check_servable(files.read(tmp_path / "second"), mergeable=True)
    check_servable(first, mergeable=True)
