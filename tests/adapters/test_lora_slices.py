"""LoRA on parts of a fused layer: exactly those rows change, whatever the family's order of them is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

import truetune
from families import FAMILIES, VOCAB, distance, logits, perturb
from method_checks import CLOSE
from peft_peer import read_by_peft
from truetune.adapters import files
from truetune.adapters.inject import attach, settle
from truetune.adapters.lora_slices import SlicedLinear
from truetune.config.lora import LoRA
from truetune.errors import AdapterError, ConfigError
from truetune.models import load

SHARED = Path(__file__).resolve().parents[3] / "shared"
_SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
          "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
          "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}  # fmt: skip


def made(name: str) -> PreTrainedModel:
    """Of the families, and some more that have fused layers."""
    if name == "bigcode-many":
        return FAMILIES["bigcode"].make(multi_query=False)
    if name in FAMILIES:
        return FAMILIES[name].make()
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "phi3": ("Phi3Config", _SMALL),
        "mpt": ("MptConfig", {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": VOCAB}),
    }
    kind, settings = kinds[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**settings))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()  # type: ignore[no-any-return]


FUSED = ("gpt2", "bigcode", "bigcode-many", "bloom", "neox", "phi3", "mpt")


def changed_by(name: str, parts: str) -> tuple[Tensor, Tensor]:
    """Logits of the base and with these parts updated."""
    model = made(name)
    before = logits(model)
    attach(model, LoRA(rank=4, alpha=8, targets=("all-linear",), slices=(f"qkv={parts}",)))
    for layer in model.modules():
        if isinstance(layer, SlicedLinear):
            perturb(layer)
    return before, logits(model)


@pytest.mark.parametrize("name", FUSED)
def test_only_values_reach_the_first_token(name: str) -> None:
    """The first token attends to itself alone, with whatever query and key: only its value counts."""
    for part in ("q", "k", "v"):
        before, after = changed_by(name, part)
        assert distance(before[:, 1:], after[:, 1:]) > 1e-3
        assert (distance(before[:, 0], after[:, 0]) > 1e-3) == (part == "v")


def heads_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """What the first layer's attention is given as queries, keys and values."""
    seen: list[tuple[Tensor, ...]] = []

    def probe(_: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append((query, key, value))
        return torch.zeros_like(query.transpose(1, 2)), None

    if type(model).__name__.startswith("Bloom"):
        attention = model.transformer.h[0].self_attention  # type: ignore[union-attr,index]
        own = attention._reshape
        attention._reshape = lambda fused: seen.append(own(fused)) or own(fused)  # type: ignore[func-returns-value]
        logits(model)
        del attention._reshape
    else:
        AttentionInterface.register("probe", probe)
        model.set_attn_implementation("probe")
        logits(model)
    return dict(zip("qkv", seen[0], strict=True))


@pytest.mark.parametrize("name", ["gpt2", "bigcode", "bigcode-many", "bloom", "neox", "phi3"])
@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_exactly_the_named_part_changes(name: str, part: str) -> None:
    model = made(name)
    before = heads_of(model)
    attach(model, LoRA(rank=4, targets=(r".*(c_attn|query_key_value|qkv_proj)",), slices=(f"qkv={part}",)))
    perturb(model)
    after = heads_of(model)
    assert {found for found in "qkv" if not torch.equal(before[found], after[found])} == {part}


# --- the layer ----------------------------------------------------------------------------------------------------


def layer(**settings: Any) -> SlicedLinear:
    torch.manual_seed(0)
    rows = [torch.tensor([0, 3, 4]), torch.tensor([8, 1])]
    found = SlicedLinear.from_base(nn.Linear(6, 9), rows=rows, rank=2, alpha=8, **settings)
    perturb(found)
    return found


def test_a_layer_computes_loralibs_formula() -> None:
    sliced, x = layer(), torch.randn(3, 6)
    y = sliced.base(x)
    a, b = sliced.lora_a.split(2), sliced.lora_b[..., 0].split([3, 2])
    y[:, [0, 3, 4]] += 4 * x @ a[0].T @ b[0].T
    y[:, [8, 1]] += 4 * x @ a[1].T @ b[1].T
    torch.testing.assert_close(sliced(x), y)
    torch.testing.assert_close(sliced.merged_weight() @ x.T, (y - sliced.base.bias).T)


def test_it_trains_no_more_than_its_parts() -> None:
    sliced = layer()
    assert (sliced.lora_a.shape, sliced.lora_b.shape) == ((4, 6), (5, 2, 1))
    sliced(torch.randn(3, 6)).square().sum().backward()
    assert sliced.lora_b.grad.all()


def test_settled_it_is_a_plain_layer_of_a_larger_rank() -> None:
    sliced, x = layer(use_rslora=True), torch.randn(3, 6)
    before = sliced(x)
    sliced.settle()
    torch.testing.assert_close(sliced(x), before)
    assert (sliced.rank, sliced.lora_a.shape, sliced.lora_b.shape) == (4, (4, 6), (9, 4))


# --- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "bigcode", "bloom", "neox"])
def test_peft_reads_what_a_run_ends_with(family: str, tmp_path: Path) -> None:
    live = FAMILIES[family].make()
    attach(live, LoRA(rank=4, alpha=8, slices=("qkv=q,v",)))  # the others of all-linear have a rank of 4 still
    perturb(live)
    expected = logits(live)
    settle(live)
    truetune.save_adapter(live, str(tmp_path))
    assert distance(logits(read_by_peft(family, tmp_path)), expected) <= CLOSE
    assert distance(logits(FAMILIES[family].make()), expected) > 0.01


def test_a_checkpoint_says_which_parts_it_has(tmp_path: Path) -> None:
    live = FAMILIES["gpt2"].make()
    attach(live, LoRA(rank=4, targets=("c_attn",), slices=("c_attn=q,2/3",)))
    perturb(live)
    files.save(live, tmp_path, base=None)
    assert files.read(tmp_path).config["slices"] == ["c_attn=q,2/3"]
    again = FAMILIES["gpt2"].make()
    files.load(again, files.read(tmp_path))
    assert torch.equal(logits(again), logits(live))


def of_2023(folder: Path, model: PreTrainedModel, enabled: list[bool]) -> dict[str, Tensor]:
    """An adapter as PEFT wrote it with ``enable_lora``: for each c_attn, its change of W [out, in] too."""
    draw = torch.Generator().manual_seed(0)
    count, tensors, deltas = sum(enabled), {}, {}
    for path, _ in model.named_modules():
        if path.endswith("attn.c_attn"):
            a, b = torch.randn(3 * count, 32, generator=draw), torch.randn(32 * count, 3, 1, generator=draw)
            tensors |= {f"base_model.model.{path}.lora_A.weight": a, f"base_model.model.{path}.lora_B.weight": b}
            found = nn.functional.conv1d(a[None], b, groups=count)[0]
            whole = torch.zeros(3, 32, 32)
            whole[torch.tensor(enabled)] = found.view(count, 32, 32)
            deltas[path] = whole.view(96, 32) * 5 / 3
    folder.mkdir()
    torch.save(tensors, folder / "adapter_model.bin")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 5, "target_modules": ["c_attn"], "enable_lora": enabled,
              "fan_in_fan_out": True, "merge_weights": False, "bias": "none"}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return deltas


