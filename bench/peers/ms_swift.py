"""``swift sft``, through its own command line. Runs in the peer's own environment.

    python ms_swift.py TASK.json

One thing is added from outside: a callback, of the kind swift has a table for, that leaves a line per step.
"""

from __future__ import annotations

import json
import runpy
import sys
import time
from pathlib import Path
from typing import Any


def log_steps(path: str) -> None:
    """Add ``bench`` to swift's callbacks: a line per step, when it ended and its loss."""
    from swift.callbacks import TrainerCallback, callbacks_map

    class StepLog(TrainerCallback):  # type: ignore[misc]
        end = 0.0
        file = Path(path).open("a", encoding="utf-8", buffering=1)  # noqa: SIM115

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.end = time.time()

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "loss" in logs:  # the summary at the end has none
                self.file.write(json.dumps({"end": self.end, "loss": float(logs["loss"])}) + "\n")

    callbacks_map["bench"] = StepLog


def arguments(task: dict[str, Any]) -> list[str]:
    """The command line; everything that is not said here is swift's default, recomputing layers among it.

    ``check_model`` would ask its hub for a newer model, and without a network wait for an answer for 10 to 20 s.
    Model type and template can't be told from a folder that is on no hub. ``dummy`` adds nothing to what a message
    says, and an end token to the answer: the rows bring the alpaca prompt with them.
    """
    setting = task["setting"]
    flags = {
        "model": task["model"], "model_type": "llama", "template": "dummy", "torch_dtype": setting["dtype"],
        "dataset": str(Path(task["rows"]) / "messages.jsonl"), "dataset_shuffle": "false", "split_dataset_ratio": 0,
        "train_dataloader_shuffle": "false", "max_length": setting["max_length"],
        "tuner_type": "lora", "target_modules": "all-linear", "lora_rank": setting["rank"],
        "lora_alpha": 2 * setting["rank"], "lora_dropout": setting["dropout"],
        "per_device_train_batch_size": setting["batch_size"], "gradient_accumulation_steps": 1,
        "max_steps": task["steps"], "learning_rate": setting["lr"], "eval_strategy": "no", "save_strategy": "no",
        "logging_steps": 1, "report_to": "none", "callbacks": "bench", "output_dir": task["out"],
        "use_cpu": "true", "check_model": "false",
    }  # fmt: skip
    return [part for flag, value in flags.items() for part in (f"--{flag}", str(value))]


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    log_steps(task["log"])
    sys.argv[1:] = arguments(task)
    runpy.run_module("swift.cli.sft", run_name="__main__")


if __name__ == "__main__":
    main()
