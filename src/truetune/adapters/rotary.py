"""Rotary positions as adapters need them: forwards for queries, backwards for keys that are stored turned.

    k' = k cos + r(k) sin,  r([a, b]) = [-b, a] of the halves of each head (Su et al. 2021, arXiv:2104.09864, eq. 34)

Some models turn only a head's first entries, as many as cos has.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from truetune.errors import AdapterError

# These turn by an angle that depends on how long a text is, so that a key has no one place to be turned back from.
_BY_LENGTH = ("dynamic", "longrope")
# Positions are rows of a table, or a bias on the scores: nothing turns.
_UNTURNED = ("gpt2", "gpt_bigcode", "bloom", "opt", "gpt_neo")


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[..., head_dim] turned by cos and sin [..., entries that turn], which broadcast."""
    part, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    return torch.cat([part * cos + _quarter(part) * sin, rest], dim=-1)


def turned_back(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """What ``turned`` makes x of; cos and sin may be scaled together."""
    part, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    return torch.cat([(part * cos - _quarter(part) * sin) / (cos.square() + sin.square()), rest], dim=-1)


def _quarter(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def tables(rotary: nn.Module, count: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cos and sin [count, entries], float32, of positions 0 … count - 1, as the model rounds them to ``dtype``."""
    cos, sin = rotary(torch.empty(1, dtype=dtype, device=device), torch.arange(count, device=device)[None])
    return cos[0].float(), sin[0].float()


def rotary_of(model: nn.Module, attention: nn.Module, method: str) -> nn.Module | None:
    """The module that makes a model's cos and sin; None where nothing turns.

    Raises:
        AdapterError: keys are changed between their map and the scores in a way that can't be undone.
    """
    config: Any = model.config
    if config.model_type in _UNTURNED:
        return None
    rotary = next((m for path, m in model.named_modules() if path.endswith("rotary_emb")), None)
    why = (
        "its keys go through a norm"
        if any(hasattr(attention, name) for name in ("k_norm", "k_layernorm"))
        else "its positions turn by the length of the text"
        if getattr(rotary, "rope_type", "default") in _BY_LENGTH
        else ""
        if rotary is not None and _turns_so(attention, rotary)
        else "how it turns its keys is not known here"
    )
    if why:
        raise AdapterError(
            f"--method {method}: {config.model_type} can't carry trained keys: {why}", ("way out", "--method prompt")
        )
    return rotary


def _turns_so(attention: nn.Module, rotary: nn.Module) -> bool:
    """Whether the model's own code turns as ``turned`` does; on the meta device it is taken to."""
    own = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    buffer = next(rotary.buffers(), None)
    if own is None or buffer is None:
        return False
    if buffer.is_meta:
        return True
    try:
        cos, sin = tables(rotary, 5, torch.float32, buffer.device)
        x = torch.linspace(-1.0, 2.0, cos.numel(), device=buffer.device).view(1, 1, *cos.shape)
        found = own(x, x, cos[None], sin[None])[1]
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return False
    return bool(torch.allclose(found, turned(x, cos, sin), atol=1e-5))
