"""Several adapters by name on one model: each computes what it does alone, sums add up, and the base stays the base."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import truetune as tt
from families import distance, logits, perturb
from method_checks import CLOSE, base
from truetune.adapters import files
from truetune.adapters.bank import bank_of
from truetune.adapters.inject import adapters, attach, settle
from truetune.adapters.lora import LoRALinear
from truetune.adapters.virtual import virtual_ids
from truetune.config.adapter import AdapterConfig
from truetune.errors import AdapterError

EXACT = {
    "lora": tt.LoRA(rank=3, alpha=6, dropout=0.3),
    "narrow": tt.LoRA(rank=2, alpha=8, layers=(1,), exclude=(".*(o_proj|attn.c_proj)",)),
    "rslora": tt.LoRA(rank=4, alpha=4, use_rslora=True),
    "adalora": tt.AdaLoRA(rank=4, target_rank=2),
    "vera": tt.VeRA(rank=8),
    "dora": tt.DoRA(rank=2),
    "ia3": tt.IA3(),
    "prompt": tt.Prompt(virtual_tokens=3),
    "prefix": tt.Prefix(virtual_tokens=2),
    "bottleneck": tt.Bottleneck(reduction=4.0),
    "gated": tt.LlamaAdapter(adapter_length=3, adapter_layers=1),
    "gated by head": tt.LlamaAdapter(adapter_length=4, adapter_layers=2, gates="head"),
    "wider": tt.Bottleneck(reduction=2.0, placement="houlsby", adapter_scale=2.0),
    "stream": tt.Bottleneck(reduction=4.0, adapter_reads="stream"),
    "second": tt.LlamaAdapter(adapter_length=3, adapter_layers=1, llama_adapter_v2=True),
    "parts": tt.LoRA(rank=2, trainable=("norm", "head")),
}
SUMS = ("lora", "narrow", "rslora", "adalora", "vera", "parts")
AMONG_THEMSELVES = ("bottleneck", "gated")
NO_SUM = ("dora", "ia3", "prompt", "prefix", *AMONG_THEMSELVES, "stream", "second")


def write(family: str, form: str, config: AdapterConfig, folder: Path, *, seed: int = 1) -> Tensor:
    """An adapter's folder; returns what the model answers with it alone."""
    model = base(family, form)
    attach(model, config)
    perturb(model, seed=seed)
    settle(model)
    files.save(model, folder, base=None)
    again = base(family, form)
    files.load(again, files.read(folder))
    return answered(again)


def answered(model: nn.Module) -> Tensor:
    """Logits of the rows, behind the virtual tokens where there are some."""
    ids = virtual_ids(model)
    rows = torch.randint(0, 128, (2, 12), generator=torch.Generator().manual_seed(2))
    front = torch.tensor(ids, dtype=torch.int64).expand(2, -1)
    return logits(model, torch.cat([front, rows], dim=1))


def filled(family: str, form: str, names: Any, folder: Path) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """A model with these adapters by name, and what each answers alone."""
    alone = {name: write(family, form, EXACT[name], folder / name, seed=n) for n, name in enumerate(names)}
    model = base(family, form)
    for name in names:
        tt.load_adapter(model, str(folder / name), name=name)
    return model, alone


@pytest.mark.parametrize(
    ("family", "form"), [("llama", "float32"), ("gpt2", "float32"), ("llama", "nf4"), ("llama", "int8")]
)
def test_each_computes_as_it_does_alone_and_the_base_as_it_was(family: str, form: str, tmp_path: Path) -> None:
    names = [name for name in EXACT if form == "float32" or name != "parts"]
    model, alone = filled(family, form, names, tmp_path)
    bare = answered(base(family, form))
    order = [*names, *reversed(names), None, "dora", "prompt", None, "gated", "narrow", None]
    for name in order:
        tt.set_adapter(model, name)
        assert torch.equal(answered(model), bare if name is None else alone[name]), name
    assert not torch.equal(alone["lora"], alone["narrow"])
    assert all(distance(bare, found[:, -bare.shape[1] :]) > 1e-3 for found in alone.values())


def test_switching_copies_no_weight_and_leaves_no_trace(tmp_path: Path) -> None:
    model, _ = filled("llama", "float32", ("lora", "parts", "narrow"), tmp_path)
    tt.set_adapter(model, None)
    bare = dict(base("llama").named_parameters())
    assert {name: p.shape for name, p in model.named_parameters()} == {name: p.shape for name, p in bare.items()}
    assert all(torch.equal(p, bare[name]) for name, p in model.named_parameters())
    tt.set_adapter(model, "lora")
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    for name in ("parts", None, "narrow", "lora"):
        tt.set_adapter(model, name)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before


