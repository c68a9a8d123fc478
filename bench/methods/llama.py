"""The model and the rows that both sides train; needs torch and transformers alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from bench.methods.pairs import Setting
from bench.shapes import Shape


def setting_of(facts: dict[str, Any]) -> Setting:
    """As it was before it became JSON."""
    return Setting(**facts | {"shape": Shape(**facts["shape"])})


def model(setting: Setting, *, biased: bool = False) -> LlamaForCausalLM:
    """The same random weights at every call, in the setting's dtype."""
    config = LlamaConfig(**setting.shape.config(), attention_bias=biased, mlp_bias=biased)
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, setting.dtype))
    try:
        return LlamaForCausalLM(config).train()
    finally:
        torch.set_default_dtype(before)


def rows(setting: Setting) -> tuple[Tensor, Tensor]:
    """[rows, tokens] int64 ids, and bool: the second half of each row is learned, as an answer is."""
    draws = torch.Generator().manual_seed(0)
    ids = torch.randint(2, setting.shape.vocab, (setting.rows, setting.tokens), generator=draws)
    return ids, (torch.arange(setting.tokens) >= setting.tokens // 2).expand_as(ids)


def hollow(shape: Shape) -> LlamaForCausalLM:
    """A model of any size that takes no memory: every entry of a weight is the same one number."""
    with torch.device("meta"):
        made = LlamaForCausalLM(LlamaConfig(**shape.config() | {"tie_word_embeddings": False}))
    for module in made.modules():
        for name, parameter in module.named_parameters(recurse=False):
            one = torch.zeros((), dtype=torch.bfloat16).expand(parameter.shape)
            module.register_parameter(name, nn.Parameter(one, requires_grad=False))
    made.model.rotary_emb.inv_freq = torch.ones(shape.head_dim // 2)
    return made
