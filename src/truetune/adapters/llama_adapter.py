"""LLaMA-Adapter: gated attention to trained prompts in the top layers.  Zhang et al. 2023, arXiv:2303.16199, section 3.

    y = attention(x) + O(g · softmax(q Kᵀ / √d) V),   K = W_k P, V = W_v P

P [length, hidden] is trained and so is g, which starts at zero, so an untrained adapter changes nothing. As in PEFT, g
is one number per layer without a tanh (with ``gates="head"`` one per head, as in litgpt), q is turned by its position,
the prompts' keys are not, and on GPT-2 nothing but the sum follows the values. A prompt stands
at no position, so packed rows, padding and caches are as they were.

The second version (Gao et al. 2023, arXiv:2304.15010, section 3.1) trains the norms too, and a bias and a scale behind
every linear layer (``adapters.scaled_linear``); an attention with prompts owns those of its maps.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from truetune.adapters.attention_layout import AttentionLayout, Part, attention_layouts
from truetune.adapters.base import Adapter
from truetune.adapters.beneath import own_path
from truetune.adapters.methods import Site
from truetune.adapters.peft_fields import Fields
from truetune.adapters.rotary import turned
from truetune.adapters.scaled_linear import OutputScale, ScaledLinear
from truetune.adapters.summed import plus
from truetune.adapters.targets import ALL_LINEAR, output_head, resolve_targets
from truetune.config.other_methods import LlamaAdapter
from truetune.errors import AdapterError
from truetune.ops.frozen import frozen_weight, is_linear

CHANGES_TABLE = False
TRAINS: tuple[str, ...] = ()
PEFT_LACKS = ("bias", "ensure_weight_tying", "modules_to_save")

_SECOND_TYPE = "TRUETUNE_LLAMA_ADAPTER"  # as ``peft_config`` calls what PEFT must not read
_SKIPPED = 2  # lowest layers without prompts, unless told otherwise
_WITHOUT_END = ("gpt2",)  # as PEFT has it
_WITH_BIAS = ("llama", "mistral")  # PEFT's files for these count the last map's bias twice, where there is one


class AdaptedAttention(Adapter):
    """A frozen attention with trained prompts beside its own keys and values.

    Args:
        base: the attention module, which returns a tuple that starts with [B, T, hidden].
        layout: where it makes queries, keys and values.
        length: prompts.
        family: the model's type, for what PEFT does in one and not in another.
        by_head: whether g is [heads, 1], and not [1].
        is_second: whether its maps have a trained bias and scale.
        is_mixed: whether the prompts' keys and values are litgpt 0.5's: the outputs of the three maps, one after the
            other, are taken for those of one map that has each group's queries, key and value side by side.
    """

    files = {"prompt": "adaption_prompt", "gate": "adaption_gate"}  # noqa: RUF012 - ClassVar in the contract

    def __init__(
        self,
        base: nn.Module,
        layout: AttentionLayout,
        length: int,
        family: str,
        generator: torch.Generator,
        *,
        by_head: bool = False,
        is_second: bool = False,
        is_mixed: bool = False,
    ) -> None:
        super().__init__()
        self.base, self.layout, self.family = base.requires_grad_(False), layout, family
        self.is_mixed = is_mixed
        frozen = frozen_weight(self._map(layout.key))
        self.prompt = nn.Parameter(torch.randn(1, length, frozen.in_features, generator=generator).to(frozen.device))
        self.gate = nn.Parameter(torch.zeros((layout.heads, 1) if by_head else (1,), device=frozen.device))
        self.maps = tuple(
            path for path, m in base.named_modules() if is_second and is_linear(m) and own_path(path) == path
        )
        self.scales = nn.ModuleList(OutputScale.of(base.get_submodule(path)) for path in self.maps)

    def adapter_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The prompts and their gates; what is behind each map by the map's name."""
        yield from super().adapter_parameters()
        for path, scale in self._behind().items():
            yield from scale.named(f"{path}.")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the base's; the queries are those that it computes itself."""
        with self._scaled():
            made, seen = self.observed(*args, **kwargs)
            return plus(made, self.added(seen))

    def observed(self, *args: Any, **kwargs: Any) -> tuple[Any, tuple[Tensor, tuple[Tensor, Tensor] | None]]:
        """See ``adapters.summed.Adding``: the queries before they are turned, and by what they are turned."""
        outputs: list[Tensor] = []
        queries = self._map(self.layout.query)
        handle = queries.register_forward_hook(lambda _, inputs, output: outputs.append(output))
        try:
            made = self.base(*args, **kwargs)
        finally:
            handle.remove()
        return tuple(made), (outputs[0], kwargs.get("position_embeddings"))

    def added(self, seen: tuple[Tensor, tuple[Tensor, Tensor] | None]) -> Tensor:
        """[B, T, hidden]."""
        return self._beside(*seen)

    @contextlib.contextmanager
    def _scaled(self) -> Iterator[None]:
        """The maps put out s · (W x + b) inside."""
        with contextlib.ExitStack() as stack:
            for path, scale in self._behind().items():
                handle = self.base.get_submodule(path).register_forward_hook(
                    lambda _, inputs, output, scale=scale: scale(output)
                )
                stack.callback(handle.remove)
            yield

    def _behind(self) -> dict[str, OutputScale]:
        return {path: cast(OutputScale, scale) for path, scale in zip(self.maps, self.scales, strict=True)}

    def _beside(self, output: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        """[B, T, hidden] of what the map of the queries puts out."""
        layout, dtype = self.layout, output.dtype
        q = self._heads(output, layout.query, "q_norm")
        if rotary is not None:
            q = turned(q, *(t.unsqueeze(-2) for t in rotary))
        prompt = self.prompt.to(dtype)[0]
        each = layout.heads // layout.kv_heads
        k, v = (heads.repeat_interleave(each, dim=-2) for heads in self._keys_and_values(prompt))
        scale = getattr(self.base, "scaling", None) or 1 / math.sqrt(layout.head_dim)
        scores = torch.einsum("bthd,nhd->bthn", q, k) * scale
        shares = self.gate * torch.softmax(scores.float(), dim=-1)
        return self._end(torch.einsum("bthn,nhd->bthd", shares.to(dtype), v).flatten(-2))

    def _keys_and_values(self, prompt: Tensor) -> tuple[Tensor, Tensor]:
        """[length, heads of keys, head_dim] of each."""
        layout = self.layout
        if self.is_mixed:
            parts = (layout.query, layout.key, layout.value)
            rows = torch.cat([self._heads(self._map(part)(prompt), part, "").flatten(-2) for part in parts], dim=-1)
            groups = rows.view(len(rows), layout.kv_heads, layout.heads // layout.kv_heads + 2, layout.head_dim)
            return groups[:, :, -2], groups[:, :, -1]
        key, value = layout.key, layout.value
        return self._heads(self._map(key)(prompt), key, "k_norm"), self._heads(self._map(value)(prompt), value, "")

    def _end(self, mixed: Tensor) -> Tensor:
        """The attention's last map; its bias is in what the base returns already."""
        if self.family in _WITHOUT_END:
            return mixed
        name = self.layout.output.removeprefix(f"{self.layout.path}.")
        last = self.base.get_submodule(name)
        y: Tensor = last(mixed)
        bias = getattr(last, "bias", None)
        if scale := self._behind().get(name):
            constant: Tensor = scale(torch.zeros_like(y[:1, :1]) if bias is None else bias)
            return y - constant
        return y if bias is None or self.family in _WITH_BIAS else y - bias

    def _heads(self, y: Tensor, part: Part, norm: str) -> Tensor:
        """[..., heads, head_dim] of a map's output, through the heads' own norm where there is one (Qwen 3)."""
        chosen = y if part.columns is None else y[..., part.columns.to(y.device)]
        heads = chosen.reshape(*chosen.shape[:-1], -1, self.layout.head_dim)
        own = getattr(self.base, norm, None) if norm else None
        if own is not None:
            heads = own(heads)
        return heads

    def _map(self, part: Part) -> nn.Module:
        return self.base.get_submodule(part.path.removeprefix(f"{self.layout.path}."))

    def merged_weight(self) -> Tensor:
        """Raises AdapterError: an attention has more than one weight, and this is in none."""
        raise AdapterError("prompts beside an attention do not fold into its weights: serve them beside the base")


def sites(model: nn.Module, config: LlamaAdapter) -> list[str]:
    """Paths of the attentions that get prompts; with the second version, those of all linear layers outside them.

    Raises:
        AdapterError: more layers than the model has, or an attention that is not known.
    """
    layouts = attention_layouts(model, config.kind)
    count = len(layouts) - _SKIPPED if config.adapter_layers is None else config.adapter_layers
    if not 0 < count <= len(layouts):
        raise AdapterError(
            f"--adapter-layers {config.adapter_layers}: the model has {len(layouts)}"
            if config.adapter_layers
            else f"the model has {len(layouts)} layers, and the lowest {_SKIPPED} get no prompts",
            ("way out", f"--adapter-layers {len(layouts)}, or fewer"),
        )
    chosen = layouts[-count:]
    for layout in chosen:
        _check_norm(model, layout)
    attentions = [layout.path for layout in chosen]
    if not config.llama_adapter_v2:
        return attentions
    linear = resolve_targets(model, (ALL_LINEAR,))
    outside = [path for path in linear if not path.startswith(tuple(f"{own}." for own in attentions))]
    head = output_head(model) if config.scaled_head else None
    return [*attentions, *outside, *(path for path, module in model.named_modules() if module is head)]


def trains(config: LlamaAdapter) -> tuple[str, ...]:
    """The parts of the base that are trained with it."""
    return ("norm",) if config.llama_adapter_v2 else TRAINS


def _check_norm(model: nn.Module, layout: AttentionLayout) -> None:
    """A norm over all heads at once would need them in another shape."""
    attention = model.get_submodule(layout.path)
    for name in ("q_norm", "k_norm", "q_layernorm", "k_layernorm"):
        weight = getattr(getattr(attention, name, None), "weight", None)
        if hasattr(attention, name) and (weight is None or weight.shape != (layout.head_dim,) or "layer" in name):
            kind = getattr(model.config, "model_type", "this model")
            raise AdapterError(
                f"--method llama-adapter: {kind} has a norm behind its queries that is not known here",
                ("way out", "--method prompt"),
            )


def wrap(layer: nn.Module, config: LlamaAdapter, site: Site) -> Adapter:
    """The attention with its prompts, or the linear layer with what is behind it."""
    if is_linear(layer):
        return ScaledLinear(layer)
    if "layouts" not in site.shared:  # once, by the attentions as the model has them
        site.shared["layouts"] = {found.path: found for found in attention_layouts(site.model, config.kind)}
    family = str(getattr(site.model.config, "model_type", ""))
    draws = site.generator("llama-adapter")
    layout, by_head = site.shared["layouts"][site.path], config.gates == "head"
    return AdaptedAttention(
        layer, layout, config.adapter_length, family, draws, by_head=by_head, is_second=config.llama_adapter_v2,
        is_mixed=config.mixed_maps,
    )  # fmt: skip


def to_peft(model: nn.Module, config: LlamaAdapter, sites: Sequence[str]) -> dict[str, Any]:
    """The method's own fields of ``adapter_config.json``."""
    attentions = [path for path in sites if isinstance(model.get_submodule(path), AdaptedAttention)]
    second = {"peft_type": _SECOND_TYPE, "llama_adapter_v2": True}  # PEFT would take it for the first version
    second |= {"scaled_head": True} if config.scaled_head else {}
    return {
        "target_modules": attentions[0].rpartition(".")[2],
        "adapter_len": config.adapter_length,
        "adapter_layers": len(attentions),
        **(second if config.llama_adapter_v2 else {}),
        **({"gates": "head"} if config.gates == "head" else {}),  # whose shape PEFT refuses
        **({"peft_type": _SECOND_TYPE, "mixed_maps": True} if config.mixed_maps else {}),
    }


def from_peft(config: Mapping[str, Any], folder: Path) -> LlamaAdapter:
    """The settings in our terms."""
    fields = Fields(config, folder, without_effect=("target_modules",))
    return fields.build(
        LlamaAdapter,
        adapter_length=("adapter_len", fields.take("adapter_len")),
        adapter_layers=("adapter_layers", fields.take("adapter_layers")),
        gates=("gates", fields.take("gates", "layer")),
        llama_adapter_v2=("llama_adapter_v2", bool(fields.take("llama_adapter_v2"))),
        scaled_head=("scaled_head", bool(fields.take("scaled_head"))),
        mixed_maps=("mixed_maps", bool(fields.take("mixed_maps"))),
    )
