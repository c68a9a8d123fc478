"""Groups of trained parameters: what decays, and what learns faster than the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.nn import Parameter

# Ends of the keys of vectors that adapter files hold as matrices of one row or column.
_VECTORS = ("ia3_l", "lora_E")
_B = ("lora_B.weight", "lora_B")


def parameter_groups(
    parameters: Mapping[str, Parameter], *, weight_decay: float, lora_plus_ratio: float = 1.0
) -> list[dict[str, Any]]:
    """Groups for any optimizer: matrices decay; biases, norms and other vectors do not.

    Args:
        parameters: by their keys on disk.
        weight_decay: of the matrices.
        lora_plus_ratio: how many times faster the B of a low-rank pair learns than its A (LoRA+, Hayou et al. 2024,
            arXiv:2402.12354): as a model grows wider, the best rate of A falls with the width, and that of B does not.
            It stands in its groups as ``lr_ratio``. The pair of an embedding table is left at the common rate.
    """
    members: dict[tuple[bool, bool], list[Parameter]] = {}
    for key, parameter in parameters.items():
        decays = parameter.ndim > 1 and not key.endswith(_VECTORS)
        members.setdefault((not decays, lora_plus_ratio != 1.0 and key.endswith(_B)), []).append(parameter)
    return [
        {"params": params, "weight_decay": 0.0 if plain else weight_decay}
        | ({"lr_ratio": lora_plus_ratio} if faster else {})
        for (plain, faster), params in sorted(members.items(), key=lambda item: item[0])
    ]
