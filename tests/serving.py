"""Tiny models to serve, a tokenizer whose tokens are bytes, and what transformers itself answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from families import VOCAB, perturb
from truetune.adapters import files
from truetune.adapters.inject import attach, detach
from truetune.adapters.virtual import virtual_ids
from truetune.config.adapter import AdapterConfig
from truetune.generate.engine import Engine
from truetune.generate.request import Delta, Request

PROMPTS: list[list[int]] = [[3, 4, 5], [7] * 5, list(range(20, 41)), [*range(20, 41), 9], [8], [64, 65, 66, 67]]


class Bytes:
    """As much of a tokenizer as text needs: each id is a byte."""

    class hf:  # noqa: N801 - what the engine looks for
        @staticmethod
        def decode(ids: Sequence[int], skip_special_tokens: bool = True) -> str:
            return bytes(ids).decode(errors="replace")


def engine(model: PreTrainedModel, **settings: Any) -> Engine:
    return Engine(model, Bytes(), **({"max_rows": 4, "max_tokens": 256, "step_tokens": 9} | settings))


def answers(engine: Engine, requests: Sequence[Request]) -> list[Delta]:
    """Ask for all at once, and wait."""
    handles = [engine.submit(request) for request in requests]
    while engine.step():
        pass
    return [handle.result() for handle in handles]


def generated(model: PreTrainedModel, prompt: Sequence[int], count: int) -> list[int]:
    """What ``transformers.generate`` answers alone, greedily; with the adapter that the model carries."""
    ids = torch.tensor([[*virtual_ids(model), *prompt]])
    with torch.no_grad():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
    found: list[int] = out[0, ids.shape[1] :].tolist()
    return found


def saved(model: PreTrainedModel, config: AdapterConfig, folder: Path, *, seed: int = 1) -> Path:
    """An adapter of ``model`` in a folder, moved far enough to change its answers."""
    attach(model, config, seed=seed, in_float32=False)
    originals = [(p, p.detach().clone()) for p in model.parameters() if p.requires_grad]
    perturb(model, seed=seed)
    files.save(model, folder, base=None)
    for parameter, before in originals:
        parameter.data.copy_(before)
    detach(model)
    return folder


def with_adapter(model: PreTrainedModel, folder: Path, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """What transformers answers with the adapter attached; the model is as it was afterwards."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    files.load(model, files.read(folder))
    found = [generated(model.eval(), prompt, count) for prompt in prompts]
    detach(model)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(before[name])
    return found


assert VOCAB == 128  # every id is a byte of ASCII
