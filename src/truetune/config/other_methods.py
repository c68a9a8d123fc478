"""Settings of the methods that are not low-rank."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import model_validator
from typing_extensions import Self

from truetune.config.adapter import AdapterConfig, Targeted
from truetune.config.options import option


class IA3(Targeted):
    """Trained factors on keys, values and the MLP's inner activations (Liu et al. 2022, arXiv:2205.05638)."""

    kind: ClassVar[str] = "ia3"

    targets: tuple[str, ...] = option(
        ("auto",),
        help="layers whose output is scaled; auto: keys, values and the MLP's second map, by the model's family",
        group="tuning",
        alias=("target_modules",),
        min_length=1,
    )
    feedforward: tuple[str, ...] = option(
        (),
        help="those of --targets whose input is scaled instead (default with auto: the MLP's second map)",
        group="tuning",
        alias=("feedforward_modules",),
    )


class BitFit(AdapterConfig):
    """Only the biases are trained (Ben Zaken et al. 2021, arXiv:2106.10199)."""

    kind: ClassVar[str] = "bitfit"


class Prompt(AdapterConfig):
    """Trained embeddings in front of every text (Lester et al. 2021, arXiv:2104.08691)."""

    kind: ClassVar[str] = "prompt"

    virtual_tokens: int = option(
        20, help="trained positions in front of every text", group="tuning", alias=("num_virtual_tokens",), gt=0
    )
    prompt_text: str | None = option(
        None,
        help="a text whose embeddings they start from (default: rows of the table, at random)",
        group="tuning",
        alias=("prompt_tuning_init_text",),
    )


class PTuning(AdapterConfig):
    """Trained embeddings in front, made by a small network while training (Liu et al. 2021, arXiv:2103.10385)."""

    kind: ClassVar[str] = "ptuning"

    virtual_tokens: int = option(
        20, help="trained positions in front of every text", group="tuning", alias=("num_virtual_tokens",), gt=0
    )
    encoder: Literal["mlp", "lstm", "none"] = option(
        "mlp", help="the network that makes them (none: they are trained themselves)", group="tuning"
    )
    encoder_hidden: int | None = option(
        None, help="its width (default: that of what it makes)", group="tuning", alias=("encoder_hidden_size",), gt=0
    )


class Prefix(AdapterConfig):
    """Trained keys and values in front of every layer's attention (Li & Liang 2021, arXiv:2101.00190)."""

    kind: ClassVar[str] = "prefix"

    virtual_tokens: int = option(
        20, help="trained positions in front of every text", group="tuning", alias=("num_virtual_tokens",), gt=0
    )
    projection: bool = option(
        False, help="make them by a small network while training", group="tuning", alias=("prefix_projection",)
    )
    encoder_hidden: int | None = option(
        None, help="its width (default: that of what it makes)", group="tuning", alias=("encoder_hidden_size",), gt=0
    )


class LlamaAdapter(AdapterConfig):
    """Zero-initialised gated attention to trained prompts in the top layers (Zhang et al. 2023, arXiv:2303.16199)."""

    kind: ClassVar[str] = "llama-adapter"

    adapter_length: int = option(10, help="trained prompts per layer", group="tuning", alias=("adapter_len",), gt=0)
    adapter_layers: int | None = option(
        None, help="top layers that get them (default: all but the lowest two)", group="tuning", gt=0
    )
    llama_adapter_v2: bool = option(
        False,
        help="the second version (arXiv:2304.15010): a trained bias and scale behind every linear layer, and trained "
        "norms, beside the prompts",
        group="tuning",
    )
    mixed_maps: bool = option(
        False,
        help="take the prompts' keys and values from rows of all three maps, as litgpt 0.5 does by mistake; to read "
        "what was trained so",
        group="tuning",
    )
    scaled_head: bool = option(
        False, help="with --llama-adapter-v2: behind the output head too, as litgpt has it", group="tuning"
    )
    gates: Literal["layer", "head"] = option(
        "layer",
        help="trained gates of the prompts: one per layer, as PEFT has it, or one per head, as the authors' code and "
        "litgpt do",
        group="tuning",
    )

    @model_validator(mode="after")
    def _head_of_the_second(self) -> Self:
        if self.scaled_head and not self.llama_adapter_v2:
            raise ValueError("--scaled-head: the first version scales no map; --llama-adapter-v2 does")
        return self


class Bottleneck(AdapterConfig):
    """Small networks after (or beside) each sublayer (Houlsby et al. 2019, arXiv:1902.00751)."""

    kind: ClassVar[str] = "bottleneck"

    placement: Literal["houlsby", "pfeiffer", "parallel"] = option(
        "pfeiffer",
        help="after attention and MLP (houlsby), after the MLP only (pfeiffer, arXiv:2005.00247), or beside the MLP "
        "(parallel, arXiv:2110.04366)",
        group="tuning",
    )
    reduction: float = option(
        16.0, help="how many times narrower than the model", group="tuning", alias=("reduction_factor",), gt=0
    )
    adapter_reads: Literal["part", "stream"] = option(
        "part",
        help="what they read: what the sublayer puts out (parallel: takes in), or the residual stream there, as "
        "AdapterHub's seq_bn and par_bn do",
        group="tuning",
    )
    activation: Literal["relu", "gelu", "silu"] = option("relu", help="between its two maps", group="tuning")
    adapter_scale: float = option(1.0, help="factor of its output", group="tuning", gt=0)


class Freeze(AdapterConfig):
    """Some of the base's own layers are trained, the rest is frozen."""

    kind: ClassVar[str] = "freeze"

    train_layers: int = option(
        2, help="last decoder layers to train", group="tuning", alias=("freeze_trainable_layers",), ge=0
    )
    train_pattern: str | None = option(
        None, help="a regular expression for the parameters to train, instead", group="tuning"
    )


class Lisa(AdapterConfig):
    """A few layers at a time are trained, drawn anew every some steps (Pan et al. 2024, arXiv:2403.17919)."""

    kind: ClassVar[str] = "lisa"

    lisa_layers: int = option(2, help="layers trained at a time", group="tuning", gt=0)
    lisa_every: int = option(20, help="steps between two draws", group="tuning", gt=0)


class Full(AdapterConfig):
    """Every weight is trained."""

    kind: ClassVar[str] = "full"