@pytest.mark.parametrize("form", ["float32", "nf4", "int8"])
@pytest.mark.parametrize(("one", "other"), [p for p in itertools.combinations(SUMS, 2) if "lora" in p or "vera" in p])
def test_a_sum_adds_the_contributions(one: str, other: str, form: str, tmp_path: Path) -> None:
    """Of one layer: W x + w_a Δ_a x + w_b Δ_b x; the layers that just one of the two is on take just that."""
    if form != "float32" and "parts" in (one, other):
        pytest.skip("a packed head can't be trained")
    model, _ = filled("llama", form, (one, other), tmp_path)
    bank = bank_of(model)
    assert bank is not None
    weights = {one: 0.7, other: -0.4}
    paths = bank[one].updates.keys() | bank[other].updates.keys()
    x = {
        path: torch.randn(5, place.base.in_features, generator=torch.Generator().manual_seed(3))
        for path, place in bank.places.items()
    }
    expected = {path: bank.places[path].base(x[path]) for path in paths}
    for name, weight in weights.items():
        for path, update in bank.updates(name).items():
            added = (x[path] @ update.a.T @ update.b.T) * update.scale * weight
            expected[path] = expected[path] + added
    tt.set_adapter(model, [one, other], weights=list(weights.values()))
    live = dict(adapters(model))
    assert live.keys() == paths
    for path in paths:
        assert distance(live[path](x[path]), expected[path]) <= CLOSE
    assert {name: found["weight"] for name, found in tt.list_adapters(model).items()} == weights


def test_a_sum_of_one_thing_twice_is_that_thing_at_double_weight(tmp_path: Path) -> None:
    write("gpt2", "float32", EXACT["lora"], tmp_path / "a")
    model = base("gpt2")
    for name in "ab":
        tt.load_adapter(model, str(tmp_path / "a"), name=name)
    tt.set_adapter(model, ["a", "b"], weights=[0.5, 0.5])
    halves = answered(model)
    tt.set_adapter(model, "a")
    assert distance(halves, answered(model)) <= CLOSE
    tt.set_adapter(model, ["a"], weights=[0.0])
    assert torch.equal(answered(model), answered(base("gpt2")))


def test_parts_trained_in_full_add_up(tmp_path: Path) -> None:
    """θ + Σ w (θ_i - θ)."""
    for number, parts in enumerate((("norm",), ("norm", "head"))):
        write("llama", "float32", tt.LoRA(rank=2, trainable=parts), tmp_path / str(number), seed=number)
    model, plain = base("llama"), dict(base("llama").named_parameters())
    for name in "01":
        tt.load_adapter(model, str(tmp_path / name), name=name)
    owns = []
    for name in "01":
        tt.set_adapter(model, name)
        owns.append({n: p.clone() for n, p in model.named_parameters() if n in ("model.norm.weight", "lm_head.weight")})
    tt.set_adapter(model, ["0", "1"], weights=[0.25, 0.5])
    norm, head = model.model.norm.weight, model.lm_head.weight
    start = plain["model.norm.weight"]
    wanted = start + 0.25 * (owns[0]["model.norm.weight"] - start) + 0.5 * (owns[1]["model.norm.weight"] - start)
    assert torch.allclose(norm, wanted, atol=1e-6)
    half = plain["lm_head.weight"] + 0.5 * (owns[1]["lm_head.weight"] - plain["lm_head.weight"])
    assert torch.allclose(head, half, atol=1e-6)
    assert not torch.allclose(head, plain["lm_head.weight"], atol=1e-3)


