"""One dtype policy: setting, checkpoint and machine decide; trained weights stay in float32."""

from typing import Any

import pytest
import torch

from truetune.errors import ConfigError
from truetune.models.precision import choose_device, choose_precision, name_of

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    ("setting", "checkpoint", "device", "fast", "storage"),
    [
        ("auto", F32, "cpu", True, F32),
        ("auto", F32, "cuda", True, F32),
        ("auto", BF16, "cpu", True, BF16),
        ("auto", BF16, "cpu", False, F32),
        ("auto", F16, "cpu", True, BF16),
        ("auto", F16, "cpu", False, F32),
        ("auto", BF16, "cuda", True, BF16),
        ("auto", F16, "cuda", True, BF16),
        ("auto", BF16, "cuda", False, F32),
        ("float32", BF16, "cpu", True, F32),
        ("bfloat16", F32, "cpu", False, BF16),
        ("float16", F32, "cuda", None, F16),
    ],
)
def test_frozen_weights_are_stored_as_the_table_says(
    setting: str, checkpoint: torch.dtype, device: str, fast: bool | None, storage: torch.dtype
) -> None:
    found = choose_precision(setting, checkpoint, device=device, bf16_is_fast=fast)
    assert (found.storage, found.autocast) == (storage, None)
    assert found.reason


@pytest.mark.parametrize(("setting", "autocast"), [("float32", None), ("bfloat16", BF16), ("auto", BF16)])
def test_trained_weights_are_stored_in_float32(setting: str, autocast: torch.dtype | None) -> None:
    found = choose_precision(setting, BF16, device="cpu", trains="base", bf16_is_fast=True)
    assert (found.storage, found.autocast) == (F32, autocast)


@pytest.mark.parametrize("setting", ["auto", "bfloat16"])
def test_an_adapter_with_parts_of_the_base_does_not_widen_the_rest(setting: str) -> None:
    """Parts that are trained are kept in float32 one by one (see attach); all of the base would be twice the memory."""
    found = choose_precision(setting, BF16, device="cpu", trains="parts", bf16_is_fast=True)
    assert (found.storage, found.autocast) == (BF16, BF16)
    assert choose_precision("float32", BF16, device="cpu", trains="parts").autocast is None


@pytest.mark.parametrize(
    ("setting", "checkpoint", "device", "fast", "reason"),
    [
        ("auto", BF16, "cuda", True, "the checkpoint's own"),
        ("auto", F16, "cuda", True, "wider in range, in place of the checkpoint's fp16"),
        ("auto", BF16, "cuda", False, "this device has no bf16, in place of the checkpoint's bf16"),
        ("auto", BF16, "cpu", True, "fastest here by probe"),
        ("auto", F16, "cpu", True, "fastest here by probe, in place of the checkpoint's fp16"),
        ("bfloat16", F16, "cpu", True, "as this run was started"),
    ],
)
def test_the_reason_is_the_true_one(
    setting: str, checkpoint: torch.dtype, device: str, fast: bool, reason: str
) -> None:
    found = choose_precision(setting, checkpoint, device=device, because="as this run was started", bf16_is_fast=fast)
    assert found.reason == reason


@pytest.mark.parametrize("trains", ["adapter", "parts", "base"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_float16_is_for_no_training(device: str, trains: Any) -> None:
    with pytest.raises(ConfigError, match="--dtype float16"):
        choose_precision("float16", F16, device=device, trains=trains)


def test_products_run_in_the_autocast_dtype_only_where_there_is_one() -> None:
    x = torch.ones(2, 2)
    mixed = choose_precision("bfloat16", F32, device="cpu", trains="base")
    plain = choose_precision("float32", F32, device="cpu", trains="base")
    with mixed.context("cpu"):
        assert (x @ x).dtype == BF16
    with plain.context("cpu"):
        assert (x @ x).dtype == F32


def test_float16_on_a_cpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="--dtype float16"):
        choose_precision("float16", F16, device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="--device cuda"):
        choose_device("cuda")
    assert choose_device("auto") == choose_device("cpu") == "cpu"


def test_dtypes_have_short_names() -> None:
    assert [name_of(dtype) for dtype in (F32, BF16, F16, torch.float64)] == ["fp32", "bf16", "fp16", "torch.float64"]
