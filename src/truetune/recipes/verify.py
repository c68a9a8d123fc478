"""``truetune verify``: is what is served what was trained? Prompts, logits, answers and losses, artefact by artefact.

The measure is base and adapter together, computed as they were trained; and they in turn are held against what the run
wrote down when its training ended.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from truetune.adapters.files import AdapterFile, write
from truetune.checkpoint.disk import writing
from truetune.config.resolve import Resolved, resolve
from truetune.config.sft import TrainConfig
from truetune.config.verify import PEERS, VerifyConfig
from truetune.errors import AdapterError, ConfigError, ModelError, OutputError, TruetuneError, counted
from truetune.eval.agreement import pooled
from truetune.eval.limits import Measured, judge
from truetune.models.precision import name_of
from truetune.recipes import verify_peers, verify_reference, verify_report
from truetune.recipes.artefacts import read_recorded
from truetune.recipes.run_folder import write_json
from truetune.recipes.verify_adapter import is_adapter, load_trained, open_adapter
from truetune.recipes.verify_compare import Finding, Trained, failed, hold_against
from truetune.recipes.verify_gguf import is_gguf, open_gguf
from truetune.recipes.verify_peers import Opener
from truetune.recipes.verify_reference import Reference, Sample
from truetune.recipes.verify_server import Server
from truetune.recipes.verify_subjects import MODELS, Folder, Loaded, Opening, find, open_by_transformers
from truetune.recipes.verify_target import Target, find_target, references_of
from truetune.train.log import Screen

RESULT = "verify.json"
KINDS = {**MODELS, "gguf": (is_gguf, open_gguf), "adapter": (is_adapter, open_adapter)}
_TOKEN = "TRUETUNE_API_KEY"
_SERVED = "bf16"  # a server does not say how finely it computes, and few do in float32 throughout


def run(resolved: Resolved[VerifyConfig]) -> dict[str, Any]:
    """Compare, print the table, keep ``verify.json`` in the run; ``exit_code`` is 1 on drift and 2 for "can't tell".

    Raises:
        TruetuneError: what is to be compared is not there.
    """
    proof = prove(resolved.config, Screen())
    proof.show()
    return proof.facts


@dataclass(frozen=True)
class Proof:
    """What was found: for people, and as ``verify.json`` has it."""

    findings: list[Finding]
    title: str
    facts: dict[str, Any]

    def show(self) -> None:
        """Print the table and the reasons."""
        verify_report.show(self.findings, title=self.title)


def prove(config: VerifyConfig, screen: Screen) -> Proof:
    """Compare, and keep ``verify.json``; prints no table."""
    target = find_target(config)
    reference = verify_reference.read_all(target.references, recorded=target.is_recorded)
    artefacts = [find(name, KINDS) for name in _names(config, target)]
    kept = Path(config.out).expanduser() if config.out else _place(target)
    if config.out and (kept.is_dir() or not kept.parent.is_dir()):
        raise ConfigError(
            f"--out: {config.out} is no place for a file", ("expected", "a name in a folder that is there")
        )
    if not (target.is_recorded or artefacts or config.url or config.peers):
        raise ConfigError(
            f"{target.result} was made of several adapters, and no run wrote down what it says",
            ("way out", f"name what was made of it: truetune verify {config.run} MODEL"),
        )
    verify_peers.check(config, target, artefacts)
    samples = _chosen(reference, config.prompts)
    compute = config.dtype if config.dtype != "auto" else reference.compute
    screen.say("verify", f"{target.name} on {_count(samples)}, in {compute}")
    title, findings = f"against {target.title} ({compute})", list[Finding]()
    with _told_if_stopped(findings, title, screen), Trained(reference, samples, _kind(compute)) as trained:
        findings += _live(trained, target, config, compute, screen)
        for name, loader, opener in _subjects(config, target, artefacts, samples, compute):
            screen.note(f"{name}, by {loader}")
            findings.append(_held_against(trained, name, loader, opener, longest=config.max_new_tokens))
            gc.collect()
    code = (
        1 if any(f.verdict == "drift" for f in findings) else 2 if any(f.verdict == "unknown" for f in findings) else 0
    )
    facts = verify_report.facts(
        findings, run=str(target.run or target.name), base=target.base, compute=compute, code=code
    )
    where = f" · {kept}" if _keep(facts, kept, screen) else ""
    screen.say("done", f"{_sentence(code, len(findings))}{where}")
    return Proof(findings, title, facts)


def _place(target: Target) -> Path:
    """In the run; of an adapter without one beside its folder, for this names rows, and an adapter is given away."""
    folder = target.result.resolve()
    return target.run / RESULT if target.run else folder.with_name(f"{folder.name}.{RESULT}")


def _keep(facts: dict[str, Any], where: Path, screen: Screen) -> bool:
    """Write ``verify.json``; a folder that takes no file any more is no reason to hold the verdict back."""
    try:
        with writing(where.parent):
            write_json(where, facts)
    except (OutputError, OSError) as error:
        screen.warn(f"the result is not kept in {where}: {getattr(error, 'message', error)}")
        return False
    return True


@contextlib.contextmanager
def _told_if_stopped(findings: Sequence[Finding], title: str, screen: Screen) -> Iterator[None]:
    """Show, when the user stops it, what was compared before; it is no proof, and is not kept as one."""
    try:
        yield
    except KeyboardInterrupt:
        if findings:
            verify_report.show(list(findings), title=f"{title}; stopped before the rest was")
            screen.note(f"{counted(len(findings), 'comparison')} done; {RESULT} is as it was")
        raise


def after_training(result: dict[str, Any], config: TrainConfig) -> dict[str, Any]:
    """What a training command returns, and with ``--verify`` the proof of it."""
    if not config.verify or config.dry_run:
        return result
    facts = run(resolve(VerifyConfig, file=None, flags={"run": config.out, "device": config.device}))
    return result | {"verify": facts["verdict"], "exit_code": facts["exit_code"]}


def check_provable(file: AdapterFile, base: str) -> None:
    """Raises CheckpointError where an adapter lies without the prompts that ``after_merge`` would compare by."""
    if file.card.get("combination"):
        paths = references_of(file)
    else:
        flags = {"run": str(file.folder), "model": base}
        paths = find_target(resolve(VerifyConfig, file=None, flags=flags).config).references
    verify_reference.read_all(paths, recorded=True)


def after_merge(file: AdapterFile, out: str, base: str, *, allowed: Collection[str]) -> dict[str, Any]:
    """The proof of a merged model: what ``run`` returns for it alone.

    Args:
        file: the adapter in it; one made of several has no folder yet, and is laid beside its base for this. Its proof
            lies beside the model.
    """
    flags = {"artefacts": (out,), "model": base, "allow_mismatch": sorted(allowed)}
    if file.folder.is_dir():
        return run(resolve(VerifyConfig, file=None, flags={"run": str(file.folder), **flags}))
    with TemporaryDirectory(prefix="truetune-verify-") as folder:
        with writing(Path(folder)):
            write(file, Path(folder) / "adapter")
        flags |= {"run": str(Path(folder) / "adapter"), "out": f"{Path(out)}.{RESULT}"}
        return run(resolve(VerifyConfig, file=None, flags=flags))


def _kind(compute: str) -> str:
    return name_of(getattr(torch, compute))


def _sentence(code: int, count: int) -> str:
    what = "the trained model says" if count == 1 else f"all {count} say"
    why = "for the reasons under the table"
    return {0: f"{what} the same", 1: f"drift, {why}", 2: f"can't tell, {why}"}[code]


def _count(samples: Sequence[Sample]) -> str:
    train = sum(sample.part == "train" for sample in samples)
    return f"{counted(train, 'prompt')} of the training rows and {len(samples) - train} of the held-out ones"


def _names(config: VerifyConfig, target: Target) -> list[str]:
    return list(config.artefacts) or (read_recorded(target.run) if target.run and not config.url else [])


def _chosen(reference: Reference, most: int | None) -> list[Sample]:
    parts = [[s for s in reference.samples if s.part == part] for part in ("train", "held_out")]
    return [sample for part in parts for sample in part[:most]]


def _live(trained: Trained, target: Target, config: VerifyConfig, compute: str, screen: Screen) -> list[Finding]:
    """Ask the trained model, as its files give it back, and hold it against what its run wrote down, if one did."""
    live = _trained_model(target, config, compute, screen)
    said = trained.ask(live, longest=config.max_new_tokens)
    if not said:
        return []
    kept = pooled(said)
    finding = Finding(str(target.result), "truetune", trained.kind, "unknown", [], logits=kept)
    finding.held_out_loss = (trained.loss, trained.loss) if trained.loss is not None else None
    finding.verdict, finding.reasons = judge(Measured(logits=kept), trained.kind)
    finding.notes.append("against what the run wrote down at its end: log-probabilities of the likeliest tokens")
    return [finding]


def _trained_model(target: Target, config: VerifyConfig, compute: str, screen: Screen) -> Loaded:
    opening = Opening(target.result, config.dtype, config.device, target, compute, config.revision)
    speaker = load_trained(target.base, target.file, opening, screen, allowed=config.allowed)
    kind = _kind(compute)
    return Loaded(str(target.result), "truetune", kind, speaker.model, speaker.tokenizer, stops=speaker.stop_ids)


def _subjects(
    config: VerifyConfig, target: Target, artefacts: Sequence[Folder], samples: Sequence[Sample], compute: str
) -> Iterator[tuple[str, str, Opener]]:
    """``(name, loader, how to open it)`` of everything that is to be compared."""
    device = "cuda" if config.device == "cuda" else "cpu"
    for artefact in artefacts:
        opening = Opening(artefact.path, config.dtype, device, target, compute, config.revision)
        yield artefact.name, artefact.loader, lambda a=artefact, o=opening: a.open(o)  # type: ignore[misc]
        for loader, opener in verify_peers.of_artefact(config, artefact, opening, samples):
            yield artefact.name, loader, opener
    if "transformers" in config.peers and target.file is None:
        opening = Opening(target.result, config.dtype, device, target, compute, config.revision)
        yield str(target.result), "transformers", lambda: open_by_transformers(opening)
    if "peft" in config.peers:
        yield str(target.result), "peft", lambda: verify_peers.by_peft(target, config, compute, device)
    if config.url:
        url, kind = config.url, _SERVED if compute == "float32" else _kind(compute)
        token = os.environ.get(_TOKEN)
        yield url, "http", lambda: Server(url, model=config.served_model, kind=kind, token=token)


def _held_against(trained: Trained, name: str, loader: str, opener: Opener, *, longest: int) -> Finding:
    try:
        return hold_against(trained, opener(), longest=longest)
    except (AdapterError, ModelError) as error:
        if loader in ("truetune", "transformers"):
            return failed(name, loader, error)
        return _untold(name, loader, error)
    except TruetuneError as error:
        return _untold(name, loader, error)
    except Exception as error:
        if loader not in PEERS:
            raise
        # Code that is not ours may fail in any way, and that says nothing about the artefact.
        said = " ".join(str(error).split())[:200]
        return _untold(name, loader, TruetuneError(f"{loader} fails on it: {type(error).__name__}: {said}"))


def _untold(name: str, loader: str, error: TruetuneError) -> Finding:
    way_out = "".join(f" ({text})" for label, text in error.notes if label in ("because", "way out"))
    return Finding(name, loader, "–", "unknown", [error.message + way_out])
