"""The way from a micro-batch to its loss: the same loss whichever way, and the same masks however it is cut."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from fused_models import FAMILIES, FUSABLE, OTHERS, adapted, by_definition, farthest, made, same_bits, state_of, step
from step_models import LENGTHS, rows
from truetune.data.pack import Batch, collate
from truetune.models.forward import Path, prepared
from truetune.models.layers import decoder_layers
from truetune.models.survey import survey

CLOSE = 1e-5  # in float32 every way is 2e-6 from the truth at most
LONGEST = max(LENGTHS)
WAYS: dict[str, dict[str, Any]] = {
    "packed in pieces": {"micro_tokens": LONGEST},
    "one by one": {"micro_tokens": 1},
    "padded": {"packing": False, "micro_tokens": 10 * LONGEST},
    "padded in pieces": {"packing": False, "micro_tokens": 2 * LONGEST},
    "by the layers' own code": {"fused": False},
    "cheap parts again": {"recompute": "cheap"},
    "everything again": {"recompute": "full"},
    "everything again by the layers' own code": {"recompute": "full", "fused": False},
    "padded, everything again": {"packing": False, "micro_tokens": 2 * LONGEST, "recompute": "full"},
}


def whole_batch(*, packing: bool = True) -> Batch:
    return collate(rows(), range(len(LENGTHS)), packing=packing)


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("name", OTHERS)
def test_families_of_another_build_learn_what_their_own_code_says(name: str, packing: bool) -> None:
    model = adapted(name)
    ways = [step(model, packing=packing, micro_tokens=200, recompute=how) for how in ("none", "full")]
    expected = by_definition(model)
    assert max(farthest(found, expected) for found in ways) < CLOSE


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["llama-bias", "qwen3", "gpt2", "phi3"])
def test_dropout_does_not_depend_on_the_way(name: str, way: str) -> None:
    model = adapted(name, dropout=0.3)
    expected = step(model)
    assert farthest(expected, step(adapted(name))) > 0.01  # something was dropped
    apart = farthest(step(model, **WAYS[way]), expected)
    assert apart < CLOSE


@pytest.mark.parametrize("way", ["packed in pieces", "padded in pieces", "everything again"])
@pytest.mark.parametrize(
    ("trainable", "targets"),
    [(("norm",), "all-linear"), (("bias",), "all-linear"), ((), ("q_proj", "lm_head")), ((), ("lm_head",))],
    ids=str,
)
def test_dropout_beside_trained_parts_and_in_the_head_does_not_depend_on_the_way(
    trainable: Any, targets: Any, way: str
) -> None:
    model = adapted("llama-bias", dropout=0.3, trainable=trainable, targets=targets)
    apart = farthest(step(model, **WAYS[way]), step(model))
    assert apart < CLOSE


def bfloat16() -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize("recompute", ["none", "cheap", "full"])
@pytest.mark.parametrize("part", ["norm", "bias", "embedding", "head"])
def test_wide_trained_parts_learn_beside_a_narrow_base(part: Any, recompute: Any) -> None:
    """As a run in bfloat16 does it: what is trained is float32, and autocast narrows what it is multiplied with."""
    model = adapted("qwen2", dtype=torch.bfloat16, trainable=(part,), dropout=0.0)
    found = step(model, recompute=recompute, autocast=bfloat16)
    padded = step(model, recompute=recompute, autocast=bfloat16, packing=False, micro_tokens=200)
    truth = by_definition(model)
    assert {g.dtype for g in found[1].values()} == {torch.float32}
    for one in (found, padded):
        assert one[0] == pytest.approx(truth[0], rel=2e-3)
        assert farthest(one, truth) < 0.1  # 8 bits through two layers; a part that does not learn is off by 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_done_again_drops_the_same_and_another_drops_other(dtype: torch.dtype) -> None:
    model = adapted("qwen2", dropout=0.3, dtype=dtype)
    third = step(model, number=3)
    torch.manual_seed(99)  # whatever came before
    step(model, number=2)
    assert same_bits(step(model, number=3), third)
    assert abs(step(model, number=4)[0] / third[0] - 1) > 1e-4


def test_each_layer_and_each_group_of_a_layer_has_a_mask_of_its_own() -> None:
    sites = [m.site for m in adapted("llama", layers=3, dropout=0.3).modules() if hasattr(m, "site")]
    assert len(sites) == 3 * 7
    assert len(set(sites)) == 3 * 4  # q, k and v read one input; so do gate and up


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_evaluating_drops_nothing(name: str, packing: bool) -> None:
    dropping, plain = adapted(name, dropout=0.9).eval(), adapted(name).eval()
    losses = []
    for model in (dropping, plain):
        path = Path(model, survey(model), packing)
        with torch.no_grad(), prepared(path):
            losses.append(path.loss(whole_batch(packing=packing)))
    assert torch.equal(*losses)


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_scores_are_those_that_the_loss_is_of(name: str, packing: bool) -> None:
    model, batch = adapted(name).eval(), whole_batch(packing=packing)
    path = Path(model, survey(model), packing)
    with torch.no_grad(), prepared(path):
        parts = list(path.scores(batch))
        loss = path.loss(batch)
    scores, targets = (torch.cat([part[i] for part in parts]) for i in (0, 1))
    assert torch.equal(targets, batch.targets)
    torch.testing.assert_close(F.cross_entropy(scores, targets, reduction="sum"), loss)


@pytest.mark.parametrize("head", ["frozen", "trained", "the model's"])
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_smoothing_is_that_of_torch_and_of_the_loss_alone(packing: bool, head: str) -> None:
    model, batch = (
        adapted("llama", trainable=("head",) if head == "trained" else ()).eval(),
        whole_batch(packing=packing),
    )
    model.__class__ = Warmer if head == "the model's" else type(model)
    path = Path(model, survey(model), packing)
    with torch.no_grad(), prepared(path):
        scores, targets = (torch.cat(parts) for parts in zip(*path.scores(batch), strict=True))
        smoothed, plain = path.loss(batch, smoothing=0.2), path.loss(batch)
    expected = F.cross_entropy(scores, targets, reduction="sum", label_smoothing=0.2)
    torch.testing.assert_close(smoothed, expected)
    assert float(smoothed - plain) != 0.0


def test_scores_come_some_rows_at_a_time() -> None:
    model = made("llama")
    data = collate(rows(), [5] * 20, packing=True)
    path = Path(model, survey(model), packing=True)
    with torch.no_grad(), prepared(path):
        sizes = [len(scores) for scores, _ in path.scores(data)]
    assert data.trained > 256
    assert (max(sizes), sum(sizes)) == (256, data.trained)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_a_batch_without_trained_tokens_has_no_loss(packing: bool, dtype: torch.dtype, fused: bool) -> None:
    model, data = adapted("llama", dtype=dtype, dropout=0.3), rows()
    data.trained[:] = False
    path = Path(model, survey(model), packing)
    with prepared(path, fused=fused):
        loss = path.loss(collate(data, [0, 1], packing=packing))
        loss.backward()
    assert float(loss.detach()) == 0.0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


class Warmer(transformers.LlamaForCausalLM):
    """Makes something of its logits that no config tells."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 0.5
        return out


