"""Uploading to the Hub: only when asked, and refused before any work where there is no way there."""

from __future__ import annotations

import os
from pathlib import Path

from truetune.errors import OutputError
from truetune.train.log import Screen


def check(repository: str) -> None:
    """Raises OutputError where the Hub's client was told to stay offline."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise OutputError(
            f"--push {repository}: HF_HUB_OFFLINE is set, and nothing can be uploaded",
            ("way out", "unset HF_HUB_OFFLINE, or leave --push out and upload the folder later"),
        )


def push(repository: str, out: Path, screen: Screen) -> str:
    """Upload a folder, or one file; returns the address.

    Raises:
        OutputError: no way to the Hub, no right to write there, or another refusal of its own.
    """
    from huggingface_hub import HfApi  # its import is slow, and few push

    screen.say("push", f"{out} → {repository}")
    try:
        api = HfApi()
        url = str(api.create_repo(repository, exist_ok=True))
        if out.is_dir():
            api.upload_folder(repo_id=repository, folder_path=out)
        else:
            api.upload_file(repo_id=repository, path_or_fileobj=out, path_in_repo=out.name)
    except Exception as error:  # the client raises what its transport raises
        said = " ".join(str(error).split())[:300] or type(error).__name__
        answered = getattr(error, "response", None) is not None
        raise OutputError(
            f"--push {repository}: the upload failed",
            ("because", said),
            ("kept", f"{out} is complete: upload it later"),
            ("way out", "hf auth login, with a token that may write there" if answered else "a connection to the Hub"),
        ) from None
    return url
