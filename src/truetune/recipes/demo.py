"""``truetune demo``: the whole story on the embedded base, offline: data, plan, LoRA, evaluation, merge, answers."""

from __future__ import annotations

import functools
import json
import shutil
import time
from pathlib import Path
from typing import Any

from truetune.checkpoint.atomic import write_text, writing
from truetune.config.demo import DemoConfig
from truetune.config.generate import GenerateConfig
from truetune.config.merge import MergeConfig
from truetune.config.resolve import Resolved, resolve
from truetune.config.sft import SFTConfig
from truetune.config.verify import VerifyConfig
from truetune.data.stdlib import HELD_OUT, parses
from truetune.errors import OutputError
from truetune.generate.answer import answer_all
from truetune.recipes import demo_data, demo_report, merge, sft
from truetune.recipes.generate import load_speaker
from truetune.recipes.quality import Contestant, measure, spread
from truetune.recipes.verify import prove
from truetune.train.log import Screen
from truetune.train.memory import peak_mb

_MARK, _MADE = "demo.json", ("data", "run", "merged")
_ANSWER_TOKENS, _ROWS = 96, 200


def run(resolved: Resolved[DemoConfig]) -> dict[str, Any]:
    """Run the demo; the table goes to stdout, everything else to stderr."""
    config, screen, began = resolved.config, Screen(), time.perf_counter()
    out = _fresh(Path(config.out).expanduser())
    write_text(out / _MARK, "{}")
    base = demo_data.base_folder()
    screen.say("demo", "teach a tiny model to write the body of a Python function from its signature and docstring")
    train, held_out = demo_data.rows(out / "data")
    screen.note(f"rows from this interpreter's standard library; held out, in pre-training too: {', '.join(HELD_OUT)}")
    settings = {
        "model": str(base), "data": [str(train)], "val_data": [str(held_out)], "out": str(out / "run"),
        "max_steps": config.steps, "batch_size": 32, "rank": 16, "alpha": 32, "lr": 4e-3, "seed": config.seed,
        "save_every": 0, "max_length": 256, "on_overlong": "drop",
    }  # fmt: skip
    trained = sft.run(resolve(SFTConfig, file=None, flags=settings))
    adapter, merged = out / "run" / "adapter", out / "merged"
    merge.run(resolve(MergeConfig, file=None, flags={"model": str(base), "adapter": str(adapter), "out": str(merged)}))
    questions = _questions(held_out, config.answers)
    contest = functools.partial(_contestant, held_out, questions, screen)
    before = contest("base", model=str(base))
    after = contest("adapter", model=str(base), adapter=str(adapter))
    answering = contest("merged", model=str(merged), template="auto")
    facts = demo_report.facts(before, after, answering, questions, parses=parses)
    proof = prove(resolve(VerifyConfig, file=None, flags={"run": str(out / "run")}).config, screen)
    facts |= {
        "verify": proof.facts["verdict"],
        "proof": proof.facts["artefacts"],
        "tok_s": trained["tok_s"],
        "train_seconds": trained["seconds"],
        "seconds": round(time.perf_counter() - began, 1),
        "peak_mb": round(peak_mb(), 1),
        "merged": str(merged),
    }
    demo_report.show(facts, before, after, questions, proof=proof.show)
    write_text(out / _MARK, json.dumps(facts, indent=1))
    return facts


def _fresh(out: Path) -> Path:
    """An empty folder for this demo. What a former demo made there goes; anything else in it is not ours to touch."""
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        if (out / _MARK).is_file():
            for name in _MADE:
                shutil.rmtree(out / name, ignore_errors=True)
            (out / _MARK).unlink()
        if left := sorted(path.name for path in out.iterdir()):
            raise OutputError(
                f"--out: {out} holds what is no demo's: {', '.join(left[:5])}", ("way out", "--out with another folder")
            )
    return out


def _questions(held_out: Path, count: int) -> list[str]:
    """Prompts from all over the held-out modules."""
    rows = [json.loads(line)["prompt"] for line in held_out.read_text(encoding="utf-8").splitlines()]
    return spread(rows, count)


def _contestant(held_out: Path, questions: list[str], screen: Screen, name: str, **source: Any) -> Contestant:
    screen.say("answer", f"{len(questions)} held-out questions by the {name}")
    speaker = load_speaker(resolve(GenerateConfig, file=None, flags={"prompt": "", **source}).config, screen)
    prompts = [speaker.prompt_ids(question) for question in questions]
    answers = answer_all(speaker.model, prompts, stop_ids=speaker.stop_ids, longest=_ANSWER_TOKENS)
    texts = [speaker.tokenizer.hf.decode(ids, skip_special_tokens=True) for ids in answers]
    return Contestant(speaker, measure(speaker, held_out, limit=_ROWS), texts)
