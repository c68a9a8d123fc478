"""Greedy answers are those of ``transformers.generate``, token for token, whatever is computed beside them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from families import FAMILIES
from serving import PROMPTS, answers, engine, generated, saved, with_adapter
from truetune.adapters import files
from truetune.adapters.inject import attachment
from truetune.config.adapter import AdapterConfig, Trainable
from truetune.config.lora import AdaLoRA, DoRA, LoRA, VeRA
from truetune.config.other_methods import IA3, BitFit, Bottleneck, LlamaAdapter, Prefix, Prompt
from truetune.generate.request import Request
from truetune.ops import dispatch

COUNT = 12
PATHS = {
    "llama": "direct", "llama-tied": "direct", "gpt2": "paged", "bigcode": "paged", "bloom": "single",
    "neox": "paged", "opt": "paged", "mistral": "direct", "qwen2": "direct", "qwen3": "direct", "gemma": "direct",
    "gemma2": "paged", "phi": "paged",
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_in_pieces_says_what_generate_says(name: str) -> None:
    model = FAMILIES[name].make()
    server = engine(model)
    found = answers(server, [Request(prompt, max_new_tokens=COUNT) for prompt in PROMPTS])
    assert [list(delta.ids) for delta in found] == [generated(model, prompt, COUNT) for prompt in PROMPTS]
    assert {delta.finish for delta in found} == {"length"}
    assert server.stats()["path"] == PATHS[name]


@pytest.mark.parametrize("tier", ["reference", "auto"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma"])
def test_every_tier_says_the_same(name: str, tier: str) -> None:
    with dispatch.forced(tier):
        model = FAMILIES[name].make()
        found = answers(engine(model), [Request(prompt, max_new_tokens=COUNT) for prompt in PROMPTS])
        assert [list(delta.ids) for delta in found] == [generated(model, prompt, COUNT) for prompt in PROMPTS]


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "bloom"])
def test_the_models_own_code_says_the_same(name: str) -> None:
    model = FAMILIES[name].make()
    server = engine(model, direct=False)
    assert server.stats()["path"] in ("paged", "single")
    found = answers(server, [Request(prompt, max_new_tokens=COUNT) for prompt in PROMPTS])
    assert [list(delta.ids) for delta in found] == [generated(model, prompt, COUNT) for prompt in PROMPTS]


METHODS: dict[str, AdapterConfig] = {
    "lora": LoRA(rank=3, alpha=6),
    "rslora-bias": LoRA(rank=3, alpha=6, use_rslora=True, lora_bias=True, targets=("q_proj", "down_proj")),
    "dora": DoRA(rank=2, alpha=4),
    "adalora": AdaLoRA(rank=2, alpha=4, target_rank=1),
    "vera": VeRA(rank=8),
    "ia3": IA3(),
    "bitfit": BitFit(),
    "prompt": Prompt(virtual_tokens=3),
    "prefix": Prefix(virtual_tokens=3),
    "llama-adapter": LlamaAdapter(adapter_length=3, adapter_layers=1),
    "bottleneck": Bottleneck(),
    "embedding": LoRA(rank=2, alpha=4, targets=("embed_tokens", "q_proj")),
    "norms": LoRA(rank=2, alpha=4, trainable=("norm",)),
}
ROW_BY_ROW = {"lora", "rslora-bias", "dora", "adalora", "ia3"}


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_beside_the_base_says_what_it_says_alone(method: str, tmp_path: Path) -> None:
    model = FAMILIES["qwen2"].make()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    folder = saved(model, METHODS[method], tmp_path / "adapter")
    base = [generated(model, prompt, COUNT) for prompt in PROMPTS]
    tuned = with_adapter(model, folder, PROMPTS, COUNT)
    assert base != tuned
    server = engine(model)
    loaded = server.adapters.register("own", folder)
    assert (loaded.terms is not None) == (method in ROW_BY_ROW)
    requests = [Request(p, adapter=name, max_new_tokens=COUNT) for p in PROMPTS for name in (None, "own")]
    found = [list(delta.ids) for delta in answers(server, requests)]
    assert (found[::2], found[1::2]) == (base, tuned)
    assert attachment(model) is None
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_an_adapted_head_of_its_own_is_no_base_s(tmp_path: Path) -> None:
    model = FAMILIES["llama"].make()
    folder = saved(model, LoRA(rank=2, alpha=64, targets=("lm_head",)), tmp_path / "adapter")
    base, tuned = [generated(model, p, COUNT) for p in PROMPTS], with_adapter(model, folder, PROMPTS, COUNT)
    server = engine(model)
    server.adapters.register("own", folder)
    requests = [Request(p, adapter=name, max_new_tokens=COUNT) for p in PROMPTS for name in (None, "own")]
    found = [list(delta.ids) for delta in answers(server, requests)]
    assert server.stats()["path"] == "direct"
    assert base != tuned
    assert (found[::2], found[1::2]) == (base, tuned)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
def test_rows_with_several_adapters_share_a_step(name: str, tmp_path: Path) -> None:
    model = FAMILIES[name].make()
    kinds: list[AdapterConfig] = [
        LoRA(rank=2, alpha=8, targets=FAMILIES[name].targets),
        LoRA(rank=5, alpha=10, targets=FAMILIES[name].targets[:1]),
        DoRA(rank=2, alpha=4, targets=FAMILIES[name].targets[:1]),
    ]
    folders = [saved(model, kind, tmp_path / str(i), seed=i + 1) for i, kind in enumerate(kinds)]
    expected = [with_adapter(model, folder, PROMPTS, COUNT) for folder in folders]
    server = engine(model, max_rows=12)
    for i, folder in enumerate(folders):
        server.adapters.register(f"a{i}", folder)
    requests = [Request(p, adapter=f"a{i}", max_new_tokens=COUNT) for p in PROMPTS for i in range(3)]
    found = [list(delta.ids) for delta in answers(server, requests)]
    assert [found[i::3] for i in range(3)] == expected


def test_a_known_beginning_is_not_computed_again(tmp_path: Path) -> None:
    model = FAMILIES["llama"].make()
    folder = saved(model, LoRA(rank=2, alpha=8), tmp_path / "adapter")
    server = engine(model, step_tokens=64)
    server.adapters.register("own", folder)
    head = list(range(30, 63))
    first, second = [*head, 5], [*head, 6, 7]
    expected = [generated(model, prompt, COUNT) for prompt in (first, second)]
    tuned = with_adapter(model, folder, [second], COUNT)[0]
    assert list(answers(server, [Request(first, max_new_tokens=COUNT)])[0].ids) == expected[0]
    handle = server.submit(Request(second, max_new_tokens=COUNT))
    other = server.submit(Request(second, adapter="own", max_new_tokens=COUNT))
    pieces = server._schedule
    server._take_news()
    assert sorted(piece.count for piece in pieces.pieces()) == [len(second) - 32, len(second)]  # two pages of 16
    while server.step():
        pass
    assert list(handle.result().ids) == expected[1]
    assert list(other.result().ids) == tuned


def test_rows_that_had_to_wait_for_pages_say_the_same() -> None:
    model = FAMILIES["llama"].make()
    server = engine(model, max_tokens=64, step_tokens=32)
    sent_back = []
    schedule = server._schedule
    schedule._send_back = lambda row, own=schedule._send_back: (sent_back.append(row), own(row))  # type: ignore[method-assign]
    found = answers(server, [Request(prompt, max_new_tokens=20) for prompt in PROMPTS])
    assert sent_back
    assert [list(delta.ids) for delta in found] == [generated(model, prompt, 20) for prompt in PROMPTS]


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_packed_base_says_what_it_says_alone(kind: str, tmp_path: Path) -> None:
    from truetune.config.quant import QuantRecipe
    from truetune.models.load import load_model, save_model

    save_model(FAMILIES["llama"].make(), tmp_path / "model")
    model = load_model(str(tmp_path / "model"), dtype=torch.float32, quant=QuantRecipe(kind=kind))
    folder = saved(model, LoRA(rank=2, alpha=8, targets=("q_proj", "down_proj")), tmp_path / "adapter")
    expected, tuned = (
        [generated(model, prompt, 6) for prompt in PROMPTS[:3]],
        with_adapter(model, folder, PROMPTS[:3], 6),
    )
    server = engine(model)
    server.adapters.register("own", folder)
    found = answers(server, [Request(p, adapter=a, max_new_tokens=6) for a in (None, "own") for p in PROMPTS[:3]])
    assert [list(delta.ids) for delta in found] == expected + tuned


@pytest.mark.parametrize(("part", "other"), [("head", "embed_tokens"), ("embedding", "lm_head")])
def test_an_adapter_that_takes_table_and_head_apart_is_served(part: Trainable, other: str, tmp_path: Path) -> None:
    """As an adapter made elsewhere may: the base's stay one matrix, and the answers are those of the adapted model."""
    model, alone = FAMILIES["llama-tied"].make(), FAMILIES["llama-tied"].make()
    folder = saved(model, LoRA(rank=2, alpha=4, targets=("q_proj",), trainable=(part,)), tmp_path / "adapter")
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"ensure_weight_tying": False}), encoding="utf-8")
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({k: v for k, v in tensors.items() if other not in k}, folder / "adapter_model.safetensors")
    base = [generated(model, prompt, COUNT) for prompt in PROMPTS]
    files.load(alone, files.read(folder))
    tuned = [generated(alone.eval(), prompt, COUNT) for prompt in PROMPTS]
    assert base != tuned
    server = engine(model)
    server.adapters.register("own", folder)
    requests = [Request(p, adapter=name, max_new_tokens=COUNT) for p in PROMPTS for name in (None, "own")]
    found = [list(delta.ids) for delta in answers(server, requests)]
    assert (found[::2], found[1::2]) == (base, tuned)
    assert model.lm_head.weight is model.model.embed_tokens.weight
