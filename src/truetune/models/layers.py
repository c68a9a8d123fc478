"""Where a model of any family keeps its layers and its head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from truetune.adapters.base import Adapter
from truetune.adapters.token_rows import HeadRows
from truetune.ops.loss import Head

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
    few = module if isinstance(module, HeadRows) and type(module.base) is nn.Linear else None
    frozen: Any = few.base if few is not None else module if plain else None
    divisor = getattr(config, "logits_scaling", None) or 1.0  # Granite
    return Head(
        module=module,
        weight=frozen.weight if frozen is not None else None,
        bias=frozen.bias if frozen is not None else None,
        scale=float(getattr(config, "logit_scale", None) or 1.0) / divisor,  # Cohere
        softcap=float(getattr(config, "final_logit_softcapping", None) or 0.0),
        parameters=parameters,
        ids=few.ids if few is not None else None,
        rows=few.trained() if few is not None else None,
    )


def _with_table(head: Adapter, own: tuple[Any, ...]) -> tuple[Any, ...]:
    """A tied head trains what belongs to the embedding table."""
    return (*own, *(p for p in head.shared_parameters() if p.requires_grad))
