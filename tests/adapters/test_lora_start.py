"""Where A and B start: nothing is changed at first, and what looks at the base finds its largest directions."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import truetune
from families import FAMILIES, distance, logits
from method_checks import CLOSE, base, learn
from packed import KINDS, save_base
from peft_peer import read_by_peft, theirs, unwarned
from truetune.adapters import files
from truetune.adapters.dora import DoRALinear
from truetune.adapters.inject import attach, settle
from truetune.adapters.lora import LoRALinear
from truetune.adapters.lora_embedding import LoRAEmbedding
from truetune.config.lora import DoRA, LoRA
from truetune.errors import AdapterError, ConfigError
from truetune.models import load
from truetune.ops import lowrank
from truetune.quant.replace import quantised

INITS = ("kaiming", "gaussian", "orthogonal", "zero", "pissa")


def wrapped(init: str, kind: type[LoRALinear] = LoRALinear, *, rank: int = 4, **settings: Any) -> Any:
    torch.manual_seed(0)
    return kind.from_base(nn.Linear(24, 40), init=init, rank=rank, alpha=8, **settings)


def inputs() -> Tensor:
    return torch.randn(3, 24, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear])
@pytest.mark.parametrize("init", INITS)
def test_at_first_the_layer_is_its_base(init: str, kind: type[LoRALinear]) -> None:
    layer = wrapped(init, kind)
    torch.testing.assert_close(layer(inputs()), layer.base(inputs()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("init", INITS)
def test_every_start_learns(init: str) -> None:
    """A and B both zero never would."""
    layer = wrapped(init)
    layer(inputs()).square().sum().backward()
    assert layer.lora_a.grad.any() or layer.lora_b.grad.any()
    assert all(p.grad is None for name, p in layer.named_parameters() if name.startswith(("base", "start")))


def test_the_random_starts_have_the_spread_they_are_known_by() -> None:
    wide = nn.Linear(400, 300)
    kaiming, gaussian, zero = (
        LoRALinear.from_base(wide, init=init, rank=16, generator=torch.Generator().manual_seed(0))
        for init in ("kaiming", "gaussian", "zero")
    )
    assert kaiming.lora_a.abs().max() <= 1 / math.sqrt(400)  # U(±1/sqrt(in)), as loralib
    assert kaiming.lora_a.std().item() == pytest.approx(1 / math.sqrt(3 * 400), rel=0.03)
    assert gaussian.lora_a.std().item() == pytest.approx(1 / 16, rel=0.03)  # as PEFT
    assert not zero.lora_a.any()
    assert zero.lora_b.std().item() == pytest.approx(1 / math.sqrt(3 * 16), rel=0.03)
    assert not kaiming.lora_b.any()


def test_orthogonal_is_pefts_and_wants_an_even_rank() -> None:
    layer = wrapped("orthogonal")
    assert (layer.lora_b @ layer.lora_a).abs().max() < 1e-6 < layer.lora_a.abs().min()
    with pytest.raises(ConfigError, match="--init orthogonal: found rank 3, expected an even one"):
        wrapped("orthogonal", rank=3)


# --- the best of a rank -------------------------------------------------------------------------------------------


def decaying(out: int, inner: int) -> Tensor:
    """Singular values 1, 0.9, 0.81 and so on, so that the best of a rank is known."""
    draw = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, min(out, inner), generator=draw)).Q for n in (out, inner))
    return u @ torch.diag(0.9 ** torch.arange(min(out, inner))) @ v.T


@pytest.mark.parametrize(("out", "inner"), [(40, 24), (24, 40), (600, 400), (400, 600)])
def test_the_best_product_of_a_rank_leaves_what_no_other_could_take(out: int, inner: int) -> None:
    """The larger two are found by iterating."""
    matrix = decaying(out, inner)
    b, a = lowrank.best(matrix, 8, torch.Generator().manual_seed(0))
    left = 0.9 ** torch.arange(8, min(out, inner))
    assert float((matrix - b @ a).norm()) == pytest.approx(float(left.norm()), rel=1e-3)
    torch.testing.assert_close(b.norm(dim=0), a.norm(dim=1), rtol=1e-3, atol=0)


# --- PiSSA --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_pissa_starts_as_pefts(kind: str) -> None:
    """PEFT rewrites the base; here it stays, and what PEFT takes off it is kept beside."""
    family, target = ("llama", "q_proj") if kind == "linear" else ("gpt2", "c_attn")
    ours = FAMILIES[family].make()
    attach(ours, LoRA(rank=4, alpha=8, init="pissa", targets=(target,)))
    config = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights="pissa", target_modules=[target],
                             fan_in_fan_out=kind == "conv1d", task_type="CAUSAL_LM")  # fmt: skip
    with unwarned():
        foreign = peft.get_peft_model(FAMILIES[family].make(), config)
    found = [m for m in ours.modules() if isinstance(m, LoRALinear)]
    expected = [m for m in foreign.modules() if hasattr(m, "lora_A") and "default" in m.lora_A]
    for one, other in zip(found, expected, strict=True):
        a, b = other.lora_A["default"].weight, other.lora_B["default"].weight
        torch.testing.assert_close(one.lora_b @ one.lora_a, b @ a, rtol=1e-4, atol=1e-5)


def test_pissa_leaves_the_base_as_it_was_and_detaching_gives_it_back() -> None:
    model = FAMILIES["llama"].make()
    before = {name: p.clone() for name, p in model.named_parameters()}
    attach(model, LoRA(rank=4, init="pissa"))
    learn(model, LoRA(rank=4))
    truetune.detach(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("settings", [LoRA(rank=4, init="pissa"), LoRA(rank=4, init="pissa", use_rslora=True),
                                      DoRA(rank=4, init="pissa")], ids=["lora", "rslora", "dora"])  # fmt: skip
def test_a_checkpoint_of_pissa_is_read_back_and_its_result_is_a_plain_lora_to_peft(
    settings: LoRA, tmp_path: Path
) -> None:
    live = FAMILIES["llama"].make()
    attach(live, settings)
    learn(live, settings)
    expected = logits(live)
    files.save(live, tmp_path / "checkpoint", base=None)
    again = FAMILIES["llama"].make()
    files.load(again, files.read(tmp_path / "checkpoint"))
    assert torch.equal(logits(again), expected)
    settle(live)
    assert distance(logits(live), expected) <= CLOSE
    files.save(live, tmp_path / "result", base=None)
    assert files.read(tmp_path / "result").config["r"] == 8
    assert distance(logits(read_by_peft("llama", tmp_path / "result")), expected) <= CLOSE
    plain = FAMILIES["llama"].make()
    files.load(plain, files.read(tmp_path / "result"))
    assert distance(logits(plain), expected) <= CLOSE


def test_peft_refuses_a_checkpoint_of_pissa_rather_than_take_it_for_its_own(tmp_path: Path) -> None:
    live = FAMILIES["llama"].make()
    attach(live, LoRA(rank=4, init="pissa"))
    files.save(live, tmp_path, base=None)
    with pytest.raises(ValueError, match="init_lora_weights should be 'pissa'"):
        read_by_peft("llama", tmp_path)


def test_pissa_of_peft_is_refused_because_it_is_of_a_base_that_peft_rewrote(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, init_lora_weights="pissa", target_modules=["q_proj"], task_type="CAUSAL_LM")
    theirs("llama", config).save_pretrained(str(tmp_path))
    with pytest.raises(AdapterError, match="init_lora_weights = 'pissa'"):
        truetune.load_adapter(FAMILIES["llama"].make(), str(tmp_path))


def test_pissa_on_a_packed_base_is_of_what_the_codes_stand_for() -> None:
    model = base("llama", "nf4")
    before = logits(model)
    attach(model, LoRA(rank=4, init="pissa"))
    assert distance(logits(model), before) <= CLOSE
    losses = learn(model, LoRA())
    assert losses[-1] < losses[0] - 0.01


# --- LoftQ --------------------------------------------------------------------------------------------------------


def test_loftq_brings_the_packed_base_nearer_to_what_it_was(tmp_path: Path) -> None:
    folder = save_base("llama", tmp_path)
    plain = load.load_model(str(folder), dtype=torch.float32)
    packed = load.load_model(str(folder), dtype=torch.float32, quant=KINDS["nf4"])
    expected, before = logits(plain), logits(packed)
    lost = {
        path: (plain.get_submodule(path).weight - layer.dense()).norm()
        for path, layer in packed.named_modules()
        if hasattr(layer, "dense")
    }
    attach(packed, LoRA(rank=8, init="loftq"))
    for path, norm in lost.items():
        layer: Any = packed.get_submodule(path)
        left = plain.get_submodule(path).weight - layer.merged_weight()
        assert left.norm() < 0.8 * norm
    assert distance(logits(packed), expected) < 0.8 * distance(before, expected)


@pytest.mark.parametrize("family", ["gpt2", "bloom"])
def test_loftq_finds_the_weights_as_each_family_stores_them(family: str, tmp_path: Path) -> None:
    folder = save_base(family, tmp_path)
    packed = load.load_model(str(folder), dtype=torch.float32, quant=KINDS["nf4"])
    expected = logits(load.load_model(str(folder), dtype=torch.float32))
    before = logits(packed)
    attach(packed, LoRA(rank=8, init="loftq"))
    assert distance(logits(packed), expected) < 0.9 * distance(before, expected)


def test_loftq_alone_takes_the_original_by_hand() -> None:
    linear = nn.Linear(64, 40)
    layer = quantised(linear, KINDS["nf4"], "a", dtype=torch.float32)
    layer.weight = linear.weight.detach()
    made = LoRALinear.from_base(layer, init="loftq", rank=8, original=linear.weight.detach())
    assert (made.merged_weight() - linear.weight).norm() < 0.8 * (layer.dense() - linear.weight).norm()


@pytest.mark.parametrize(
    ("packed", "message"), [(False, "here the weight is as it was"), (True, "the base's own weights are needed")]
)
def test_loftq_is_refused_without_what_it_starts_from(packed: bool, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        attach(base("llama", "nf4" if packed else "float32"), LoRA(init="loftq"))


# --- what has no such start ---------------------------------------------------------------------------------------


def test_a_rank_that_the_weight_has_not_is_refused() -> None:
    with pytest.raises(AdapterError, match=r"--init pissa: a weight of 40 x 24 has no 25 singular directions"):
        wrapped("pissa", rank=25)


@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_a_table_has_no_start_from_weights(init: str) -> None:
    with pytest.raises(AdapterError, match=f"--init {init}: for linear layers"):
        LoRAEmbedding.from_base(nn.Embedding(8, 4), init=init)


def test_on_the_meta_device_nothing_is_drawn_and_nothing_decomposed() -> None:
    with torch.device("meta"):
        linear = nn.Linear(4096, 4096)
    layer = LoRALinear.from_base(copy.deepcopy(linear), init="pissa", rank=16)
    assert layer.lora_a.is_meta
    assert layer.start_b.shape == (4096, 16)
