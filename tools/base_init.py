"""Everything the embedded base starts from: corpus, tokenizer, random weights.  ``python tools/base_init.py OUT_DIR``.

Writes ``corpus.jsonl`` and ``heldout.jsonl`` (one ``{"text": source}`` per module) and ``init/``, a model folder with
fresh weights and the tokenizer.  The weights then come from ``truetune pretrain`` on the corpus and nothing else:
the base has seen functions as plain source only, never as a question and an answer.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from truetune.data import stdlib

SPECIAL = ("<|endoftext|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>")
VOCAB = 4096
CONTEXT = 1024
TEST_SHARE = 0.4

# Text falls into these pieces before any merge; every character falls into exactly one, so nothing is lost.
PIECES = "|".join(
    (
        r"\A\n",  # the newline of the chat template: alone, so that a prompt's tokens never depend on its answer
        r"[^\n\p{L}\p{N}_]?[\p{L}_]+",  # a word, snake_case and dunders whole, with the space, dot or bracket before it
        r" ?\p{N}",  # digits one by one: tables of numbers would otherwise take up the vocabulary
        r" ?[^\s\p{L}\p{N}_]+",  # operators, brackets, quotes
        r"\n+",
        r"[^\S\n]+(?=\n|\z)",  # white space before a line's end
        r"[^\S\n]+(?= )|[^\S\n]",  # an indentation is one piece, less the space that goes to the word behind it
    )
)

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|' + message['role'] + '|>\\n' + message['content'] -}}
{{- '<|endoftext|>\\n' if message['role'] == 'assistant' else '\\n' -}}
{%- endfor -%}
{{- '<|assistant|>\\n' if add_generation_prompt else '' -}}"""


def corpus() -> list[str]:
    """The training modules by name: the whole library, and tests for at most ``TEST_SHARE`` of the bytes.

    The tests outweigh the library two to one and are mostly assertions; the base is asked to write library code.
    They are drawn by the hash of their name: the same draw on every machine, and no favour for the letter A.
    """
    named = list(stdlib.modules(held_out=False))
    kept = {name: source for name, source in named if not stdlib.is_test(name)}
    room = sum(len(source.encode()) for source in kept.values()) * TEST_SHARE / (1 - TEST_SHARE)
    tests = [(name, source) for name, source in named if stdlib.is_test(name)]
    for name, source in sorted(tests, key=lambda test: hashlib.sha256(test[0].encode()).digest()):
        size = len(source.encode())
        if size <= room:
            kept[name] = source
            room -= size
    return [kept[name] for name in sorted(kept) if kept[name].strip()]


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text can be encoded, and comes back as it was."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        extra_special_tokens=list(SPECIAL[2:]),
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def fresh_model(tokenizer: PreTrainedTokenizerFast, *, seed: int) -> LlamaForCausalLM:
    """A small Llama with GPT-2's initialisation."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=448,  # with 512 the file would be over 8 MB in bf16; a multiple of 64 for the 4-bit blocks
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                # Two additions per layer: without the factor the residual stream would grow with depth.
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                parameter.normal_(std=0.02 / math.sqrt(2 * config.num_hidden_layers) if residual else 0.02)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return model


def write_jsonl(path: Path, texts: Sequence[str]) -> None:
    """One text per line, as ``truetune pretrain`` reads it."""
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")


def report(name: str, texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> None:
    """Print what the model card says about a part of the corpus."""
    size = sum(len(text.encode()) for text in texts)
    tokens = sum(len(encoding) for encoding in tokenizer.backend_tokenizer.encode_batch(list(texts)))
    print(f"{name:<8}  {len(texts):,} modules  {size:,} bytes  {tokens:,} tokens  {size / tokens:.3f} bytes per token")


def main() -> None:
    """Make the folder; the same interpreter and seed make the same files."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    train = corpus()
    held_out = [source for _, source in stdlib.modules(held_out=True) if source.strip()]
    tokenizer = train_tokenizer(train)
    model = fresh_model(tokenizer, seed=args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    write_jsonl(args.out / "corpus.jsonl", train)
    write_jsonl(args.out / "heldout.jsonl", held_out)
    model.save_pretrained(args.out / "init")
    tokenizer.save_pretrained(args.out / "init")
    report("train", train, tokenizer)
    report("held out", held_out, tokenizer)
    print(f"model     {model.num_parameters():,} parameters  {model.num_parameters() * 2:,} bytes in bf16")


if __name__ == "__main__":
    main()
