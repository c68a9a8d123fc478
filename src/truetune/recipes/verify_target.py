"""What is to be proven: a run's result, the prompts it is proven by, and the base it needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from truetune.adapters import files
from truetune.adapters.folder import digest, read_json
from truetune.config.verify import VerifyConfig
from truetune.errors import AdapterError, CheckpointError, beside
from truetune.recipes import verify_reference


@dataclass(frozen=True)
class Target:
    """What is to be proven: the run, and what it left."""

    run: Path | None  # None for an adapter that lies elsewhere
    result: Path
    references: tuple[Path, ...]  # of its run; of an adapter that was made of several, those of their runs
    base: str  # model to load: the base of an adapter, or the tuned model itself
    file: files.AdapterFile | None

    @property
    def is_recorded(self) -> bool:
        """Whether a run wrote down what it says: not so of an adapter that was made of others."""
        return not self.parents

    @property
    def parents(self) -> Sequence[Mapping[str, Any]]:
        """What an adapter was made of: folders, weights."""
        return _parents(self.file)

    @property
    def name(self) -> str:
        """What artefacts are held against."""
        if self.is_recorded:
            return str(self.result)
        assert self.file is not None
        how = self.file.card["combination"]["kind"]
        return " + ".join(f"{parent['folder']}={parent['weight']:g}" for parent in self.parents) + f" ({how})"

    @property
    def title(self) -> str:
        """The same, above a table."""
        return f"{self.name}, {'as it was trained' if self.is_recorded else 'as one adapter beside the base'}"


def find_target(config: VerifyConfig) -> Target:
    """The run or adapter that a config names.

    Raises:
        CheckpointError, AdapterError: it is not there, has no result yet, or lies without its reference.
    """
    path = Path(config.run).expanduser()
    if not path.is_dir():
        raise CheckpointError(f"there is no folder {config.run}", ("did you mean", beside(path)))
    if (path / "run.yaml").is_file():
        home, result = path, next((path / name for name in ("adapter", "model") if (path / name).is_dir()), None)
        if result is None:
            raise CheckpointError(
                f"{config.run} has no result yet: its training has not ended", ("way out", "--resume auto ends it")
            )
    else:
        result = path
        home = next((p for p in [path.resolve().parent] if (p / "run.yaml").is_file()), None)  # type: ignore[assignment]
    if not ((result / files.CONFIG).is_file() or (result / "config.json").is_file()):
        raise AdapterError(
            f"{config.run} is neither a run nor an adapter",
            ("expected", "a run's folder (run.yaml, adapter/), or an adapter's (adapter_config.json)"),
        )
    file = files.read(result) if (result / files.CONFIG).is_file() else None
    if file is not None and _parents(file):  # wherever it lies, no run made it
        return Target(None, result, _references(config, None, file), config.model or _base_of(file), file)
    base = str(result) if file is None else config.model or _base_of(file)
    return Target(home, result, _references(config, home, file), base, file)


def references_of(file: files.AdapterFile) -> tuple[Path, ...]:
    """Those of the runs whose adapters one was made of, as far as they are there and were worded as it is.

    Raises:
        CheckpointError: there is none.
    """
    found = []
    for parent in _parents(file):
        folder = Path(str(parent["folder"]))
        reference, card, weights = folder.parent / verify_reference.FILE, folder / files.CARD, folder / files.WEIGHTS
        if reference.is_file() and card.is_file() and weights.is_file() and digest(weights) == parent["sha256"]:
            said = read_json(card)
            if all(said.get(key) == file.card.get(key) for key in ("template", "system")):
                found.append(reference)
    if not found:
        raise CheckpointError(
            f"none of the adapters in {file.folder} lies as it was in its run's folder, with prompts that were worded "
            "as theirs together",
            ("expected", f"{verify_reference.FILE} beside one of them"),
            ("way out", "truetune verify with --reference, and the file of one of these runs"),
        )
    return tuple(dict.fromkeys(found))


def _parents(file: files.AdapterFile | None) -> Sequence[Mapping[str, Any]]:
    return (file.card.get("combination") or {}).get("parents", ()) if file else ()


def _base_of(file: files.AdapterFile) -> str:
    name = (file.card.get("base") or {}).get("name") or file.config.get("base_model_name_or_path")
    if not name:
        raise AdapterError(f"{file.folder} does not name its base", ("way out", "--model BASE"))
    return str(name)


def _references(config: VerifyConfig, home: Path | None, file: files.AdapterFile | None) -> tuple[Path, ...]:
    if config.reference:
        return (Path(config.reference).expanduser(),)
    if file and _parents(file):
        return references_of(file)
    if home is None or not (home / verify_reference.FILE).is_file():
        raise CheckpointError(
            f"{config.run} lies without the prompts it was trained on, so nothing can be compared",
            ("expected", f"{verify_reference.FILE} in its run's folder"),
            ("way out", _way_out(config, is_adapter=file is not None)),
        )
    return (home / verify_reference.FILE,)


def _way_out(config: VerifyConfig, *, is_adapter: bool) -> str:
    if not is_adapter:
        return f"name the run first, and then what was made from it: truetune verify RUN {config.run}"
    return "name the run's folder, or --reference with that file; a run keeps it unless --verify-prompts is 0"
