"""AdaLoRA: the layer, which ranks it keeps, and that PEFT keeps the same ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from families import FAMILIES, distance, logits, perturb, token_rows
from method_checks import CLOSE, EACH, base, check, learn, merged
from peft_peer import read_by_peft, saved_by_peft, theirs, trained_by, unwarned
from truetune.adapters import files
from truetune.adapters.adalora import AdaLoRALinear
from truetune.adapters.inject import adapters, attach, settle
from truetune.adapters.rank_allocation import Phases, RankAllocation
from truetune.checkpoint import run_state
from truetune.config.lora import AdaLoRA
from truetune.errors import AdapterError, CheckpointError
from truetune.train.hooks import Hooks

SMALL = AdaLoRA(rank=4, target_rank=2, alpha=8)


@pytest.mark.parametrize(("name", "form"), EACH)
def test_it_learns_is_read_back_and_merges(name: str, form: str, tmp_path: Path) -> None:
    check(name, form, AdaLoRA(rank=8, orthogonality=0.0), tmp_path, lr=3e-2)


def layers_of(model: nn.Module) -> dict[str, AdaLoRALinear]:
    return {path: layer for path, layer in adapters(model) if isinstance(layer, AdaLoRALinear)}


def adapted(family: str = "llama", config: AdaLoRA = SMALL, *, lose: bool = False) -> Any:
    """A model with adapters away from where they start; with ``lose``, layers have lost 0 to 4 of their ranks."""
    model = FAMILIES[family].make()
    attach(model, config)
    perturb(model)
    with torch.no_grad():
        for place, layer in enumerate(layers_of(model).values()):
            layer.lora_e[: place % 5 if lose else 0] = 0.0
    return model


# --- the layer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_node_computes_what_its_formula_does(dropout: float) -> None:
    layer = AdaLoRALinear(nn.Linear(6, 5), rank=3, alpha=2.0, dropout=dropout)
    perturb(layer)
    layer.eval()
    x = torch.randn(2, 4, 6, requires_grad=True)
    delta = layer.lora_b @ (layer.lora_a * layer.lora_e) * 2.0 / (3 + 1e-5)
    expected = x @ (layer.base.weight + delta).T + layer.base.bias
    torch.testing.assert_close(layer(x), expected)
    inputs = (x, layer.lora_a, layer.lora_b, layer.lora_e)
    found = torch.autograd.grad(layer(x).square().sum(), inputs)
    torch.testing.assert_close(found, torch.autograd.grad(expected.square().sum(), inputs))


def test_untrained_it_changes_no_bit() -> None:
    linear, x = nn.Linear(6, 5), torch.randn(3, 6)
    with torch.no_grad():
        assert torch.equal(AdaLoRALinear(linear, rank=3, alpha=2.0)(x), linear(x))


def test_settling_drops_ranks_and_changes_nothing_else() -> None:
    model = adapted(lose=True)
    before = logits(model)
    settle(model)
    assert distance(logits(model), before) <= CLOSE
    assert [len(layer.lora_e) for layer in layers_of(model).values()][:6] == [4, 3, 2, 1, 0, 4]
    assert distance(logits(merged("llama", "float32", model)), before) <= CLOSE


# --- files and PEFT -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lose", [False, True], ids=["whole", "settled"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_crosses_to_peft_and_back(family: str, lose: bool, tmp_path: Path) -> None:
    live, again = adapted(family, lose=lose), FAMILIES[family].make()
    whole = trained_by(live)
    if lose:
        settle(live)
    files.save(live, tmp_path / "ours", base=None)
    assert distance(logits(live), logits(read_by_peft(family, tmp_path / "ours"))) <= CLOSE
    assert distance(logits(live), logits(FAMILIES[family].make())) > 0.01
    files.load(again, files.read(tmp_path / "ours"))
    assert torch.equal(logits(live), logits(again))
    foreign, read = theirs(family, peft_config(family)), FAMILIES[family].make()
    files.load(read, files.read(saved_by_peft(foreign, tmp_path / "theirs")))
    assert distance(logits(foreign), logits(read)) <= CLOSE
    assert trained_by(read) == trained_by(foreign) == whole


def peft_config(family: str = "llama", **settings: Any) -> peft.AdaLoraConfig:
    return peft.AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=8, target_modules="all-linear", total_step=10, lora_dropout=0.1,
        fan_in_fan_out=family == "gpt2", task_type="CAUSAL_LM", **settings,
    )  # fmt: skip


def test_phases_are_read_and_written_as_steps(tmp_path: Path) -> None:
    foreign = theirs("llama", peft_config(tinit=2, tfinal=3, deltaT=2))
    read = FAMILIES["llama"].make()
    files.load(read, files.read(saved_by_peft(foreign, tmp_path / "theirs")))
    files.save(read, tmp_path / "ours", base=None)
    before, after = (json.loads((tmp_path / who / files.CONFIG).read_text()) for who in ("theirs", "ours"))
    for field in ("tinit", "tfinal", "total_step", "deltaT", "init_r", "target_r", "orth_reg_weight", "beta1"):
        assert before[field] == after[field]


# --- ranks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "first", "last"), [(100, 10, 70), (8, 1, 6), (3, 0, 2), (1, 0, 1)])
def test_phases_are_shares_of_a_run(steps: int, first: int, last: int) -> None:
    phases = Phases.of(SMALL, steps)
    assert (phases.first, phases.last) == (first, last)
    assert phases.decides(last)
    assert not phases.decides(last + 1)


def test_the_budget_shrinks_as_pefts() -> None:
    phases = Phases(5, 40, 3)
    peer = object.__new__(peft.tuners.adalora.layer.RankAllocator)
    peer.init_bgt, peer.target_bgt = 120, 40
    peer.peft_config = peft_config_of(phases, steps=50)
    found = [(phases.budget(t, 120, 40), phases.decides(t)) for t in range(1, 40)]
    assert found == [peer.budget_schedule(t) for t in range(1, 40)]
    assert phases.budget(40, 120, 40) == phases.budget(50, 120, 40) == 40


def peft_config_of(phases: Phases, steps: int) -> peft.AdaLoraConfig:
    return peft.AdaLoraConfig(
        target_modules="q_proj", tinit=phases.first, tfinal=steps - phases.last, deltaT=phases.every, total_step=steps
    )


def both(tmp_path: Path, steps: int) -> tuple[RankAllocation, dict[str, AdaLoRALinear], Any]:
    """Ours, and the same adapter in training in PEFT."""
    config = AdaLoRA(
        rank=4, target_rank=2, prune_from=0.1, prune_until=0.8, prune_every=2, targets=("q_proj", "v_proj")
    )
    model = adapted(config=config)
    layers = layers_of(model)
    allocation = RankAllocation(layers, config, steps)
    files.save(model, tmp_path, base=None)
    with unwarned():
        peer = peft.PeftModel.from_pretrained(FAMILIES["llama"].make(), str(tmp_path), is_trainable=True)
    return allocation, layers, peer


def test_the_ranks_that_stay_are_pefts(tmp_path: Path) -> None:
    """Before the last decision, for which the paper measures that very step as well and PEFT does not."""
    allocation, layers, peer = both(tmp_path, steps=20)
    draws, decided = torch.Generator().manual_seed(5), 0
    for step in range(1, allocation.phases.last):
        for path, layer in layers.items():
            twin = peer.base_model.model.get_submodule(path)
            for mine, other in zip(parameters(layer), parameters(twin), strict=True):
                gradient = torch.randn(mine.shape, generator=draws)
                for p in (mine, other):
                    p.grad = gradient.clone()
                    p.data -= 0.1 * gradient
        allocation.after_update(step - 1)
        peer.base_model.update_and_allocate(step)
        for path, layer in layers.items():
            assert torch.equal(layer.lora_e, parameters(peer.base_model.model.get_submodule(path))[2])
        if allocation.phases.decides(step):
            decided += 1
            lost = sum(int((layer.lora_e == 0).sum()) for layer in layers.values())
            assert lost == allocation.start - allocation.phases.budget(step, allocation.start, allocation.target)
    assert decided > 5


def parameters(layer: Any) -> list[Tensor]:
    if isinstance(layer, AdaLoRALinear):
        return [layer.lora_a, layer.lora_b, layer.lora_e]
    return [layer.lora_A["default"], layer.lora_B["default"], layer.lora_E["default"]]


def test_the_penalty_is_what_peft_adds_to_the_loss(tmp_path: Path) -> None:
    allocation, _, peer = both(tmp_path, steps=20)
    ids = token_rows()
    with_penalty = peer(input_ids=ids, labels=ids).loss
    without = peer.base_model.model(input_ids=ids, labels=ids).loss
    assert float(allocation.penalty().detach()) == pytest.approx(float((with_penalty - without).detach()), rel=1e-5)


@pytest.mark.parametrize("budget", [0, 1, 7, 16])
def test_just_as_many_ranks_stay_as_there_is_budget(budget: int, tmp_path: Path) -> None:
    allocation, layers, _ = both(tmp_path, steps=20)
    for layer in layers.values():
        for name, tensor in layer.measured.items():
            tensor.copy_(torch.rand(tensor.shape) if name != "kept" else tensor)
    with torch.no_grad():
        allocation._allocate(budget)
    assert sum(int((layer.lora_e != 0).sum()) for layer in layers.values()) == budget


def test_after_the_last_decision_lost_ranks_stay_lost() -> None:
    model = base("llama")
    attach(model, SMALL)
    layers = layers_of(model)
    config = SMALL.model_copy(update={"prune_until": 0.5, "prune_every": 1})
    allocation = RankAllocation(layers, config, steps=8)
    lost: list[set[tuple[str, int]]] = []

    def after(step: int) -> None:
        allocation.after_update(step)
        zero = {(path, i) for path, layer in layers.items() for i, e in enumerate(layer.lora_e.tolist()) if e == [0.0]}
        lost.append(zero)

    losses = learn(model, SMALL, steps=8, lr=3e-2, hooks=Hooks(penalty=allocation.penalty, after_update=after))
    assert losses[-1] < losses[0] - 0.01
    assert len(lost[3]) == 2 * len(layers)
    assert lost[3] == lost[4] == lost[7]
    assert lost[0] != lost[3]


def test_a_checkpoint_without_what_was_measured_is_refused(tmp_path: Path) -> None:
    model = adapted()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    path = run_state.save(tmp_path, model, optimizer, run_state.Progress(step=3), base=None, keep=1)
    RankAllocation(layers_of(model), SMALL, steps=8)
    with pytest.raises(CheckpointError, match=r"method\.safetensors does not hold what this method keeps"):
        run_state.restore(path, model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (AdaLoRA(rank=4), "--target-rank 8: layers start with --rank 4"),
        (AdaLoRA(prune_from=0.8), "--prune-from 0.8: expected less than --prune-until"),
        (AdaLoRA(targets=("embed_tokens",)), "embed_tokens is of the kind Embedding, and adalora"),
    ],
)
def test_what_can_not_be_is_refused_by_its_flag(settings: AdaLoRA, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        attach(FAMILIES["llama"].make(), settings)
