"""Whether a tensor holds numbers alone."""

from __future__ import annotations

from torch import Tensor


def are_finite(tensor: Tensor) -> bool:
    """No NaN, no infinity, in a tensor of any shape and dtype; integers always are.

    A sum in the tensor's own dtype tells without a mask or a copy of its size; where that overflows, the mask decides.
    """
    if not tensor.is_floating_point():
        return True
    wide = tensor if tensor.itemsize > 1 else tensor.float()  # torch neither adds up nor asks floats of one byte
    return bool(wide.sum().isfinite()) or bool(wide.isfinite().all())
