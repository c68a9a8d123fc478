"""Where a folder that is not there yet would be made, room that is taken beforehand, and what the system refuses."""

import ctypes
import errno
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors import SafetensorError

from truetune.checkpoint.disk import existing, require_space, reserve, writing
from truetune.errors import OutputError


def test_the_nearest_folder_is_found(tmp_path: Path) -> None:
    assert existing(tmp_path / "a" / "b") == existing(tmp_path) == tmp_path
    assert existing(Path("not/there")) == Path()


def test_a_drive_that_does_not_exist_is_an_error_and_no_endless_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Windows the root of a path may be missing as well; its parent is itself."""
    monkeypatch.setattr(Path, "exists", lambda self: False)
    with pytest.raises(OutputError, match="there is no /"):
        require_space(Path("/gone/away"), 1)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS])
def test_what_the_system_refuses_is_said_alike_by_python_and_by_safetensors(number: int, tmp_path: Path) -> None:
    said = []
    text = f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})"
    for error in (OSError(number, os.strerror(number)), SafetensorError(text)):
        with pytest.raises(OutputError) as caught, writing(tmp_path):
            raise error
        said.append(re.sub(r"[\d,]+ MB", "N MB", str(caught.value)))
    assert said[0] == said[1]


def test_a_limit_on_files_is_no_full_disk(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="larger than allowed") as caught, writing(tmp_path):
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    assert "full" not in str(caught.value)


def test_what_went_wrong_with_reading_is_not_blamed_on_the_disk_that_is_written(tmp_path: Path) -> None:
    text = "Error while deserializing header: I/O error: Permission denied (os error 13)"
    with pytest.raises(SafetensorError), writing(tmp_path):
        raise SafetensorError(text)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems take room as a file is written")
def test_the_blocks_of_a_reserved_file_are_there_before_its_bytes(tmp_path: Path) -> None:
    with (tmp_path / "file").open("xb") as file:
        reserve(file.fileno(), 3_000_001)
        found = os.stat(file.fileno())
    assert found.st_size == 3_000_001
    if not found.st_blocks:
        pytest.skip("this disk takes no blocks beforehand")
    assert found.st_blocks * 512 >= 3_000_001


@pytest.mark.skipif(sys.platform != "linux", reason="other systems take room as a file is written")
@pytest.mark.parametrize(("number", "refused"), [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EOPNOTSUPP, False)])
def test_a_full_disk_is_found_by_reserving_and_a_disk_that_cannot_is_not_asked_to(
    number: int, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fallocate(*_: int) -> int:
        ctypes.set_errno(number)
        return -1

    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: SimpleNamespace(fallocate=fallocate))
    with (tmp_path / "file").open("xb") as file:
        if refused:
            with pytest.raises(OSError, match=re.escape(os.strerror(number))):
                reserve(file.fileno(), 1000)
        else:
            reserve(file.fileno(), 1000)
            assert os.stat(file.fileno()).st_size == 1000
