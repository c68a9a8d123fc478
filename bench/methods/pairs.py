"""Each method as both sides are asked for it: our settings, and PEFT's config class with its arguments.

Nothing here imports torch; both sides' processes read it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from bench.shapes import Shape

STEPS = 1000  # of the run that a schedule of ranks is laid over; nothing of it is reached
VIRTUAL, PROMPTS = 20, 10
RANKS = {"adalora": 12, "vera": 256}  # both libraries' defaults; other methods have ``Setting.rank``


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What every method is measured on.

    Attributes:
        shape: of a Llama with random weights.
        dtype: of its weights; the adapters are float32 on both sides.
        rows, tokens: of a batch; all rows are of that length, so that nothing is padded.
        rank: of LoRA and DoRA, alpha twice that.
    """

    shape: Shape
    dtype: str
    rows: int
    tokens: int
    rank: int
    dropout: float


@dataclass(frozen=True)
class Pair:
    """One method on both sides.

    Attributes:
        ours: settings beside ``--method``.
        peft: a config class and its arguments; None where PEFT has no such method.
        needs_biases: the model is given some.
    """

    ours: dict[str, Any]
    peft: tuple[str, dict[str, Any]] | None = None
    needs_biases: bool = False


def pairs(setting: Setting) -> dict[str, Pair]:
    """Method → how it is asked for, in the order of the table."""
    low_rank = {"rank": setting.rank, "alpha": 2 * setting.rank, "dropout": setting.dropout}
    lora = {"r": setting.rank, "lora_alpha": 2 * setting.rank, "lora_dropout": setting.dropout,
            "target_modules": "all-linear"}  # fmt: skip
    virtual = {"virtual_tokens": VIRTUAL}
    hidden, layers = setting.shape.hidden, max(1, setting.shape.layers - 2)
    found = {
        "lora": Pair(low_rank, ("LoraConfig", lora)),
        "dora": Pair(low_rank, ("LoraConfig", lora | {"use_dora": True})),
        "adalora": _adalora(setting),
        "vera": Pair(
            {"rank": RANKS["vera"], "dropout": setting.dropout},
            ("VeraConfig", {"r": RANKS["vera"], "vera_dropout": setting.dropout, "target_modules": "all-linear"}),
        ),
        "ia3": Pair(
            {},
            ("IA3Config", {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
        ),
        "prompt": Pair(virtual, ("PromptTuningConfig", {"num_virtual_tokens": VIRTUAL})),
        "ptuning": Pair(
            virtual, ("PromptEncoderConfig", {"num_virtual_tokens": VIRTUAL, "encoder_hidden_size": hidden})
        ),
        "prefix": Pair(virtual, ("PrefixTuningConfig", {"num_virtual_tokens": VIRTUAL})),
        "llama-adapter": Pair(
            {"adapter_length": PROMPTS, "adapter_layers": layers},
            ("AdaptionPromptConfig", {"adapter_len": PROMPTS, "adapter_layers": layers}),
        ),
        "bottleneck": Pair({}),
        "bitfit": Pair({}, needs_biases=True),
        "freeze": Pair({"train_layers": min(2, setting.shape.layers)}),
        "lisa": Pair({"lisa_layers": min(2, setting.shape.layers)}),
        "full": Pair({}),
    }
    return {name: _with_task(pair) for name, pair in found.items()}


def _adalora(setting: Setting) -> Pair:
    """Ranks are weighed from the first step on, on both sides."""
    rank, target = RANKS["adalora"], 8
    ours = {"rank": rank, "target_rank": target, "alpha": 32.0, "dropout": setting.dropout,
            "prune_from": 0.0, "prune_until": 0.8, "prune_every": 10, "orthogonality": 0.5}  # fmt: skip
    theirs = {"init_r": rank, "target_r": target, "lora_alpha": 32, "lora_dropout": setting.dropout, "tinit": 0,
              "tfinal": STEPS // 5, "deltaT": 10, "total_step": STEPS, "orth_reg_weight": 0.5,
              "target_modules": "all-linear"}  # fmt: skip
    return Pair(ours, ("AdaLoraConfig", theirs))


def _with_task(pair: Pair) -> Pair:
    if pair.peft is None:
        return pair
    kind, arguments = pair.peft
    return replace(pair, peft=(kind, arguments | {"task_type": "CAUSAL_LM"}))


_SMALLEST = Shape(hidden=1, inner=1, layers=1, heads=1, kv_heads=1, head_dim=1, vocab=1)
METHODS = tuple(pairs(Setting(shape=_SMALLEST, dtype="float32", rows=1, tokens=2, rank=1, dropout=0.0)))
