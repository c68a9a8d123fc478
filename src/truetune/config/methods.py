"""The methods: what each can do, enforced before a weight is read, and their settings for the command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from pydantic import model_validator

from truetune.config.adapter import AdapterConfig
from truetune.config.lora import AdaLoRA, DoRA, LoRA
from truetune.config.lora import VeRA as VeRA
from truetune.config.options import option
from truetune.config.other_methods import (
    IA3,
    BitFit,
    Bottleneck,
    Freeze,
    Full,
    Lisa,
    LlamaAdapter,
    Prefix,
    Prompt,
    PTuning,
)

MethodName = Literal[
    "lora", "dora", "adalora", "vera", "ia3", "bitfit", "prompt", "ptuning", "prefix", "llama-adapter", "bottleneck",
    "freeze", "lisa", "full",
]  # fmt: skip


@dataclass(frozen=True)
class Method:
    """One method and its capabilities.

    Attributes:
        config: its settings.
        result: what a run leaves: an adapter, or a whole model.
        mergeable: it folds into the base's weights without cost at inference.
        on_quantised: it trains on a packed base.
        peft: PEFT's name for its files; None where PEFT has no such method.
        lr: the usual peak learning rate.
    """

    config: type[AdapterConfig]
    result: Literal["adapter", "model"]
    mergeable: bool
    on_quantised: bool
    peft: str | None
    lr: float

    @property
    def has_low_rank_pair(self) -> bool:
        """Whether it trains an A and a B."""
        return issubclass(self.config, LoRA | AdaLoRA)


def _adapter(config: type[AdapterConfig], peft: str | None, lr: float, *, mergeable: bool) -> Method:
    return Method(config, "adapter", mergeable, True, peft, lr)


def _model(config: type[AdapterConfig], lr: float) -> Method:
    return Method(config, "model", False, False, None, lr)


METHODS: dict[str, Method] = {
    "lora": _adapter(LoRA, "LORA", 2e-4, mergeable=True),
    "dora": _adapter(DoRA, "LORA", 2e-4, mergeable=True),
    "adalora": _adapter(AdaLoRA, "ADALORA", 5e-4, mergeable=True),
    "vera": _adapter(VeRA, "VERA", 5e-3, mergeable=True),
    "ia3": _adapter(IA3, "IA3", 5e-3, mergeable=True),
    "bitfit": _adapter(BitFit, None, 1e-3, mergeable=True),
    "prompt": _adapter(Prompt, "PROMPT_TUNING", 1e-2, mergeable=False),
    "ptuning": _adapter(PTuning, "P_TUNING", 1e-3, mergeable=False),
    "prefix": _adapter(Prefix, "PREFIX_TUNING", 1e-2, mergeable=False),
    "llama-adapter": _adapter(LlamaAdapter, "ADAPTION_PROMPT", 9e-3, mergeable=False),
    "bottleneck": _adapter(Bottleneck, None, 1e-4, mergeable=False),
    "freeze": _model(Freeze, 2e-5),
    "lisa": _model(Lisa, 2e-5),
    "full": _model(Full, 2e-5),
}
assert set(METHODS) == set(get_args(MethodName))


class TuningGroup(
    DoRA, AdaLoRA, VeRA, IA3, Prompt, PTuning, Prefix, LlamaAdapter, Bottleneck, Freeze, Lisa
):  # fmt: skip
    """What is trained, and how it is parametrised: all methods' settings, of which only the chosen one's count."""

    method: MethodName = option(
        "lora", help="how to tune", group="tuning", alias=("tuner_type", "train_type", "finetuning_type")
    )
    rank: int = option(
        16, help="rank of the adapter (adalora starts at 12, vera takes 256)", group="tuning",
        alias=("r", "lora_rank", "lora_r", "init_r"), gt=0,
    )  # fmt: skip
    targets: tuple[str, ...] = option(
        ("all-linear",),
        help="layers that get an adapter: all-linear, names, or regular expressions; ia3: auto",
        group="tuning",
        alias=("target_modules", "lora_target"),
        min_length=1,
    )

    @model_validator(mode="before")
    @classmethod
    def _of_the_method(cls, values: Any) -> Any:
        """Only the chosen method's settings may be given, and its own defaults hold."""
        name = values.get("method", cls.model_fields["method"].default)
        if name not in METHODS:
            return values  # refused by name, as a field
        own = METHODS[name].config.model_fields
        given = [key for key in TUNING_FIELDS if key in values and key not in own]
        if given:
            flags = ", ".join(f"--{key.replace('_', '-')}" for key in given)
            raise ValueError(f"{flags}: no setting of --method {name}")
        return {**{key: own[key].default for key in own if key in TUNING_FIELDS}, **values}

    @classmethod
    def heading(cls, field: str) -> str:
        """Settings that the usual method lacks stand under the names of those that have them."""
        usual = METHODS["lora"].config.model_fields
        if field not in TUNING_FIELDS or field in usual:
            return super().heading(field)
        *names, last = (name for name, method in METHODS.items() if field in method.config.model_fields)
        return f"with --method {', '.join(names)} or {last}" if names else f"with --method {last}"

    def method_settings(self) -> AdapterConfig:
        """The chosen method's settings alone."""
        chosen = METHODS[self.method].config
        return chosen(**{name: getattr(self, name) for name in chosen.model_fields})

    @property
    def trains_model(self) -> bool:
        """Whether the result is a whole model, not an adapter."""
        return METHODS[self.method].result == "model"


TUNING_FIELDS = tuple(dict.fromkeys(name for method in METHODS.values() for name in method.config.model_fields))
