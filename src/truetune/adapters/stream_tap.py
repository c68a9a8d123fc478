"""Where a decoder layer's residual stream is read: at the norm before attention, and at the one before the MLP."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from truetune.adapters.base import Adapter
from truetune.config.other_methods import Bottleneck
from truetune.errors import AdapterError

# Families whose layers are x + attention(norm(x)), then x + mlp(norm(x)), and what these norms are called.
_NORMS = {
    "gpt2": ("ln_1", "ln_2"),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), ("input_layernorm", "post_attention_layernorm")),
}
_ALL = {name for pair in _NORMS.values() for name in pair}


class StreamTap(Adapter):
    """A norm that keeps what it is given until the part behind it has read it; it computes what its base does."""

    files = {}  # noqa: RUF012 - ClassVar in the contract

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self._seen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> [..., hidden], as the base."""
        self._seen = x
        y: Tensor = self.base(x)
        return y

    def taken(self) -> Tensor:
        """[..., hidden], the stream as it was last; once."""
        seen, self._seen = self._seen, None
        assert seen is not None, "the part is computed behind its norm"
        return seen

    def merged_weight(self) -> Tensor:
        """Raises AdapterError: what reads the stream does not fold into weights."""
        raise AdapterError("a bottleneck adapter does not fold into weights: serve it beside the base")


def stream_norms(model: nn.Module, layer: str, config: Bottleneck) -> list[str]:
    """Paths of a layer's norms whose inputs the networks of ``config.placement`` read.

    Raises:
        AdapterError: a family whose residual stream is not known here.
    """
    kind = str(getattr(model.config, "model_type", ""))
    if kind not in _NORMS:
        raise AdapterError(
            f"--adapter-reads stream: {kind} is not built in a way that is known here",
            ("expected", ", ".join(_NORMS)),
            ("way out", "--adapter-reads part"),
        )
    names = _NORMS[kind] if config.placement == "houlsby" else _NORMS[kind][1:]
    return [f"{layer}.{name}" for name in names]


def is_norm(path: str) -> bool:
    """Whether a site is one of these norms."""
    return path.rpartition(".")[2] in _ALL


def tap_of(norm: nn.Module, path: str, shared: dict[str, Any]) -> StreamTap:
    """The norm with its tap, known to the parts of its layer."""
    return shared.setdefault("taps", {}).setdefault(path, StreamTap(norm))  # type: ignore[no-any-return]


def tap_before(path: str, shared: dict[str, Any]) -> StreamTap:
    """The tap whose norm a part stands behind: the layer's own for the attention, or for the MLP."""
    taps: dict[str, StreamTap] = shared["taps"]
    layer = max((own.rpartition(".")[0] for own in taps if path.startswith(own.rpartition(".")[0] + ".")), key=len)
    within = [own for own in taps if own.rpartition(".")[0] == layer]
    first, last = within[0], within[-1]  # the same where only the MLP is read
    is_attention = "attn" in path.removeprefix(layer).split(".")[1]
    return taps[first if is_attention else last]
