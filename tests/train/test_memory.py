"""Memory is what the system says, or nothing."""

import builtins
from typing import Any

import pytest

from truetune.train.memory import available_mb, peak_mb


def test_a_system_that_does_not_say_is_not_guessed_at(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_proc(name: Any, *args: Any, **kwargs: Any) -> Any:
        if str(name).startswith("/proc/"):
            raise FileNotFoundError(name)
        return own(name, *args, **kwargs)

    own = builtins.open
    monkeypatch.setattr(builtins, "open", no_proc)
    assert available_mb("cpu") is None
    assert peak_mb("cpu") > 0  # getrusage knows it


def test_a_cpu_run_is_not_measured_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another model of this process may lie there."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 1)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5_000_000)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (7_000_000, 9_000_000))
    assert peak_mb("cpu") != 5.0
    assert (peak_mb("cuda"), available_mb("cuda")) == (5.0, 7.0)
