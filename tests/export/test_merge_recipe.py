"""``truetune.merge``: what it writes is a model of transformers that answers as base and adapter did together."""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Model, PreTrainedModel

import truetune
from families import FAMILIES, distance, logits, perturb
from truetune.adapters import files
from truetune.adapters.inject import adapters
from truetune.checkpoint.tensors import load, open_index
from truetune.config.lora import LoRA
from truetune.data.schema import Message
from truetune.data.template import resolve_template
from truetune.errors import AdapterError, ModelError, OutputError
from truetune.models.load import weight_hash
from truetune.models.tokenizer import ChatTokenizer

CLOSE = 1e-5  # float32, of the largest logit: W x + s B A x against (W + s B A) x; up to 8e-7 was seen
# Before 5.4, transformers takes what is tied and stored twice for two matrices, equal or not, and warns.
TIES_COPIES = Version(transformers.__version__) >= Version("5.4")


class _Collect(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextlib.contextmanager
def silence(*, but: str | None = None) -> Iterator[None]:
    """Whatever transformers logs as a warning inside is a failure; Python's own warnings are anyway.

    Args:
        but: what one warning has to say.
    """
    heard, logger = _Collect(), transformers.logging.get_logger("transformers")
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_warning()  # whatever an earlier test left
    logger.addHandler(heard)
    try:
        yield
    finally:
        logger.removeHandler(heard)
        transformers.logging.set_verbosity(verbosity)
    assert [message for message in heard.messages if but is None or but not in message] == []
    assert len(heard.messages) == (but is not None)


def reload(folder: Path, **options: Any) -> PreTrainedModel:
    """The model as a user of transformers loads it: nothing missing, nothing left over, nothing said."""
    transformers.logging.disable_progress_bar()
    untied = not TIES_COPIES and tied_and_stored_twice(folder)
    with silence(but="both are present in the checkpoints" if untied else None):
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype="auto", **options)
    assert {name: keys for name, keys in info.items() if keys} == {}
    return model


def tied_and_stored_twice(folder: Path) -> bool:
    config = json.loads((folder / "config.json").read_text())
    return config.get("tie_word_embeddings", False) and "lm_head.weight" in open_index(folder)


def save_base(family: str, folder: Path, *, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    transformers.logging.disable_progress_bar()
    FAMILIES[family].make().to(dtype).save_pretrained(folder, **options)
    return folder


def train(base: Path, folder: Path, settings: LoRA, card: dict[str, Any] | None = None) -> PreTrainedModel:
    """A model with a trained adapter, which is also saved in ``folder``."""
    model = reload(base)
    truetune.attach(model, settings, seed=3)
    perturb(model)
    files.save(model, folder, base=str(base), card=card)
    return model.eval()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base("llama", tmp_path / "base")


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    train(base, tmp_path / "adapter", LoRA(rank=2, alpha=4, targets=("q_proj",)))
    return tmp_path / "adapter"


def merge(tmp_path: Path, **settings: Any) -> Path:
    truetune.merge(str(tmp_path / "base"), str(tmp_path / "adapter"), str(tmp_path / "out"), **settings)
    return tmp_path / "out"


# --- weights ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_merged_model_answers_as_the_live_one(family: str, tmp_path: Path) -> None:
    base = save_base(family, tmp_path / "base")
    live = train(base, tmp_path / "adapter", LoRA(rank=4, alpha=8))
    merged = reload(merge(tmp_path))
    assert distance(logits(live), logits(merged)) <= CLOSE
    assert distance(logits(reload(base)), logits(merged)) > 0.01
    assert merged.config.tie_word_embeddings == live.config.tie_word_embeddings


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2"])
def test_a_merge_into_bf16_rounds_each_weight_once(family: str, tmp_path: Path) -> None:
    """The files hold, bit for bit, the float32 sum rounded once; so the logits are as right as bf16 weights can be."""
    base = save_base(family, tmp_path / "base", dtype=torch.bfloat16)
    live = train(base, tmp_path / "adapter", LoRA(rank=4, alpha=8, targets=("all-linear", FAMILIES[family].table)))
    rounded = reload(base).float()
    for path, layer in adapters(live):
        exact = layer.base.float()
        weight = type(layer).merged_weight(layer)
        assert weight.dtype == torch.float32
        rounded.get_submodule(path).weight.data = weight.bfloat16().float()
        layer.base = exact
    merged = reload(merge(tmp_path))
    expected = dict(rounded.named_parameters())
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert [n for n, p in merged.named_parameters() if not torch.equal(p.float(), expected[n])] == []
    assert torch.equal(logits(merged.float()), logits(rounded))


@pytest.mark.parametrize("part", ["norm", "head", "embedding", "bias"])
@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "phi", "opt"])
def test_parts_trained_in_full_are_merged(family: str, part: Any, tmp_path: Path) -> None:
    if family == "llama-tied" and part == "bias":
        pytest.skip("a Llama has no biases")
    save_base(family, tmp_path / "base")
    live = train(tmp_path / "base", tmp_path / "adapter", LoRA(rank=2, alpha=4, trainable=(part,)))
    assert distance(logits(live), logits(reload(merge(tmp_path)))) <= CLOSE


