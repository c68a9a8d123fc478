"""W + s B A in every tier: against float64, against the reference, and at the edges of tiles and of numbers."""

import pytest
import torch
from torch import Tensor

from truetune.ops import dispatch, lowrank
from truetune.ops.native import cpu
from truetune.ops.native import fold as native
from truetune.ops.native.library import Library

# Whole tiles and what is left of them in both directions, more rows than a task has, and more than a band of A.
LARGE = 3e38
SHAPES = [(1, 1, 1), (7, 33, 3), (6, 64, 16), (49, 130, 8), (13, 2049, 64), (97, 48, 300)]


def made(rows: int, columns: int, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(rows * columns + rank)
    weight, a, b = (torch.randn(*size, generator=draw) for size in ((rows, columns), (rank, columns), (rows, rank)))
    return weight.to(dtype), a, b


def laid_out(library: Library, a: Tensor, b: Tensor, scale: float) -> native.Factors:
    """s B A for the native tier; A as it is stored."""
    rank, columns = a.shape
    return native.factors(
        library, a.data_ptr(), b.data_ptr(), rank=rank, columns=columns, scale=scale, dtype=name_of(a.dtype)
    )


def fold_in_place(library: Library, weight: Tensor, factors: native.Factors) -> bool:
    """In place; whether all of it is finite."""
    return native.fold(library, weight.data_ptr(), len(weight), factors, dtype=name_of(weight.dtype))


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_sum_is_right_to_one_rounding(tier: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    weight, a, b = made(*shape, dtype)
    product = b.double() @ a.double()
    exact = weight.double() + 0.37 * product
    step = torch.finfo(dtype).eps * exact.abs() / 2  # half the distance to the next number, or less
    sizes = b.double().abs() @ a.double().abs() + weight.double().abs()
    sums = (shape[2] + 2) * torch.finfo(torch.float32).eps * sizes
    folded = lowrank.fold(weight, a, b, 0.37)
    assert folded.dtype == dtype
    assert ((folded.double() - exact).abs() <= step + sums).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_update_of_zero_keeps_every_bit_of_the_weight(tier: str, dtype: torch.dtype) -> None:
    """The smallest numbers too, which an instruction of newer CPUs would take for 0."""
    small = torch.finfo(dtype).smallest_normal
    values = torch.tensor([0.0, small, small / 4, -small / 8, 1.0, -3.5, torch.finfo(dtype).max, float("inf")])
    weight = values.to(dtype).repeat(5, 9)
    folded = lowrank.fold(weight, torch.ones(4, 72), torch.zeros(5, 4), 2.0)
    assert torch.equal(folded.view(torch.uint8), weight.view(torch.uint8))


def test_ties_round_to_even_and_what_is_too_large_to_infinity(tier: str) -> None:
    weight = torch.tensor([[1.0, 1.0078125, torch.finfo(torch.bfloat16).max, float("nan")]]).bfloat16()
    half = torch.tensor([[2.0**-8, 2.0**-8, 2.0**120, 1.0]])  # half a step of bf16 above 1; above the largest
    folded = lowrank.fold(weight, half, torch.ones(1, 1), 1.0)[0]
    assert folded[:3].tolist() == [1.0, 1.015625, float("inf")]
    assert folded[3].isnan()


@pytest.mark.parametrize("bad", [float("nan"), float("-inf"), LARGE])
@pytest.mark.parametrize("place", [(0, 0), (48, 129), (17, 63)])
def test_a_sum_that_is_not_finite_is_told(tier: str, bad: float, place: tuple[int, int]) -> None:
    library = dispatch.library_here()
    if library is None:
        pytest.skip("the reference tells nothing")
    for dtype in (torch.float32, torch.bfloat16):
        weight, a, b = made(49, 130, 8, dtype)
        told = [fold_in_place(library, weight, laid_out(library, a, b, 0.5))]
        weight = torch.zeros(49, 130, dtype=dtype)
        weight[place] = bad if bad != LARGE else torch.finfo(dtype).max
        if bad == LARGE:  # finite as it is, and not with an update; of bf16 once it is rounded
            a[:, place[1]], b[place[0]] = 2.0**120, 1.0
        told.append(fold_in_place(library, weight, laid_out(library, a, b, 0.5)))
        assert told == [True, False]
        assert not weight[place].isfinite()


def test_what_rounds_to_the_largest_number_is_finite_and_what_lies_above_is_not(tier: str) -> None:
    library = dispatch.library_here()
    if library is None:
        pytest.skip("the reference tells nothing")
    edge = torch.tensor([0x7F7F7FFF, 0x7F7F8000], dtype=torch.int32).view(torch.float32)  # of bf16, the tie goes up
    for update, finite in zip(edge, (True, False), strict=True):
        weight, a, b = torch.zeros(1, 1, dtype=torch.bfloat16), update.view(1, 1).clone(), torch.ones(1, 1)
        assert fold_in_place(library, weight, laid_out(library, a, b, 1.0)) is finite
        assert bool(weight.isfinite().all()) is finite


def test_the_number_of_threads_changes_no_bit(tier: str, two_threads: None) -> None:
    weight, a, b = made(301, 513, 16, torch.bfloat16)
    both = lowrank.fold(weight, a, b, 0.5)
    torch.set_num_threads(1)
    assert torch.equal(lowrank.fold(weight, a, b, 0.5), both)


def test_strides_and_gradients_of_what_is_given_do_not_matter(tier: str) -> None:
    weight, a, b = made(20, 36, 4, torch.float32)
    plain = lowrank.fold(weight, a, b, 0.5)
    other = lowrank.fold(weight.T.contiguous().T, a.T.contiguous().T.requires_grad_(), b.requires_grad_(), 0.5)
    assert torch.equal(other, plain)
    assert not other.requires_grad


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_of_plain_memory_are_those_of_the_whole(tier: str, dtype: str) -> None:
    """What a streaming merge does: blocks of rows, each told which of them it begins with."""
    library = dispatch.library_here()
    if library is None:
        pytest.skip("the reference works on tensors alone")
    weight, a, b = made(50, 37, 5, getattr(torch, dtype))
    size = weight.element_size() * 37
    memory = bytearray(weight.view(torch.uint8).numpy().tobytes())
    factors = laid_out(library, a, b, 0.25)
    for first, count in ((0, 13), (13, 36), (49, 1)):
        rows = memoryview(memory)[first * size : (first + count) * size]
        native.fold(library, native.address(rows), count, factors, dtype=dtype, first=first)
    assert memory == lowrank.fold(weight, a, b, 0.25).view(torch.uint8).numpy().tobytes()


def test_numbers_become_wide_without_torch(tier: str) -> None:
    library = dispatch.library_here()
    if library is None:
        pytest.skip("the reference works on tensors alone")
    values = torch.randn(37).bfloat16()
    raw = bytearray(values.view(torch.uint8).numpy().tobytes())
    assert native.wide(library, raw, dtype="bfloat16") == values.float().numpy().tobytes()
    assert native.wide(library, raw, dtype="float32") is raw


def test_the_cpu_is_what_torch_takes_it_for() -> None:
    level = torch.backends.cpu.get_cpu_capability().lower()
    assert cpu.level() == (level if level in ("avx2", "avx512") else "default")
    for name in ("avx512_bf16", "amx_tile"):
        assert cpu.has(name) == getattr(torch.cpu, f"_is_{name}_supported", bool)()


@pytest.mark.parametrize("allowed", ["default", "avx2", "avx512", "what"])
def test_a_lower_level_can_be_asked_for_and_no_higher_one(monkeypatch: pytest.MonkeyPatch, allowed: str) -> None:
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    found = cpu.level()
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", allowed)
    levels = ["default", "avx2", "avx512"]
    wanted = min(allowed, found, key=levels.index) if allowed in levels else found
    assert cpu.level() == wanted
