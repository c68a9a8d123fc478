"""Tiny models with adapters, and what a step through them gives by every way there is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from reference.norms import distance
from step_models import LENGTHS, VOCAB, rows
from truetune.adapters.inject import attach
from truetune.config.lora import LoRA
from truetune.data.plan import StepPlan
from truetune.models.forward import Path, prepared
from truetune.models.fused import Recompute
from truetune.models.survey import survey
from truetune.train.step import accumulate

_SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
          "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
          "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}  # fmt: skip
_GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "resid_pdrop": 0.0,
         "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None}  # fmt: skip
FUSABLE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _SMALL),
    "llama-bias": ("LlamaConfig", _SMALL | {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralConfig", _SMALL | {"sliding_window": 6}),
    "qwen2": ("Qwen2Config", _SMALL),
    "qwen3": ("Qwen3Config", _SMALL),
    "gemma": ("GemmaConfig", _SMALL),
}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    # Capped scores and norms after the parts; a matrix for q, k and v; learned positions; parallel parts and turns of
    # another kind; a scaled residual stream; norms after the parts.
    "gemma2": ("Gemma2Config", _SMALL | {"sliding_window": 6, "attn_logit_softcapping": 0.5,
                                         "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8}),
    "phi3": ("Phi3Config", _SMALL),
    "gpt2": ("GPT2Config", _GPT2),
    "cohere": ("CohereConfig", _SMALL | {"logit_scale": 0.5}),
    "granite": ("GraniteConfig", _SMALL | {"logits_scaling": 4.0, "residual_multiplier": 0.5,
                                           "attention_multiplier": 0.2, "embedding_multiplier": 3.0}),
    "olmo2": ("Olmo2Config", _SMALL),
}  # fmt: skip
FAMILIES = FUSABLE | OTHERS


def made(name: str, *, dtype: torch.dtype = torch.float32, **settings: Any) -> PreTrainedModel:
    """A model of a family; weights are neither so small that a part hides, nor so large that rounding is magnified."""
    class_name, own = FAMILIES[name]
    attention = {"attn_implementation": "eager"} if "attn_logit_softcapping" in own else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = getattr(transformers, class_name)(**(own | settings))
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, **attention)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.15)
                else:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).train()  # type: ignore[no-any-return]


def adapted(
    name: str, *, dtype: torch.dtype = torch.float32, layers: int = 2, tied: bool | None = None, **lora: Any
) -> PreTrainedModel:
    """With adapters (on every linear layer but the head, unless told otherwise) that are away from where they start."""
    settings: dict[str, Any] = {"n_layer" if name == "gpt2" else "num_hidden_layers": layers}
    model = made(name, dtype=dtype, **settings, **({} if tied is None else {"tie_word_embeddings": tied}))
    attach(model, LoRA(rank=4, alpha=8, **lora))
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "lora_" in path:
                parameter.copy_((0.3 if "lora_a" in path else 0.1) * torch.randn(parameter.shape, generator=draw))
    return model


Step = tuple[float, dict[str, Tensor]]


def step(
    model: PreTrainedModel,
    *,
    packing: bool = True,
    fused: bool = True,
    recompute: Recompute = "none",
    full_layers: int = 0,
    micro_tokens: int = sum(LENGTHS),
    number: int = 0,
    autocast: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
) -> Step:
    """The loss of a step over all eight rows, and the gradient of every trained parameter."""
    plan = StepPlan.build(
        rows(), batch_size=len(LENGTHS), micro_tokens=micro_tokens, packing=packing, seed=3, epochs=9, max_steps=None
    )
    with autocast():
        path = Path(model, survey(model), packing)
    with prepared(path, recompute=recompute, full_layers=full_layers, fused=fused):
        result = accumulate(path.loss, plan.micro_batches(number), seed=3, step=number, autocast=autocast)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return result.loss, gradients


def by_definition(model: PreTrainedModel) -> Step:
    """Through the model's own code in float64, one row at a time; the model stays in float64."""
    model, data = model.double(), rows()
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(data)):
        tokens, flags = data.example(i)
        scores = model(input_ids=tokens.long()[None], use_cache=False).logits[0]
        losses = nn.functional.cross_entropy(scores[:-1], tokens[1:].long(), reduction="none")
        total = total + losses[flags[1:]].sum()
    loss = total / data.trained_count()
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return float(loss.detach()), gradients


def farthest(found: Step, expected: Step) -> float:
    """The largest relative difference, norm by norm: of the loss and of each parameter's gradient."""
    assert found[1].keys() == expected[1].keys()
    differences: Iterable[float] = (distance(found[1][name], expected[1][name]) for name in expected[1])
    return max(abs(found[0] / expected[0] - 1), *differences)


def same_bits(one: Step, other: Step) -> bool:
    return one[0] == other[0] and one[1].keys() == other[1].keys() and all(
        torch.equal(one[1][name], other[1][name]) for name in one[1]
    )  # fmt: skip


def state_of(model: PreTrainedModel) -> dict[str, Any]:
    """What a trial may not change: modes, hooks and stand-ins of all modules, the attention, what is trained."""
    state: dict[str, Any] = {"attention": model.config._attn_implementation}
    for path, m in model.named_modules():
        state[path] = (m.training, "forward" in m.__dict__, len(m._forward_hooks), len(m._forward_pre_hooks))
    for path, p in model.named_parameters():
        state[path] = (p.requires_grad, p.grad is None)
    return state