@pytest.mark.parametrize("way", [{}, {"packing": False, "micro_tokens": 200}, {"recompute": "full"}], ids=str)
def test_logits_that_are_not_the_head_s_alone_come_from_the_model(way: dict[str, Any]) -> None:
    model = adapted("llama")
    model.__class__ = Warmer
    assert survey(model).head is None
    found = step(model, **way)
    assert farthest(found, by_definition(model)) < CLOSE
    assert farthest(found, step(adapted("llama"))) > 0.1


@pytest.mark.parametrize(
    "lora",
    [
        {"trainable": ("head",)},
        {"targets": ("q_proj", "lm_head")},
        {"targets": ("embed_tokens", "q_proj")},
        {"trainable": ("embedding",)},
    ],
    ids=str,
)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("way", [{}, {"micro_tokens": LONGEST}, {"packing": False, "micro_tokens": 200}], ids=str)
def test_a_trained_head_and_its_table_learn_the_same(tied: bool, lora: dict[str, Any], way: dict[str, Any]) -> None:
    model = adapted("llama", tied=tied, **lora)
    found = step(model, **way)
    assert farthest(found, by_definition(model)) < CLOSE


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_model_is_as_it_was_even_after_an_error(name: str, recompute: Any) -> None:
    model = adapted(name)
    before = state_of(model)
    path = Path(model, survey(model), packing=True)
    assert state_of(model) == before
    with contextlib.suppress(IndexError), prepared(path, recompute=recompute):
        assert any("forward" in layer.__dict__ for layer in decoder_layers(model)) or recompute == "none"
        batch = whole_batch()
        batch.input_ids[0, 3] = 10**6  # no such token
        path.loss(batch)
    assert state_of(model) == before


def test_a_forward_that_somebody_gave_a_layer_is_given_back() -> None:
    model = adapted("llama")
    layer = decoder_layers(model)[0]
    own, calls = layer.forward, []

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return own(*args, **kwargs)  # type: ignore[no-any-return]

    layer.forward = watched
    expected = step(adapted("llama"))
    assert farthest(step(model, fused=False, recompute="full"), expected) < CLOSE
    assert calls
    assert layer.__dict__["forward"] is watched


def test_low_precision_rows_are_filled_up_and_the_filling_changes_nothing() -> None:
    """A product's rows come in multiples of 64 then, in the last layer too."""
    model, batch = adapted("llama", dtype=torch.bfloat16).eval(), collate(rows(), (1, 3), packing=True)
    seen: list[int] = []
    core = model.get_decoder()
    hook = core.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    path = Path(model, survey(model), packing=True)
    seen.clear()
    with torch.no_grad(), prepared(path):
        loss = path.loss(batch)
    hook.remove()
    assert seen == [128]
    plain = by_rows(adapted("llama", dtype=torch.bfloat16).eval(), (1, 3))
    assert float(loss) == pytest.approx(plain, rel=5e-3)  # 8 bits through two layers, averaged over 100 tokens


def by_rows(model: nn.Module, examples: tuple[int, ...]) -> float:
    """The sum of the losses, one row at a time through the model's own code."""
    total = 0.0
    for tokens, flags in map(rows().example, examples):
        with torch.no_grad():
            scores = model(input_ids=tokens.long()[None]).logits[0].float()
        losses = F.cross_entropy(scores[:-1], tokens[1:].long(), reduction="none")
        total += float(losses[flags[1:]].sum())
    return total


@pytest.mark.parametrize("name", FUSABLE)
def test_packed_neighbours_do_not_matter(name: str) -> None:
    model = adapted(name).eval()
    path = Path(model, survey(model), packing=True)
    with torch.no_grad(), prepared(path):
        alone = sum(float(path.loss(collate(rows(), [i], packing=True))) for i in range(len(LENGTHS)))
        together = float(path.loss(whole_batch()))
    assert together == pytest.approx(alone, rel=1e-6)
