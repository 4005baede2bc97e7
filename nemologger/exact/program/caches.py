"""Dictionaries that are only added to: most often caches, which are filled again when they are needed."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
import xxhash


class Caches:
    """Tells them by what has become of the entries that they had. Holds none of these."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[int, int]] = {}
        self._found: set[str] = set()

    def watch(self, path: str, value: dict[Any, Any]) -> None:
        """``value`` may be one; what it has now is what it must keep."""
        self._entries[path] = _entries_of(value, len(value))

    def __contains__(self, path: str) -> bool:
        """Whether one has been found at ``path``: a look at its entries takes less time than one at what they hold."""
        return path in self._found

    def find(self, path: str, value: Any) -> bool:
        """Whether ``value`` has been added to since it was last looked at, and has lost or replaced nothing."""
        known = self._entries.get(path)
        if known is None or len(value) < known[0] or _entries_of(value, known[0]) != known:
            return False
        if len(value) > known[0]:
            self.watch(path, value)
            self._found.add(path)
        return path in self._found


def _entries_of(value: dict[Any, Any], count: int) -> tuple[int, int]:
    """``count``, and a number for which the oldest ``count`` of its entries are."""
    ids = np.fromiter(map(id, islice(dict.values(value), count)), np.int64, count)
    return count, xxhash.xxh3_64_intdigest(ids.data)
