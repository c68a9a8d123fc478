"""What of a file's pages this process holds."""

from __future__ import annotations

import mmap
import sys

import pytest

from truetune.checkpoint.mapped import Pages

on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="pages can be let go on Linux alone")


def present_bytes(pages: Pages) -> int:
    """By /proc/self/pagemap, one word per page: bit 63 says that it is in memory."""
    found = 0
    with open("/proc/self/pagemap", "rb", buffering=0) as file:
        for start, stop in pages.areas:
            file.seek(start // mmap.PAGESIZE * 8)
            words = file.read((stop - start) // mmap.PAGESIZE * 8)
            found += sum(bool(words[i + 7] & 0x80) for i in range(0, len(words), 8))
    return found * mmap.PAGESIZE
