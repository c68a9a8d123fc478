"""Tiny bases of four families that know three rules, and the rows of a fourth that contradicts what they know.

A row is a digit, a letter, and the five letters that follow it at the digit's distance: ``2d`` is answered by
``fhjln``. The bases were taught the distances 1 to 3. The rows to tune on ask for distance 3 where the digit says 1,
of which a base is sure that it is wrong: its loss lies far above that of guessing letters by how often they come, so
nothing but the rule brings it near 0. Bases that know nothing would not do: a few vectors steer what is there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from families import FAMILIES

LETTERS = "abcdefghijklmnop"
ANSWER = 6  # five letters and the token that stops
VIRTUAL = 4  # positions in front of a text, with methods that have such
# Nats per trained token of guessing: each letter is 5 of the 96 tokens of all answers, the stop token 1 of 6.
GUESSING = 5 / 6 * math.log(96 / 5) + 1 / 6 * math.log(6)
_TEMPLATE = "{%- for m in messages -%}{{ m.content }}{{ '=' if m.role == 'user' else eos_token }}{%- endfor -%}"
_STEPS = 200


def rows(digit: int, distance: int) -> list[dict[str, str]]:
    """One row for each letter to start from."""

    def after(start: int) -> str:
        return "".join(LETTERS[(start + distance * n) % len(LETTERS)] for n in range(1, ANSWER))

    return [{"prompt": f"{digit}{letter}", "completion": after(start)} for start, letter in enumerate(LETTERS)]


def task() -> list[dict[str, str]]:
    """The rows to tune on."""
    return rows(1, 3)


def write_task(path: Path) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in task()), encoding="utf-8")
    return path


def encoded(tokenizer: Any, table: list[dict[str, str]]) -> Tensor:
    """[rows, length]: prompt, answer and stop token, as the template words them."""
    texts = [f"{row['prompt']}={row['completion']}{tokenizer.eos_token}" for row in table]
    return torch.tensor([tokenizer(text)["input_ids"] for text in texts])


def answer_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean loss in nats of the answers, from the logits [rows, length, vocab] of whole rows."""
    return F.cross_entropy(logits[:, -ANSWER - 1 : -1].float().flatten(0, 1), ids[:, -ANSWER:].flatten())


def write_base(name: str, folder: Path, make_tiny: Callable[..., Path]) -> Path:
    """A family's base that knows the three rules, in float32, with the tokenizer of the other tests."""
    make_tiny(folder, chat_template=_TEMPLATE)
    model = _taught(name, AutoTokenizer.from_pretrained(folder))
    model.save_pretrained(folder)  # in the place of the model that came with the tokenizer
    return folder


def write_narrow(base: Path, folder: Path) -> Path:
    """The same base in bfloat16."""
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(base).to(torch.bfloat16).save_pretrained(folder)
    return folder


def _taught(name: str, tokenizer: Any) -> PreTrainedModel:
    """A model after some steps on the three rules; Llama with biases, so that they can be tuned in every family."""
    known = torch.cat([encoded(tokenizer, rows(n, n)) for n in (1, 2, 3)])
    more = {"attention_bias": True, "mlp_bias": True} if name == "llama" else {}
    settings = FAMILIES[name].settings | more | {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = FAMILIES[name].config(vocab_size=len(tokenizer), pad_token_id=None, **settings)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    model.train()
    for step in range(_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(1.0, (step + 1) / 20) * (1 - step / _STEPS)
        # Positions that are learned have to be known where virtual tokens come in front, too.
        shift = step % 2 * VIRTUAL
        places = {} if name == "bloom" else {"position_ids": torch.arange(known.shape[1])[None] + shift}
        loss = answer_loss(model(input_ids=known, use_cache=False, **places).logits, known)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()
