"""What every module with packed weights tells of them, so that who counts bytes need not know which kind it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


class Packed(ABC):
    """A module some of whose own parameters are codes; on a skeleton these have the dense shapes."""

    @property
    @abstractmethod
    def nbytes_by_parameter(self) -> Mapping[str, int]:
        """Own parameter's name → bytes of its codes and scales, known before there are any."""

    @property
    @abstractmethod
    def dense_values(self) -> int:
        """Values that the codes stand for."""

    @property
    @abstractmethod
    def dense_at_once(self) -> int:
        """Values that are made dense for a product."""

    @abstractmethod
    def stored(self) -> Iterator[Tensor]:
        """Codes and scales where they lie in memory; none before there are any."""

    @property
    def packed_bytes(self) -> int:
        """Bytes of all codes and scales."""
        return sum(self.nbytes_by_parameter.values())


def taken(state: Mapping[str, Tensor], device: torch.device, metadata: Mapping[str, Any]) -> dict[str, Tensor]:
    """What a module keeps of a state dict: copies where the module is, or with ``assign=True`` the tensors themselves.

    Args:
        device: the module's; one without values (meta) takes them where they are.
        metadata: as ``nn.Module._load_from_state_dict`` gets it.
    """
    if metadata.get("assign_to_params_buffers", False):
        return dict(state)
    own = None if device.type == "meta" else device
    return {name: tensor.detach().to(own or tensor.device, copy=True) for name, tensor in state.items()}