def test_a_weight_that_transformers_renames_is_refused_and_not_lost(tmp_path: Path) -> None:
    """GPT-NeoX's files call the head ``embed_out``; an edit under the model's name would add a tensor nobody reads.

    Later versions of transformers call it ``lm_head`` in the model; where they don't, the merge has to be right.
    """
    base = save_base("neox", tmp_path / "base")
    live = train(base, tmp_path / "adapter", LoRA(rank=2, alpha=4, trainable=("head",)))
    if hasattr(live, "embed_out"):
        assert distance(logits(live), logits(reload(merge(tmp_path)))) <= CLOSE
        return
    with pytest.raises(AdapterError, match=r"no tensor lm_head\.weight(.|\n)*transformers renames"):
        merge(tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", ["table", "head"])
@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma", "bloom", "opt", "gpt2"])
def test_lora_on_table_or_head_is_merged_and_keeps_them_tied(family: str, target: str, tmp_path: Path) -> None:
    base = save_base(family, tmp_path / "base")
    live = train(base, tmp_path / "adapter", LoRA(rank=4, alpha=8, targets=(getattr(FAMILIES[family], target),)))
    merged = reload(merge(tmp_path))
    assert distance(logits(live), logits(merged)) <= CLOSE
    one = merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    assert one == live.config.tie_word_embeddings
    assert open_index(tmp_path / "out").keys() == open_index(base).keys()


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ],
    ids=["lora head", "lora table", "head", "table", "both"],
)
@pytest.mark.parametrize("stored", ["once", "twice"])
def test_an_adapter_of_peft_on_one_of_two_tied_layers_is_merged_untied(
    settings: dict[str, Any], stored: str, tmp_path: Path
) -> None:
    base = save_base("llama-tied", tmp_path / "base")
    if stored == "twice":
        store_head_too(base)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message="Setting `save_embedding_layers` to `True`")
        warnings.filterwarnings("ignore", message=".*Model has `tie_word_embeddings=True`")
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False, **settings)
        foreign = peft.get_peft_model(reload(base), config)
        perturb(foreign)
        foreign.save_pretrained(tmp_path / "adapter")
    merged = reload(merge(tmp_path))
    assert distance(logits(foreign), logits(merged)) <= CLOSE
    assert merged.config.tie_word_embeddings is False


def store_head_too(base: Path) -> None:
    """Some published models store the one matrix under both of its names."""
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "settings",
    [LoRA(rank=2, alpha=4, targets=("embed_tokens",)), LoRA(rank=2, alpha=4, targets=("q_proj",), trainable=("head",))],
)
def test_a_tied_matrix_that_is_stored_twice_changes_in_both_places(settings: LoRA, tmp_path: Path) -> None:
    """Where transformers took them for two while training, only one of them was trained, and only one changes."""
    base = save_base("llama-tied", tmp_path / "base")
    store_head_too(base)
    live = train(base, tmp_path / "adapter", settings)
    out = merge(tmp_path)
    held = {name: load(entry) for name, entry in open_index(out).items()}
    merged = reload(out)
    assert torch.equal(held["lm_head.weight"], held["model.embed_tokens.weight"]) is TIES_COPIES
    assert merged.config.tie_word_embeddings is TIES_COPIES
    assert distance(logits(live), logits(merged)) <= CLOSE


