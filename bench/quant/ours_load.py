"""truetune loads a checkpoint: ``python -m bench.quant.ours_load MODEL nf4|none MARKS.json``."""

from __future__ import annotations

import sys
from typing import Any

import transformers.models.llama.modeling_llama  # noqa: F401  (as for the peer: not timed)

from bench.peers.marks import leave
from truetune import api


def load(model: str, quant: str) -> Any:
    """NF4 with double quantised scales; ``none`` is for a checkpoint that is packed already."""
    return api.load(model, quant=quant, double_quant=quant != "none", dtype="bfloat16")


if __name__ == "__main__":
    leave(lambda: load(*sys.argv[1:3]), sys.argv[3])
