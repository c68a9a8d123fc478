"""What a model can be trusted with, found out by trying it: packed rows, fused layers, a loss without whole logits.

Every layer is given the very input that it has when two short texts run alone, and must give the same output when
they share a row: so no rounding error of the layers before it hides, or feigns, a difference.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from truetune.errors import ModelError
from truetune.models.attention import (
    AttentionSettings,
    PackedRow,
    Witness,
    borders,
    row,
    segmented,
    set_to,
    witness,
)
from truetune.models.families import DecoderParts, decoder_parts
from truetune.models.fused import FusedLayer, standing_in
from truetune.models.layers import decoder, decoder_layers, head_of
from truetune.models.library import quiet
from truetune.models.precision import name_of
from truetune.ops.finite import are_finite
from truetune.ops.loss import Head
from truetune.quant.linear8bit import unrounded

_PROBED_WINDOW = 512  # beyond this, a text longer than the window costs more to try than it could still show
_MISFITS = (ValueError, TypeError, RuntimeError, AttributeError, IndexError, KeyError)


@dataclass(frozen=True)
class Survey:
    """What was found.

    Attributes:
        packs: packed segments stay apart.
        fusable: the layers that a ``FusedLayer`` computes as they do, with what it needs.
        last: the last layer, where that is known.
        decoder, head: from ids to hidden states to logits, where the two together give the model's own logits.
    """

    packs: bool
    fusable: Mapping[nn.Module, tuple[DecoderParts, AttentionSettings]] = field(default_factory=dict)
    last: nn.Module | None = None
    decoder: nn.Module | None = None
    head: Head | None = None


@dataclass
class _Trace:
    """Inputs and outputs of the layers, [1, T, hidden] each, and what the decoder ends in."""

    inputs: list[Tensor]
    outputs: list[Tensor]
    hidden: list[Tensor] = field(default_factory=list)  # of the decoder, one [tokens, hidden] per text


def survey(model: PreTrainedModel, *, longest: int | None = None) -> Survey:
    """Try a model with a few tokens; it is left as it was.

    A model that ignores the borders of packed texts, mixes tokens by other means, or has an attention of its own kind
    is trained with padding instead. So is one that puts a window or chunks into its masks alone, where segments would
    lose them.

    Args:
        longest: tokens of the longest example. A window that no example exceeds does not matter; every window does when
            this is not known.
    Raises:
        ModelError: the model answers NaN.
    """
    windows = {window for window in _windows_of(model.config) if longest is None or window < longest}
    texts = _texts(model, windows, longest)
    layers, seen = decoder_layers(model), Witness()
    learning = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), quiet(), unrounded():
            alone, scores = _alone(model, layers, texts)
            _check_numbers(model, scores)
            core, head = _head(model, alone, scores)
            with segmented(model), set_to(witness, seen):
                packs = _packs(model, layers, texts, alone, scores)
            windows |= {window for window in seen.windows_in_masks if longest is None or window < longest}
            if not packs or not windows <= {call.window for call in seen.calls.values()}:
                return Survey(False, decoder=core, head=head)
            # Under autocast weights of several dtypes take part in one product, which fused parts don't provide for.
            mixed = torch.is_autocast_enabled(model.device.type)
            fusable = {} if mixed else _fusable(model, layers, texts, alone, seen.calls)
            return Survey(True, fusable, layers[-1] if layers else None, core, head)
    finally:
        for module in learning:
            module.training = True


def _check_numbers(model: PreTrainedModel, scores: Tensor) -> None:
    """NaN is like nothing, itself included: every comparison below would tell of something else."""
    if not scores.isnan().any():
        return
    weights = [(name, tensor) for name, tensor in model.named_parameters() if tensor.is_floating_point()]
    bad = next((name for name, tensor in weights if not are_finite(tensor)), "")
    narrow = next((tensor.dtype for _, tensor in weights if tensor.dtype != torch.float32), None)
    wider = f"--dtype float32, whose range is wider than that of {name_of(narrow)}" if narrow else ""
    raise ModelError(
        "the model answers NaN to a few plain tokens",
        ("likely", f"{bad} holds NaN or infinity" if bad else ""),
        ("way out", "copy or download the model again, or leave the adapter out that brings it" if bad else wider),
    )


def _texts(model: PreTrainedModel, windows: set[int], longest: int | None) -> list[Tensor]:
    vocab = model.get_input_embeddings().weight.shape[0]
    beyond = [min(window + 3, longest or window + 3) for window in windows if window <= _PROBED_WINDOW]
    sizes = (5, max([7, *beyond]))
    return [((torch.arange(size) * (2 * i + 1) + i) % vocab).to(model.device) for i, size in enumerate(sizes)]


def _alone(model: PreTrainedModel, layers: Sequence[nn.Module], texts: Sequence[Tensor]) -> tuple[_Trace, Tensor]:
    """The texts one by one through the model's own attention: ``(what its layers saw, logits [T, vocab])``."""
    traces, scores, hidden = [], [], list[Tensor]()
    core = decoder(model)
    keep = core and core.register_forward_hook(
        lambda *call: hidden.append(getattr(call[2], "last_hidden_state", call[2])[0])
    )
    try:
        for text in texts:
            with _traced(layers) as trace:
                scores.append(model(input_ids=text[None], use_cache=False).logits[0])
            traces.append(trace)
    finally:
        if keep:
            keep.remove()
    if not all(len(t.inputs) == len(t.outputs) == len(layers) for t in traces) or not layers:
        return _Trace([], [], hidden), torch.cat(scores)
    inputs, outputs = (
        [torch.cat(parts, dim=1) for parts in zip(*(getattr(t, side) for t in traces), strict=True)]
        for side in ("inputs", "outputs")
    )
    return _Trace(inputs, outputs, hidden), torch.cat(scores)


