"""Who holds which page of keys and values, and which pages hold the beginning of a text that may come again."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict, deque
from collections.abc import Sequence

from truetune.models.paged import PAGE


class PagePool:
    """Pages 0 … count - 1.

    A full page is known by all that its keys and values depend on: the adapter, and the ids up to its end. Once nobody
    holds it any more it stays until its memory is needed, the one that was let go first going first.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = deque(range(count))
        self._holders = [0] * count
        self._by_key: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # known pages that nobody holds

    @property
    def available(self) -> int:
        """Pages that could be taken now."""
        return len(self._free) + len(self._idle)

    @property
    def held(self) -> int:
        """Pages that some text holds."""
        return self.count - self.available

    def take(self, count: int) -> list[int] | None:
        """So many pages, or None where there are not as many."""
        if count > self.available:
            return None
        return [self._take_one() for _ in range(count)]

    def _take_one(self) -> int:
        if self._free:
            page = self._free.popleft()
        else:
            page, _ = self._idle.popitem(last=False)
            del self._by_key[self._key_of.pop(page)]
        self._holders[page] = 1
        return page

    def let_go(self, pages: Sequence[int]) -> None:
        """One holder fewer; the last pages of a text are forgotten before its first ones."""
        for page in reversed(pages):
            self._holders[page] -= 1
            assert self._holders[page] >= 0
            if not self._holders[page]:
                if page in self._key_of:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def name(self, page: int, key: bytes) -> None:
        """Make a full page known by its key; the first one of a key stays the one that is found."""
        if key not in self._by_key and page not in self._key_of:
            self._by_key[key], self._key_of[page] = page, key

    def shared(self, keys: Sequence[bytes]) -> list[int]:
        """The known pages that these keys begin with, each with one holder more."""
        found = []
        for key in keys:
            page = self._by_key.get(key)
            if page is None:
                break
            self._idle.pop(page, None)
            self._holders[page] += 1
            found.append(page)
        return found


def page_keys(owner: str, ids: Sequence[int]) -> list[bytes]:
    """The key of each full page of a text.

    Args:
        owner: tells apart what the same ids become under different adapters.
    """
    keys, last = [], owner.encode()
    for start in range(0, len(ids) - PAGE + 1, PAGE):
        last = hashlib.blake2b(last + array("q", ids[start : start + PAGE]).tobytes(), digest_size=16).digest()
        keys.append(last)
    return keys
