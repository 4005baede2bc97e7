"""What a module only notes of what it does in one life (``self.losses.append(...)``), and what it goes on with.

Both are lists and dictionaries among its attributes. A program that is told of its losses by a record would be surprised to
find those of an earlier life there; one that weighs its losses, averages weights or draws from a memory with such a thing
goes on wrong without it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from itertools import islice
from typing import Any

import numpy as np
import torch

from nemologger.exact.program.uses import Uses
from nemologger.exact.values import contents

KINDS = (list, dict, set, deque)

_ARRAYS = (np.ndarray, torch.Tensor)
_NOTHING = (0, 0)
#: So many of the last items say what kind of thing is in it, so deep.
_LOOKED_AT, _DEEPEST = 8, 3
#: A list of more arrays and tensors that only grows is a record all the same: to keep it would cost each save.
_MOST_ARRAYS = 4096


class Records:
    """Tells one from the other by how they change.

    A record is only ever added to, and holds numbers and texts: it has in it, in its place, all that it had when it was last
    looked at. What has been brought back from a checkpoint is none, nor is a queue of limited length, nor what code looks
    into or empties while it trains.
    """

    def __init__(self) -> None:
        self._uses = Uses({})
        self._heads: dict[str, tuple[int, int]] = {}
        self._others: set[str] = set()
        #: Dictionaries that have been seen to grow. What each step fills anew, activations for example, does not.
        self._growing: set[str] = set()
        self._entries: dict[str, tuple[int, int]] = {}

    def begin(self, present: Iterable[tuple[str, Any]], uses: Uses) -> None:
        """Training begins; path and value of what is there, and what code does with it."""
        self._uses = uses
        self._heads = {}
        for path, value in present:
            with suppress(Exception):  # a class of somebody's that does not let others go through it; so it is a record
                self._heads[path] = _head(value, contents.length(value))

    def go_on_with(self, paths: Iterable[str]) -> None:
        """These are no records."""
        self._others.update(paths)

    def has(self, path: str, value: Any) -> bool:
        """Whether ``value`` is a record, as far as is known by now. To be asked soon and often."""
        with suppress(Exception):  # as above
            self._see_growth(path, value)
        if path not in self._others:
            with suppress(Exception):  # as above
                if (
                    _is_limited(value)
                    or not self._has_grown(path, value)
                    or _holds_arrays(value)
                    or self._uses.has(path)
                ):
                    self._others.add(path)
        return path not in self._others

    def decides(self, path: str, value: Any) -> bool:
        """Whether a run certainly goes on wrong without it; a cache is filled again."""
        with suppress(Exception):  # as above
            if not self._uses.has(path):
                return False
            fills_itself = hasattr(type(value), "__missing__")
            is_other = path in self._growing and not fills_itself and not self._uses.is_cache(path)
            return is_other or _is_limited(value) or not _may_be_cache(value)
        return False

    def _see_growth(self, path: str, value: Any) -> None:
        if isinstance(value, dict):
            before, now = self._entries.get(path, _NOTHING), (len(value), id(next(iter(dict.values(value)), None)))
            if 0 < before[0] < now[0] and before[1] == now[1]:
                self._growing.add(path)
            self._entries[path] = now

    def _has_grown(self, path: str, value: Any) -> bool:
        """Whether nothing else has happened to it."""
        count, _ = before = self._heads.get(path, _NOTHING)
        if contents.length(value) < count or (count and _head(value, count) != before):
            return False
        self._heads[path] = _head(value, contents.length(value))
        return True


def _head(value: Any, count: int) -> tuple[int, int]:
    """``count`` of the items, the first ones, and what they are."""
    if not count or isinstance(value, set):  # of which it is not known which came first
        return count, 0
    if count < contents.length(value):
        value = dict(islice(dict.items(value), count)) if isinstance(value, dict) else list(islice(value, count))
    return count, contents.fingerprint(value if isinstance(value, dict) else list(value))


def _is_limited(value: Any) -> bool:
    return isinstance(value, deque) and value.maxlen is not None


def _may_be_cache(value: Any) -> bool:
    """Of arrays, or of objects by name."""
    some = islice(reversed(value.values()), _LOOKED_AT) if isinstance(value, dict) else ()
    return _holds_arrays(value) or not all(isinstance(item, (*contents.SCALARS, *contents.KINDS)) for item in some)


def _holds_arrays(value: Any, depth: int = 0) -> bool:
    if depth == 0 and contents.length(value) > _MOST_ARRAYS:
        return False
    if isinstance(value, dict):
        value = list(islice(reversed(value.values()), _LOOKED_AT))
    elif not isinstance(value, list | tuple | deque):
        return isinstance(value, _ARRAYS) and value.ndim > 0  # else it is a number, a loss say
    last = value if isinstance(value, tuple | list) else list(islice(reversed(value), _LOOKED_AT))
    return depth < _DEEPEST and any(_holds_arrays(item, depth + 1) for item in last[-_LOOKED_AT:])
