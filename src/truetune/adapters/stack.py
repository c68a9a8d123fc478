"""The sum of several adapters on a model, as one that stands where they would."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor
from torch.nn import Parameter

from truetune.adapters.base import Adapter, LowRankUpdate
from truetune.adapters.combine import Combination
from truetune.adapters.composed import attachment_of, layers_of
from truetune.adapters.expert_lora import ExpertsLoRA
from truetune.adapters.held import Held, Part
from truetune.adapters.inject import Attachment
from truetune.adapters.lora_embedding import TiedHead
from truetune.adapters.methods import trained_parts
from truetune.adapters.summed import Summed
from truetune.config.adapter import AdapterConfig
from truetune.errors import AdapterError
from truetune.ops.rng import generator

_NO_SUM = {
    "dora": "it gives each row of W + s B A a length of its own, and two lengths have no sum",
    "ia3": "it multiplies what layers put out, and adds nothing to it",
    "prompt": "it puts tokens in front of the text, and nothing says whose come first",
    "ptuning": "it puts tokens in front of the text, and nothing says whose come first",
    "prefix": "it puts keys and values in front of every layer, and nothing says whose come first",
    "llama-adapter": "what it adds depends on keys and values that an adapter of another kind changes",
    "bottleneck": "it reads what the layer puts out, which an adapter of another kind changes",
}
_AMONG_THEMSELVES = ("llama-adapter", "bottleneck")  # what each adds goes by the frozen layer alone


def check_additive(held: Held, name: str) -> None:
    """Raises AdapterError with the reason, for an adapter whose effect is no sum with another's."""
    kind = held.attachment.config.kind
    if kind in _NO_SUM:
        reason = _NO_SUM[kind]
    elif held.attachment.rows:
        reason = "it has rows of tokens of its own, which stand in the place of the base's"
    elif any(isinstance(layer, ExpertsLoRA) for layer in held.layers.values()):
        reason = "it adapts experts that are one parameter (target_parameters), whose module is no map that adds up"
    else:
        return
    raise AdapterError(
        f"adapter '{name}' ({kind}) can be used alone and with weight 1 only",
        ("because", reason),
        ("way out", "lora, adalora and vera can be added up; so can biases, norms and other parts trained in full; and "
         "llama-adapter or bottleneck with others of its kind, beside a base in memory"),
    )  # fmt: skip


def _same_kind(helds: Mapping[str, Held]) -> bool:
    """Whether all of them add to the frozen layers, each for itself."""
    configs = [held.attachment.config for held in helds.values()]
    return (
        configs[0].kind in _AMONG_THEMSELVES
        and len({config.kind for config in configs}) == 1
        and not any(
            getattr(c, "llama_adapter_v2", False) or getattr(c, "adapter_reads", "") == "stream" for c in configs
        )
        and not any(held.attachment.rows for held in helds.values())
    )


def _reaches_further(config: AdapterConfig) -> bool:
    """Whether it does more than add to single layers: scales them as well, or reads the residual stream."""
    return getattr(config, "llama_adapter_v2", False) or getattr(config, "adapter_reads", "part") == "stream"


def _beside_each_other(helds: Mapping[str, Held], weights: Mapping[str, float]) -> Held:
    """Adapters of one kind that each read what the frozen layer reads and makes."""
    places = {path: place for held in helds.values() for path, place in held.places.items()}
    layers: dict[str, Adapter] = {}
    for path in places:
        here = {name: held.layers[path] for name, held in helds.items() if path in held.layers}
        layers[path] = Summed(list(here.values()), [weights[name] for name in here])
    places = {path: replace(place, own=layers[path]) for path, place in places.items()}
    attached = next(iter(helds.values())).attachment
    return Held(attached, layers, places, _summed_parts(helds, weights))


