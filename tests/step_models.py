"""Models of five families with a few thousand random weights, and rows of very different lengths."""

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from truetune.data.schema import Origin
from truetune.data.token_set import TokenSet

VOCAB = 97
LENGTHS = (3, 40, 7, 25, 12, 60, 5, 31)
_SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
          "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
          "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}  # fmt: skip
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _SMALL),
    "gpt2": ("GPT2Config", {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128,
                            "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
                            "bos_token_id": None, "eos_token_id": None}),
    "mistral": ("MistralConfig", _SMALL | {"sliding_window": 6}),
    "gemma2": ("Gemma2Config", _SMALL | {"sliding_window": 6, "attn_logit_softcapping": 0.5,
                                         "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8}),
    "qwen3": ("Qwen3Config", _SMALL),
    "bloom": ("BloomConfig", {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4,
                              "hidden_dropout": 0.0, "attention_dropout": 0.0,
                              "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}),
    "gpt-oss": ("GptOssConfig", _SMALL | {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 6}),
}  # fmt: skip
PACKED = ("llama", "gpt2", "mistral", "gemma2", "qwen3")


def family(name: str) -> PreTrainedModel:
    """A model of a family, in float32, with weights large enough that attention is not flat."""
    class_name, settings = _CONFIGS[name]
    # What caps its attention scores runs eagerly: SDPA, the default of older transformers there, would not cap them.
    attention = {"attn_implementation": "eager"} if "attn_logit_softcapping" in settings else {}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, class_name)(**settings), dtype=torch.float32, **attention
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return model.train()


def rows() -> TokenSet:
    """Eight rows; in each, the prompt (none, some, or all but one token) is masked."""
    draw = torch.Generator().manual_seed(1)
    tokens = [torch.randint(VOCAB, (n,), generator=draw).tolist() for n in LENGTHS]
    prompts = [1, 5, 6, 0, 3, 40, 4, 30]
    trained = [[i >= prompt for i in range(n)] for n, prompt in zip(LENGTHS, prompts, strict=True)]
    return TokenSet.from_lists(tokens, trained, [Origin("rows", i + 1) for i in range(len(tokens))])
