"""Sizes of memory as people write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from truetune.config.groups import bytes_of
from truetune.config.resolve import resolve
from truetune.config.sft import SFTConfig
from truetune.errors import ConfigError

NEEDED: dict[str, Any] = {"model": "m", "data": ["d.jsonl"]}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1.5GB", 1_500_000_000),
        ("1500MB", 1_500_000_000),
        ("1500 mb", 1_500_000_000),
        ("1.5GiB", 3 << 29),
        ("1.5g", 1_500_000_000),
        ("2Gi", 2 << 30),
        ("0.002TB", 2_000_000_000),
        ("64KiB", 65536),
        ("1500000000", 1_500_000_000),
        ("1500000000B", 1_500_000_000),
    ],
)
def test_a_size_is_read_in_decimal_and_in_binary_units(text: str, size: int) -> None:
    assert bytes_of(text) == size
    assert SFTConfig(**NEEDED, max_memory=text).memory_limit_mb == size / 1e6


@pytest.mark.parametrize(
    "text", ["", "much", "1.5 gigs", "-1GB", "1,5GB", "GB", "5iB", "1e9", "1GB 2MB", ".5GB", "nan"]
)
def test_what_is_no_size_is_told_how_to_write_one(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--max-memory: found .*expected a size such as 1.5GB, 1500MB, 1.5GiB or"):
        SFTConfig(**NEEDED, max_memory=text)


@pytest.mark.parametrize("text", ["0", "0GB", "0.1"])
def test_nothing_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="a size above zero"):
        SFTConfig(**NEEDED, max_memory=text)


def test_a_plain_number_in_a_file_is_bytes_and_true_is_none(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("max_memory: 1500000000\n", encoding="utf-8")
    assert resolve(SFTConfig, file=str(path), flags=NEEDED).config.memory_limit_mb == 1500
    path.write_text("max_memory: true\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="--max-memory: found true"):
        resolve(SFTConfig, file=str(path), flags=NEEDED)


def test_no_limit_is_the_default() -> None:
    assert SFTConfig(**NEEDED).memory_limit_mb is None
