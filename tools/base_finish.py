"""Turn a finished pre-training run into the embedded base: bf16 weights, tokenizer, and a card with measured figures.

    python tools/base_finish.py BUILD_DIR

``BUILD_DIR`` is what ``tools/base_init.py`` filled and ``truetune pretrain --out BUILD_DIR/run`` trained in.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import shutil
from pathlib import Path

import torch

from truetune.data.blocks import cut_into_blocks
from truetune.data.formats import parse_rows
from truetune.data.mask import encode_rows
from truetune.data.plan import sequential_batches
from truetune.data.read import read_rows
from truetune.data.stdlib import HELD_OUT
from truetune.eval.perplexity import Evaluation, evaluate
from truetune.models import attention, load
from truetune.models.precision import choose_precision
from truetune.models.tokenizer import ChatTokenizer

ASSETS = Path(__file__).resolve().parents[1] / "src" / "truetune" / "assets" / "base"


def main() -> None:
    """Convert, measure, write the card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("build", type=Path)
    build: Path = parser.parse_args().build
    source = build / "run" / "model"
    shutil.rmtree(ASSETS, ignore_errors=True)
    model = load.load_model(str(source), dtype=torch.bfloat16)
    load.save_model(model, ASSETS)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copyfile(source / name, ASSETS / name)
    for path in ASSETS.iterdir():
        path.chmod(0o644)
    measured = held_out_loss(build / "heldout.jsonl")
    (ASSETS / "README.md").write_text(card(build, measured), encoding="utf-8")
    print(f"{ASSETS}: held-out loss {measured.loss:.4f}, accuracy {measured.accuracy:.3f}")


def held_out_loss(path: Path) -> Evaluation:
    """Loss of the bf16 model on the held-out modules, in blocks of 512 tokens, computed in float32."""
    tokenizer = ChatTokenizer.load(str(ASSETS))
    rows, _ = parse_rows(read_rows([str(path)])[0], "text")
    documents, _ = encode_rows(rows, None, tokenizer, train_on="all")
    batches = sequential_batches(cut_into_blocks(documents, 512), 4096, packing=True)
    model = load.load_model(str(ASSETS), dtype=torch.float32)
    precision = choose_precision("float32", torch.bfloat16, device="cpu", trains_base=False)
    with attention.segmented(model):
        logits = functools.partial(attention.trained_logits, model)
        return evaluate(logits, batches, autocast=functools.partial(precision.context, "cpu"))


def card(build: Path, measured: Evaluation) -> str:
    """The model card: what it is, what it saw, how good it is, what it can't do."""
    report = json.loads((build / "run" / "data" / "report.json").read_text(encoding="utf-8"))
    metrics = json.loads((build / "run" / "model" / "truetune.json").read_text(encoding="utf-8"))["metrics"]
    settings = (build / "run" / "run.yaml").read_text(encoding="utf-8")
    given = [line.split("  #")[0].strip() for line in settings.splitlines() if line.endswith("# flag")]
    seconds = sum(
        row["tokens"] / row["tok_s"]
        for row in map(json.loads, (build / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines())
        if "tok_s" in row
    )
    every = next((int(line.split(":")[1]) for line in given if line.startswith("log_every")), 1)
    parameters = sum(p.numel() for p in load.load_model(str(ASSETS), dtype=torch.bfloat16).parameters())
    settings_used = ", ".join(
        g for g in given if g.split(":")[0] not in ("model", "data", "val_data", "out", "log_every")
    )
    return f"""---
license: apache-2.0
language: [code]
pipeline_tag: text-generation
---
# truetune base

A Llama-architecture causal language model of {parameters:,} parameters (grouped-query attention, tied embeddings,
byte-level BPE of 4,096 tokens) for demonstrations and tests that must run offline. Made by `make base`.

| | |
|---|---|
| data | source of the standard library of CPython {platform.python_version()}: {report["used"]:,} modules, {report["tokens"]:,} tokens |
| held out | {", ".join(HELD_OUT)}, and their tests: {measured.tokens:,} tokens |
| tokens seen | {metrics["tokens"]:,} in {metrics["steps"]:,} steps |
| held-out loss | **{measured.loss:.4f}** nats a token (perplexity {measured.perplexity:.2f}, next-token accuracy {measured.accuracy:.1%}), bf16 weights, blocks of 512 tokens; {metrics["held_out_loss_before"]:.4f} before training |
| time | about {seconds * every / 60:.0f} minutes of training on 2 CPU cores |
| settings | {settings_used} |

**What it can do**: continue Python source in the style of the standard library for a few lines.
**Limits**: it is tiny. It knows no other language, no facts and no instructions; longer code is locally plausible and
globally wrong. Its context is 1,024 tokens, trained on blocks of 512. It has seen no `<|system|>`, `<|user|>` or
`<|assistant|>` token in training: what they mean is taught by fine-tuning.
**Licence**: the weights are under Apache-2.0; the data is the standard library's source, under the PSF licence.
"""


if __name__ == "__main__":
    main()
