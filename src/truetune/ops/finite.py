"""Whether a tensor holds numbers alone."""

from __future__ import annotations

from torch import Tensor


def are_finite(tensor: Tensor) -> bool:
    """No NaN, no infinity, whatever the dtype; integers always are.

    A sum tells without a mask of the tensor's size; where large values overflow in it, the mask decides.
    """
    if not tensor.is_floating_point():
        return True
    wide = tensor if tensor.itemsize > 1 else tensor.float()  # torch asks no float of one byte
    return bool(wide.float().sum().isfinite()) or bool(wide.isfinite().all())
