"""Who chooses the tier, and what it is told."""

from collections.abc import Iterator

import pytest
import torch

from truetune.errors import ConfigError
from truetune.ops import dispatch
from truetune.ops.native import library


@pytest.fixture(autouse=True)
def _unread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if the variable had not been read yet."""
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    dispatch._from_environment.cache_clear()
    yield
    dispatch._from_environment.cache_clear()


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> Iterator[None]:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    library._attempt.cache_clear()
    yield
    library._attempt.cache_clear()


@pytest.fixture
def best(tiers: list[str]) -> str:
    """The best native tier."""
    if len(tiers) == 1:
        pytest.skip(library.reason())
    return tiers[1]


@pytest.mark.parametrize("value", ["", "auto", "native"])
def test_the_best_native_tier_is_the_default(best: str, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, value)
    found = dispatch.native(torch.zeros(1))
    assert found is not None
    assert f"native-{found.isa}" == best
    assert dispatch.describe() == f"native ({found.isa})"


def test_the_variable_forces_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "reference")
    assert dispatch.native(torch.zeros(1)) is None
    assert dispatch.describe() == "reference (TRUETUNE_KERNELS)"


def test_the_variable_is_read_once(best: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert dispatch.native(torch.zeros(1))
    monkeypatch.setenv(dispatch.VARIABLE, "reference")
    assert dispatch.native(torch.zeros(1))


@pytest.mark.parametrize(("value", "close"), [("natve", "native"), ("Reference", "reference"), ("trition", "triton")])
def test_a_wrong_value_is_told_the_nearest(monkeypatch: pytest.MonkeyPatch, value: str, close: str) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, value)
    with pytest.raises(ConfigError) as error:
        dispatch.native(torch.zeros(1))
    assert f"TRUETUNE_KERNELS: found '{value}', expected reference, native, triton, auto" in str(error.value)
    assert f"did you mean   TRUETUNE_KERNELS={close}" in str(error.value)


def test_triton_is_an_error_until_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    with pytest.raises(ConfigError, match="no Triton kernels yet"):
        dispatch.describe()


@pytest.mark.usefixtures("no_compiler")
def test_native_where_it_cannot_be_had_is_an_error_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "native")
    with pytest.raises(ConfigError, match=r"can't be had: no C compiler\n  way out   TRUETUNE_KERNELS=auto"):
        dispatch.describe()


@pytest.mark.usefixtures("no_compiler")
def test_auto_does_without_and_says_why() -> None:
    assert dispatch.native(torch.zeros(1)) is None
    assert dispatch.describe() == "reference (no C compiler)"
    assert dispatch.tiers() == ["reference"]


class _Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "other",
    [
        torch.zeros(1, dtype=torch.float64),
        torch.zeros(1, dtype=torch.float16),
        torch.zeros(1, dtype=torch.int64),
        torch.zeros(1, device="meta"),
        torch.zeros(2).to_sparse(),
        torch.zeros(1).as_subclass(_Subclass),
    ],
    ids=["float64", "float16", "int64", "elsewhere", "sparse", "subclass"],
)
def test_one_tensor_that_does_not_fit_means_the_reference(best: str, other: torch.Tensor) -> None:
    fits = torch.zeros(1)
    with dispatch.forced(best):
        assert dispatch.native(fits, fits.bfloat16(), torch.nn.Parameter(fits))
        assert dispatch.native(fits, other) is None


def test_forced_tiers_nest_and_end(best: str) -> None:
    x = torch.zeros(1)
    with dispatch.forced("reference"):
        assert dispatch.describe() == "reference (forced)"
        with dispatch.forced("native", best.removeprefix("native-")):
            assert dispatch.native(x)
        assert dispatch.native(x) is None
        with pytest.raises(ZeroDivisionError), dispatch.forced(best):
            _ = 1 / 0
        assert dispatch.native(x) is None
    assert dispatch.native(x)


@pytest.mark.parametrize("tier", ["nativ", "native-avx1024", "triton"])
def test_what_cannot_be_forced_is_an_error_and_changes_nothing(tier: str) -> None:
    before = dispatch.describe()
    with pytest.raises(ConfigError), dispatch.forced(tier):
        pass
    assert dispatch.describe() == before


def test_kernels_follow_the_number_of_threads_torch_has(best: str) -> None:
    before = torch.get_num_threads()
    try:
        for threads in (2, 1, 3):
            torch.set_num_threads(threads)
            found = dispatch.native(torch.zeros(1))
            assert found is not None
            assert found._threads == threads
    finally:
        torch.set_num_threads(before)
