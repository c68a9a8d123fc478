"""From a micro-batch to its loss, or to the logits of its trained tokens, by the shortest way a model allows."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from truetune.data.pack import Batch
from truetune.models.attention import PackedRow, borders, row, segmented, set_to
from truetune.models.fused import Forward, FusedLayer, Recompute, Recomputed, standing_in
from truetune.models.layers import decoder_layers
from truetune.models.survey import Survey
from truetune.ops.loss import cross_entropy_sum, linear_cross_entropy
from truetune.ops.rng import keyed

_SIZE_STEP = 128
_SCORED_ROWS = 256


@dataclass(frozen=True)
class Path:
    """The way through a model: what a survey found, and whether rows are packed."""

    model: PreTrainedModel
    survey: Survey
    packing: bool

    def loss(self, batch: Batch, *, smoothing: float = 0.0) -> Tensor:
        """The sum of the cross-entropies of the batch's trained tokens, a scalar, with that much label smoothing."""
        head = self.survey.head
        targets = batch.targets.to(self.model.device)
        if head is None:
            return cross_entropy_sum(trained_logits(self.model, batch), targets, smoothing=smoothing)
        keys = _keys_of_trained(batch)
        return linear_cross_entropy(self._hidden(batch), targets, head, smoothing=smoothing, keys=keys)

    def scores(self, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits and targets at the positions that predict a trained token, some rows at a time.

        Yields:
            [n, vocab] in the model's dtype, and [n] int64.
        """
        head, targets = self.survey.head, batch.targets.to(self.model.device)
        if head is None:
            yield trained_logits(self.model, batch), targets
            return
        hidden = self._hidden(batch)
        for start in range(0, len(hidden), _SCORED_ROWS):
            part = slice(start, start + _SCORED_ROWS)
            yield head.logits(hidden[part]), targets[part]

    def _hidden(self, batch: Batch) -> Tensor:
        """[n, hidden]: the decoder's last hidden states at those positions."""
        core = self.survey.decoder
        assert core is not None
        if batch.lengths is None:
            inputs = _padded_inputs(self.model, batch)
            with keyed(batch.keys):
                ids = batch.input_ids.to(self.model.device)
                states: Tensor = core(input_ids=ids, use_cache=False, **inputs).last_hidden_state
            return states[:, batch.columns.to(self.model.device)].flatten(0, 1)[batch.picks.to(self.model.device)]
        packed = _PackedInputs.of(self.model, batch)
        cuts = self.survey.last is not None and isinstance(self.survey.last.__dict__.get("forward"), FusedLayer)
        with set_to(row, PackedRow(packed.lengths, packed.columns if cuts else None)), keyed(packed.keys):
            last: Tensor = core(input_ids=packed.ids, use_cache=False, **packed.keywords).last_hidden_state[0]
        return (last if cuts else last[packed.columns])[: len(batch.columns)]


def _keys_of_trained(batch: Batch) -> Tensor | None:
    """[n] int64: the counters of the positions that predict a trained token, for what the head's adapter drops."""
    if batch.keys is None:
        return None
    return batch.keys.view(batch.input_ids.shape)[:, batch.columns].flatten()[batch.picks]


@contextlib.contextmanager
def prepared(path: Path, *, recompute: Recompute = "none", full_layers: int = 0, fused: bool = True) -> Iterator[None]:
    """Run the model this way inside the block, and leave it as it was.

    Args:
        recompute: what the backward computes again, as ``FusedLayer`` takes it.
        full_layers: the first so many layers are computed again whole. The first, because the backward comes to them
            last: what it makes of them again then takes the place of what the others had kept.
    """
    with contextlib.ExitStack() as stack:
        if path.packing:
            stack.enter_context(segmented(path.model))
        stack.enter_context(standing_in(_forwards(path, recompute, full_layers, fused)))
        yield


def _forwards(path: Path, recompute: Recompute, full_layers: int, fused: bool) -> dict[nn.Module, Forward]:
    fusable = path.survey.fusable if path.packing and fused else {}
    result: dict[nn.Module, Forward] = {}
    for number, layer in enumerate(decoder_layers(path.model)):
        again: Recompute = "full" if number < full_layers else recompute
        if found := fusable.get(layer):
            is_last = layer is path.survey.last
            result[layer] = FusedLayer(*found, layer.forward, recompute=again, is_last=is_last)
        elif again == "full":
            result[layer] = Recomputed(layer.forward)
    return result


@dataclass(frozen=True)
class _PackedInputs:
    """A packed row as the model is given it, rounded up to a size that its products come in."""

    ids: Tensor
    columns: Tensor
    lengths: tuple[int, ...]
    keys: Tensor | None
    keywords: dict[str, Any]

    @classmethod
    def of(cls, model: PreTrainedModel, batch: Batch) -> _PackedInputs:
        assert batch.lengths is not None
        ids, positions, lengths, columns = batch.input_ids, batch.position_ids, batch.lengths, batch.columns
        keys = batch.keys
        if spare := _spare(model, ids.shape[1]):
            filler = torch.arange(spare)
            zeros = torch.zeros_like(filler)[None]  # any place in the model's context: a table may be short
            ids, positions = torch.cat([ids, zeros], dim=1), torch.cat([positions, zeros], dim=1)
            keys = None if keys is None else torch.cat([keys, filler])
            lengths = (*lengths, spare)
        if spare := _spare(model, len(columns)):
            columns = torch.cat([columns, columns.new_zeros(spare)])
        device = model.device
        keywords = {"position_ids": positions.to(device), **borders(lengths, device)}
        keys = None if keys is None else keys.to(device)  # here, and not once per layer
        return cls(ids.to(device), columns.to(device), lengths, keys, keywords)


def trained_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """[n, vocab]: the logits at the positions that predict a trained token, through the model's own forward."""
    if batch.lengths is None:
        with keyed(batch.keys):
            logits = _call(model, batch.input_ids, batch.columns, **_padded_inputs(model, batch))
        return logits.flatten(0, 1)[batch.picks.to(model.device)]
    packed = _PackedInputs.of(model, batch)
    with set_to(row, PackedRow(packed.lengths)), keyed(packed.keys):
        # There is one row, and its columns are exactly what is wanted: a gather would only cost a scatter backwards.
        return _call(model, packed.ids, packed.columns, **packed.keywords)[0, : len(batch.columns)]


def _padded_inputs(model: PreTrainedModel, batch: Batch) -> dict[str, Any]:
    assert batch.attention_mask is not None
    # Right padding: attention is causal, so real tokens never see it; positions need no help either.
    return {
        "position_ids": batch.position_ids.to(model.device),
        "attention_mask": batch.attention_mask.to(model.device),
    }


def _call(model: PreTrainedModel, ids: Tensor, columns: Tensor, **inputs: Any) -> Tensor:
    """[B, c, vocab]: the logits of these columns."""
    columns = columns.to(model.device)
    keeps = "logits_to_keep" in inspect.signature(type(model).forward).parameters
    if keeps:
        inputs["logits_to_keep"] = columns
    logits: Tensor = model(input_ids=ids.to(model.device), use_cache=False, **inputs).logits
    return logits if keeps else logits[:, columns]


def _spare(model: PreTrainedModel, size: int) -> int:
    """How many places to add so that low-precision products on a CPU come in few sizes.

    oneDNN compiles a kernel for every size it meets, which took longer than the product itself: 2 to 13 ms against 1.
    The added tokens are a segment of their own and nothing reads them.
    """
    # The frozen part's: what an adapter trains is float32, and ``model.dtype`` is that of whatever comes first.
    frozen = (p.dtype for p in model.parameters() if p.is_floating_point() and not p.requires_grad)
    low = next(frozen, model.dtype) != torch.float32 or torch.is_autocast_enabled("cpu")
    return -size % _SIZE_STEP if low and model.device.type == "cpu" else 0
