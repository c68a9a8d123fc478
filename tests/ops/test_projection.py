"""Projections of one input with their low-rank paths, against the composition that they stand for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from projections import DROPPED, GROUPS, SITE, SOURCES, Problem, problem, weights_of, with_gradients
from reference.norms import assert_no_worse_as_a_whole, distance
from truetune.ops.dropout import lanes
from truetune.ops.frozen import FrozenLinear
from truetune.ops.projection import Group, Projection, project

DTYPES = [torch.float32, torch.bfloat16]
both_ways = pytest.mark.parametrize("keep", [False, True], ids=["recomputed", "kept"])
dropped_or_not = pytest.mark.parametrize("dropout", [False, True], ids=["whole", "dropped"])


@both_ways
@dropped_or_not
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("group", "residual"), [("one", True), *((name, False) for name in GROUPS)])
def test_it_is_the_composition_and_its_derivative_in_float64(
    group: str, residual: bool, source: str, dropout: bool, keep: bool
) -> None:
    asked = problem(group, source, dropout=dropout, residual=residual)
    ours, plain = (with_gradients(outputs, asked.leaves) for outputs in (asked.ours(keep=keep), asked.plainly()))
    for found, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


@both_ways
@dropped_or_not
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("group", "residual"), [("one", False), ("one-transposed", True), ("three", False)])
def test_the_gradient_is_that_of_finite_differences(
    group: str, residual: bool, source: str, dropout: bool, keep: bool
) -> None:
    asked = problem(group, source, dropout=dropout, residual=residual, n=2, width=3)

    def call(*leaves: Tensor) -> tuple[Tensor, ...]:
        rest = list(leaves)
        inputs = [rest.pop(0) for _ in asked.inputs]
        beside = rest.pop(0) if residual else None
        projections = [p if p.a is None else replace(p, a=rest.pop(0), b=rest.pop(0)) for p in asked.group.projections]
        given = replace(asked.group, projections=tuple(projections))
        return project(given, *inputs, source=asked.source, residual=beside, keep=keep)

    assert torch.autograd.gradcheck(call, tuple(asked.leaves))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@dropped_or_not
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("group", ["one", "two", "three"])
def test_in_narrow_dtypes_it_is_no_worse_than_torch(
    tier: str, group: str, source: str, dropout: bool, dtype: torch.dtype
) -> None:
    asked = problem(group, source, dropout=dropout, residual=group == "one", n=40, width=48).to(dtype)
    wide = asked.to(torch.float64)
    truth = with_gradients(wide.plainly(), wide.leaves)
    ours, plain = (with_gradients(outputs, asked.leaves) for outputs in (asked.ours(), asked.plainly()))
    for found, expected, exact in zip(ours, plain, truth, strict=True):
        assert_no_worse_as_a_whole(found, expected, exact, dtype)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_recomputed_is_what_would_have_been_kept_to_the_bit(tier: str, source: str, dtype: torch.dtype) -> None:
    asked = problem("three", source, dropout=True, n=20, width=48).to(dtype)
    kept, again = (with_gradients(asked.ours(keep=keep), asked.leaves) for keep in (True, False))
    assert all(map(torch.equal, kept, again))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_call_changes_nothing_of_an_earlier_one(source: str, dtype: torch.dtype) -> None:
    """Tensors of more than 64 KiB lie in memory that is used again."""
    first = problem("three", source, n=300, width=128).to(dtype)
    wide = first.to(torch.float64)
    truth, plain = (with_gradients(p.plainly(), p.leaves) for p in (wide, first))
    pending = first.ours()
    for n in (299, 301):
        other = problem("three", source, n=n, width=128).to(dtype)
        with_gradients(other.ours(), other.leaves)
    found = with_gradients(pending, first.leaves)
    with_gradients(other.ours(), other.leaves)
    for ours, theirs, exact in zip(found, plain, truth, strict=True):
        assert_no_worse_as_a_whole(ours, theirs, exact, dtype)


@both_ways
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_nothing_that_is_given_is_written_to(source: str, dtype: torch.dtype, keep: bool) -> None:
    asked = problem("one", source, dropout=True, residual=True).to(dtype)
    outputs = asked.ours(keep=keep)
    weights = weights_of(outputs)
    frozen = asked.group.projections[0].weight
    assert isinstance(frozen, FrozenLinear)
    given = [*asked.leaves, *weights, frozen.weight]
    before = [t.detach().clone() for t in given]
    torch.autograd.grad(outputs, asked.leaves, weights)
    assert all(map(torch.equal, given, before))


def test_a_projection_that_nothing_reads_adds_nothing_to_the_gradient() -> None:
    asked = problem("three-alike")
    expected = torch.autograd.grad(asked.plainly()[1].sum(), asked.leaves, allow_unused=True)
    found = torch.autograd.grad(asked.ours()[1].sum(), asked.leaves)
    for ours, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, torch.zeros_like(ours) if plain is None else plain, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("source", SOURCES)
def test_no_rows_give_no_rows_and_gradients_of_zeros(tier: str, source: str) -> None:
    asked = problem("three", source, dropout=True, n=0).to(torch.float32)
    found = with_gradients(asked.ours(), asked.leaves)
    assert [y.shape for y in found[:3]] == [(0, 7), (0, 8), (0, 9)]
    assert all(not t.any() for t in found)


@pytest.mark.parametrize("module", [nn.Linear(6, 8), nn.Linear(6, 8, bias=False), Conv1D(8, 6)], ids=repr)
def test_a_module_is_what_it_computes_and_its_parameters_get_no_gradient(module: Any) -> None:
    """Even those that ask for one."""
    group = Group((Projection(FrozenLinear.of(module), getattr(module, "bias", None)),))
    x = torch.randn(3, 6, requires_grad=True)
    (y,) = project(group, x)
    torch.testing.assert_close(y, module(x))
    y.sum().backward()
    assert x.grad is not None
    assert all(p.grad is None for p in module.parameters())


@dataclass
class Counted:
    """A weight that notes which products are asked of it."""

    weight: Tensor  # [out, in]
    calls: list[str] = field(default_factory=list)

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        self.calls.append("forward")
        return F.linear(x, self.weight, bias)

    def matmul_t(self, g: Tensor, into: Tensor | None = None) -> Tensor:
        self.calls.append("backward")
        return g @ self.weight if into is None else into.addmm_(g, self.weight)


def counted(name: str, source: str) -> tuple[Problem, list[Counted]]:
    """A problem whose weights count; the shapes and values are as before."""
    asked = problem(name, source)
    weights = [Counted(p.weight.dense()) for p in asked.group.projections if isinstance(p.weight, FrozenLinear)]
    projections = [replace(p, weight=weight) for p, weight in zip(asked.group.projections, weights, strict=True)]
    return Problem(replace(asked.group, projections=tuple(projections)), asked.source, asked.inputs, None), weights


@both_ways
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", GROUPS)
def test_a_frozen_weight_is_read_once_forwards_and_once_backwards(name: str, source: str, keep: bool) -> None:
    asked, weights = counted(name, source)
    with_gradients(asked.ours(keep=keep), asked.leaves)
    assert [weight.calls for weight in weights] == [["forward", "backward"]] * len(weights)


@both_ways
@pytest.mark.parametrize("source", SOURCES)
def test_an_input_that_needs_no_gradient_costs_none(source: str, keep: bool) -> None:
    same = problem("three", source)
    expected = with_gradients(same.plainly(), same.leaves[len(same.inputs) :])
    asked, weights = counted("three", source)
    for t in asked.inputs:
        t.requires_grad_(False)
    found = with_gradients(asked.ours(keep=keep), asked.leaves[len(asked.inputs) :])
    assert all(weight.calls.count("backward") == 0 for weight in weights)
    for ours, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-12, rtol=1e-12)


def test_without_anything_to_learn_there_is_no_graph() -> None:
    asked = problem("three-frozen", "normed")
    asked.inputs[0].requires_grad_(False)
    assert not any(y.requires_grad for y in asked.ours())


def saved_by(call: Callable[[], Any]) -> list[Tensor]:
    """What a call keeps for its backward."""
    found: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        found.append(t)
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        call()
    return found


@pytest.mark.parametrize("name", ["one", "three", "three-alike"])
@pytest.mark.parametrize("source", ["normed", "offset", "gated"])
def test_what_comes_from_a_source_is_kept_only_when_asked(source: str, name: str) -> None:
    asked = problem(name, source, n=5)
    x, _ = asked.source.forward(*asked.inputs)

    def times_kept(keep: bool) -> int:
        return sum(t.shape == x.shape and torch.equal(t, x) for t in saved_by(lambda: asked.ours(keep=keep)))

    assert (times_kept(False), times_kept(True)) == (0, 1)


@pytest.mark.parametrize("source", SOURCES)
def test_three_projections_keep_their_input_once_and_nothing_of_the_size_of_their_outputs(source: str) -> None:
    asked = problem("three-alike", source, n=50, width=6)
    saved = saved_by(asked.ours)
    for given in asked.inputs:
        assert sum(t.data_ptr() == given.data_ptr() for t in saved) == 1
    ranks, outputs = 3 * 4, 7 + 8 + 9
    low_rank = ranks * 6 + outputs * 4 + 50 * ranks  # stacked A, each s B, h
    assert sum(t.numel() for t in saved) == len(asked.inputs) * 50 * 6 + low_rank


def test_without_low_rank_paths_the_source_s_input_is_all_that_is_kept() -> None:
    asked = problem("three-frozen", "normed")
    assert [t.data_ptr() for t in saved_by(asked.ours)] == [asked.inputs[0].data_ptr()]


@both_ways
@pytest.mark.parametrize("source", SOURCES)
def test_a_recomputing_checkpoint_gives_the_same_bits(source: str, keep: bool) -> None:
    asked = problem("three", source, dropout=True).to(torch.float32)
    direct = with_gradients(asked.ours(keep=keep), asked.leaves)
    outputs = checkpoint(lambda: asked.ours(keep=keep), use_reentrant=False)
    assert all(map(torch.equal, with_gradients(outputs, asked.leaves), direct))


@both_ways
@pytest.mark.parametrize("source", SOURCES)
def test_going_back_twice_gives_the_same_bits(tier: str, source: str, keep: bool) -> None:
    asked = problem("one", source, dropout=True, residual=True).to(torch.float32)
    outputs = asked.ours(keep=keep)
    first, second = (
        torch.autograd.grad(outputs, asked.leaves, weights_of(outputs), retain_graph=True) for _ in range(2)
    )
    assert all(map(torch.equal, first, second))


# --- magnitudes and trained biases --------------------------------------------------------------------------------

WAYS = {"whole": (False, False), "low-rank dropped": (True, False), "all dropped": (True, True)}


def scaled(
    group: str,
    source: str,
    way: str = "whole",
    *,
    residual: bool = False,
    n: int = 4,
    width: int = 6,
    shift: bool = True,
) -> Problem:
    """A problem whose projections, but for the second, have a magnitude; every other one has a trained bias."""
    dropout, drops_base = WAYS[way]
    asked = problem(group, source, dropout=dropout, residual=residual, n=n, width=width)
    draw = torch.Generator().manual_seed(5)
    projections = []
    for i, p in enumerate(asked.group.projections):
        out = p.weight.out_features
        magnitude = None if i == 1 else 1 + 0.3 * torch.randn(out, generator=draw, dtype=torch.float64)
        beside = torch.randn(out, generator=draw, dtype=torch.float64) if shift and i % 2 == 0 else None
        projections.append(replace(p, magnitude=magnitude, shift=beside))
    changed = replace(asked.group, projections=tuple(projections), drops_base=drops_base)
    return Scaled(changed, asked.source, asked.inputs, asked.residual)


class Scaled(Problem):
    """A problem with magnitudes, and their plain composition."""

    def __post_init__(self) -> None:
        learned = [t for p in self.group.projections for t in p.learned]
        self.leaves = [*self.inputs, *([] if self.residual is None else [self.residual]), *learned]
        for leaf in self.leaves:
            leaf.requires_grad_()

    def plainly(self) -> tuple[Tensor, ...]:
        """W x + b + (g - 1) ∘ W z + g ∘ s B A drop(x) + c, with z the dropped input or x itself."""
        x = self._x()
        low = x
        if self.group.keys is not None:
            low = x * (lanes(self.group.keys, SITE, x.shape[1]) >= round(DROPPED * 65536)) / (1 - DROPPED)
        return tuple(self._projected(p, x, low) for p in self.group.projections)

    def _x(self) -> Tensor:
        eye = FrozenLinear(torch.eye(self.inputs[0].shape[1], dtype=self.inputs[0].dtype), transposed=False)
        return Problem(Group((Projection(eye),)), self.source, self.inputs, None).plainly()[0]

    def _projected(self, p: Projection, x: Tensor, low: Tensor) -> Tensor:
        g = torch.ones(()) if p.magnitude is None else p.magnitude
        weight = p.weight.dense()
        y = F.linear(x, weight, p.bias) + ((g - 1) * F.linear(low if self.group.drops_base else x, weight)).to(x.dtype)
        if p.a is not None and p.b is not None:
            y = y + (g * F.linear(F.linear(low, p.a.to(x.dtype)), p.b.to(x.dtype)) * p.scale).to(x.dtype)
        y = y if p.shift is None else y + p.shift.to(x.dtype)
        return y if self.residual is None else y + self.residual


@both_ways
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    ("group", "residual"), [("one", True), ("one", False), ("one-frozen", False), ("three", False)]
)
def test_with_magnitudes_it_is_the_composition_and_its_derivative(
    group: str, residual: bool, source: str, way: str, keep: bool
) -> None:
    asked = scaled(group, source, way, residual=residual)
    ours, plain = (with_gradients(outputs, asked.leaves) for outputs in (asked.ours(keep=keep), asked.plainly()))
    for found, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("group", "residual"), [("one", True), ("one-transposed", False), ("three", False)])
def test_with_magnitudes_the_gradient_is_that_of_finite_differences(group: str, residual: bool, way: str) -> None:
    asked = scaled(group, "normed", way, residual=residual, n=2, width=3)

    def call(*leaves: Tensor) -> tuple[Tensor, ...]:
        rest = list(leaves)
        inputs = [rest.pop(0) for _ in asked.inputs]
        beside = rest.pop(0) if residual else None
        projections = [
            replace(
                p, **{name: rest.pop(0) for name in ("a", "b", "magnitude", "shift") if getattr(p, name) is not None}
            )
            for p in asked.group.projections
        ]
        given = replace(asked.group, projections=tuple(projections))
        return project(given, *inputs, source=asked.source, residual=beside)

    assert torch.autograd.gradcheck(call, tuple(asked.leaves))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_with_magnitudes_it_is_no_worse_than_torch_in_narrow_dtypes(tier: str, way: str, dtype: torch.dtype) -> None:
    """Magnitudes stay in float32, as an adapter has them. Their gradients may have two roundings more: of the output,
    which they are read off, and of its products."""
    wide = scaled("three-alike", "normed", way, n=40, width=48, shift=False)

    def cast(kind: torch.dtype) -> Scaled:
        narrow = wide.to(dtype).to(kind)
        magnitudes = [None if p.magnitude is None else p.magnitude.detach() for p in wide.group.projections]
        keep = torch.promote_types(kind, torch.float32)
        projections = [
            replace(p, magnitude=None if g is None else g.float().to(keep))
            for p, g in zip(narrow.group.projections, magnitudes, strict=True)
        ]
        group = replace(narrow.group, projections=tuple(projections), drops_base=wide.group.drops_base)
        return Scaled(group, narrow.source, narrow.inputs, None)

    asked, exact = cast(dtype), cast(torch.float64)
    truth = with_gradients(exact.plainly(), exact.leaves)
    ours, plain = (with_gradients(outputs, asked.leaves) for outputs in (asked.ours(), asked.plainly()))
    for found, expected, right in zip(ours, plain, truth, strict=True):
        if found.ndim > 1:
            assert_no_worse_as_a_whole(found, expected, right, dtype)
        else:
            assert distance(found, right) <= distance(expected, right) + 3 * torch.finfo(dtype).eps / 5


def test_a_magnitude_of_one_changes_no_bit() -> None:
    asked = problem("one", n=5)
    (p,) = asked.group.projections
    out = p.weight.out_features
    same = replace(asked.group, projections=(replace(p, bias=None, magnitude=torch.ones(out)),))
    bare = replace(asked.group, projections=(replace(p, bias=None),))
    assert torch.equal(project(same, *asked.inputs)[0], project(bare, *asked.inputs)[0])


def test_a_magnitude_of_zero_gives_zeros_and_no_gradient_of_its_own() -> None:
    asked = scaled("one", "plain", shift=False)
    (p,) = asked.group.projections
    magnitude = torch.tensor([0.0] + [1.0] * (p.weight.out_features - 1), dtype=torch.float64, requires_grad=True)
    (y,) = project(Group((replace(p, bias=None, magnitude=magnitude),)), *asked.inputs)
    of_magnitude, of_x = torch.autograd.grad(y.sum(), [magnitude, asked.inputs[0]])
    assert not y[:, 0].any()
    assert of_magnitude[0] == 0
    assert of_magnitude[1:].all()
    assert of_x.isfinite().all()


@pytest.mark.parametrize("group", ["one", "three-alike"])
def test_a_magnitude_keeps_nothing_of_the_size_of_the_output_but_the_output(group: str) -> None:
    """Without biases, which would make what was multiplied differ from what comes out."""
    asked = problem(group, n=50, width=6)
    projections = [
        replace(p, bias=None, magnitude=torch.full((p.weight.out_features,), 1.1)) for p in asked.group.projections
    ]
    given = replace(asked.group, projections=tuple(projections))
    outputs: list[Tensor] = []
    saved = saved_by(lambda: outputs.extend(project(given, *asked.inputs)))
    large = [t.data_ptr() for t in saved if t.shape[0] == 50 and t.shape[1] > 6]
    assert sorted(large) == sorted(y.data_ptr() for y in outputs)


@pytest.mark.parametrize("way", WAYS)
def test_only_a_dropped_base_takes_a_second_product(way: str) -> None:
    asked, (weight,) = counted("one", "plain")
    (p,) = asked.group.projections
    dropout, drops_base = WAYS[way]
    magnitude = torch.full((len(weight.weight),), 1.1, dtype=torch.float64, requires_grad=True)
    keys = torch.arange(4) if dropout else None
    (y,) = project(Group((replace(p, magnitude=magnitude),), 0.4, keys, 7, drops_base), *asked.inputs)
    y.sum().backward()
    times = 2 if drops_base else 1
    assert weight.calls == ["forward"] * times + ["backward"] * times


@pytest.mark.parametrize("way", WAYS)
def test_with_magnitudes_a_recomputing_checkpoint_gives_the_same_bits(way: str) -> None:
    asked = scaled("three", "normed", way)
    direct = with_gradients(asked.ours(), asked.leaves)
    outputs = checkpoint(asked.ours, use_reentrant=False)
    assert all(map(torch.equal, with_gradients(outputs, asked.leaves), direct))
