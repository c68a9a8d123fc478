"""Optimizers that keep their state in 8 bits or 32, learning rates, parameter groups."""

from truetune.optim.adam import LAMB as LAMB
from truetune.optim.adam import Adam as Adam
from truetune.optim.adam import Adam8bit as Adam8bit
from truetune.optim.adam import AdamW as AdamW
from truetune.optim.adam import AdamW8bit as AdamW8bit
from truetune.optim.adam import AdEMAMix as AdEMAMix
from truetune.optim.adam import AdEMAMix8bit as AdEMAMix8bit
from truetune.optim.adam import LAMB8bit as LAMB8bit
from truetune.optim.momentum import LARS as LARS
from truetune.optim.momentum import SGD as SGD
from truetune.optim.momentum import LARS8bit as LARS8bit
from truetune.optim.momentum import Lion as Lion
from truetune.optim.momentum import Lion8bit as Lion8bit
from truetune.optim.momentum import SGD8bit as SGD8bit
from truetune.optim.override import override_32bit as override_32bit
from truetune.optim.rms import Adagrad as Adagrad
from truetune.optim.rms import Adagrad8bit as Adagrad8bit
from truetune.optim.rms import RMSprop as RMSprop
from truetune.optim.rms import RMSprop8bit as RMSprop8bit

__all__ = [
    "LAMB",
    "LARS",
    "SGD",
    "AdEMAMix",
    "AdEMAMix8bit",
    "Adagrad",
    "Adagrad8bit",
    "Adam",
    "Adam8bit",
    "AdamW",
    "AdamW8bit",
    "LAMB8bit",
    "LARS8bit",
    "Lion",
    "Lion8bit",
    "RMSprop",
    "RMSprop8bit",
    "SGD8bit",
    "override_32bit",
]
