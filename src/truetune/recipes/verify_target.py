"""What is to be proven: a run's result, the prompts it is proven by, and the base it needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from truetune.adapters import files
from truetune.config.verify import VerifyConfig
from truetune.errors import AdapterError, CheckpointError, beside
from truetune.recipes import verify_reference


@dataclass(frozen=True)
class Target:
    """What is to be proven: the run, and what it left."""

    run: Path | None  # None for an adapter that lies elsewhere
    result: Path
    reference: Path
    base: str  # model to load: the base of an adapter, or the tuned model itself
    file: files.AdapterFile | None


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
    base = str(result) if file is None else config.model or _base_of(file)
    return Target(home, result, _reference(config, home, is_adapter=file is not None), base, file)


def _base_of(file: files.AdapterFile) -> str:
    name = (file.card.get("base") or {}).get("name") or file.config.get("base_model_name_or_path")
    if not name:
        raise AdapterError(f"{file.folder} does not name its base", ("way out", "--model BASE"))
    return str(name)


def _reference(config: VerifyConfig, home: Path | None, *, is_adapter: bool) -> Path:
    if config.reference:
        return Path(config.reference).expanduser()
    if home is None or not (home / verify_reference.FILE).is_file():
        raise CheckpointError(
            f"{config.run} lies without the prompts it was trained on, so nothing can be compared",
            ("expected", f"{verify_reference.FILE} in its run's folder"),
            ("way out", _way_out(config, is_adapter=is_adapter)),
        )  # fmt: skip
    return home / verify_reference.FILE


def _way_out(config: VerifyConfig, *, is_adapter: bool) -> str:
    if not is_adapter:
        return f"name the run first, and then what was made from it: truetune verify RUN {config.run}"
    return "name the run's folder, or --reference with that file; a run keeps it unless --verify-prompts is 0"
