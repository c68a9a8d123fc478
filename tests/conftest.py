"""What every test may use: one thread, no network, and a model of a few thousand weights that is made here.

Nothing in this file needs ``../shared``.
"""

import atexit
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub's client is imported: no test may reach for the network
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
if "TRUETUNE_TESTS" not in os.environ:  # the first of the processes that run the suite together, and the last to end
    os.environ["TRUETUNE_TESTS"] = tempfile.mkdtemp(prefix="truetune-tests-")
    atexit.register(shutil.rmtree, os.environ["TRUETUNE_TESTS"], ignore_errors=True)
# No test reads or writes the user's own cache; what the kernels are compiled to is shared.
os.environ["TRUETUNE_CACHE"] = tempfile.mkdtemp(dir=os.environ["TRUETUNE_TESTS"])
_kernels = Path(os.environ["TRUETUNE_TESTS"]) / "kernels"
_kernels.mkdir(mode=0o700, exist_ok=True)
(Path(os.environ["TRUETUNE_CACHE"]) / "native").symlink_to(_kernels)

SHARED = Path(__file__).resolve().parents[2] / "shared"
CHATML = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Tiny products gain nothing from a second thread, and lose much when the machine has other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def make_tiny() -> Callable[..., Path]:
    """``make_tiny(folder, **config)`` writes a tiny Llama with a byte-level tokenizer, and returns the folder."""
    return _make_tiny


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in float32 whose tokenizer has ChatML's tokens and template. Read only."""
    return _make_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def alpaca_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve alpaca rows of different lengths. Read only."""
    rows = [
        {
            "instruction": f"Add {n} and {n * n}.",
            "input": "in words" * (n % 2),
            "output": f"It is {n + n * n}" + "!" * n,
        }
        for n in range(12)
    ]
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _make_tiny(folder: Path, *, chat_template: str | None = CHATML, dtype: str = "float32", **config: Any) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    core = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate([*letters, *special])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>", chat_template=chat_template)
    shape = {"vocab_size": len(letters) + 3, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
             "bos_token_id": None, "eos_token_id": len(letters), "pad_token_id": None}  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**(shape | config))).to(getattr(torch, dtype))
    logging.disable_progress_bar()
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder
