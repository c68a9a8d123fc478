"""Which layers (IA)³ scales, by the model's family.

The paper's are the keys, the values and the inner activations of the MLP. PEFT's choice per family is kept, so that
adapters of both have the same tensors, though of some families it scales the queries in place of the keys.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from truetune.adapters.targets import adaptable, matches
from truetune.config.other_methods import IA3
from truetune.errors import AdapterError, nearest

AUTO = ("auto",)
_KEYS, _QUERIES = ("k_proj", "v_proj"), ("q_proj", "v_proj")
# model_type in config.json -> layers whose output is scaled, and the one whose input is.
_FAMILIES: dict[str, tuple[tuple[str, ...], str]] = {
    **dict.fromkeys(("gpt2", "gpt_bigcode"), (("c_attn",), "mlp.c_proj")),
    "bloom": (("query_key_value",), "mlp.dense_4h_to_h"),
    **dict.fromkeys(("gpt_neox", "falcon", "RefinedWeb", "RefinedWebModel"), (("query_key_value",), "dense_4h_to_h")),
    **dict.fromkeys(("llama", "mistral"), (_KEYS, "down_proj")),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "llama4", "qwen2", "qwen3"), (_QUERIES, "down_proj")),
    "gpt_neo": (_QUERIES, "c_proj"),
    "gptj": (_QUERIES, "fc_out"),
    "opt": (("q_proj", "k_proj"), "fc2"),
    "phi": (_QUERIES, "fc2"),
    "t5": (("k", "v"), "wo"),
}
# What other families call these layers; all of a row must be there.
_USUAL = ((_KEYS, "down_proj"), (_KEYS, "fc2"))


def targets_of_family(model: nn.Module) -> tuple[str, ...]:
    """The names of all layers to scale.

    Raises:
        AdapterError: a family whose layers are not known, nor called as usual.
    """
    outputs, inner = _of_family(model)
    return (*outputs, inner)


def feedforward_names(model: nn.Module, config: IA3) -> tuple[str, ...]:
    """The names of those layers whose input is scaled."""
    return config.feedforward or ((_of_family(model)[1],) if config.targets == AUTO else ())


def check_feedforward(config: IA3, paths: Sequence[str]) -> None:
    """Raises AdapterError for a name in ``--feedforward`` that none of the targets has."""
    for name in config.feedforward:
        if not any(matches(name, path) for path in paths):
            leaves = sorted({path.rsplit(".", 1)[-1] for path in paths})
            raise AdapterError(
                f"--feedforward: '{name}' is none of the targets",
                ("did you mean", nearest(name, leaves)),
                ("targets", ", ".join(leaves)),
            )


def _of_family(model: nn.Module) -> tuple[tuple[str, ...], str]:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind in _FAMILIES:
        return _FAMILIES[kind]
    leaves = {path.rsplit(".", 1)[-1] for path in adaptable(model)}
    for outputs, inner in _USUAL:
        if {*outputs, inner} <= leaves:
            return outputs, inner
    raise AdapterError(
        f"--targets auto: which layers of a model of the type {kind!r} are keys, values and the MLP's second map is "
        "not known",
        ("it has", ", ".join(sorted(leaves))),
        ("way out", "name them: --targets K V DOWN --feedforward DOWN"),
    )
