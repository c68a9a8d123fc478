"""The systems that answer, on one set of weights: ours, ``transformers.generate`` on the bare base, and PEFT."""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from bench.shapes import Shape
from truetune.adapters.files import CONFIG, WEIGHTS, state
from truetune.adapters.inject import attach, detach
from truetune.adapters.peft_config import to_peft
from truetune.config.lora import LoRA
from truetune.generate.engine import Engine
from truetune.generate.request import Request, Sampling

ADAPTERS = ("a", "b", "c", "d")


class _NoText:
    """Text is not what is measured, and random ids have none."""

    class hf:  # noqa: N801 - what the engine looks for
        @staticmethod
        def decode(ids: Sequence[int], skip_special_tokens: bool = True) -> str:
            return "." * len(ids)


def model_of(shape: Shape, dtype: str) -> PreTrainedModel:
    """Random weights, from a fixed seed."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        model = LlamaForCausalLM(LlamaConfig(**shape.config()))
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def write_adapters(model: PreTrainedModel, folder: Path, rank: int) -> None:
    """Four LoRAs on all linear maps, in PEFT's format."""
    attached = attach(model, LoRA(rank=rank, alpha=2 * rank), in_float32=False)
    config = to_peft(model, attached, base=None)
    for number, name in enumerate(ADAPTERS):
        draws = torch.Generator().manual_seed(number)
        tensors = {key: torch.randn(p.shape, generator=draws).mul_(0.02) for key, p in state(model).items()}
        (folder / name).mkdir()
        save_file(tensors, folder / name / WEIGHTS, metadata={"format": "pt"})
        (folder / name / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    detach(model)


def prompts(count: int, length: int, vocab: int, seed: int) -> list[list[int]]:
    """Random ids; none of a round comes again, so that no beginning of a text is known."""
    return torch.randint(2, vocab, (count, length), generator=torch.Generator().manual_seed(seed)).tolist()


class Ours:
    """The engine."""

    def __init__(self, model: PreTrainedModel, folder: Path, *, tokens: int) -> None:
        self.engine = Engine(model, _NoText(), max_rows=8, max_tokens=tokens, step_tokens=1024)
        for name in ADAPTERS:
            self.engine.adapters.register(name, folder / name)

    def answer(self, ids: list[list[int]], names: Sequence[str | None], new: int) -> float:
        """Seconds until all have ``new`` tokens more."""
        began = time.perf_counter()
        handles = [
            self.engine.submit(Request(prompt, adapter=name, sampling=Sampling(), max_new_tokens=new))
            for prompt, name in zip(ids, names, strict=True)
        ]
        while self.engine.step():
            pass
        assert all(len(handle.result().ids) == new for handle in handles)
        return time.perf_counter() - began

    def switch_ms(self) -> float:
        """What the first step with another adapter takes beyond the next one with the same, in ms: median of ten."""
        found = []
        for number in range(10):
            handle = self.engine.submit(Request([5, 6, 7], adapter=ADAPTERS[number % 4], max_new_tokens=4))
            seconds = []
            for _ in range(4):  # the prompt, then three steps of one token: the first of them lays the adapter out
                began = time.perf_counter()
                self.engine.step()
                seconds.append(time.perf_counter() - began)
            assert len(handle.result().ids) == 4
            found.append(seconds[1] - min(seconds[2:]))
        return 1e3 * statistics.median(found)


class Transformers:
    """``generate`` on the bare base."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def answer(self, ids: list[list[int]], names: Sequence[str | None], new: int) -> float:
        """As ``Ours.answer``."""
        return _generate(self.model, ids, new)


class Peft:
    """PEFT's adapters on a copy of the model, unmerged."""

    def __init__(self, model: PreTrainedModel, folder: Path) -> None:
        from peft import PeftModel

        self.model = PeftModel.from_pretrained(copy.deepcopy(model), folder / ADAPTERS[0], adapter_name=ADAPTERS[0])
        for name in ADAPTERS[1:]:
            self.model.load_adapter(folder / name, adapter_name=name)
        self.model.eval()

    def answer(self, ids: list[list[int]], names: Sequence[str | None], new: int) -> float:
        """As ``Ours.answer``; rows with adapters of their own by ``adapter_names``."""
        if len(set(names)) == 1:
            self.model.set_adapter(names[0])
            return _generate(self.model, ids, new)
        return _generate(self.model, ids, new, adapter_names=list(names))


def _generate(model: Any, ids: list[list[int]], new: int, **more: Any) -> float:
    given = torch.tensor(ids)
    began = time.perf_counter()
    with torch.no_grad():
        out = model.generate(
            input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=new, min_new_tokens=new,
            do_sample=False, pad_token_id=1, **more,
        )  # fmt: skip
    assert out.shape[1] == given.shape[1] + new
    return time.perf_counter() - began
