"""Adapters that stand on another are served beside it and the bare base: each says what transformers says with it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from families import perturb
from serve.live import greedy, make_adapter, serving
from truetune.adapters import files
from truetune.config.adapter import AdapterConfig
from truetune.config.lora import LoRA
from truetune.config.other_methods import IA3, Prefix
from truetune.models.load import load_model

COUNT = 8
ABOVE: dict[str, AdapterConfig] = {"lora": LoRA(rank=2, alpha=8), "ia3": IA3(), "prefix": Prefix(virtual_tokens=3)}
PROMPTS = ["hi", "a b c d e f g"]


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One adapter, and one of each kind on top of it."""
    made = tmp_path_factory.mktemp("stacked")
    first = files.read(make_adapter(tiny_model, made / "first", LoRA(rank=4, alpha=8), seed=1))
    for name, config in ABOVE.items():
        net = load_model(str(tiny_model), dtype=torch.float32)
        files.attach_on(net, first, config=config, seed=2)
        for _ in range(5):
            perturb(net, seed=3)
        files.save(net, made / name, base=None)
    return made


def test_every_client_hears_the_adapter_that_it_asked_for(tiny_model: Path, folder: Path) -> None:
    names = ["base", "first", *ABOVE]
    asked = [(name, prompt) for name in names for prompt in PROMPTS]
    expected = [greedy(tiny_model, None if name == "base" else folder / name, prompt, COUNT) for name, prompt in asked]
    assert len(set(expected)) == len(asked)
    with serving(model=str(tiny_model), adapters=(str(folder),), served_name="base", max_rows=4) as live:

        def heard(question: tuple[str, str]) -> str:
            name, prompt = question
            stream = live.client.completions.create(
                model=name, prompt=prompt, max_tokens=COUNT, temperature=0, stream=True
            )
            return "".join(event.choices[0].text for event in stream if event.choices)

        assert {model.id for model in live.client.models.list().data} == set(names)
        with ThreadPoolExecutor(len(asked)) as pool:
            assert list(pool.map(heard, asked)) == expected
