"""How near a kernel must come to the truth: as near as plain torch in the same dtype, plus a hair."""

import torch
from torch import Tensor


def assert_no_worse(ours: Tensor, plain: Tensor, truth: Tensor) -> None:
    """The largest error of ``ours`` is at most that of ``plain``, and a hair.

    The hair is what one correct rounding may cost at the largest value in bfloat16, and eight of them in float32, where
    sums are formed in another order and an exponential may be off by two.
    """
    assert ours.dtype == plain.dtype
    assert ours.shape == truth.shape
    if not truth.numel():
        return
    error, allowed = (ours.double() - truth).abs(), (plain.double() - truth).abs().max()
    roundings = 8 if ours.dtype == torch.float32 else 1
    allowed = allowed + roundings * torch.finfo(ours.dtype).eps / 2 * truth.abs().max()
    worst = int(error.argmax())
    values = [float(t.flatten()[worst]) for t in (ours, plain, truth)]
    assert error.max() <= allowed, "element {}: ours {:.9g}, torch {:.9g}, truth {:.9g}".format(worst, *values)


def same_nonfinite(ours: Tensor, truth: Tensor) -> bool:
    """Whether both are NaN or infinite in the same places."""
    return torch.equal(ours.isfinite(), truth.isfinite())
