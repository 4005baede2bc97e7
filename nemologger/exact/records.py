"""What a module only notes of what it does in one life (``self.losses.append(...)``), and what it goes on with.

Both are lists and dictionaries among its attributes. A program that is told of its losses by a record would be surprised to
find those of an earlier life there; one that weighs its losses, averages weights or draws from a memory with such a thing
goes on wrong without it.
"""

from __future__ import annotations

import dis
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from itertools import islice
from types import FunctionType
from typing import Any

import numpy as np
import torch

from nemologger.exact import contents
from nemologger.exact.variables import functions_of

KINDS = (list, dict, set, deque)

_ARRAYS = (np.ndarray, torch.Tensor)
_NOTHING = (0, 0)
#: What these make or empty is so at the start of each life.
_BEFORE_TRAINING = {"__init__", "setup", "configure_model", "configure_optimizers", "on_fit_start", "on_train_start"}
#: How they are kept.
_PLAIN = {*(kind.__name__ for kind in KINDS), "queue"}
#: So many of the last items say what kind of thing is in it, so deep.
_LOOKED_AT, _DEEPEST = 8, 3
#: A list of more arrays and tensors that only grows is a record all the same: to keep it would cost each save.
_MOST_ARRAYS = 4096


class Records:
    """Tells one from the other by how they change.

    A record is only ever added to, and holds numbers and texts: it has in it, in its place, all that it had when it was last
    looked at. What has been brought back from a checkpoint is none, nor is a queue of limited length, nor what the program
    itself empties while it trains (:func:`emptied_in`).
    """

    def __init__(self) -> None:
        self._heads: dict[str, tuple[int, int]] = {}
        self._others: set[str] = set()

    def begin(self, present: Iterable[tuple[str, Any]]) -> None:
        """Training begins; path and value of what is there."""
        self._heads = {}
        for path, value in present:
            with suppress(Exception):  # a class of somebody's that does not let others go through it; so it is a record
                self._heads[path] = _head(value, contents.length(value))

    def go_on_with(self, paths: Iterable[str]) -> None:
        """These are no records."""
        self._others.update(paths)

    def has(self, path: str, value: Any) -> bool:
        """Whether ``value`` is a record, as far as is known by now. To be asked soon and often."""
        if path not in self._others:
            with suppress(Exception):  # as above
                if _is_limited(value) or not self._has_grown(path, value) or _holds_arrays(value):
                    self._others.add(path)
        return path not in self._others

    def _has_grown(self, path: str, value: Any) -> bool:
        """Whether nothing else has happened to it."""
        count, _ = before = self._heads.get(path, _NOTHING)
        if contents.length(value) < count or (count and _head(value, count) != before):
            return False
        self._heads[path] = _head(value, contents.length(value))
        return True


@lru_cache(maxsize=1024)
def emptied_in(kind: type) -> frozenset[str]:
    """The attributes that code of a class empties while it trains: outputs of the steps of one epoch, say."""
    functions = (function for function in functions_of(kind) if function.__name__ not in _BEFORE_TRAINING)
    return frozenset(name for function in functions for name in _emptied(function))


def _emptied(function: FunctionType) -> Iterator[str]:
    """Names such as in ``self.outputs.clear()`` and ``self.outputs = []``."""
    code = [one for one in dis.get_instructions(function) if one.opname not in ("CACHE", "PRECALL")]
    for first, second, third in zip(code, code[1:], code[2:], strict=False):
        if second.opname == "LOAD_ATTR" and third.opname in ("LOAD_METHOD", "LOAD_ATTR") and third.argval == "clear":
            yield second.argval
        elif first.opname in ("BUILD_LIST", "BUILD_MAP") and not first.arg and third.opname == "STORE_ATTR":
            yield third.argval


def goes_with(path: str, value: Any, kept: Mapping[str, Any]) -> list[str]:
    """What begins anew with the list ``value``, which cannot be kept: other lists of the object, and places in it.

    Args:
        path: That of ``value``.
        value: The list, or dictionary.
        kept: What is to be kept, by path, as plain types.
    """
    object_ = path.rpartition(".")[0]
    own = {other: one for other, one in kept.items() if other.rpartition(".")[0] == object_}
    return [other for other, one in own.items() if _is_list(one) or _is_place(one, value)]


def _is_list(kept: Any) -> bool:
    return isinstance(kept, dict) and not kept.keys().isdisjoint(_PLAIN)


def _is_place(kept: Any, samples: Any) -> bool:
    return type(kept) is int and 0 <= kept <= contents.length(samples)


def _head(value: Any, count: int) -> tuple[int, int]:
    """``count`` of the items, the first ones, and what they are."""
    if not count or isinstance(value, set):  # of which it is not known which came first
        return count, 0
    if count < contents.length(value):
        value = dict(islice(dict.items(value), count)) if isinstance(value, dict) else list(islice(value, count))
    return count, contents.fingerprint(value if isinstance(value, dict) else list(value))


def _is_limited(value: Any) -> bool:
    return isinstance(value, deque) and value.maxlen is not None


def _holds_arrays(value: Any, depth: int = 0) -> bool:
    if depth == 0 and contents.length(value) > _MOST_ARRAYS:
        return False
    if isinstance(value, dict):
        value = list(islice(reversed(value.values()), _LOOKED_AT))
    elif not isinstance(value, list | tuple | deque):
        return isinstance(value, _ARRAYS) and value.ndim > 0  # else it is a number, a loss say
    last = value if isinstance(value, tuple | list) else list(islice(reversed(value), _LOOKED_AT))
    return depth < _DEEPEST and any(_holds_arrays(item, depth + 1) for item in last[-_LOOKED_AT:])
