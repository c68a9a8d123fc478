"""Rows of single tokens trained beside an adapter, and tokens that a base did not have; with PEFT both ways."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedModel

import truetune as tt
from families import FAMILIES, VOCAB, distance, logits, perturb
from method_checks import CLOSE, base, check, learn
from step_models import LENGTHS, rows
from truetune.adapters import files, vocabulary
from truetune.adapters.inject import attachment
from truetune.adapters.token_rows import HeadRows, TokenRows
from truetune.adapters.vocabulary import NewTokens
from truetune.config.methods import METHODS
from truetune.data.plan import StepPlan
from truetune.errors import AdapterError
from truetune.models.forward import Path as Way
from truetune.models.forward import prepared
from truetune.models.survey import survey
from truetune.train.step import accumulate

IDS = (20, 3, 7)
EACH = ("llama", "llama-tied", "gpt2", "bloom", "gemma2", "qwen3")
TWO_NEW = NewTokens({"<a>": VOCAB, "<b>": VOCAB + 1}, known=VOCAB, before=VOCAB, after=VOCAB + 2)
TEXT = torch.tensor([[1, 20, 3, 9, 7, 3, 20, 55]])
NEW_TEXT = torch.tensor([[1, VOCAB, 3, 9, VOCAB + 1, 3, VOCAB, 55]])


def lora(family: str, **settings: Any) -> tt.LoRA:
    return tt.LoRA(**({"rank": 2, "targets": FAMILIES[family].targets, "token_rows": IDS} | settings))


@contextlib.contextmanager
def peft_advice() -> Iterator[None]:
    with warnings.catch_warnings():
        for text in ("fan_in_fan_out", "Model has `tie", "Setting `save_embedding", "You have requested `ensure"):
            warnings.filterwarnings("ignore", message=f".*{text}")
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*Could not find a config file")
        yield


# --- what is trained ----------------------------------------------------------------------------------------------


def gradients(model: PreTrainedModel, *, packing: bool) -> tuple[float, list[Tensor]]:
    """The loss of one step through packed or padded rows, and the rows' gradients."""
    found = survey(model)
    way = Way(model, found, packing and found.packs)
    plan = StepPlan.build(
        rows(), batch_size=len(LENGTHS), micro_tokens=200, packing=way.packing, seed=3, epochs=1, max_steps=None
    )
    with prepared(way):
        result = accumulate(way.loss, plan.micro_batches(0), seed=3, step=0, autocast=contextlib.nullcontext)
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    if isinstance(ends[0], TokenRows):
        return result.loss, [end.rows.grad for end in ends if end.rows is not None]
    return result.loss, [w.grad[list(IDS)] for w in dict.fromkeys(end.weight for end in ends)]


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("family", EACH)
def test_rows_get_the_gradient_that_they_have_in_the_whole_matrix(family: str, packing: bool) -> None:
    model, whole = FAMILIES[family].make(), FAMILIES[family].make()
    tt.attach(model, lora(family))
    whole.requires_grad_(False)
    for end in (whole.get_input_embeddings(), whole.get_output_embeddings()):
        end.weight.requires_grad_(True)
    loss, found = gradients(model, packing=packing)
    expected_loss, expected = gradients(whole, packing=packing)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert distance(one / other.abs().max(), other / other.abs().max()) <= 1e-5


def test_nothing_of_the_matrix_is_trained_or_stored(tmp_path: Path) -> None:
    model = FAMILIES["llama-tied"].make()
    tt.attach(model, lora("llama-tied"))
    trained = {name: count for name, count in tt.trainable(model).items() if "lora" not in name}
    assert trained == {"model.embed_tokens.rows": len(IDS) * 32}
    tt.save_adapter(model, str(tmp_path))
    held = {key: t for key, t in files.read(tmp_path).tensors.items() if "lora" not in key}
    key = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    assert {k: tuple(t.shape) for k, t in held.items()} == {key: (len(IDS), 32)}
    assert torch.equal(held[key], FAMILIES["llama-tied"].make().get_input_embeddings().weight[list(IDS)])


