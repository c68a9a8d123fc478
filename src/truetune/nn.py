"""The layers alone, for anyone's training loop: ``truetune.nn.LoRALinear.from_base(linear, rank=8)``."""

from truetune.adapters.lora import LoRALinear as LoRALinear
from truetune.adapters.lora_embedding import LoRAEmbedding as LoRAEmbedding

__all__ = ["LoRAEmbedding", "LoRALinear"]
