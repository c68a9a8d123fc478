"""Where a model of any family keeps its layers and its head."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from truetune.adapters.base import Adapter
from truetune.ops.loss import Head


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The repeated layers: of the shallowest lists of modules the longest one; empty where there is none."""
    lists = [(path.count("."), -len(m), m) for path, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    return list(min(lists, key=lambda item: item[:2])[2]) if lists else []


def decoder(model: PreTrainedModel) -> nn.Module | None:
    """The part of a causal language model that ends in hidden states."""
    found = model.base_model
    return found if isinstance(found, nn.Module) and found is not model else None


def head_of(model: PreTrainedModel) -> Head | None:
    """What makes logits of the decoder's last hidden states, by what is known of families; to be tried before use."""
    module = model.get_output_embeddings()
    if module is None:
        return None
    config: Any = model.config.get_text_config()
    parameters = tuple(p for p in module.parameters() if p.requires_grad)
    plain = type(module) is nn.Linear and not parameters
    if not plain and isinstance(module, Adapter):
        parameters = _with_table(module, parameters)
    divisor = getattr(config, "logits_scaling", None) or 1.0  # Granite
    return Head(
        module=module,
        weight=module.weight if plain else None,
        bias=module.bias if plain else None,
        scale=float(getattr(config, "logit_scale", None) or 1.0) / divisor,  # Cohere
        softcap=float(getattr(config, "final_logit_softcapping", None) or 0.0),
        parameters=parameters,
    )


def _with_table(head: Adapter, own: tuple[Any, ...]) -> tuple[Any, ...]:
    """A tied head trains what belongs to the embedding table."""
    return (*own, *(p for p in head.shared_parameters() if p.requires_grad))