def test_rows_alone_follow_a_scale_inside_the_table() -> None:
    """Gemma 3 multiplies rows by sqrt(dim) in the table's module; the head, which is the same matrix, does not."""
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 8, "vocab_size": VOCAB}  # fmt: skip
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(Gemma3TextConfig(**shape, tie_word_embeddings=True)).eval()
    before = logits(model, TEXT)
    tt.attach(model, tt.LoRA(rank=2, targets=("q_proj",), token_rows=IDS))
    assert distance(logits(model, TEXT), before) <= CLOSE
    perturb(model)
    live = logits(model, TEXT)
    merged = [(path, adapter.merged_weight()) for path, adapter in dict(model.named_modules()).items()
              if isinstance(adapter, TokenRows)]  # fmt: skip
    lora_only = {k: p.detach().clone() for k, p in model.named_parameters() if "lora" in k}
    tt.detach(model)
    model.get_submodule(merged[0][0]).weight.data = merged[0][1]
    tt.attach(model, tt.LoRA(rank=2, targets=("q_proj",)))
    for name, parameter in model.named_parameters():
        if name in lora_only:
            parameter.data = lora_only[name]
    model.tie_weights()
    assert distance(logits(model, TEXT), live) <= CLOSE


# --- every method, every form of base -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", [name for name, m in METHODS.items() if m.result == "adapter" and name != "bitfit"])
def test_every_method_trains_rows_beside_its_own(method: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"adapter_layers": 1} if method == "llama-adapter" else {}
    config = METHODS[method].config(token_rows=IDS, **settings)
    model = FAMILIES["llama-tied"].make()
    tt.attach(model, config)
    losses = learn(model, config, steps=3)
    assert losses[-1] < losses[0]
    live = logits(model)
    tt.save_adapter(model, str(tmp_path))
    again = FAMILIES["llama-tied"].make()
    tt.load_adapter(again, str(tmp_path))
    assert torch.equal(logits(again), live)
    moved = next(m for m in again.modules() if isinstance(m, TokenRows))
    assert not torch.equal(moved.trained(), FAMILIES["llama-tied"].make().get_input_embeddings().weight[list(IDS)])
    type_ = json.loads((tmp_path / files.CONFIG).read_text())["peft_type"]
    assert (type_ in ("LORA", "ADALORA")) == (method in ("lora", "dora", "adalora"))  # PEFT would drop the rows
    tt.detach(again)
    assert torch.equal(logits(again), logits(FAMILIES["llama-tied"].make()))


