"""A decoder layer from fused parts: four nodes for its seven projections, with norms and activations inside them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain, repeat
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from truetune.adapters.ia3 import with_inner_factors
from truetune.adapters.prefix_linear import with_prefix
from truetune.adapters.projecting import projection_group
from truetune.adapters.virtual import Places, placed, places_in_force
from truetune.models.attention import AttentionSettings, row
from truetune.models.families import DecoderParts
from truetune.ops import buffers
from truetune.ops.attention import rotary_segment_attention
from truetune.ops.frozen import FrozenWeight
from truetune.ops.projection import Group, project
from truetune.ops.rng import current_keys, keyed, keys_in_force
from truetune.ops.source import Gated

Recompute = Literal["none", "cheap", "full"]
Forward = Callable[..., Any]


class FusedLayer:
    """Stands in for a layer's ``forward`` while a packed row is computed; for anything else the layer's own runs.

    Args:
        own: the layer's own forward.
        recompute: ``none`` keeps norms and activations for the backward, ``cheap`` computes them again, ``full``
            computes the whole layer again.
        is_last: only the wanted columns go on after the attention.
    """

    def __init__(
        self, parts: DecoderParts, settings: AttentionSettings, own: Forward, *, recompute: Recompute, is_last: bool
    ) -> None:
        self.parts, self.settings, self.own = parts, settings, own
        self.keep, self.again, self.is_last = recompute != "cheap", recompute == "full", is_last

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """[1, T, hidden] -> [1, T or wanted columns, hidden]."""
        packed, rotary = row.get(), kwargs.get("position_embeddings")
        if packed is None or rotary is None or kwargs.get("past_key_values") is not None:
            return self.own(hidden_states, *args, **kwargs)
        columns = packed.columns if self.is_last else None
        if self.again and torch.is_grad_enabled():
            keys = current_keys(hidden_states.shape[1], hidden_states.device)
            is_again = chain((False,), repeat(True))
            return checkpoint(
                self._keyed, is_again, keys, places_in_force(), hidden_states, rotary, packed.lengths, columns,
                use_reentrant=False, preserve_rng_state=False,
            )  # fmt: skip
        return self._forward(hidden_states, rotary, packed.lengths, columns)

    def _keyed(self, is_again: Iterator[bool], keys: Tensor, places: Places | None, *args: Any) -> Tensor:
        """The backward runs this a second time, when the counters of the tokens are no longer those in force."""
        with keyed(keys), placed(places):
            return self._forward(*args, is_again=next(is_again))

    def _forward(
        self,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        lengths: tuple[int, ...],
        columns: Tensor | None,
        *,
        is_again: bool = False,
    ) -> Tensor:
        parts, x = self.parts, hidden[0]
        flat = project(_group(x, parts.q, parts.k, parts.v), x, source=parts.input_norm, keep=self.keep)
        rows = (with_prefix(m, y) for m, y in zip((parts.q, parts.k, parts.v), flat, strict=True))
        q, k, v = (y.view(len(x), -1, parts.head_dim) for y in rows)
        mixed = self._attend(q, k, v, rotary, lengths)
        if columns is None:
            return self._rest(x, mixed, is_again)[None]
        keys = keys_in_force()
        with keyed(None if keys is None else keys[columns]):
            return self._rest(x[columns], mixed[columns], is_again)[None]

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, rotary: tuple[Tensor, Tensor], lengths: tuple[int, ...]
    ) -> Tensor:
        parts, settings = self.parts, self.settings
        q = parts.q_norm(q) if parts.q_norm else q
        k = parts.k_norm(k) if parts.k_norm else k
        cos, sin = (t[0] for t in rotary)
        mixed = rotary_segment_attention(
            q, k, v, lengths, cos=cos, sin=sin, scale=settings.scale, window=settings.window, softcap=settings.softcap
        )
        return mixed.flatten(1)

    def _rest(self, x: Tensor, mixed: Tensor, is_again: bool) -> Tensor:
        """What follows the attention, row by row; when it is computed again, nobody reads what it ends in."""
        parts = self.parts
        (x,) = project(_group(x, parts.o), mixed, residual=x)
        inner = _group(x, parts.gate, parts.up)
        inner = replace(inner, projections=(inner.projections[0], with_inner_factors(parts.down, inner.projections[1])))
        gate, up = project(inner, x, source=parts.mlp_norm, keep=self.keep)
        down = _without_products(_group(x, parts.down)) if is_again else _group(x, parts.down)
        (x,) = project(down, gate, up, source=Gated(parts.activation), residual=x, keep=self.keep)
        return x


def _group(x: Tensor, *modules: nn.Module) -> Group:
    """Projections of the rows of x as one node; that they can be one is what made the layer's parts its parts."""
    group = projection_group(modules, len(x))
    assert group is not None
    return group


@dataclass(frozen=True)
class _Unread:
    """A frozen weight whose outputs nobody reads: they are not computed."""

    own: FrozenWeight

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[n, in] -> [n, out], with whatever the memory holds."""
        return buffers.empty(len(x), self.own.out_features, x.dtype, x.device)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)


def _without_products(group: Group) -> Group:
    """A magnitude's gradient does read the product."""
    unread = (
        replace(p, weight=cast(FrozenWeight, _Unread(p.weight))) if p.magnitude is None else p
        for p in group.projections
    )
    return replace(group, projections=tuple(unread))


class Recomputed:
    """A layer's own forward, computed again in the backward."""

    def __init__(self, own: Forward) -> None:
        self.own = own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the layer's."""
        if not torch.is_grad_enabled():
            return self.own(*args, **kwargs)
        return checkpoint(self._keyed, keys_in_force(), places_in_force(), *args, use_reentrant=False, **kwargs)

    def _keyed(self, keys: Tensor | None, places: Places | None, *args: Any, **kwargs: Any) -> Any:
        """The backward runs this a second time, when the counters of the tokens are no longer those in force."""
        with keyed(keys), placed(places):
            return self.own(*args, **kwargs)


@contextlib.contextmanager
def standing_in(forwards: Mapping[nn.Module, Forward]) -> Iterator[None]:
    """Let these forwards stand in for the modules' own, and give them back afterwards."""
    given = {module: module.__dict__["forward"] for module in forwards if "forward" in module.__dict__}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in forwards:
            if module in given:
                module.forward = given[module]
            else:
                del module.forward
