"""The models that are trained: shapes of known ones, with random weights, because only speed and memory are measured.

``python -m bench.shapes NAME DATA FOLDER`` makes one with its tokenizer; the bench runs that in a process of its own,
so that the bench itself never holds a model (what a child's peak would begin with).
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# More pieces than a thousand short rows can fill: the vocabulary's size costs the head, not the tokenizer.
MOST_PIECES = 32_000


@dataclass(frozen=True)
class Shape:
    """A Llama with tied embeddings."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int = 8192
    rope_theta: float = 1e5

    def linears(self) -> list[tuple[int, int]]:
        """(in, out) of the seven linear maps of one layer: q, k, v, o, gate, up, down."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = [(self.hidden, q), (self.hidden, kv), (self.hidden, kv), (q, self.hidden)]
        return [*attention, (self.hidden, self.inner), (self.hidden, self.inner), (self.inner, self.hidden)]

    def flops_per_token(self, trained_share: float) -> float:
        """What LoRA training can't avoid: forward and backward through frozen weights, 2 products of 2 FLOPs each.

        Args:
            trained_share: of the tokens; only those need the head.
        """
        body = self.layers * sum(rows * columns for rows, columns in self.linears())
        return 4.0 * body + 4.0 * self.hidden * self.vocab * trained_share

    def config(self) -> dict[str, Any]:
        """Arguments of transformers' ``LlamaConfig``; the tokenizer's end token is 0, its padding 1."""
        return {
            "hidden_size": self.hidden, "intermediate_size": self.inner, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim,
            "vocab_size": self.vocab, "max_position_embeddings": self.context, "rope_theta": self.rope_theta,
            "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1,
            "dtype": "bfloat16",
        }  # fmt: skip


SHAPES = {
    "smollm2-135m": Shape(hidden=576, inner=1536, layers=30, heads=9, kv_heads=3, head_dim=64, vocab=49_152),
    # With the vocabulary of Llama 2: the real one would make a fifth of the model.
    "llama-3.2-1b": Shape(hidden=2048, inner=8192, layers=16, heads=32, kv_heads=8, head_dim=64, vocab=32_000),
    "tiny": Shape(hidden=64, inner=192, layers=2, heads=4, kv_heads=2, head_dim=16, vocab=4096, context=2048),
}


def make(shape: Shape, data: Path, folder: Path) -> None:
    """Write a bf16 checkpoint in transformers' form, with a byte-level BPE tokenizer that is trained on ``data``.

    ``folder`` appears when all of it is there. Memory: the weights, and what a save takes.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    _tokenizer(shape, data).save_pretrained(unfinished)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)  # or the weights would be drawn in float32: twice the memory
    LlamaForCausalLM(LlamaConfig(**shape.config())).save_pretrained(unfinished)
    os.replace(unfinished, folder)


def _tokenizer(shape: Shape, data: Path) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(MOST_PIECES, shape.vocab), special_tokens=["<|endoftext|>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    core.train_from_iterator(_texts(data), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>", pad_token="<pad>")


def _texts(data: Path) -> list[str]:
    text = data.read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines() if line] if data.suffix == ".jsonl" else json.loads(text)
    return [" ".join(value for value in row.values() if isinstance(value, str)) for row in rows]


if __name__ == "__main__":
    make(SHAPES[sys.argv[1]], Path(sys.argv[2]), Path(sys.argv[3]))
