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
from statistics import median

import torch

from truetune.data.blocks import cut_into_blocks
from truetune.data.formats import parse_rows
from truetune.data.mask import encode_rows
from truetune.data.plan import sequential_batches
from truetune.data.read import read_rows
from truetune.data.stdlib import HELD_OUT
from truetune.eval.perplexity import Evaluation, evaluate
from truetune.models import forward, load
from truetune.models.precision import choose_precision
from truetune.models.survey import survey
from truetune.models.tokenizer import ChatTokenizer

SETTINGS = ("max_length", "batch_size", "epochs", "lr", "warmup", "weight_decay", "dtype")
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
    precision = choose_precision("float32", torch.bfloat16, device="cpu")
    path_through = forward.Path(model, survey(model), packing=True)
    with forward.prepared(path_through):
        return evaluate(path_through.scores, batches, autocast=functools.partial(precision.context, "cpu"))


def card(build: Path, measured: Evaluation) -> str:
    """The model card: what it is, what it saw, how good it is, what it can't do."""
    run = build / "run"
    report = json.loads((run / "data" / "report.json").read_text(encoding="utf-8"))
    metrics = json.loads((run / "model" / "truetune.json").read_text(encoding="utf-8"))["metrics"]
    log = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    size = report["tokens"]
    speed = median(row["tok_s"] for row in log if "tok_s" in row)
    lines = (run / "run.yaml").read_text(encoding="utf-8").splitlines()
    given = [line.split("  #")[0].strip() for line in lines if line.endswith(("# flag", "# file"))]
    settings = ", ".join(item for item in given if item.split(":")[0] in SETTINGS)
    parameters = sum(p.numel() for p in load.load_model(str(ASSETS), dtype=torch.bfloat16).parameters())
    quality = (
        f"**{measured.loss:.4f}** nats a token (perplexity {measured.perplexity:.2f}, next token right "
        f"{measured.accuracy:.1%}); {metrics['held_out_loss_before']:.4f} before training"
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
| data | standard library of CPython {platform.python_version()}, {report["used"]:,} modules, {size:,} tokens |
| held out | {", ".join(HELD_OUT)}, and their tests: {measured.tokens:,} tokens |
| tokens seen | {metrics["tokens"]:,} in {metrics["steps"]:,} steps |
| held-out loss | {quality} |
| measured | with the bf16 weights in this folder, in blocks of 512 tokens |
| time | about {metrics["tokens"] / speed / 60:.0f} minutes at {speed:,.0f} tokens/s |
| settings | {settings} |

**What it can do**: continue Python source in the style of the standard library for a few lines.
**Limits**: it is tiny. It knows no other language, no facts and no instructions; longer code is locally plausible and
globally wrong. Its context is 1,024 tokens, trained on blocks of 512. It has seen no `<|system|>`, `<|user|>` or
`<|assistant|>` token in training: what they mean is taught by fine-tuning.
**Licence**: the weights are under Apache-2.0; the data is the standard library's source, under the PSF licence.
"""


if __name__ == "__main__":
    main()