def test_a_base_saved_as_the_bare_body_is_merged(tmp_path: Path) -> None:
    """The published GPT-2's files lack the prefix ``transformer.``."""
    model = FAMILIES["gpt2"].make()
    body = GPT2Model(model.config)
    body.load_state_dict(model.transformer.state_dict())
    transformers.logging.disable_progress_bar()
    body.save_pretrained(tmp_path / "base")
    live = train(tmp_path / "base", tmp_path / "adapter", LoRA(rank=2, alpha=4, targets=("c_attn", "wte")))
    out = merge(tmp_path)
    assert "h.0.attn.c_attn.weight" in open_index(out)
    assert distance(logits(live), logits(reload(out))) <= CLOSE


def test_shards_are_read_and_written(tmp_path: Path) -> None:
    base = save_base("llama", tmp_path / "base", max_shard_size="20KB")
    assert len(list(base.glob("model-*.safetensors"))) > 2
    live = train(base, tmp_path / "adapter", LoRA(rank=2, alpha=4))
    out = merge(tmp_path, max_shard_gb=3e-5)
    sizes = [path.stat().st_size for path in out.glob("model-*.safetensors")]
    assert len(sizes) > 2
    assert max(sizes) < 34_000  # 30 kB of tensors and a header
    assert distance(logits(live), logits(reload(out))) <= CLOSE


def test_an_adapter_merges_the_same_after_a_visit_to_peft(adapter: Path, base: Path, tmp_path: Path) -> None:
    """PEFT's own merge of our adapter gives the same weights, up to the rounding of float32."""
    merged = reload(merge(tmp_path))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        theirs = peft.PeftModel.from_pretrained(reload(base), str(adapter)).merge_and_unload()
    for name, parameter in merged.named_parameters():
        assert distance(parameter, theirs.get_parameter(name)) < 1e-6


# --- files beside the weights -------------------------------------------------------------------------------------


@pytest.fixture
def chatty(make_tiny: Any, tmp_path: Path) -> Path:
    """A base with a tokenizer and no chat template."""
    folder: Path = make_tiny(tmp_path / "base", chat_template=None)
    return folder


def trained_card(base: Path, template: str = "alpaca") -> dict[str, Any]:
    found = resolve_template(template, ChatTokenizer.load(str(base)))
    return {"template": {"name": found.name, "source": found.source, "sha256": found.digest}, "stop_ids": [258]}


def test_tokenizer_and_generation_settings_come_along(chatty: Path, tmp_path: Path) -> None:
    train(chatty, tmp_path / "adapter", LoRA(rank=2, alpha=4))
    (chatty / "generation_config.json").write_text('{"eos_token_id": 256, "temperature": 0.5, "do_sample": true}')
    out = merge(tmp_path)
    kept = [path.name for path in chatty.glob("*.json") if path.name != "config.json"]
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= set(kept)
    assert [name for name in kept if (out / name).read_bytes() != (chatty / name).read_bytes()] == []
    ids = AutoTokenizer.from_pretrained(out)("What it is.")["input_ids"]
    assert ids == AutoTokenizer.from_pretrained(chatty)("What it is.")["input_ids"]


@pytest.mark.parametrize("own", [None, "{{ 'another' }}"], ids=["no template", "another template"])
def test_the_template_that_trained_it_is_the_merged_models_own(own: str | None, chatty: Path, tmp_path: Path) -> None:
    if own:
        path = chatty / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": own}))
    card = trained_card(chatty)
    train(chatty, tmp_path / "adapter", LoRA(rank=2, alpha=4), card)
    out = merge(tmp_path)
    assert (out / "chat_template.jinja").read_text() == card["template"]["source"]
    encoder = ChatTokenizer.load(str(chatty))
    template = resolve_template("alpaca", encoder)
    text = template.render(
        encoder, [Message("user", "Add 2 and 3.", instruction="Add 2 and 3.", input="")], prompt=True
    )
    theirs = AutoTokenizer.from_pretrained(out).apply_chat_template(
        [{"role": "user", "content": "Add 2 and 3."}], add_generation_prompt=True, return_dict=False
    )
    assert theirs == encoder.encode([text])[0]


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({"eos_token_id": 256, "do_sample": True, "top_p": 0.9}, [256, 258]),
        ({"eos_token_id": [257, 258]}, [257, 258]),
        (None, [256, 258]),
    ],
    ids=["one", "known", "only in config.json"],
)
def test_stop_tokens_that_were_trained_join_those_of_the_base(
    generation: dict[str, Any] | None, expected: list[int], chatty: Path, tmp_path: Path
) -> None:
    train(chatty, tmp_path / "adapter", LoRA(rank=2, alpha=4), trained_card(chatty))
    path = chatty / "generation_config.json"
    path.unlink() if generation is None else path.write_text(json.dumps(generation))
    merged = reload(merge(tmp_path))
    assert merged.generation_config.eos_token_id == expected
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert {name: written[name] for name in generation or {} if name != "eos_token_id"} == {
        name: value for name, value in (generation or {}).items() if name != "eos_token_id"
    }


