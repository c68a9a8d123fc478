"""LoRA on chosen parts of a fused layer, such as the queries and values of a ``c_attn``, each with an A of its own.

    y[rows of part i] += s B_i A_i x          (loralib's ``MergedLinear``)

In the file A is stacked, [parts · r, in], and so is B, [rows of all parts, r, 1]: the weight of a grouped convolution
of width 1, as PEFT had it in 2023 with ``enable_lora``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from typing_extensions import Self

from truetune.adapters.lora import A, B, LoRALinear
from truetune.adapters.lora_start import Start, start
from truetune.config.lora import LoRA
from truetune.errors import AdapterError
from truetune.ops.frozen import frozen_weight

QKV = "qkv"
"""In ``--slices``, the fused layer of queries, keys and values, whatever a family calls it."""

_STARTS = ("kaiming", "gaussian", "zero")


class SlicedLinear(LoRALinear):
    """As ``LoRALinear``, for some rows of W.

    Args:
        rows: for each part, which outputs are its own.
    """

    def __init__(self, base: nn.Module, *, rows: Sequence[Tensor], rank: int, **settings: Any) -> None:
        super().__init__(base, rank=rank, **settings)
        columns = torch.cat([torch.full((len(part),), i * rank) for i, part in enumerate(rows)])
        self.rows: Tensor | None
        self.columns: Tensor
        self.register_buffer("rows", torch.cat(list(rows)), persistent=False)
        self.register_buffer("columns", columns[:, None] + torch.arange(rank), persistent=False)

    @classmethod
    def from_base(
        cls,
        base: nn.Module,
        config: LoRA | None = None,
        *,
        rows: Sequence[Tensor] = (),
        generator: torch.Generator | None = None,
        **settings: Any,
    ) -> Self:
        """Wrap a layer by the settings of a run, or by keywords.

        Raises:
            AdapterError: no rows, or a start that is not one of A alone or B alone.
        """
        config = cls.settings(**{**(config or cls.settings()).model_dump(), **settings})
        if not rows or config.init not in _STARTS:
            what = f"--init {config.init}" if rows else "no rows"
            raise AdapterError(f"--slices: {what}", ("expected", f"parts of a layer, and --init {', '.join(_STARTS)}"))
        frozen, count = frozen_weight(base), sum(len(part) for part in rows)
        a = start(config.init, frozen, config.rank * len(rows), generator=generator).a
        b = start(config.init, frozen, config.rank, generator=generator).b[:count, :, None].clone()
        return cls(base, rows=rows, begun=Start(a, b), **cls.keywords(config))

    def low_rank(self, own: Mapping[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """A [parts · r, in], and B [out, parts · r] with zeros where a part has no row."""
        a, b = (self.lora_a, self.lora_b) if own is None else (own[A], own[B])
        if self.rows is None:
            return a, b
        full = b.new_zeros(frozen_weight(self.base).out_features, len(a))
        # A skeleton is on the meta device, and what is merged by it is not.
        return a, full.index_put((self.rows[:, None].to(b.device), self.columns.to(b.device)), b[..., 0])

    def settle(self) -> None:
        """Let A and B be a plain LoRA's, of a rank as large as all parts' together."""
        if self.rows is not None:
            a, b = self.low_rank()
            self.lora_a, self.lora_b = Parameter(a.detach()), Parameter(b.detach())
            self.rows = None
            self.grow(len(a))


def rows_of(parts: Sequence[str], model: nn.Module, path: str) -> list[Tensor]:
    """Which outputs of a layer each of its named parts has.

    Args:
        parts: ``q``, ``k``, ``v``, ``gate``, ``up``, or ``1/3`` for the first of three equal ones.
        path: the layer's.
    Raises:
        AdapterError: the layer has no such parts, or how it keeps them is not known.
    """
    out = frozen_weight(model.get_submodule(path)).out_features
    known = {} if all("/" in part for part in parts) else _layout(model, path, out)
    found = []
    for part in parts:
        number, _, count = part.partition("/")
        if count:
            if out % int(count) or not 1 <= int(number) <= int(count):
                raise AdapterError(f"--slices: {path} has {out} outputs: there is no part {part} of them")
            size = out // int(count)
            found.append(torch.arange((int(number) - 1) * size, int(number) * size))
        elif part in known:
            found.append(known[part])
        else:
            raise AdapterError(f"--slices: {path} has no part {part}", ("it has", ", ".join(known)))
    return found


def is_fused(model: nn.Module, path: str) -> bool:
    """Whether a layer makes queries, keys and values at once, in an order that is known."""
    parent, _, leaf = path.rpartition(".")
    return leaf in _QKV_NAMES and type(model.get_submodule(parent)).__name__ in _LAYOUTS


def _layout(model: nn.Module, path: str, out: int) -> dict[str, Tensor]:
    parent = model.get_submodule(path.rpartition(".")[0])
    kind = type(parent).__name__
    if kind not in _LAYOUTS or getattr(parent, "is_cross_attention", False):
        raise AdapterError(
            f"--slices: how {path} ({kind}) orders its outputs is not known",
            ("known", ", ".join(_LAYOUTS)),
            ("way out", f"name the parts by number, such as {path.rpartition('.')[2]}=1/3,3/3"),
        )
    return _LAYOUTS[kind](parent, out)


def _blocks(*sizes: tuple[str, int]) -> dict[str, Tensor]:
    """One part after the other."""
    ends = torch.tensor([size for _, size in sizes]).cumsum(0).tolist()
    return {name: torch.arange(end - size, end) for (name, size), end in zip(sizes, ends, strict=True)}


def _thirds(parent: Any, out: int) -> dict[str, Tensor]:
    return _blocks(("q", out // 3), ("k", out // 3), ("v", out // 3))


def _by_head(parent: Any, out: int) -> dict[str, Tensor]:
    """Head by head, its query, key and value."""
    dim = int(getattr(parent, "head_dim", None) or parent.head_size)
    table = torch.arange(out).view(-1, 3, dim)
    return {name: table[:, i].flatten() for i, name in enumerate("qkv")}


def _bigcode(parent: Any, out: int) -> dict[str, Tensor]:
    """With one key and value for all heads: the queries, then these two."""
    if not parent.multi_query:
        return _by_head(parent, out)
    return _blocks(("q", out - 2 * parent.kv_dim), ("k", parent.kv_dim), ("v", parent.kv_dim))


def _grouped(parent: Any, out: int) -> dict[str, Tensor]:
    heads, groups = parent.config.num_attention_heads, parent.config.num_key_value_heads
    dim = out // (heads + 2 * groups)
    return _blocks(("q", heads * dim), ("k", groups * dim), ("v", groups * dim))


def _halves(parent: Any, out: int) -> dict[str, Tensor]:
    return _blocks(("gate", out // 2), ("up", out // 2))


_QKV_NAMES = ("c_attn", "query_key_value", "qkv_proj", "Wqkv")
_LAYOUTS: dict[str, Callable[[Any, int], dict[str, Tensor]]] = {
    "GPT2Attention": _thirds,
    "GPTBigCodeAttention": _bigcode,
    "BloomAttention": _by_head,
    "GPTNeoXAttention": _by_head,
    "MptAttention": _thirds,
    "Phi3Attention": _grouped,
    "Phi3MLP": _halves,
}