def combined_updates(
    updates: Mapping[str, Mapping[str, LowRankUpdate]],
    weights: Mapping[str, float],
    combination: Combination,
    *,
    seed: int = 0,
) -> dict[str, LowRankUpdate]:
    """Path → one update of several adapters', on every layer that any of them is on.

    Args:
        updates: name → path → update.
        weights: by name.
        seed: of what DARE drops; each layer draws from a generator of its own.
    Raises:
        AdapterError: as ``Combination.of``, with the layer.
    """
    result = {}
    for path in dict.fromkeys(path for found in updates.values() for path in found):
        here = {name: found[path] for name, found in updates.items() if path in found and len(found[path].a)}
        if not here:  # of AdaLoRA, a layer may have no rank left
            continue
        draws = generator(seed, "dare", path)
        try:
            result[path] = combination.of(list(here.values()), [weights[name] for name in here], draws)
        except AdapterError as error:
            raise AdapterError(f"{path}: {error.message}", *error.notes) from None
    return result


def tied_of(helds: Mapping[str, Held]) -> tuple[str, ...]:
    """The paths of (table, head) that the sum of these changes as one.

    Raises:
        AdapterError: they are one matrix to some, and another changes just one of the two.
    """
    found = {held.attachment.tied: name for name, held in helds.items() if _ties(held)}
    if not found:
        return ()
    (tied, owner), *_ = found.items()
    for name, held in helds.items():
        if not _ties(held) and set(tied) & set(held.layers):
            raise AdapterError(
                f"adapter '{owner}' changes the table and the head as one matrix, and '{name}' just one of the two",
                ("way out", "use them one at a time"),
            )
    return tied


def _ties(held: Held) -> bool:
    return any(isinstance(layer, TiedHead) for layer in held.layers.values())


def stacked(helds: Mapping[str, Held], weights: Sequence[float]) -> Held:
    """The sum, each contribution times its weight.

    Raises:
        AdapterError: a method that has no sum; by name and with the reason.
    """
    by_name, same = dict(zip(helds, weights, strict=True)), _same_kind(helds)
    for name, held in helds.items():
        if not same:
            check_additive(held, name)
        held.follow()  # those that are not in use may lie where the model was before
    if same:
        return _beside_each_other(helds, by_name)
    updates = combined_updates({n: h.updates for n, h in helds.items()}, by_name, Combination("cat"))
    tied = tied_of(helds)
    known = {path: place for held in helds.values() for path, place in held.places.items()}
    layers = layers_of({path: place.base for path, place in known.items()}, updates, tied)
    places = {path: replace(known[path], own=layer) for path, layer in layers.items()}
    return Held(_attachment(helds, updates, tied), layers, places, _summed_parts(helds, by_name))


def _attachment(helds: Mapping[str, Held], updates: Mapping[str, LowRankUpdate], tied: tuple[str, ...]) -> Attachment:
    """The layers' as a LoRA, and every part that any of them trained in full."""
    found = [held.attachment for held in helds.values()]
    if not updates:
        return found[0]
    made = attachment_of(updates, tied)
    biased = any("bias" in trained_parts(each.config) for each in found)
    config = made.config.model_copy(update={"trainable": ("bias",) if biased else ()})
    full = dict.fromkeys(path for each in found for path in each.full_modules)
    return replace(made, config=config, full_modules=tuple(full))


def _summed_parts(helds: Mapping[str, Held], weights: Mapping[str, float]) -> tuple[Part, ...]:
    """θ + Σ w (θ_i - θ) in every place where an adapter has a part of its own; shared ones stay shared."""
    places: dict[tuple[int, str], list[tuple[Part, float]]] = {}
    for name, held in helds.items():
        for part in held.parts:
            places.setdefault((id(part.owner), part.name), []).append((part, weights[name]))
    made: dict[tuple[int, ...], Parameter] = {}
    result = []
    for owns in places.values():
        first, key = owns[0][0], tuple(id(part.own) for part, _ in owns)
        if key not in made:
            made[key] = _part_of_sum(first.base, [(part.own, weight) for part, weight in owns])
        result.append(replace(first, own=made[key]))
    return tuple(result)


def _part_of_sum(base: Tensor, owns: Sequence[tuple[Tensor, float]]) -> Parameter:
    """Formed in float32 and rounded once."""
    start = base.detach().float()
    total = start + sum(weight * (own.detach().float() - start) for own, weight in owns)
    return Parameter(total.to(base.dtype))