@pytest.mark.parametrize("enabled", [[True, False, True], [False, True, False], [True, True, True]], ids=str)
def test_an_adapter_with_enable_lora_is_read(enabled: list[bool], tmp_path: Path) -> None:
    expected = FAMILIES["gpt2"].make()
    deltas = of_2023(tmp_path / "old", expected, enabled)
    with torch.no_grad():
        for path, delta in deltas.items():
            expected.get_submodule(path).weight += delta.T  # type: ignore[operator]
    live = FAMILIES["gpt2"].make()
    truetune.load_adapter(live, str(tmp_path / "old"))
    assert distance(logits(live), logits(expected)) <= CLOSE
    assert distance(logits(live), logits(FAMILIES["gpt2"].make())) > 0.01


@pytest.mark.skipif(not (SHARED / "adapters").is_dir(), reason="needs ../shared/adapters")
def test_a_real_adapter_with_enable_lora_fits_its_model() -> None:
    file = files.read(SHARED / "adapters" / "bloom-560m-lora")
    config = transformers.BloomConfig(hidden_size=1024, n_layer=24, n_head=16, vocab_size=250880)
    model = load.skeleton(config, dtype=torch.float32)
    files.load(model, file)
    sliced = [m for m in model.modules() if isinstance(m, SlicedLinear)]
    assert len(sliced) == 24
    assert {tuple(m.lora_b.shape) for m in sliced} == {(2048, 8, 1)}


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("llama", {"slices": ("qkv=q",)}, "'qkv' is none of the layers(.|\n)*no fused layer that is known"),
        ("gpt2", {"slices": ("c_atn=q",)}, "'c_atn' is none of the layers(.|\n)*c_attn"),
        ("gpt2", {"slices": ("c_attn=gate",)}, "has no part gate(.|\n)*q, k, v"),
        (
            "gpt2",
            {"slices": ("c_fc=q",)},
            r"how transformer.h.0.mlp.c_fc \(GPT2MLP\) orders its outputs(.|\n)*c_fc=1/3",
        ),
        ("gpt2", {"slices": ("c_attn=1/7",)}, "96 outputs: there is no part 1/7"),
        ("gpt2", {"slices": ("c_attn=4/3",)}, "96 outputs: there is no part 4/3"),
        ("gpt2", {"slices": ("c_attn=q",), "init": "pissa"}, "--slices: --init pissa"),
    ],
)
def test_what_it_cant_do_is_refused_by_name(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        attach(FAMILIES[name].make(), LoRA(**settings))


@pytest.mark.parametrize("value", ["qkv", "qkv=", "=q", "qkv=q v", "qkv=w"])
def test_what_is_no_slice_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=r"--slices: found .*, expected NAME=PART,PART"):
        LoRA(slices=(value,))
