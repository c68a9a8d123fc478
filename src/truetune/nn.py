"""The layers alone, for anyone's training loop: ``truetune.nn.LoRALinear.from_base(linear, rank=8)``."""

from truetune.adapters.dora import DoRAConv as DoRAConv
from truetune.adapters.dora import DoRAEmbedding as DoRAEmbedding
from truetune.adapters.dora import DoRALinear as DoRALinear
from truetune.adapters.lora import LoRALinear as LoRALinear
from truetune.adapters.lora_conv import LoRAConv as LoRAConv
from truetune.adapters.lora_embedding import LoRAEmbedding as LoRAEmbedding
from truetune.adapters.lora_slices import SlicedLinear as SlicedLinear
from truetune.adapters.standalone import adapter_state_dict as adapter_state_dict
from truetune.adapters.standalone import load_adapter_state_dict as load_adapter_state_dict
from truetune.adapters.standalone import only_adapters_trainable as only_adapters_trainable
from truetune.optim.stable_embedding import StableEmbedding as StableEmbedding
from truetune.quant.embedding import Embedding4bit as Embedding4bit
from truetune.quant.embedding import Embedding8bit as Embedding8bit
from truetune.quant.linear4bit import Linear4bit as Linear4bit
from truetune.quant.linear8bit import Linear8bit as Linear8bit

LoRAConv1d = LoRAConv2d = LoRAConv3d = LoRAConv  # one class: it goes by its base

__all__ = [
    "DoRAConv",
    "DoRAEmbedding",
    "DoRALinear",
    "Embedding4bit",
    "Embedding8bit",
    "Linear4bit",
    "Linear8bit",
    "LoRAConv",
    "LoRAConv1d",
    "LoRAConv2d",
    "LoRAConv3d",
    "LoRAEmbedding",
    "LoRALinear",
    "SlicedLinear",
    "StableEmbedding",
    "adapter_state_dict",
    "load_adapter_state_dict",
    "only_adapters_trainable",
]
