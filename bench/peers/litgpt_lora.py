"""``litgpt finetune_lora``, through its own command line. Runs in the peer's own environment.

    python litgpt_lora.py TASK.json [convert]

``convert`` makes litgpt's form of the checkpoint, once and untimed. Three things are changed from outside: rows are
not shuffled, each step leaves a line, and the process ends with the last step (else it saves, then merges the model).
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any


def convert(model: Path, folder: Path) -> None:
    """litgpt knows models by name; this one is added to its table as it stands in ``config.json``."""
    from litgpt.config import name_to_config
    from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint

    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    rope = config.get("rope_parameters") or config
    name_to_config[folder.name] = {
        "name": folder.name, "hf_config": {"name": folder.name, "org": "bench"},
        "block_size": config["max_position_embeddings"], "vocab_size": config["vocab_size"],
        "padded_vocab_size": config["vocab_size"], "n_layer": config["num_hidden_layers"],
        "n_head": config["num_attention_heads"], "n_query_groups": config["num_key_value_heads"],
        "head_size": config["head_dim"], "n_embd": config["hidden_size"],
        "intermediate_size": config["intermediate_size"], "rotary_percentage": 1.0, "parallel_residual": False,
        "bias": False, "norm_class_name": "RMSNorm", "norm_eps": config["rms_norm_eps"],
        "mlp_class_name": "LLaMAMLP", "rope_base": int(rope["rope_theta"]),
    }  # fmt: skip
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(model, folder)
    convert_hf_checkpoint(folder, model_name=folder.name)
    (folder / "model.safetensors").unlink()


def keep_order() -> None:
    """Take the rows one after another; the rest of litgpt's loader is as it was."""
    from litgpt.data import JSON, get_sft_collate_fn
    from torch.utils.data import DataLoader

    def train_dataloader(self: Any) -> Any:
        collate = get_sft_collate_fn(max_seq_length=self.max_seq_length, ignore_index=self.ignore_index)
        options = {"batch_size": self.batch_size, "num_workers": self.num_workers, "collate_fn": collate}
        return DataLoader(self.train_dataset, shuffle=False, **options)

    JSON.train_dataloader = train_dataloader


def log_steps(path: str) -> None:
    """A line per step: when it ended, its loss, the tokens so far; the process ends behind the last one."""
    import litgpt.finetune.lora as recipe

    file = Path(path).open("a", encoding="utf-8", buffering=1)  # noqa: SIM115
    fit = recipe.fit

    def logged_fit(**options: Any) -> None:
        fabric = options["fabric"]
        log_dict = fabric.log_dict

        def stamped(metrics: dict[str, Any], step: int | None = None) -> None:
            end = time.time()
            log_dict(metrics, step=step)
            if "loss" in metrics:  # its throughput comes in a line of its own
                row = {"end": end, "loss": float(metrics["loss"]), "tokens_so_far": int(metrics["tokens"])}
                file.write(json.dumps(row) + "\n")

        fabric.log_dict = stamped
        fit(**options)
        sys.exit(0)

    recipe.fit = logged_fit


def arguments(task: dict[str, Any]) -> list[str]:
    """The command line; everything that is not said here is litgpt's default."""
    setting = task["setting"]
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": setting["lr"]}}
    flags = {
        "out_dir": task["out"], "precision": "bf16-true" if setting["dtype"] == "bfloat16" else "32-true",
        "lora_r": setting["rank"], "lora_alpha": 2 * setting["rank"], "lora_dropout": setting["dropout"],
        **{f"lora_{part}": "true" for part in ("query", "key", "value", "projection", "mlp")}, "lora_head": "false",
        "data": "JSON", "data.json_path": str(Path(task["rows"]) / "alpaca"), "data.mask_prompt": "true",
        "train.epochs": 1, "train.max_steps": task["steps"], "train.global_batch_size": setting["batch_size"],
        "train.micro_batch_size": setting["batch_size"], "train.max_seq_length": setting["max_length"],
        "train.lr_warmup_steps": 1, "eval.interval": 1_000_000, "eval.final_validation": "false",
        "optimizer": json.dumps(optimizer),
    }  # fmt: skip
    return ["finetune_lora", task["litgpt"], *(part for k, v in flags.items() for part in (f"--{k}", str(v)))]


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if sys.argv[2:] == ["convert"]:
        return convert(Path(task["model"]), Path(task["litgpt"]))
    from litgpt.__main__ import main as command_line

    keep_order()
    log_steps(task["log"])
    sys.argv[1:] = arguments(task)
    return command_line()


if __name__ == "__main__":
    main()