def _packs(
    model: PreTrainedModel, layers: Sequence[nn.Module], texts: Sequence[Tensor], alone: _Trace, scores: Tensor
) -> bool:
    """Whether one row with both texts gives what the texts give alone."""
    try:
        with _traced(layers if alone.inputs else [], given=alone.inputs) as packed:
            found = _run(model, texts)
    except _MISFITS:  # borders or positions that it has no parameter for
        return False
    if not alone.inputs:
        return _same(found, scores, torch.zeros_like(scores))
    same = [_same(packed.inputs[0], alone.inputs[0], torch.zeros_like(alone.inputs[0]))]
    same += [_same(*three) for three in zip(packed.outputs, alone.outputs, alone.inputs, strict=True)]
    return all(same) and _same(found, scores, torch.zeros_like(scores))


def _fusable(
    model: PreTrainedModel,
    layers: Sequence[nn.Module],
    texts: Sequence[Tensor],
    alone: _Trace,
    calls: Mapping[nn.Module, AttentionSettings],
) -> dict[nn.Module, tuple[DecoderParts, AttentionSettings]]:
    """The layers that can be computed from fused parts, each tried."""
    if not alone.inputs:
        return {}
    found: dict[nn.Module, tuple[DecoderParts, AttentionSettings]] = {}
    for layer in layers:
        parts = decoder_parts(layer)
        drops = parts is not None and float(getattr(parts.attention, "attention_dropout", 0.0) or 0.0) > 0
        drops |= any(isinstance(m, nn.Dropout) and m.p > 0 for m in layer.modules())  # invisible while it is tried
        if parts is not None and parts.attention in calls and not drops:
            found[layer] = (parts, calls[parts.attention])
    tried = {layer: FusedLayer(*made, layer.forward, recompute="none", is_last=False) for layer, made in found.items()}
    try:
        with segmented(model), standing_in(tried), _traced(layers, given=alone.inputs) as packed:
            _run(model, texts)
    except _MISFITS:
        return {}
    same = [_same(*three) for three in zip(packed.outputs, alone.outputs, alone.inputs, strict=True)]
    return {layer: found[layer] for layer, good in zip(layers, same, strict=True) if good and layer in found}


def _head(model: PreTrainedModel, alone: _Trace, scores: Tensor) -> tuple[nn.Module | None, Head | None]:
    """The decoder and the head, where the one after the other gives the model's logits."""
    core, head = decoder(model), head_of(model)
    if core is None or head is None:
        return None, None
    try:
        found = head.logits(torch.cat(alone.hidden))
    except _MISFITS:
        return None, None
    return (core, head) if _same(found, scores, torch.zeros_like(scores)) else (None, None)


@contextlib.contextmanager
def _traced(layers: Sequence[nn.Module], given: Sequence[Tensor] | None = None) -> Iterator[_Trace]:
    """Record what layers take and give; with ``given``, hand them these inputs in place of their own."""
    trace = _Trace([], [])

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        own = args[0] if args else kwargs["hidden_states"]
        trace.inputs.append(own)
        if given is None:
            return None
        mine = given[len(trace.inputs) - 1]
        return ((mine, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": mine})

    def after(_: nn.Module, args: Any, output: Any) -> None:
        trace.outputs.append(output[0] if isinstance(output, tuple) else output)

    hooks = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    hooks += [layer.register_forward_hook(after) for layer in layers]
    try:
        yield trace
    finally:
        for hook in hooks:
            hook.remove()


def _same(found: Tensor, expected: Tensor, before: Tensor) -> bool:
    """Whether what was added to ``before`` is the same for every token, up to rounding of it and of the sum."""
    wide, low = found.float(), expected.dtype != torch.float32
    error = (wide - expected.float()).norm(dim=-1)
    added = (expected.float() - before.float()).norm(dim=-1)
    whole = expected.float().norm(dim=-1)
    relative, rounding = (4e-2, 2.0**-8) if low else (1e-4, 1e-6)
    return bool((error <= relative * added + rounding * whole).all())


def _run(model: PreTrainedModel, texts: Sequence[Tensor]) -> Tensor:
    """[T, vocab]: the logits of all texts in one packed row."""
    lengths = tuple(len(text) for text in texts)
    positions = torch.cat([torch.arange(n) for n in lengths])[None].to(model.device)
    with set_to(row, PackedRow(lengths)):
        logits: Tensor = model(
            input_ids=torch.cat(list(texts))[None], position_ids=positions, use_cache=False,
            **borders(lengths, model.device),
        ).logits[0]  # fmt: skip
    return logits


def _windows_of(config: Any) -> set[int]:
    """The sizes of the windows and chunks that a config sets, for the layers that it gives them to."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    slides = getattr(text, "use_sliding_window", True) is not False and (not kinds or "sliding_attention" in kinds)
    is_chunked = not kinds or "chunked_attention" in kinds
    sizes = {
        getattr(text, "sliding_window", None) if slides else None,
        getattr(text, "attention_chunk_size", None) if is_chunked else None,
    }
    return {size for size in sizes if isinstance(size, int) and size > 0}
