"""VeRA: one pair for all layers, drawn as PEFT draws it, and vectors that scale it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from families import FAMILIES, distance, logits, perturb
from method_checks import CLOSE, EACH, base, check, merged
from peft_peer import read_by_peft, saved_by_peft, theirs, trained_by, unwarned
from truetune.adapters import files
from truetune.adapters.inject import adapters, attach
from truetune.adapters.vera import SharedPair, VeRALinear
from truetune.config.lora import VeRA
from truetune.errors import AdapterError
from truetune.ops.rng import keyed

SMALL = VeRA(rank=8)
PAIR = ("base_model.vera_A", "base_model.vera_B")


@pytest.mark.parametrize(("name", "form"), EACH)
def test_it_learns_is_read_back_and_merges(name: str, form: str, tmp_path: Path) -> None:
    check(name, form, VeRA(rank=32), tmp_path, lr=5e-2)


# --- the layer ----------------------------------------------------------------------------------------------------


def layer(**settings: Any) -> VeRALinear:
    """On a layer that is smaller than the pair, and away from where it starts."""
    made = VeRALinear(nn.Linear(6, 4), SharedPair(5, 9, 7, seed=3, saved=True), **settings)
    nn.init.normal_(made.lambda_b)
    nn.init.normal_(made.lambda_d)
    return made


def test_the_layer_computes_its_formula() -> None:
    vera, x = layer(), torch.randn(2, 3, 6)
    a, b = vera.pair.a[:, :6], vera.pair.b[:4]
    delta = torch.diag(vera.lambda_b) @ b @ torch.diag(vera.lambda_d) @ a
    torch.testing.assert_close(vera(x), x @ (vera.base.weight + delta).T + vera.base.bias)


def test_untrained_it_changes_no_bit() -> None:
    linear, x = nn.Linear(6, 4), torch.randn(3, 6)
    assert torch.equal(VeRALinear(linear, SharedPair(5, 6, 4, seed=0, saved=True))(x), linear(x))


def test_only_the_vectors_learn_and_the_pair_needs_nothing_of_the_input() -> None:
    vera, kept = layer(), list[torch.Tensor]()
    x = torch.randn(50, 6)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        vera(x).sum().backward()
    assert {name for name, p in vera.named_parameters() if p.grad is not None} == {"lambda_b", "lambda_d"}
    assert not any(t.shape == x.shape for t in kept)


def test_the_pair_is_cast_once_until_it_changes() -> None:
    pair, x = SharedPair(5, 6, 4, seed=0, saved=True), torch.zeros(1, dtype=torch.bfloat16)
    first = pair.like(x)[0]
    assert pair.like(x)[0] is first
    pair.a.fill_(2.0)
    assert float(pair.like(x)[0][0, 0]) == 2.0


def test_dropout_goes_by_the_tokens() -> None:
    vera, x = layer(dropout=0.5), torch.randn(4, 6)
    keys = torch.arange(4)
    with keyed(keys):
        first, second = vera(x), vera(x)
    with keyed(keys[2:]):
        part = vera(x[2:])
    assert torch.equal(first, second)
    torch.testing.assert_close(part, first[2:])
    assert not torch.allclose(first, vera.eval()(x))


def test_the_layers_of_a_model_have_one_pair_also_in_a_copy() -> None:
    model = FAMILIES["llama"].make()
    attach(model, SMALL)
    for one in (model, copy.deepcopy(model)):
        pairs = {id(found.pair) for _, found in adapters(one)}  # type: ignore[union-attr]
        assert len(pairs) == 1
    assert [tuple(t.shape) for t in next(adapters(model))[1].shared_tensors().values()] == [(8, 48), (48, 8)]


# --- files and PEFT -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_crosses_to_peft_and_back(family: str, saved: bool, tmp_path: Path) -> None:
    live = FAMILIES[family].make()
    attach(live, SMALL.model_copy(update={"save_projection": saved, "projection_seed": 7}))
    perturb(live)
    files.save(live, tmp_path / "ours", base=None)
    assert (PAIR[0] in load_file(tmp_path / "ours" / files.WEIGHTS)) == saved
    assert distance(logits(live), logits(read_by_peft(family, tmp_path / "ours"))) <= CLOSE
    assert distance(logits(live), logits(FAMILIES[family].make())) > 0.005
    foreign, read = theirs(family, peft_config(family, saved)), FAMILIES[family].make()
    files.load(read, files.read(saved_by_peft(foreign, tmp_path / "theirs")))
    assert distance(logits(foreign), logits(read)) <= CLOSE
    assert trained_by(read) == trained_by(live) == trained_by(foreign)


def peft_config(family: str, saved: bool) -> peft.VeraConfig:
    with unwarned():
        return peft.VeraConfig(
            r=8, target_modules="all-linear", save_projection=saved, projection_prng_key=5, vera_dropout=0.1,
            fan_in_fan_out=family == "gpt2", task_type="CAUSAL_LM",
        )  # fmt: skip


def test_a_pair_that_was_drawn_elsewhere_is_taken_from_the_file_and_merged(tmp_path: Path) -> None:
    live, again = base("llama"), base("llama")
    attach(live, SMALL)
    perturb(live)
    files.save(live, tmp_path, base=None)
    tensors = load_file(tmp_path / files.WEIGHTS)
    save_file(tensors | {PAIR[0]: tensors[PAIR[0]] * 2}, tmp_path / files.WEIGHTS)
    files.load(again, files.read(tmp_path))
    assert distance(logits(again), logits(live)) > 0.01
    assert distance(logits(merged("llama", "float32", again)), logits(again)) <= CLOSE
    with torch.device("meta"):
        skeleton = FAMILIES["llama"].make()
    files.load(skeleton, files.read(tmp_path))  # as a merge does: no weights but those of the adapter
    assert torch.equal(next(adapters(skeleton))[1].shared_tensors()[PAIR[0]], tensors[PAIR[0]] * 2)


def test_a_file_without_its_pair_does_not_fit(tmp_path: Path) -> None:
    live = FAMILIES["llama"].make()
    attach(live, SMALL)
    files.save(live, tmp_path, base=None)
    tensors = load_file(tmp_path / files.WEIGHTS)
    save_file({key: t for key, t in tensors.items() if key not in PAIR}, tmp_path / files.WEIGHTS)
    with pytest.raises(AdapterError, match=r"missing +base_model\.vera_A \[8, 48\]"):
        files.load(FAMILIES["llama"].make(), files.read(tmp_path))


def test_an_embedding_table_is_refused_by_name() -> None:
    with pytest.raises(AdapterError, match="embed_tokens is of the kind Embedding, and vera"):
        attach(FAMILIES["llama"].make(), VeRA(targets=("embed_tokens", "q_proj")))


def test_the_head_of_a_tied_model_alone_may_have_one(tmp_path: Path) -> None:
    live, again = FAMILIES["llama-tied"].make(), FAMILIES["llama-tied"].make()
    attach(live, VeRA(rank=8, targets=("lm_head", "q_proj")))
    perturb(live)
    files.save(live, tmp_path, base=None)
    files.load(again, files.read(tmp_path))
    assert torch.equal(logits(live), logits(again))
    assert distance(logits(live), logits(read_by_peft("llama-tied", tmp_path))) <= CLOSE
