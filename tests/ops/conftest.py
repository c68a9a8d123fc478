"""Kernels are tested in every tier that this machine has."""

from collections.abc import Iterator

import pytest
import torch

from truetune.ops import dispatch
from truetune.ops.native.build import INSTRUCTION_SETS

PRESENT = [entry.name for entry in INSTRUCTION_SETS if entry.present()]
# Compiling takes seconds: a set between two others, whose every line one of them runs too, is left out.
TESTED = [name for name in PRESENT if name != "avx512_bf16" or "amx" not in PRESENT]


@pytest.fixture(scope="session")
def tiers() -> list[str]:
    """Compiles, which takes seconds: for those tests alone that run kernels."""
    return dispatch.tiers(TESTED)


@pytest.fixture(params=["reference", *(f"native-{name}" for name in TESTED)])
def tier(request: pytest.FixtureRequest, tiers: list[str]) -> Iterator[str]:
    """The test's kernels run in this tier."""
    if request.param not in tiers:
        pytest.skip(dispatch.library.reason(request.param.removeprefix("native-")))
    with dispatch.forced(request.param):
        yield request.param


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
