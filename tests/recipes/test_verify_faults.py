"""Faults that are known from real tools, planted one by one: ``verify`` finds each, and says what it is."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

import truetune
from proof_runs import Tensors, change_json, change_tensors, copy_of, facts, row_of, trained, verdict
from truetune.errors import AdapterError
from truetune.models import load

LAYER = "model.layers.0"


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tiny_model, tmp_path_factory.mktemp("proof"))


@pytest.fixture
def merged(run: Path, tmp_path: Path) -> Path:
    """The merged model, to be broken."""
    return copy_of(run.parent / "merged", tmp_path / "merged")


def with_head(base: Path, folder: Path, *, tied: bool) -> Path:
    """A run on a base with a head that is the table, or one of its own."""
    change_json(base / "config.json", tie_word_embeddings=tied)
    return trained(base, folder)


def test_what_is_not_broken_is_found_the_same(run: Path, merged: Path) -> None:
    found = facts(run, merged, against="transformers,peft")
    assert found["exit_code"] == 0
    assert {(row["loader"], row["verdict"]) for row in found["artefacts"]} == {
        ("truetune", "faithful"), ("transformers", "faithful"), ("peft", "faithful")
    }  # fmt: skip
    row = row_of(found, merged)
    assert row["logits"]["max_delta"] < 1e-5
    assert row["prompts"] == [8, 8]
    assert row["answers"] == [8, 8]


def test_another_template(run: Path, merged: Path) -> None:
    source = (merged / "chat_template.jinja").read_text(encoding="utf-8")
    (merged / "chat_template.jinja").write_text(source.replace("assistant", "model"), encoding="utf-8")
    says, why = verdict(run, merged)
    assert says == "drift"
    assert why == "8 of 8 prompts become other tokens than those that were trained"


def test_tokens_that_changed_places_where_no_prompt_has_them(run: Path, merged: Path) -> None:
    tokenizer = json.loads((merged / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    rare = [token for token, number in vocabulary.items() if number in (0, 1)]  # control characters
    vocabulary[rare[0]], vocabulary[rare[1]] = vocabulary[rare[1]], vocabulary[rare[0]]
    (merged / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    found = row_of(facts(run, merged), merged)
    assert found["prompts"] == [8, 8]
    assert found["verdict"] == "drift"
    assert "2 tokens have other ids, such as" in " | ".join(found["reasons"])


def test_pieces_that_are_joined_in_another_order(run: Path, merged: Path) -> None:
    tokenizer = json.loads((merged / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    joined = list(itertools.product(list(vocabulary)[:20], repeat=2))[:2]
    tokenizer["model"]["vocab"] = vocabulary | {a + b: len(vocabulary) + 2 + n for n, (a, b) in enumerate(joined)}
    tokenizer["model"]["merges"] = [list(pair) for pair in joined]
    (merged / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    row = row_of(facts(run, merged), merged)
    assert row["verdict"] == "drift"
    assert "its tokenizer joins pieces of text by other rules" in row["reasons"]


def test_a_stop_token_that_is_missing(run: Path, merged: Path) -> None:
    settings = json.loads((merged / "generation_config.json").read_text(encoding="utf-8"))
    assert settings["eos_token_id"] == [256, 258]
    change_json(merged / "generation_config.json", eos_token_id=256)
    says, why = verdict(run, merged)
    assert says == "drift"
    assert why == "an answer no longer ends at <|im_end|>, which was trained to end it"


def test_alpha_in_place_of_alpha_over_r(run: Path, tmp_path: Path) -> None:
    adapter = copy_of(run / "adapter", tmp_path / "adapter")
    known = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    change_json(adapter / "adapter_config.json", lora_alpha=known["lora_alpha"] * known["r"])
    base = known["base_model_name_or_path"]
    truetune.merge(base, str(adapter), str(tmp_path / "wrong"))
    says, why = verdict(run, tmp_path / "wrong")
    assert says == "drift"
    assert "logits differ by up to" in why


def test_a_transposed_conv1d(tiny_model: Path, tmp_path: Path) -> None:
    """GPT-2 keeps [in, out]: of a square weight, the wrong way round has the right shape."""
    base = tmp_path / "gpt2"
    shutil.copytree(tiny_model, base, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        GPT2LMHeadModel(
            GPT2Config(vocab_size=259, n_embd=32, n_layer=1, n_head=2, n_positions=128, eos_token_id=256)
        ).save_pretrained(base)
    run = trained(base, tmp_path, targets=["attn.c_proj"])
    name = "transformer.h.0.attn.c_proj.weight"
    plain = load_file(base / "model.safetensors")[name]
    assert verdict(run, tmp_path / "merged") == ("faithful", "")

    def transpose(tensors: Tensors) -> Tensors:
        return tensors | {name: (plain + (tensors[name] - plain).T).contiguous()}

    says, why = verdict(run, change_tensors(copy_of(tmp_path / "merged", tmp_path / "wrong"), transpose))
    assert says == "drift"
    assert "logits differ by up to" in why


def test_a_head_that_was_dropped(run: Path, merged: Path) -> None:
    change_tensors(merged, lambda tensors: {k: v for k, v in tensors.items() if k != "lm_head.weight"})
    found = facts(run, merged, against="transformers")
    for loader in ("truetune", "transformers"):
        row = row_of(found, merged, loader)
        assert row["verdict"] == "drift"
        assert "lm_head.weight" in " ".join(row["reasons"])


@pytest.mark.parametrize("was_tied", [True, False])
def test_a_head_tied_or_untied_by_mistake(was_tied: bool, make_tiny: Callable[..., Path], tmp_path: Path) -> None:
    run = trained(make_tiny(tmp_path / "base", tie_word_embeddings=was_tied), tmp_path)
    merged = tmp_path / "merged"
    assert verdict(run, merged) == ("faithful", "")
    change_json(merged / "config.json", tie_word_embeddings=not was_tied)

    def stale(tensors: Tensors) -> Tensors:
        """The head of an earlier state is left in the file, or the one of its own is left out."""
        head = "lm_head.weight"
        rest = {k: v for k, v in tensors.items() if k != head}
        return rest | {head: rest["model.embed_tokens.weight"].flip(0).contiguous()} if was_tied else rest

    says, why = verdict(run, change_tensors(merged, stale))
    assert says == "drift"
    assert "logits differ by up to" in why


def test_another_revision_of_the_base(run: Path, tiny_model: Path, tmp_path: Path) -> None:
    newer = change_tensors(
        copy_of(tiny_model, tmp_path / "newer"),
        lambda t: t | {f"{LAYER}.mlp.down_proj.weight": t[f"{LAYER}.mlp.down_proj.weight"] * 1.1},
    )
    with pytest.raises(AdapterError, match="was trained on other weights"):
        truetune.merge(str(newer), str(run / "adapter"), str(tmp_path / "refused"))
    with pytest.raises(AdapterError, match="was trained on other weights"):
        facts(run, model=str(newer))
    truetune.merge(str(newer), str(run / "adapter"), str(tmp_path / "wrong"), allow_mismatch="base")
    assert verdict(run, tmp_path / "wrong")[0] == "drift"
    found = facts(run, run.parent / "merged", model=str(newer), allow_mismatch=["base"])
    assert row_of(found, run / "adapter")["verdict"] == "drift"  # against what the run wrote down


def test_float16_that_overflows(tiny_model: Path, tmp_path: Path) -> None:
    """The scale of a norm moved between two weights: the same model in float32, and infinite in float16."""
    large = 2.0**18

    def scaled(tensors: Tensors) -> Tensors:
        norm = f"{LAYER}.input_layernorm.weight"
        small = {f"{LAYER}.self_attn.{x}_proj.weight": 1 / large for x in "qkv"}
        return {name: tensor * {norm: large, **small}.get(name, 1.0) for name, tensor in tensors.items()}

    base = change_tensors(copy_of(tiny_model, tmp_path / "base"), scaled)
    run = trained(base, tmp_path, targets=["down_proj"])
    merged = tmp_path / "merged"
    assert verdict(run, merged) == ("faithful", "")
    change_json(merged / "config.json", dtype="float16")
    says, why = verdict(run, change_tensors(merged, lambda tensors: {k: v.half() for k, v in tensors.items()}))
    assert says == "drift"
    assert "its logits are not all numbers: a weight or a product overflows" in why


def test_an_adapter_that_was_not_applied(run: Path, tiny_model: Path) -> None:
    says, why = verdict(run, tiny_model)
    assert says == "drift"
    assert "it is as far from the trained model as the base itself: the training is not in it" in why


def test_a_text_that_begins_twice(tiny_model: Path, tmp_path: Path) -> None:
    base = copy_of(tiny_model, tmp_path / "base")
    change_json(base / "tokenizer_config.json", bos_token="<|endoftext|>")
    source = (base / "chat_template.jinja").read_text(encoding="utf-8")
    (base / "chat_template.jinja").write_text("{{ bos_token }}" + source, encoding="utf-8")
    run = trained(base, tmp_path)
    merged = tmp_path / "merged"
    assert verdict(run, merged) == ("faithful", "")
    (merged / "chat_template.jinja").write_text("{{ bos_token }}{{ bos_token }}" + source, encoding="utf-8")
    says, why = verdict(run, merged)
    assert says == "drift"
    assert why == "8 of 8 prompts become other tokens than those that were trained"


def test_an_adapter_that_was_changed_on_disk(run: Path, tmp_path: Path) -> None:
    """Without any artefact, the adapter itself is held against what the run wrote down."""
    moved = copy_of(run, tmp_path / "run")
    change_tensors_of_adapter(moved / "adapter")
    found = facts(moved)
    assert found["exit_code"] == 1
    assert row_of(found, moved / "adapter")["verdict"] == "drift"


def change_tensors_of_adapter(adapter: Path) -> None:
    from safetensors.torch import save_file

    path = adapter / "adapter_model.safetensors"
    save_file({name: tensor * 1.5 for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    assert load.is_local(str(adapter))
