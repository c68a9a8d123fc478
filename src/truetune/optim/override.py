"""Which parameters keep their state in 32 bits, whatever their optimizer does with the others."""

from __future__ import annotations

import weakref

from torch import Tensor, nn

_MARK = "_keeps_32bit_state"
_modules: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def override_32bit(*owners: nn.Module | Tensor) -> None:
    """Keep the optimizer's state of these in 32 bits.

    It counts when a parameter's state is made, at its first step. Of a module it concerns all parameters that it has
    then. A copy of a module or of a parameter has to be told again.

    Args:
        owners: modules or single parameters.
    """
    for owner in owners:
        if isinstance(owner, nn.Module):
            _modules.add(owner)
        else:
            setattr(owner, _MARK, True)


def keeps_32bit(parameter: Tensor) -> bool:
    """Whether ``override_32bit`` named it."""
    return hasattr(parameter, _MARK) or any(parameter is p for module in _modules for p in module.parameters())
