"""Loading: what comes out is the model as its authors meant it, on every supported transformers."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from families import FAMILIES, distance, logits
from truetune.models.load import load_model


@pytest.mark.parametrize("family", ["gemma2", "llama"])
def test_a_loaded_model_answers_as_the_eager_one(family: str, tmp_path: Path) -> None:
    """Older transformers choose SDPA for Gemma 2, and SDPA knows no cap on attention scores."""
    cap = {"attn_logit_softcapping": 0.01} if family == "gemma2" else {}
    FAMILIES[family].make(**cap).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), dtype=torch.float32)
    eager = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert distance(logits(eager), logits(model)) < 1e-5
    assert (model.config._attn_implementation == "eager") is bool(cap)


def test_the_cap_is_felt() -> None:
    """Were the scores too small to be capped, the test above would hold by accident."""
    capped, free = (FAMILIES["gemma2"].make(attn_logit_softcapping=cap) for cap in (0.01, None))
    assert distance(logits(capped), logits(free)) > 1e-3
