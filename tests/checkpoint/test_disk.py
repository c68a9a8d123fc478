"""Where a folder that is not there yet would be made."""

from pathlib import Path

import pytest

from truetune.checkpoint.disk import existing, require_space
from truetune.errors import OutputError


def test_the_nearest_folder_is_found(tmp_path: Path) -> None:
    assert existing(tmp_path / "a" / "b") == existing(tmp_path) == tmp_path
    assert existing(Path("not/there")) == Path()


def test_a_drive_that_does_not_exist_is_an_error_and_no_endless_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Windows the root of a path may be missing as well; its parent is itself."""
    monkeypatch.setattr(Path, "exists", lambda self: False)
    with pytest.raises(OutputError, match="there is no /"):
        require_space(Path("/gone/away"), 1)
