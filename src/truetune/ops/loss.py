"""Cross-entropy as a sum and a count, and straight from hidden states, so that logits never exist as a whole.

Never a mean: the step divides by the trained tokens of the whole optimizer step, so the loss does not depend on how
the step was cut into micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from truetune.ops import buffers
from truetune.ops.cross_entropy import softmax_cross_entropy_
from truetune.ops.rng import keyed

# Logits that exist at a time. The head's weight is read once per chunk, so a chunk should hold some hundred rows.
_CHUNK_BYTES = 32 << 20
_NO_TARGET = torch.iinfo(torch.int64).min  # torch leaves out -100 in silence, unless it is told of another number


def cross_entropy_sum(logits: Tensor, targets: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """Computes ``F.cross_entropy(logits.float(), targets, reduction="sum")``; float64 stays what it is.

    Args:
        logits: [n, vocab], any floating dtype; the softmax is taken in float32.
        targets: [n] int64 in [0, vocab).
        smoothing: label smoothing, as in ``F.cross_entropy``.
    Returns:
        A float32 scalar; 0 with a gradient of zeros when n = 0.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), targets, reduction="sum", label_smoothing=smoothing)


@dataclass(frozen=True)
class Head:
    """What turns hidden states into logits.

    Attributes:
        weight: [vocab, hidden], frozen; None where the head is trained, adapted or of a kind of its own.
        bias: [vocab] or None, frozen.
        scale: the logits are multiplied by it.
        softcap: c of ``c · tanh(logits / c)`` (Gemma 2, arXiv:2408.00118); 0 for none.
        module: the head as it is called, [n, hidden] -> [n, vocab], before scale and cap.
        parameters: those of ``module`` that are trained.
        ids, rows: [k] int64 and [k, hidden], trained rows that stand in the place of these of ``weight``.
    """

    module: Callable[[Tensor], Tensor]
    weight: Tensor | None = None
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float = 0.0
    parameters: tuple[Tensor, ...] = ()
    ids: Tensor | None = None
    rows: Tensor | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, hidden] -> [n, vocab], whole."""
        scores = self.module(hidden)
        scores = scores * self.scale if self.scale != 1.0 else scores
        return self.softcap * torch.tanh(scores / self.softcap) if self.softcap else scores


def linear_cross_entropy(
    hidden: Tensor,
    targets: Tensor,
    head: Head,
    *,
    smoothing: float = 0.0,
    chunk: int | None = None,
    keys: Tensor | None = None,
) -> Tensor:
    """The sum of the cross-entropies of ``head(hidden)``, a few rows at a time.

    The gradient is formed in the forward, while the logits of a chunk exist: they are neither kept nor computed twice.

    Args:
        hidden: [n, h].
        targets: [n] int64.
        smoothing: label smoothing, as in ``F.cross_entropy``.
        chunk: rows at a time; by default as many as make 32 MiB of logits.
        keys: [n] int64, the counters of the rows, for what an adapter on the head drops.
    Returns:
        A scalar: float32, or float64 for float64.
    Raises:
        IndexError: a target that is no row of the head; on an accelerator, whatever its own indexing raises.
    """
    # Inside a Function grad mode is off, and what an input says of itself does not know of no_grad outside.
    wants = torch.is_grad_enabled() and (hidden.requires_grad or bool(head.parameters))
    if head.weight is None:
        call = _Call(head, targets, smoothing, chunk or 256, wants, keys)
        total: Tensor = _TrainedHead.apply(call, hidden, *head.parameters)  # type: ignore[no-untyped-call]
    else:
        rows = chunk or _rows(head.weight.shape[0] * head.weight.element_size())
        call = _Call(head, targets, smoothing, rows, wants)
        with torch.autocast(hidden.device.type, enabled=False):
            total = _FrozenHead.apply(  # type: ignore[no-untyped-call]
                call, hidden.to(head.weight.dtype), head.rows
            )
    return total


@dataclass(frozen=True)
class _Call:
    """What both Functions take beside what they find gradients for."""

    head: Head
    targets: Tensor
    smoothing: float
    rows: int  # at a time
    wants: bool  # a gradient
    keys: Tensor | None = None

    def parts(self, hidden: Tensor) -> Iterator[slice]:
        return (slice(start, start + self.rows) for start in range(0, len(hidden), self.rows))


def _rows(row_bytes: int) -> int:
    return max(64, _CHUNK_BYTES // row_bytes // 64 * 64)


class _TrainedRows:
    """The few rows of a frozen head that are trained: their logits, and what their gradients come to."""

    def __init__(self, head: Head, weight: Tensor, rows: Tensor) -> None:
        assert head.ids is not None
        self.ids, self.own = head.ids, rows.detach().to(weight.dtype)
        self.apart = self.own - weight[self.ids]
        self.gradient = torch.zeros_like(rows)

    def put(self, logits: Tensor, hidden: Tensor) -> None:
        """In place: their columns of [n, vocab]."""
        logits.index_copy_(1, self.ids, hidden @ self.own.T)

    def collect(self, slopes: Tensor, hidden: Tensor, gradient: Tensor) -> None:
        """Mend the gradient of ``hidden``, which was made with the frozen rows, and add up their own."""
        picked = slopes[:, self.ids]
        gradient.addmm_(picked, self.apart)
        self.gradient += picked.to(self.gradient.dtype).T @ hidden.to(self.gradient.dtype)


class _FrozenHead(torch.autograd.Function):
    """Only the hidden states and the trained rows get a gradient: softmax minus one-hot, times the weight."""

    @staticmethod
    def forward(ctx: Any, call: _Call, hidden: Tensor, trained: Tensor | None) -> Tensor:
        head, targets, weight = call.head, call.targets, call.head.weight
        assert weight is not None
        few = None if trained is None else _TrainedRows(head, weight, trained)
        count, hidden = len(hidden), _filled_up(hidden)
        gradient = buffers.empty_like(hidden) if call.wants else None
        total = hidden.new_zeros((), dtype=torch.float64)
        room = buffers.empty(min(call.rows, len(hidden)), len(weight), hidden.dtype, hidden.device)
        for part in call.parts(hidden):
            logits = _uncapped(hidden[part], head, few, out=room[: len(hidden[part])])
            losses = softmax_cross_entropy_(
                logits[: len(targets[part])], targets[part], softcap=head.softcap, smoothing=call.smoothing,
                grad=call.wants,
            )  # fmt: skip
            total += losses.sum(dtype=torch.float64)
            if gradient is not None:
                torch.mm(logits, weight, out=gradient[part])
                if few is not None:
                    few.collect(logits, hidden[part], gradient[part])
        if gradient is not None and head.scale != 1.0:
            gradient *= head.scale
        ctx.gradient = None if gradient is None else gradient[:count]
        ctx.of_rows = few.gradient * head.scale if few is not None and call.wants else None
        return total.to(torch.promote_types(hidden.dtype, torch.float32))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        gradient = None if ctx.gradient is None else ctx.gradient * g
        of_rows = None if ctx.of_rows is None else ctx.of_rows * g
        return None, gradient, of_rows


def _uncapped(hidden: Tensor, head: Head, few: _TrainedRows | None, *, out: Tensor) -> Tensor:
    """``out``, filled with the logits of ``hidden`` [n, h] before the cap, [n, vocab]."""
    assert head.weight is not None
    torch.mm(hidden, head.weight.T, out=out)
    if few is not None:
        few.put(out, hidden)
    if head.bias is not None:
        out += head.bias
    if head.scale != 1.0:
        out *= head.scale
    return out


def _filled_up(hidden: Tensor) -> Tensor:
    """[n, h] with rows of zeros to whole 64s, where oneDNN would compile two products anew for every number of rows.

    Each took 1 to 15 ms to make, and about a megabyte for good.
    """
    spare = -len(hidden) % 64
    if not spare or hidden.dtype.itemsize > 2 or hidden.device.type != "cpu":
        return hidden
    return F.pad(hidden, (0, 0, 0, spare))


class _TrainedHead(torch.autograd.Function):
    """Any head: autograd runs within a chunk, and what it finds for the head's own parameters adds up."""

    @staticmethod
    def forward(ctx: Any, call: _Call, hidden: Tensor, *parameters: Tensor) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float64)
        sums = [torch.zeros_like(t) for t in (hidden, *parameters)] if call.wants else []
        for part in call.parts(hidden):
            with torch.set_grad_enabled(call.wants), keyed(None if call.keys is None else call.keys[part]):
                rows_in = hidden[part].detach().requires_grad_(call.wants)
                logits = call.head.logits(rows_in)
                loss = F.cross_entropy(
                    logits.to(torch.promote_types(logits.dtype, torch.float32)), call.targets[part], reduction="sum",
                    label_smoothing=call.smoothing, ignore_index=_NO_TARGET,
                )  # fmt: skip
            total += loss.detach()
            if call.wants:
                _add(sums, part, torch.autograd.grad(loss, [rows_in, *parameters]))
        ctx.sums = sums
        return total.to(torch.promote_types(hidden.dtype, torch.float32))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *(t * g for t in ctx.sums))


def _add(sums: Sequence[Tensor], part: slice, gradients: Sequence[Tensor]) -> None:
    sums[0][part] = gradients[0]
    for total, gradient in zip(sums[1:], gradients[1:], strict=True):
        total += gradient
