"""The layers alone, for anyone's training loop: ``truetune.nn.LoRALinear.from_base(linear, rank=8)``."""

from truetune.adapters.lora import LoRALinear as LoRALinear
from truetune.adapters.lora_embedding import LoRAEmbedding as LoRAEmbedding
from truetune.optim.stable_embedding import StableEmbedding as StableEmbedding
from truetune.quant.embedding import Embedding4bit as Embedding4bit
from truetune.quant.embedding import Embedding8bit as Embedding8bit
from truetune.quant.linear4bit import Linear4bit as Linear4bit
from truetune.quant.linear8bit import Linear8bit as Linear8bit

__all__ = [
    "Embedding4bit",
    "Embedding8bit",
    "Linear4bit",
    "Linear8bit",
    "LoRAEmbedding",
    "LoRALinear",
    "StableEmbedding",
]