@pytest.mark.parametrize("form", ["float32", "nf4"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_bottlenecks_add_up_as_one_that_has_both_inside(family: str, form: str, tmp_path: Path) -> None:
    model, alone = filled(family, form, ("bottleneck", "wider"), tmp_path)
    tt.set_adapter(model, ["bottleneck", "wider"], weights=[0.5, 2.0])
    found = answered(model)
    one = base(family, form)
    attach(one, EXACT["wider"].model_copy(update={"reduction": 4 / 3, "adapter_scale": 1.0}))  # 24 of 32 inside
    held = [files.read(tmp_path / name).tensors for name in ("bottleneck", "wider")]
    for key, parameter in files.state(one).items():
        inside, kind = torch.zeros_like(parameter), key.rpartition("adapter_")[2]
        for tensors, weight, place in ((held[0], 0.5, slice(0, 8)), (held[1], 2.0 * 2.0, slice(8, 24))):
            if key not in tensors:  # the first is not behind the attention
                continue
            if kind.startswith("down"):
                inside[place] = tensors[key]
            elif kind == "up.weight":
                inside[:, place] = tensors[key] * weight
            else:
                inside += tensors[key] * weight
        parameter.data.copy_(inside)
    assert distance(found, answered(one)) <= CLOSE
    assert distance(found, alone["wider"]) > 1e-3
    tt.set_adapter(model, "bottleneck")
    assert torch.equal(answered(model), alone["bottleneck"])


def attended(model: nn.Module) -> Tensor:
    """What the attention of the last layer puts out."""
    kept: list[Tensor] = []
    layer = model.get_submodule("model.layers.1.self_attn")
    handle = layer.register_forward_hook(lambda module, inputs, output: kept.append(output[0].detach().clone()))
    answered(model)
    handle.remove()
    return kept[0]


@pytest.mark.parametrize("form", ["float32", "int8"])
def test_gated_prompts_add_up_at_the_attention(form: str, tmp_path: Path) -> None:
    """In the last layer alone: what it reads is the same with each of them."""
    model, _ = filled("llama", form, ("gated",), tmp_path)
    write("llama", form, EXACT["gated"], tmp_path / "again", seed=7)
    tt.load_adapter(model, str(tmp_path / "again"), name="again")
    outputs = {}
    for names, weights in ((None, None), (["gated"], [1.0]), (["again"], [1.0]), (["gated", "again"], [0.5, -2.0])):
        tt.set_adapter(model, names, weights=weights)
        outputs[" ".join(names or ())] = attended(model)
    plain = outputs[""]
    wanted = plain + 0.5 * (outputs["gated"] - plain) - 2.0 * (outputs["again"] - plain)
    assert distance(outputs["gated again"], wanted) <= CLOSE
    assert distance(outputs["gated again"], plain) > 1e-3


def test_gates_of_two_kinds_and_other_layers_add_up(tmp_path: Path) -> None:
    model, alone = filled("llama", "float32", ("gated", "gated by head"), tmp_path)
    tt.set_adapter(model, ["gated", "gated by head"], weights=[0.0, 1.0])
    assert distance(answered(model), alone["gated by head"]) <= CLOSE
    tt.detach(model, name="gated")
    assert torch.equal(answered(model), alone["gated by head"])
    tt.detach(model)
    assert torch.equal(answered(model), answered(base("llama")))


@pytest.mark.parametrize("name", NO_SUM)
def test_what_has_no_sum_is_refused_with_the_reason_and_nothing_changes(name: str, tmp_path: Path) -> None:
    model, alone = filled("llama", "float32", ("lora", name), tmp_path)
    tt.set_adapter(model, "lora")
    for names, weights in ((["lora", name], None), *([] if name in AMONG_THEMSELVES else [([name], [0.5])])):
        with pytest.raises(AdapterError, match=rf"adapter '{name}'(.|\n)*because"):
            tt.set_adapter(model, names, weights=weights)
    assert torch.equal(answered(model), alone["lora"])
    assert tt.list_adapters(model)["lora"]["weight"] == 1.0


def test_a_tied_table_is_one_matrix_in_a_sum_too(tmp_path: Path) -> None:
    table, layers = tt.LoRA(rank=2, targets=("embed_tokens", "q_proj")), tt.LoRA(rank=3)
    write("llama-tied", "float32", table, tmp_path / "table", seed=4)
    write("llama-tied", "float32", layers, tmp_path / "layers", seed=5)
    model = base("llama-tied")
    for name in ("table", "layers"):
        tt.load_adapter(model, str(tmp_path / name), name=name)
    tt.set_adapter(model, ["table", "layers"])
    tt.save_adapter(model, str(tmp_path / "sum"), base="somewhere/else")
    summed = answered(model)
    tt.set_adapter(model, None)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    again = base("llama-tied")
    files.load(again, files.read(tmp_path / "sum"))
    assert torch.equal(answered(again), summed)
    folded = base("llama-tied")
    for name in ("table", "layers"):
        one = base("llama-tied")
        files.load(one, files.read(tmp_path / name))
        for path, layer in adapters(one):
            if path != "lm_head":
                place = folded.get_submodule(path)
                place.weight.data += layer.merged_weight().detach() - layer.base.weight.detach()
    assert distance(answered(folded), summed) <= CLOSE


def test_names_that_are_wrong_say_which_there_are(tmp_path: Path) -> None:
    model, alone = filled("llama", "float32", ("lora", "narrow"), tmp_path)
    with pytest.raises(AdapterError, match=r"no adapter 'lra'(.|\n)*did you mean\s+lora(.|\n)*lora, narrow"):
        tt.set_adapter(model, "lra")
    with pytest.raises(AdapterError, match="already carries an adapter called 'lora'"):
        tt.load_adapter(model, str(tmp_path / "lora"), name="lora")
    for names, weights in ((["lora", "lora"], None), (["lora"], [1.0, 2.0]), (["lora", "narrow"], [1.0, float("nan")])):
        with pytest.raises(AdapterError, match="each name once, and a finite weight"):
            tt.set_adapter(model, names, weights=weights)
    with pytest.raises(AdapterError, match="no adapter 'x'"):
        tt.detach(model, name="x")
    assert torch.equal(answered(model), alone["narrow"])


def test_an_adapter_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    model, alone = filled("llama", "float32", ("lora", "parts"), tmp_path)
    write("gpt2", "float32", EXACT["lora"], tmp_path / "other")
    write("llama", "float32", EXACT["parts"], tmp_path / "cut")
    torch_file = files.read(tmp_path / "cut")
    with pytest.raises(AdapterError):
        tt.load_adapter(model, str(tmp_path / "other"), name="other")
    held = bank_of(model)
    assert held is not None
    short = dict(list(torch_file.tensors.items())[:-1])
    with pytest.raises(AdapterError, match="missing"):
        held.add("cut", files.AdapterFile(torch_file.folder, torch_file.config, short, {}))
    assert list(tt.list_adapters(model)) == ["lora", "parts"]
    assert torch.equal(answered(model), alone["parts"])
    tt.set_adapter(model, None)
    assert torch.equal(answered(model), answered(base("llama")))


def test_detaching_one_and_then_all_gives_the_model_back(tmp_path: Path) -> None:
    model, alone = filled("llama", "float32", ("lora", "narrow", "parts"), tmp_path)
    tt.set_adapter(model, ["lora", "narrow"])
    tt.detach(model, name="narrow")
    assert {name: found["weight"] for name, found in tt.list_adapters(model).items()} == {"lora": 1.0, "parts": None}
    assert torch.equal(answered(model), alone["lora"])
    tt.detach(model)
    assert tt.list_adapters(model) == {}
    assert tt.trainable(model) == tt.trainable(base("llama"))
    assert torch.equal(answered(model), answered(base("llama")))
    tt.attach(model, tt.LoRA(rank=2))
    assert [*tt.list_adapters(model)] == ["default"]


def test_what_is_being_trained_is_not_mixed_with_names(tmp_path: Path) -> None:
    write("llama", "float32", EXACT["lora"], tmp_path / "a")
    model = base("llama")
    tt.attach(model, tt.LoRA(rank=2))
    with pytest.raises(AdapterError, match=r"already carries an adapter, put there for training(.|\n)*save_adapter"):
        tt.load_adapter(model, str(tmp_path / "a"), name="a")
    assert bank_of(model) is None
    tt.detach(model)
    tt.load_adapter(model, str(tmp_path / "a"), name="a")
    tt.set_adapter(model, None)
    tt.attach(model, tt.LoRA(rank=2))
    with pytest.raises(AdapterError, match="put there for training"):
        tt.set_adapter(model, "a")


def test_dropout_is_off_in_a_model_that_is_not_trained(tmp_path: Path) -> None:
    write("llama", "float32", EXACT["lora"], tmp_path / "a")
    model = base("llama").eval()
    tt.load_adapter(model, str(tmp_path / "a"))
    assert not any(module.training for module in model.modules())
    tt.set_adapter(model, None)
    model.train()
    tt.set_adapter(model, "default")
    assert all(layer.training for _, layer in adapters(model))


def test_the_updates_of_a_name_are_found_once_and_are_the_layers_own(tmp_path: Path) -> None:
    """What a server needs that gives every row of a batch another adapter."""
    model, _ = filled("llama", "float32", ("lora", "narrow"), tmp_path)
    bank = bank_of(model)
    assert bank is not None
    assert bank.updates("lora") is bank.updates("lora")
    for path, update in bank.updates("lora").items():
        layer = bank["lora"].layers[path]
        assert isinstance(layer, LoRALinear)
        assert (update.a, update.b, update.scale, update.kind) == (layer.lora_a, layer.lora_b, layer.scale, "linear")
        assert bank.places[path].base is layer.base
