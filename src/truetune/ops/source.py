"""Where a projection's input comes from, if that is cheap: a norm or a gated activation.

Its own inputs are kept for the backward, and x is computed from them again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from truetune.ops import buffers, gated, norm


class Source(Protocol):
    """What turns the kept inputs into x."""

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """``(x, what the backward needs beside the inputs)``."""

    def backward(self, g: Tensor, memo: Tensor | None, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The inputs' gradients, given that of x [n, in], which nobody reads afterwards: it may be overwritten."""


class Plain:
    """x itself."""

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """[n, in], as it is."""
        return inputs[0], None

    def backward(self, g: Tensor, memo: Tensor | None, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The gradient, as it is."""
        return (g,)


@dataclass(frozen=True)
class Normed:
    """RMSNorm of one input, with a frozen weight."""

    weight: Tensor | None
    eps: float
    offset: float = 0.0

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """[n, in], normalised."""
        return norm.rms_norm(inputs[0], self.weight, self.eps, offset=self.offset)

    def backward(self, g: Tensor, memo: Tensor | None, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Of the norm's input."""
        assert memo is not None
        return (norm.rms_norm_backward(g, inputs[0], self.weight, memo, offset=self.offset),)


@dataclass(frozen=True)
class Gated:
    """act(gate) · up (Shazeer 2020, arXiv:2002.05202)."""

    kind: str

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """[n, inner] of gate and up, both [n, inner]."""
        gate, up = inputs
        return gated.gated(gate, up, self.kind), None

    def backward(self, g: Tensor, memo: Tensor | None, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Of gate and up."""
        gate, up = inputs
        return gated.gated_backward(g, gate, up, self.kind, out=(g, buffers.empty_like(g)))  # g is nobody else's


PLAIN = Plain()