@pytest.mark.parametrize("form", ["float32", "bfloat16", "int8", "nf4"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rows_on_every_form_of_base(family: str, form: str, tmp_path: Path) -> None:
    check(family, form, lora(family), tmp_path, lr=1e-2)


# --- PEFT ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", EACH)
def test_peft_reads_our_rows(family: str, tmp_path: Path) -> None:
    live = FAMILIES[family].make()
    tt.attach(live, lora(family))
    perturb(live)
    tt.save_adapter(live, str(tmp_path))
    with peft_advice():
        theirs = peft.PeftModel.from_pretrained(FAMILIES[family].make(), str(tmp_path))
    assert distance(logits(theirs, TEXT), logits(live, TEXT)) <= CLOSE


def of_peft(family: str, folder: Path, field: Any, *, stored: Path | None = None, vocab: int = VOCAB) -> Any:
    """PEFT's model with such rows, moved from where it starts and saved."""
    model = FAMILIES[family].make()
    if stored:  # PEFT looks there for the size that the vocabulary had
        model.save_pretrained(str(stored))
        model.config._name_or_path = model.name_or_path = str(stored)
    if vocab > VOCAB:
        model.resize_token_embeddings(vocab, mean_resizing=False)
    conv = {"fan_in_fan_out": family == "gpt2"}
    config = peft.LoraConfig(r=2, target_modules=[*FAMILIES[family].targets], trainable_token_indices=field,
                             init_lora_weights=False, task_type="CAUSAL_LM", **conv)  # fmt: skip
    with peft_advice():
        foreign = peft.get_peft_model(model, config)
        perturb(foreign)
        foreign.save_pretrained(str(folder))
    return foreign


@pytest.mark.parametrize(
    ("family", "field"),
    [
        ("llama", [3, 20]),  # of the table alone, though the head is a matrix of its own
        ("llama-tied", [3, 20]),
        ("gpt2", [20]),
        ("llama", {"embed_tokens": [3, 20], "lm_head": [7]}),
        ("llama-tied", {"embed_tokens": [3, 20], "lm_head": [3, 20]}),
        ("llama-tied", {"embed_tokens": [3, 20], "lm_head": [7]}),
        ("llama-tied", {"lm_head": [7]}),
    ],
    ids=str,
)
def test_we_read_rows_of_peft(family: str, field: Any, tmp_path: Path) -> None:
    foreign, live = of_peft(family, tmp_path / "a", field), FAMILIES[family].make()
    tt.load_adapter(live, str(tmp_path / "a"))
    assert distance(logits(live, TEXT), logits(foreign, TEXT)) <= CLOSE
    tt.save_adapter(live, str(tmp_path / "b"))
    before, after = (files.read(tmp_path / name) for name in "ab")
    assert {k: v.tolist() for k, v in before.tensors.items()} == {k: v.tolist() for k, v in after.tensors.items()}


@pytest.mark.parametrize(("family", "ids"), [("llama-tied", [128, 129]), ("llama-tied", [3, 128])])
@pytest.mark.parametrize("is_stored", [True, False], ids=["whole matrix in the file", "rows alone"])
def test_we_read_rows_of_tokens_that_peft_added(family: str, ids: list[int], is_stored: bool, tmp_path: Path) -> None:
    """Where PEFT can compare with the base's folder, it stores the whole matrix too, of table and head."""
    stored = tmp_path / "base" if is_stored else None
    foreign = of_peft(family, tmp_path / "a", ids, stored=stored, vocab=max(ids) + 1)
    held = files.read(tmp_path / "a").tensors
    assert any("base_layer" in key for key in held) == is_stored
    live = FAMILIES[family].make()
    tt.load_adapter(live, str(tmp_path / "a"), allow_other_base=True)
    text = NEW_TEXT.clamp(max=max(ids))
    assert distance(logits(live, text), logits(foreign, text)) <= CLOSE


# --- new tokens ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*EACH, "phi"])
def test_a_vocabulary_grows_by_the_mean_and_shrinks_again(family: str) -> None:
    model = FAMILIES[family].make()
    before = logits(model)
    vocabulary.admit(model, dataclasses.replace(TWO_NEW, known=100))
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert (len(table.weight), len(head.weight), model.config.vocab_size) == (130, 130, 130)
    assert (head.weight is table.weight) == model.config.tie_word_embeddings
    for weight in (table.weight, head.weight):
        assert torch.equal(weight[VOCAB], weight[:100].mean(dim=0))
        assert torch.equal(weight[VOCAB], weight[-1])
    assert torch.equal(logits(model)[..., :VOCAB], before)
    vocabulary.dismiss(model, VOCAB)
    assert torch.equal(logits(model), before)
    assert model.config.vocab_size == VOCAB
    assert vocabulary.new_tokens(model) is None


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2"])
def test_an_adapter_brings_its_tokens_and_takes_them_away(family: str, tmp_path: Path) -> None:
    live = FAMILIES[family].make()
    vocabulary.admit(live, TWO_NEW)
    tt.attach(live, lora(family, token_rows=tuple(TWO_NEW.ids.values())))
    perturb(live)
    tt.save_adapter(live, str(tmp_path))
    again = FAMILIES[family].make()
    tt.load_adapter(again, str(tmp_path))
    assert torch.equal(logits(again, NEW_TEXT), logits(live, NEW_TEXT))
    assert files.read(tmp_path).card["tokenizer"] == TWO_NEW.card()
    larger = FAMILIES[family].make()
    larger.resize_token_embeddings(VOCAB + 2, mean_resizing=False)
    with peft_advice():
        theirs = peft.PeftModel.from_pretrained(larger, str(tmp_path))
    assert distance(logits(theirs, NEW_TEXT), logits(live, NEW_TEXT)) <= CLOSE
    tt.detach(again)
    assert torch.equal(logits(again), logits(FAMILIES[family].make()))


def test_rows_that_a_checkpoint_has_to_spare_are_taken_from_the_mean_and_left_as_they_are() -> None:
    model = FAMILIES["llama-tied"].make()
    spare = NewTokens({"<a>": 126}, known=126, before=VOCAB, after=VOCAB)
    vocabulary.admit(model, spare)
    tt.attach(model, lora("llama-tied", token_rows=(126, 3)))
    table = model.get_input_embeddings()
    assert isinstance(table, TokenRows)
    assert torch.equal(table.trained()[0], table.weight[:126].mean(dim=0))
    assert torch.equal(table.trained()[1], table.weight[3])
    assert not torch.equal(table.weight[126], table.trained()[0])


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("llama", {"targets": ("embed_tokens",)}, "whole matrix is adapted or trained"),
        ("llama", {"trainable": ("head",)}, "lm_head: rows of single tokens"),
        ("llama-tied", {"trainable": ("embedding",)}, "whole matrix is adapted or trained"),
        ("llama-tied", {"targets": ("lm_head",)}, "whole matrix is adapted or trained"),
        ("llama", {"token_rows": (3, VOCAB)}, f"--token-rows {VOCAB}: model.embed_tokens has rows 0 to {VOCAB - 1}"),
    ],
)
def test_what_can_not_be_is_refused_and_nothing_is_changed(family: str, settings: dict[str, Any], message: str) -> None:
    model = FAMILIES[family].make()
    before = logits(model)
    with pytest.raises(AdapterError, match=message):
        tt.attach(model, lora(family, **settings))
    assert attachment(model) is None
    assert torch.equal(logits(model), before)
    assert not any(isinstance(m, TokenRows | HeadRows) for m in model.modules())


