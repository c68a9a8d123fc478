"""Decoding one token of a few texts in C, held to the same layers in plain torch in float64; skinny products alone."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ops.conftest import TESTED
from truetune.ops import dispatch
from truetune.ops.native.decode import MOST_RANK, LayerParts, Layers, NormPart, RowTerm, skinny
from truetune.ops.native.library import Library

# The plain tier of this is the direct runner's own code (tests/generate).
pytestmark = pytest.mark.parametrize("tier", [f"native-{name}" for name in TESTED], indirect=True)

PAGE, ROTARY, DIM, HEADS, KV_HEADS, HIDDEN, INNER = 4, 6, 8, 4, 2, 36, 52
SHAPES = {
    "q": (HEADS * DIM, HIDDEN),
    "k": (KV_HEADS * DIM, HIDDEN),
    "v": (KV_HEADS * DIM, HIDDEN),
    "o": (HIDDEN, HEADS * DIM),
    "gate": (INNER, HIDDEN),
    "up": (INNER, HIDDEN),
    "down": (HIDDEN, INNER),
}
ACTIVATIONS = {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}
DTYPES = [torch.float32, torch.bfloat16]
# Relative, of the largest: sums of up to 52 terms in float32, and inputs of products rounded to bfloat16 (2^-9) twice
# a layer, in two layers.
CLOSE = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2}


@pytest.fixture
def library(tier: str) -> Library:
    found = dispatch.native(torch.empty(0))
    assert found is not None
    return found


class Drawn:
    """Random layers, and texts with positions behind them."""

    def __init__(self, dtype: torch.dtype, *, window: int = 0, softcap: float = 0.0, bias: bool = True,
                 norms: Sequence[str] = ("input", "mlp", "q", "k"), offset: float = 0.0) -> None:  # fmt: skip
        draw = torch.Generator().manual_seed(7)

        def some(*shape: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(*shape, generator=draw)).to(dtype)

        self.positions = torch.tensor([0, 5, 3, 10, 7])
        self.pages = [torch.tensor(held) for held in ([6], [1, 4], [0], [8, 2, 9], [3, 5])]
        self.parts = [
            LayerParts(
                {name: (some(*shape, scale=shape[1] ** -0.5), some(shape[0]) if bias else None)
                 for name, shape in SHAPES.items()},
                {name: NormPart(some(DIM if name in "qk" else HIDDEN), 1e-5, offset) for name in norms},
                some(10, PAGE, KV_HEADS, DIM), some(10, PAGE, KV_HEADS, DIM), DIM**-0.5, softcap, window,
            )
            for _ in range(2)
        ]  # fmt: skip
        self.x = torch.randn(len(self.positions), HIDDEN, generator=draw)
        angle = torch.rand(len(self.positions), ROTARY // 2, generator=draw) * 6
        self.cos, self.sin = torch.cat([angle.cos()] * 2, 1), torch.cat([angle.sin()] * 2, 1)

    def terms(self, dtype: torch.dtype) -> dict[tuple[int, str], list[RowTerm]]:
        """A few adapters: two on one map, ranks apart, each kind of factor somewhere, rows of none in between."""
        draw = torch.Generator().manual_seed(9)

        def lora(first: int, end: int, rank: int, name: str) -> RowTerm:
            out, inner = SHAPES[name]
            a, b = (torch.randn(rank, n, generator=draw).to(dtype) * 0.3 for n in (inner, out))
            return RowTerm(first, end, a, b)

        factor = torch.rand(HIDDEN, generator=draw) + 0.5
        return {
            (0, "q"): [lora(0, 2, 3, "q"), lora(3, 4, 17, "q")],
            (0, "down"): [RowTerm(1, 3, of_output=factor), lora(3, 5, 1, "down")],
            (1, "up"): [RowTerm(0, 4, of_input=factor)],
            (1, "o"): [RowTerm(2, 5, *(getattr(lora(2, 5, 2, "o"), n) for n in "ab"), magnitude=factor,
                               shift=torch.randn(HIDDEN, generator=draw).to(dtype))],
        }  # fmt: skip


def product(part: tuple[Tensor, Tensor | None], x: Tensor, terms: Sequence[RowTerm]) -> Tensor:
    """o · (g · (W (i · x) + B A (i · x)) + b + c), row by row."""
    weight, bias = part[0].double(), None if part[1] is None else part[1].double()
    rows = []
    for number, row in enumerate(x):
        own = next((t for t in terms if t.first <= number < t.end), RowTerm(0, 1))
        row = row if own.of_input is None else row * own.of_input.double()
        y = weight @ row
        if own.a is not None and own.b is not None:
            y = y + own.b.double().T @ (own.a.double() @ row)
        y = y if own.magnitude is None else y * own.magnitude.double()
        for more in (bias, None if own.shift is None else own.shift.double()):
            y = y if more is None else y + more
        rows.append(y if own.of_output is None else y * own.of_output.double())
    return torch.stack(rows)


def normed(part: NormPart | None, x: Tensor) -> Tensor:
    if part is None:
        return x
    return x * (x.square().mean(-1, keepdim=True) + part.eps).rsqrt() * (part.weight.double() + part.offset)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[heads, dim] of one text."""
    low, high, rest = x[:, : ROTARY // 2], x[:, ROTARY // 2 : ROTARY], x[:, ROTARY:]
    half = torch.cat([-high, low], 1)
    return torch.cat([x[:, :ROTARY] * cos + half * sin, rest], 1)


def plainly(drawn: Drawn, kind: str, terms: dict[tuple[int, str], list[RowTerm]]) -> tuple[Tensor, list[Tensor]]:
    """``(states, each text's keys of the last layer)`` in float64."""
    x, kept = drawn.x.double(), list[Tensor]()
    for number, parts in enumerate(drawn.parts):

        def by(name: str, given: Tensor, number: int = number, parts: LayerParts = parts) -> Tensor:
            return product(parts.maps[name], given, terms.get((number, name), ()))

        given = normed(parts.norms.get("input"), x)
        q, k, v = (by(name, given).view(len(x), -1, DIM) for name in "qkv")
        q, k = normed(parts.norms.get("q"), q), normed(parts.norms.get("k"), k)
        mixed, kept = [], []
        for row, position in enumerate(drawn.positions.tolist()):
            cos, sin = drawn.cos[row].double(), drawn.sin[row].double()
            held = [t[drawn.pages[row]].flatten(0, 1)[:position].double() for t in (parts.keys, parts.values)]
            keys = torch.cat([held[0], turned(k[row], cos, sin)[None]])
            values = torch.cat([held[1], v[row][None]])
            kept.append(keys)
            first = max(0, position + 1 - parts.window) if parts.window else 0
            keys, values = (t[first:].repeat_interleave(HEADS // KV_HEADS, 1) for t in (keys, values))
            scores = torch.einsum("hd,thd->ht", turned(q[row], cos, sin), keys) * parts.scale
            if parts.softcap:
                scores = parts.softcap * torch.tanh(scores / parts.softcap)
            mixed.append(torch.einsum("ht,thd->hd", scores.softmax(1), values).flatten())
        x = x + by("o", torch.stack(mixed))
        given = normed(parts.norms.get("mlp"), x)
        x = x + by("down", ACTIVATIONS[kind](by("gate", given)) * by("up", given))
    return x, kept


def decoded(library: Library, drawn: Drawn, kind: str, rows: Sequence[int] | None = None,
            terms: dict[tuple[int, str], list[RowTerm]] | None = None) -> Tensor:  # fmt: skip
    layers = Layers(drawn.parts, heads=HEADS, dim=DIM, rotary=ROTARY, kind=kind)
    layers.place(terms or {})
    chosen = list(range(len(drawn.x))) if rows is None else list(rows)
    x = drawn.x[chosen].clone()
    layers.decode(library, x, (drawn.cos[chosen], drawn.sin[chosen]), drawn.positions[chosen],
                  [drawn.pages[row] for row in chosen])  # fmt: skip
    return x


def far(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).abs().max() / truth.abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_a_step_is_what_the_layers_compute(library: Library, kind: str, dtype: torch.dtype) -> None:
    drawn = Drawn(dtype)
    truth, keys = plainly(drawn, kind, {})
    assert far(decoded(library, drawn, kind), truth) < CLOSE[dtype]
    for row, position in enumerate(drawn.positions.tolist()):  # and what comes later will find them
        own = drawn.parts[-1].keys[drawn.pages[row]].flatten(0, 1)[position]
        assert far(own, keys[row][-1]) < CLOSE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "how",
    [{"window": 3}, {"window": 1}, {"softcap": 1.5}, {"bias": False}, {"norms": ("input", "mlp")}, {"offset": 1.0}],
    ids=str,
)
def test_every_kind_of_layer(library: Library, how: dict[str, object], dtype: torch.dtype) -> None:
    drawn = Drawn(dtype, **how)  # type: ignore[arg-type]
    truth, _ = plainly(drawn, "silu", {})
    assert far(decoded(library, drawn, "silu"), truth) < CLOSE[dtype]
    assert far(decoded(library, Drawn(dtype), "silu"), truth) > 5 * CLOSE[dtype]  # it is another layer


@pytest.mark.parametrize("dtype", DTYPES)
def test_adapters_add_to_their_own_rows(library: Library, dtype: torch.dtype) -> None:
    drawn = Drawn(dtype)
    terms = drawn.terms(dtype)
    truth, _ = plainly(drawn, "silu", terms)
    assert far(decoded(library, drawn, "silu", terms=terms), truth) < CLOSE[dtype]
    for gone in terms:
        left = {place: rows for place, rows in terms.items() if place != gone}
        assert far(decoded(library, drawn, "silu", terms=left), truth) > 3 * CLOSE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_the_same_to_the_bit_in_any_company(library: Library, dtype: torch.dtype) -> None:
    drawn = Drawn(dtype)
    together = decoded(library, drawn, "silu")
    for row in range(len(drawn.x)):
        assert torch.equal(decoded(library, drawn, "silu", rows=[row])[0], together[row])
    assert torch.equal(decoded(library, drawn, "silu", rows=[4, 2, 0]), together[[4, 2, 0]])


@pytest.mark.usefixtures("two_threads")
def test_threads_change_no_bit(library: Library) -> None:
    drawn = Drawn(torch.bfloat16)
    library.use_threads(2)
    two = decoded(library, drawn, "silu")
    library.use_threads(1)
    assert torch.equal(two, decoded(library, drawn, "silu"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (1, 16, 33), (3, 5, 64), (8, 70, 100), (9, 257, 31), (17, 40, 96)], ids=str
)
def test_skinny_products_are_products(library: Library, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    n, out, inner = shape
    draw = torch.Generator().manual_seed(sum(shape))
    x, weight, bias = (torch.randn(*s, generator=draw) for s in ((n, inner), (out, inner), (out,)))
    weight, bias = weight.to(dtype), bias.to(dtype)
    truth = x.double() @ weight.double().T + bias.double()
    found = skinny(library, x, weight, bias)
    assert found.dtype == torch.float32
    assert far(found, truth) < CLOSE[dtype]
    assert far(skinny(library, x, weight), truth - bias.double()) < CLOSE[dtype]
    for row in range(n):
        assert torch.equal(skinny(library, x[row : row + 1].contiguous(), weight, bias)[0], found[row])


def test_what_c_would_trust_is_asserted(library: Library) -> None:
    drawn = Drawn(torch.float32)
    layers = Layers(drawn.parts, heads=HEADS, dim=DIM, rotary=ROTARY, kind="silu")
    angles = drawn.cos, drawn.sin

    def step(positions: Tensor, pages: list[Tensor]) -> None:
        layers.decode(library, drawn.x.clone(), angles, positions, pages)

    for positions, pages in [
        (drawn.positions + PAGE, drawn.pages),  # behind the pages that a text has
        (-drawn.positions - 1, drawn.pages),
        (drawn.positions, [torch.tensor([10]), *drawn.pages[1:]]),  # a page that there is not
        (drawn.positions, drawn.pages[:-1]),
    ]:
        with pytest.raises(AssertionError):
            step(positions, pages)
    rank = MOST_RANK + 1
    for term in (
        RowTerm(0, 1, torch.zeros(rank, HIDDEN), torch.zeros(rank, HEADS * DIM)),
        RowTerm(0, 1, torch.zeros(2, HIDDEN + 1), torch.zeros(2, HEADS * DIM)),
        RowTerm(0, 1, torch.zeros(2, HIDDEN)),
        RowTerm(1, 1, shift=torch.zeros(HEADS * DIM)),
        RowTerm(0, 1, magnitude=torch.zeros(HEADS * DIM, dtype=torch.float64)),
    ):
        with pytest.raises(AssertionError):
            layers.place({(0, "q"): [term]})
