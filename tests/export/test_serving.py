"""``export --to peft-serving``: one rank, one scale, and to PEFT the very same model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from families import FAMILIES, distance, logits, perturb
from peft_peer import unwarned
from truetune.adapters import files
from truetune.adapters.inject import attach
from truetune.config.adapter import AdapterConfig
from truetune.config.export import ExportConfig
from truetune.config.methods import METHODS
from truetune.config.resolve import resolve
from truetune.errors import AdapterError, TruetuneError
from truetune.export.serving import RANKS, serving
from truetune.recipes import export

CLOSE = 2e-6  # float32, of the largest logit: zeros added to a sum, and s B rounded once


def saved(family: str, folder: Path, method: str = "lora", **settings: Any) -> tuple[Path, Path, Tensor]:
    """``(base, adapter, what both compute)``: a model and an adapter as if trained, on disk."""
    model = FAMILIES[family].make()
    base, adapter = folder / "base", folder / "adapter"
    model.save_pretrained(base)
    config: AdapterConfig = METHODS[method].config(**settings)
    attach(model, config, seed=3)
    perturb(model)
    files.save(model, adapter, base=str(base))
    return base, adapter, logits(model)


def exported(base: Path, adapter: Path, out: Path) -> dict[str, Any]:
    flags = {"model": str(base), "adapter": str(adapter), "to": "peft-serving", "out": str(out)}
    return export.run(resolve(ExportConfig, file=None, flags=flags))


def by_peft(base: str | Path, adapter: str | Path | None) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    if adapter is None:
        return logits(model)
    with unwarned():
        return logits(PeftModel.from_pretrained(model, str(adapter)))


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"rank": 4, "alpha": 6}),
        ("llama", {"rank": 4, "rank_pattern": ("q_proj=7", "down_proj=2"), "alpha_pattern": ("k_proj=3",)}),
        ("llama", {"rank": 4, "use_rslora": True, "rank_pattern": ("v_proj=9",), "layers": (1,)}),
        ("gpt2", {"rank": 3, "rank_pattern": ("c_attn=5",)}),
    ],
)
def test_peft_computes_the_same_with_one_rank_and_one_scale(
    family: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    base, adapter, live = saved(family, tmp_path, **settings)
    made = exported(base, adapter, tmp_path / "out")
    assert made["base"] is None
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert not {"rank_pattern", "alpha_pattern"} & config.keys()
    assert config["use_rslora"] is False
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in tensors)
    assert {len(t) if "lora_A" in key else t.shape[1] for key, t in tensors.items()} == {config["r"]}
    assert made["max_lora_rank"] in RANKS
    assert distance(by_peft(base, tmp_path / "out"), live) < CLOSE < distance(by_peft(base, None), live)


@pytest.mark.parametrize(
    ("family", "method", "settings", "left"),
    [
        ("llama", "lora", {"rank": 4, "trainable": ("norm", "head")}, True),
        ("llama-tied", "lora", {"rank": 4, "trainable": ("embedding",)}, True),
        ("llama", "lora", {"rank": 4, "targets": ("q_proj", "embed_tokens", "lm_head")}, True),
        ("qwen2", "lora", {"rank": 4, "trainable": ("bias",)}, True),
        ("gpt2", "lora", {"rank": 4, "lora_bias": True}, False),
        ("llama", "dora", {"rank": 4}, False),
        ("llama", "ia3", {"targets": ("auto",)}, False),
    ],
)
def test_what_a_server_takes_no_adapter_for_goes_into_a_base(
    family: str, method: str, settings: dict[str, Any], left: bool, tmp_path: Path
) -> None:
    base, adapter, live = saved(family, tmp_path, method, **settings)
    made = exported(base, adapter, tmp_path / "out")
    assert made["folded"]
    assert (made["adapter"] is not None) is left
    assert distance(by_peft(made["base"], made["adapter"]), live) < 1e-5
    if left:  # the two are not one: the layers that stay beside the base are not in it as well
        assert distance(by_peft(made["base"], None), live) > 1e-3
        assert files.read(Path(made["adapter"])).config["base_model_name_or_path"] == made["base"]


def test_a_prompt_can_not_be_served_so(tmp_path: Path) -> None:
    base, adapter, _ = saved("llama", tmp_path, "prompt", virtual_tokens=3)
    with pytest.raises(AdapterError, match="made by prompt, which is no LoRA"):
        exported(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_b_of_most_layers_stays_as_it_is(tmp_path: Path) -> None:
    _, adapter, _ = saved("llama", tmp_path, rank=4, alpha=6, alpha_pattern=("q_proj=3",))
    file = files.read(adapter)
    served = serving(file)
    same = {key for key in file.tensors if torch.equal(file.tensors[key], served.tensors[key])}
    assert same == {key for key in file.tensors if "q_proj.lora_B" not in key}


def test_refusals_name_the_flag(tmp_path: Path) -> None:
    for flags, words in (
        ({"to": "hf", "model": "m"}, "wants an --adapter"),
        ({"to": "gguf"}, "--model or --adapter is missing"),
        ({"to": "gguf", "model": "m", "as_adapter": True}, "goes with an --adapter"),
        ({"to": "hf", "adapter": "a", "gguf_type": "f16"}, "writes no GGUF"),
        ({"to": "hf", "adapter": "a", "license": "mit"}, "writes no card"),
        ({"to": "hf", "adapter": "a", "push": "alone"}, "ORG/NAME"),
    ):
        with pytest.raises(TruetuneError, match=words):
            resolve(ExportConfig, file=None, flags={"out": str(tmp_path / "o"), **flags})


def test_nothing_is_uploaded_offline(tmp_path: Path) -> None:
    flags = {"adapter": "a", "to": "hf", "out": str(tmp_path / "o"), "push": "me/mine"}
    with pytest.raises(TruetuneError, match="HF_HUB_OFFLINE is set"):
        export.run(resolve(ExportConfig, file=None, flags=flags))