# --- refusals -----------------------------------------------------------------------------------------------------


def test_another_base_is_refused_unless_it_is_meant(base: Path, tmp_path: Path) -> None:
    card = {"base": {"name": "mine", "weights_sha256": weight_hash(base)}}
    train(base, tmp_path / "adapter", LoRA(rank=2, alpha=4), card)
    with torch.no_grad():
        other = reload(base)
        other.model.norm.weight.add_(0.5)
    other.save_pretrained(base)
    with pytest.raises(AdapterError, match=r"trained on other weights(.|\n)*mine(.|\n)*--allow-mismatch base"):
        merge(tmp_path)
    assert not (tmp_path / "out").exists()
    merge(tmp_path, allow_other_base=True)
    assert reload(tmp_path / "out").model.norm.weight.equal(other.model.norm.weight)


def test_a_base_of_another_shape_is_refused_with_every_tensor(adapter: Path, tmp_path: Path) -> None:
    FAMILIES["llama"].make(hidden_size=64).save_pretrained(tmp_path / "wide")
    with pytest.raises(AdapterError, match=r"does not fit this model: 4 of 4(.|\n)*misshaped"):
        truetune.merge(str(tmp_path / "wide"), str(adapter), str(tmp_path / "out"), allow_other_base=True)
    assert not (tmp_path / "out").exists()


def test_a_table_that_is_not_the_adapters_is_refused_while_merging(base: Path, tmp_path: Path) -> None:
    train(base, tmp_path / "adapter", LoRA(rank=2, alpha=4, targets=("embed_tokens",)))
    path = tmp_path / "adapter" / files.WEIGHTS
    table = FAMILIES["llama"].make().model.embed_tokens.weight.detach()
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    save_file(load_file(path) | {key: table + 1}, path)
    with pytest.raises(AdapterError, match=r"embed_tokens\.weight in it is not what this base holds"):
        merge(tmp_path)
    assert not (tmp_path / "out").exists()
    save_file(load_file(path) | {key: table.clone()}, path)
    merge(tmp_path)


def test_an_existing_out_is_refused_and_kept(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"is not empty(.|\n)*mine\.txt(.|\n)*new folder"):
        merge(tmp_path)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_base_and_adapter_swapped_is_said_so(adapter: Path, base: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"it is +an adapter"):
        truetune.merge(str(adapter), str(base), str(tmp_path / "out"))
    with pytest.raises(AdapterError, match="is no adapter"):
        truetune.merge(str(base), str(base), str(tmp_path / "out"))


@pytest.mark.parametrize(
    "settings", [LoRA(rank=2, alpha=8), LoRA(rank=2, alpha=8, rank_pattern=("q_proj=1",))], ids=["by files", "by model"]
)
def test_what_would_not_be_finite_is_not_written(base: Path, tmp_path: Path, settings: LoRA) -> None:
    """A plain LoRA is merged by its files alone, one with patterns by the model."""
    train(base, tmp_path / "adapter", settings)
    with pytest.raises(ModelError, match=r"\.weight would hold NaN or infinity"):
        truetune.merge(str(base), f"{tmp_path / 'adapter'}=1e39", str(tmp_path / "out"))
    tensors = load_file(tmp_path / "adapter" / files.WEIGHTS)
    tensors[sorted(tensors)[0]].view(-1)[0] = float("nan")
    save_file(tensors, tmp_path / "adapter" / files.WEIGHTS)
    with pytest.raises((ModelError, AdapterError), match="NaN or infinity"):
        truetune.merge(str(base), str(tmp_path / "adapter"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
