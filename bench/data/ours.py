"""One process of ours: rows to tokens by the product's own preparation, then packing; the answer is a line of JSON."""

from __future__ import annotations

import json
import resource
import sys
import time
from typing import Any

from truetune.config.sft import SFTConfig
from truetune.data.pack import group
from truetune.data.plan import StepPlan
from truetune.models.tokenizer import ChatTokenizer
from truetune.recipes.data import prepare_sft
from truetune.train.log import Screen

STEPS = 200  # of 32 examples, read as training would


def run(model: str, data: str, length: int, *, pack: bool) -> dict[str, Any]:
    """Prepare, then either pack all examples or read some steps of them.

    Args:
        pack: all into blocks of ``length``, for the share that is filled; the lengths of all are a list then.
    """
    tokenizer = ChatTokenizer.load(model)
    config = SFTConfig(model=model, data=(data,), template="alpaca", on_overlong="drop", max_length=length)
    began = time.perf_counter()
    found = prepare_sft(config, tokenizer, max_length=length, screen=Screen())
    prepared = time.perf_counter() - began
    answer = {"rows": found.report["read"], "tokens": found.report["tokens"], "cached": found.cached}
    if pack:
        blocks = group(found.train.lengths.tolist(), length, packing=True)
        answer |= {"blocks": len(blocks), "fill": len(found.train.tokens) / (length * len(blocks))}
    else:
        plan = StepPlan.build(
            found.train, batch_size=32, micro_tokens=4096, packing=True, seed=0, epochs=1, max_steps=None
        )
        every = max(1, plan.steps // STEPS)
        answer["steps_tokens"] = sum(b.tokens for step in range(0, plan.steps, every) for b in plan.micro_batches(step))
    peaks = [resource.getrusage(who).ru_maxrss / 1e3 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return answer | {
        "prepare_s": prepared,
        "seconds": time.perf_counter() - began,
        "peak_mb": peaks[0],
        "worker_peak_mb": peaks[1],
    }


if __name__ == "__main__":
    task = json.loads(sys.argv[1])
    print(json.dumps(run(task["model"], task["data"], task["length"], pack=task["pack"])))
