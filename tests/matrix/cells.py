"""The cells of the matrix: every method, in each of its forms, on every kind of base, in every family."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from matrix.bases import VIRTUAL
from truetune.config.methods import METHODS, Method

FAMILIES = ("llama", "gpt2", "bigcode", "bloom")
KINDS = ("float32", "bfloat16", "int8", "nf4")
PACKED = ("int8", "nf4")
_LOW_RANK: dict[str, Any] = {"rank": 4, "alpha": 8.0, "lr": 3e-2}
_IN_FRONT: dict[str, Any] = {"virtual_tokens": VIRTUAL}
_PROMPTS: dict[str, Any] = {"adapter_length": 4, "adapter_layers": 2}
_NETWORKS: dict[str, Any] = {"reduction": 4.0, "lr": 5e-2}
# Method → form → settings. Rates are such that some thirty steps of sixteen rows do.
FORMS: dict[str, dict[str, dict[str, Any]]] = {
    "lora": {
        "lora": _LOW_RANK,
        "rslora": _LOW_RANK | {"alpha": 4.0, "use_rslora": True, "dropout": 0.05},
    },
    "dora": {"dora": _LOW_RANK | {"dropout": 0.05}},
    "adalora": {"adalora": {"rank": 6, "target_rank": 4, "alpha": 32.0, "prune_every": 2, "lr": 5e-2}},
    "vera": {"vera": {"rank": 32, "lr": 0.1}},
    "ia3": {"ia3": {"lr": 0.2}},
    "bitfit": {"bitfit": {"lr": 8e-2}},
    "prompt": {"prompt": _IN_FRONT | {"lr": 0.2}},
    "ptuning": {
        "mlp": _IN_FRONT | {"encoder": "mlp", "lr": 3e-2},
        "lstm": _IN_FRONT | {"encoder": "lstm", "lr": 2e-2},
    },
    "prefix": {
        "rows": _IN_FRONT | {"lr": 0.3},
        "projection": _IN_FRONT | {"projection": True, "lr": 3e-2},
    },
    "llama-adapter": {
        "first": _PROMPTS | {"lr": 0.3},
        "second": _PROMPTS | {"llama_adapter_v2": True, "lr": 5e-2},
    },
    "bottleneck": {
        "houlsby": _NETWORKS | {"placement": "houlsby"},
        "pfeiffer": _NETWORKS | {"placement": "pfeiffer"},
        "parallel": _NETWORKS | {"placement": "parallel"},
    },
    "freeze": {"freeze": {"train_layers": 1, "lr": 1e-2}},
    "lisa": {"lisa": {"lisa_layers": 1, "lisa_every": 2, "lr": 1e-2}},
    "full": {"full": {"lr": 1e-2}},
}  # fmt: skip
# What PEFT has no way to read, beside the methods that it has no name for in the table of capabilities.
_NOT_PEFTS = {("llama-adapter", "second")}
_PROMPTED_BY_PEFT = ("llama", "gpt2")  # its adaption prompts know two of the four families


@dataclass(frozen=True)
class Cell:
    """One method in one form, on one kind of base, in one family."""

    method: str
    form: str
    kind: str
    family: str

    @property
    def can(self) -> Method:
        """The row of truetune's own table of capabilities."""
        return METHODS[self.method]

    @property
    def is_refused(self) -> bool:
        """Whether no such run may start."""
        return self.kind in PACKED and not self.can.on_quantised

    @property
    def is_pefts(self) -> bool:
        """Whether PEFT reads and writes such an adapter."""
        if self.can.peft is None or (self.method, self.form) in _NOT_PEFTS:
            return False
        return self.method != "llama-adapter" or self.family in _PROMPTED_BY_PEFT

    @property
    def flags(self) -> dict[str, Any]:
        """The settings of the run, but for where it is and how long."""
        base = {"quant": self.kind} if self.kind in PACKED else {"dtype": self.kind}
        return {"method": self.method, **base, **FORMS[self.method][self.form]}

    def __str__(self) -> str:
        names = (self.method, self.form, self.kind, self.family)
        return "-".join(dict.fromkeys(names))


def whole() -> list[Cell]:
    """All of them."""
    forms = [(method, form) for method, own in FORMS.items() for form in own]
    return [Cell(*names, kind, family) for names, kind, family in itertools.product(forms, KINDS, FAMILIES)]


def sample() -> list[Cell]:
    """A square of each method: it meets every kind and every family once, and its forms take turns."""
    found = []
    for number, (method, forms) in enumerate(FORMS.items()):
        for place, kind in enumerate(KINDS, start=number):
            family, form = FAMILIES[place % len(FAMILIES)], list(forms)[place % len(forms)]
            found.append(Cell(method, form, kind, family))
    return found
