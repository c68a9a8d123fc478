"""What a bench has made once (model, rows, checkpoints in other forms), and one run of one system on it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from bench import environments, ours
from bench.measure import Outcome, Setting, Watched, steps_of_peer, tokens_per_second, watch
from bench.report import OURS

ROOT = Path(__file__).resolve().parents[1]
ALPACA = ROOT.parent / "shared" / "data" / "alpaca_en.json"
# The product asks the same of the C library for itself; a peer must not lose for want of it.
KEEP_FREED_MEMORY = "glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=2147483647"
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "USE_HF": "1",
           "HF_HUB_DISABLE_TELEMETRY": "1", "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
# Of this interpreter; a peer's own must not see them.
NOT_FOR_PEERS = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")


class FailedRunError(Exception):
    """A process that did not train to the end; the text is what it said last."""


@dataclass(frozen=True, kw_only=True)
class Runs:
    """All that the runs of a bench have in common."""

    setting: Setting
    work: Path
    environments: Path
    data: Path
    recompute: str | None
    env: Mapping[str, str] = field(repr=False)

    @cached_property
    def model(self) -> Path:
        """Where the random model is kept: its tokenizer depends on the data."""
        digest = hashlib.sha256(self.data.read_bytes()).hexdigest()[:8]
        return self.work / "models" / f"{self.setting.shape}-{digest}"

    @property
    def rows(self) -> Path:
        """The folder with the rows in the order of our plan."""
        return self.work / "rows"

    @cached_property
    def tokens(self) -> tuple[list[int], list[int]]:
        """(tokens, trained tokens) of each step."""
        return ours.token_counts(self.rows / "rows.jsonl", self.setting.batch_size)

    def prepare(self, peers: list[str], say: Callable[[str], None]) -> None:
        """Make what is not there yet: the model, its other form for litgpt, the rows."""
        if not self.model.is_dir():
            say(f"making a random {self.setting.shape} with a tokenizer of {self.data.name}")
            self.model.parent.mkdir(parents=True, exist_ok=True)
            self._python("-m", "bench.shapes", self.setting.shape, str(self.data), str(self.model))
        shutil.rmtree(self.rows, ignore_errors=True)
        paths = {"model": str(self.model), "data": str(self.data), "folder": str(self.rows)}
        task = self.work / "rows.json"
        task.write_text(json.dumps({"setting": asdict(self.setting), **paths}), encoding="utf-8")
        self._python("-m", "bench.ours", str(task))
        if "litgpt" in peers and not (self._task("litgpt")["litgpt"] / "lit_model.pth").is_file():
            say("converting the model for litgpt")
            self._convert()

    def ceiling(self) -> dict[str, Any]:
        """The machine's rate of products right now; see ``measure.ceiling``."""
        found: dict[str, Any] = json.loads(self._python("-m", "bench.measure", self.setting.shape, self.setting.dtype))
        return found

    def one(self, system: str, folder: Path, *, steps: int | None = None) -> Outcome:
        """Train once in a process of its own.

        Raises:
            FailedRunError: it ended early, or its log is not one of these steps.
        """
        steps = steps or self.setting.steps
        folder.mkdir(parents=True)
        log = folder / "out" / "log.jsonl" if system == OURS else folder / "steps.jsonl"
        try:
            watched = watch(self._command(system, folder, log, steps), log, env=self._env(system), folder=folder)
        except TimeoutError as error:
            raise FailedRunError(f"{system}: {error}") from error
        if watched.code or watched.first_step_s is None:
            raise FailedRunError(f"{system} ended with code {watched.code}\n{watched.tail}")
        try:
            return self._outcome(system, log, watched, self.tokens[0][:steps])
        except (ValueError, KeyError) as error:
            raise FailedRunError(f"{system}: {error}") from error
        finally:
            shutil.rmtree(folder / "out", ignore_errors=True)

    def _outcome(self, system: str, log: Path, watched: Watched, tokens: list[int]) -> Outcome:
        steps = ours.steps(log, tokens) if system == OURS else steps_of_peer(log, tokens)
        assert watched.first_step_s is not None
        return Outcome(tokens_per_second(steps, tokens), watched.peak_mb, watched.first_step_s, steps[-1].loss)

    def _command(self, system: str, folder: Path, log: Path, steps: int) -> list[str]:
        if system == OURS:
            out = folder / "out"
            return ours.command(
                self.setting, model=self.model, data=self.data, out=out, steps=steps, recompute=self.recompute
            )
        task = self._task(system) | {"out": folder / "out", "log": log, "steps": steps}
        file = folder / "task.json"
        file.write_text(json.dumps(task, default=str), encoding="utf-8")
        python = environments.python_of(self.environments, system)
        return [str(python), str(environments.PEERS / environments.SCRIPTS[system]), str(file)]

    def _task(self, system: str) -> dict[str, Any]:
        """What a peer's script reads, without what is of one run."""
        task: dict[str, Any] = {"setting": asdict(self.setting), "model": self.model, "rows": self.rows}
        return task | ({"litgpt": self.work / "models-litgpt" / self.model.name} if system == "litgpt" else {})

    def _convert(self) -> None:
        file = self.work / "convert.json"
        file.write_text(json.dumps(self._task("litgpt"), default=str), encoding="utf-8")
        python = environments.python_of(self.environments, "litgpt")
        script = environments.PEERS / environments.SCRIPTS["litgpt"]
        self._run([str(python), str(script), str(file), "convert"], self._env("litgpt"))

    def _env(self, system: str) -> dict[str, str]:
        if system == OURS:
            return dict(self.env)
        return {"GLIBC_TUNABLES": KEEP_FREED_MEMORY} | {k: v for k, v in self.env.items() if k not in NOT_FOR_PEERS}

    def _python(self, *arguments: str) -> str:
        return self._run([sys.executable, *arguments], dict(self.env))

    def _run(self, command: list[str], env: dict[str, str]) -> str:
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            raise FailedRunError(f"{' '.join(command[:4])} ended with code {done.returncode}\n{done.stderr[-3000:]}")
        return done.stdout


def data_file(given: Path | None, work: Path) -> Path:
    """Alpaca rows: those asked for, those beside the checkout, or the demo's corpus in that form."""
    if given or ALPACA.is_file():
        return (given or ALPACA).resolve()
    corpus = work / "stdlib.json"
    if not corpus.is_file():
        subprocess.run([sys.executable, "-m", "bench.ours", "corpus", str(corpus)], cwd=ROOT, check=True)
    return corpus


def environment(work: Path, threads: int | None) -> dict[str, str]:
    """The variables of every process: no network, caches in ``work``, one way of waiting."""
    caches = {"HF_HOME": "hf", "MODELSCOPE_CACHE": "modelscope", "TRUETUNE_CACHE": "truetune"}
    env = dict(os.environ) | OFFLINE | {name: str(work / "caches" / folder) for name, folder in caches.items()}
    if threads:
        env |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    # What truetune sets for itself: on a shared machine threads that spin for long starve each other, a peer's as well.
    return {"GOMP_SPINCOUNT": "2000"} | env
