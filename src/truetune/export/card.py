"""A model card for the Hub: ``README.md`` with the front matter its site reads, all of it from what the run recorded.

https://huggingface.co/docs/hub/model-cards
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import yaml


@dataclass(frozen=True)
class Subject:
    """What a card is about.

    Attributes:
        name: a title.
        base: as people may find it; a folder's path says nothing to others, and only its last part is told.
        method: of the tuning; None for a model whose method is not known.
        is_adapter: whether it is to be loaded onto its base.
        card: the content of ``truetune.json``.
        license: as the Hub abbreviates it; None where nobody said.
        base_license: what the base's own card says.
    """

    name: str
    base: str
    method: str | None
    is_adapter: bool
    card: Mapping[str, Any]
    license: str | None = None
    base_license: str | None = None


def model_card(subject: Subject) -> str:
    """The whole of ``README.md``."""
    front = yaml.safe_dump(_front(subject), sort_keys=False, allow_unicode=True).rstrip()
    parts = [
        f"---\n{front}\n---\n",
        f"# {subject.name}\n",
        _about(subject),
        _table("Data", _data(subject.card)),
        _table("Results", _results(subject.card)),
        _use(subject),
        _limits(subject),
        _table("Made with", _versions(subject.card)),
    ]
    return "\n".join(part for part in parts if part).rstrip() + "\n"


def _front(subject: Subject) -> dict[str, Any]:
    found: dict[str, Any] = {
        "base_model": _shown(subject.base),
        "base_model_relation": "adapter" if subject.is_adapter else "finetune",
        "library_name": "peft" if subject.is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["truetune", *([subject.method] if subject.method else [])],
    }
    if subject.license or subject.base_license:
        found["license"] = subject.license or subject.base_license
    if hubs := sorted({name.removeprefix("hub:").split(":")[0] for name in _files(subject.card) if "hub:" in name}):
        found["datasets"] = hubs
    if index := _model_index(subject):
        found["model-index"] = index
    return found


def _model_index(subject: Subject) -> list[dict[str, Any]]:
    """Results as the Hub's site shows them; only what was measured on held-out rows."""
    metrics = subject.card.get("metrics") or {}
    named = {"held_out_loss": "loss", "held_out_accuracy": "accuracy"}
    values = [
        {"type": kind, "name": f"held-out {kind}", "value": round(metrics[key], 6)}
        for key, kind in named.items()
        if metrics.get(key) is not None
    ]
    task = {"type": "text-generation"}
    data = {"type": "held-out", "name": "rows held out of the training data"}
    return [{"name": subject.name, "results": [{"task": task, "dataset": data, "metrics": values}]}] if values else []


def _about(subject: Subject) -> str:
    card, base = subject.card, subject.card.get("base") or {}
    weights = f" (weights `{base['weights_sha256'][:12]}`)" if base.get("weights_sha256") else ""
    what = "An adapter for" if subject.is_adapter else "A model tuned from"
    how = f", tuned with {subject.method}" if subject.method else ""
    lines = [f"{what} `{_shown(subject.base)}`{weights}{how}.\n"]
    if template := card.get("template"):
        lines.append(f"Prompts are worded by the chat template `{_shown(template['name'])}` "
                     f"(sha256 `{template['sha256'][:12]}`), as they were in training.\n")  # fmt: skip
    elif "template" in card:
        lines.append("It was trained on bare text, without a chat template.\n")
    if system := card.get("system"):
        quoted = system.replace("\n", "\n> ")
        lines.append(f"Conversations without a system message were trained with this one:\n\n> {quoted}\n")
    if packed := card.get("quantisation"):
        lines.append(f"The base was stored in {packed['kind']} while it was trained.\n")
    return "\n".join(lines)


def _files(card: Mapping[str, Any]) -> Mapping[str, str]:
    found: Mapping[str, str] = (card.get("data") or {}).get("files") or {}
    return found


def _data(card: Mapping[str, Any]) -> list[tuple[str, str]]:
    data = card.get("data") or {}
    rows = [(f"`{_shown(name)}`", f"sha256 `{digest[:12]}`") for name, digest in _files(card).items()]
    counts = (("read", "rows read"), ("used", "rows used"), ("held_out", "rows held out"), ("tokens", "tokens"),
              ("trained_tokens", "tokens that carried a loss"))  # fmt: skip
    rows += [(label, f"{data[key]:,}") for key, label in counts if isinstance(data.get(key), int)]
    return rows + [(f"left out: {reason}", f"{count:,}") for reason, count in (data.get("rejected") or {}).items()]


def _results(card: Mapping[str, Any]) -> list[tuple[str, str]]:
    metrics = card.get("metrics") or {}
    named = (
        ("steps", "steps", "{:,}"),
        ("tokens", "tokens seen", "{:,}"),
        ("held_out_loss_before", "held-out loss before", "{:.4f}"),
        ("held_out_loss", "held-out loss after", "{:.4f}"),
        ("held_out_accuracy", "next token right, held-out rows", "{:.1%}"),
    )
    return [(label, form.format(metrics[key])) for key, label, form in named if metrics.get(key) is not None]


def _versions(card: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, str(version)) for name, version in (card.get("versions") or {}).items()]


def _table(title: str, rows: Sequence[tuple[str, str]]) -> str:
    if not rows:
        return ""
    cells = "\n".join(f"| {_cell(one)} | {_cell(other)} |" for one, other in rows)
    return f"## {title}\n\n| | |\n|---|---|\n{cells}\n"


def _use(subject: Subject) -> str:
    base = _shown(subject.base)
    if subject.is_adapter:
        code = (
            "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{base}", dtype="auto")\n'
            'model = PeftModel.from_pretrained(model, "PATH-OR-NAME-OF-THIS")'
        )
        shell = f"truetune generate --model {base} --adapter PATH-OF-THIS --prompt '…'"
    else:
        code = (
            "from transformers import AutoModelForCausalLM\n\n"
            'model = AutoModelForCausalLM.from_pretrained("PATH-OR-NAME-OF-THIS", dtype="auto")'
        )
        shell = "truetune generate --model PATH-OF-THIS --prompt '…'"
    # PEFT has no class for some methods, and says so; our own command knows them all.
    return f"## How to use it\n\n```\n{shell}\n```\n\n```python\n{code}\n```\n"


def _limits(subject: Subject) -> str:
    lines = ["What the base gets wrong, this may get wrong too; nothing beside the figures above was measured."]
    if subject.license is None:
        told = f"; the base's is {subject.base_license}" if subject.base_license else ""
        lines.append(f"Nobody stated a licence for the tuned weights{told}. The data's own terms hold as well.")
    return "## Limits\n\n" + "\n".join(lines) + "\n"


def _shown(name: str) -> str:
    """A name of the Hub as it is; of a path on somebody's disk the last part."""
    path = PurePath(name)
    return path.name if path.is_absolute() or name.startswith((".", "~")) or "\\" in name else name


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