def test_a_model_is_as_it_was_when_new_rows_do_not_fit(tmp_path: Path) -> None:
    live = FAMILIES["llama"].make()
    vocabulary.admit(live, TWO_NEW)
    tt.attach(live, lora("llama", token_rows=(128, 129)))
    tt.save_adapter(live, str(tmp_path))
    other = FAMILIES["llama"].make(num_hidden_layers=1)
    before = logits(other)
    with pytest.raises(AdapterError, match="does not fit this model"):
        tt.load_adapter(other, str(tmp_path))
    assert torch.equal(logits(other), before)
    assert other.config.vocab_size == VOCAB


def test_ids_of_another_vocabulary_are_refused(tmp_path: Path) -> None:
    live = FAMILIES["llama"].make()
    tt.attach(live, lora("llama"))
    tt.save_adapter(live, str(tmp_path))
    config = json.loads((tmp_path / files.CONFIG).read_text())
    config["trainable_token_indices"] = [3, 7, 10**9]
    (tmp_path / files.CONFIG).write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="has rows of token 1000000000"):
        tt.load_adapter(FAMILIES["llama"].make(), str(tmp_path))


def test_a_packed_head_can_not_grow() -> None:
    from packed import KINDS
    from truetune.quant.replace import replace

    model = base("llama")
    replace(model, KINDS["nf4"], ["lm_head"], dtype=torch.float32)
    with pytest.raises(AdapterError, match="Linear4bit can't be made larger"):
        vocabulary.admit(model, TWO_NEW)
    tt.attach(model, lora("llama"))  # rows that are there can be trained
    assert learn(model, lora("llama"), steps=3)[-1] < 5.2


@pytest.mark.parametrize("part", ["head", "embedding"])
def test_a_matrix_that_virtual_tokens_stand_before_is_refused_with_what_to_do(part: Any) -> None:
    with pytest.raises(AdapterError, match="which is the table of the embeddings as well") as refused:
        tt.attach(FAMILIES["llama-tied"].make(), tt.Prompt(virtual_tokens=2, trainable=(part,)))
    assert f"leave {part} out of --trainable" in str(refused.value)
    assert "--token-rows" in str(refused.value)
