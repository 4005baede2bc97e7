"""Objects of libraries, and others that are not looked into, that a module or a callback holds.

What a library keeps in an object that is no module and has no ``state_dict()`` is not for us to set. It may decide about
training all the same, as the importance of weights does in peft's AdaLoRA: that it has changed is seen, to be said. So are
tables, and python's own iterators (``itertools.cycle``, a generator), of which nobody can see how far they are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch

from nemologger.exact.port import is_iterator_of_loader
from nemologger.exact.program.own_states import OTHERS, has_state
from nemologger.exact.reach.kinds import has_place, is_ordinary, may_hold_numbers, shown_place
from nemologger.exact.reach.objects import is_of_the_program
from nemologger.exact.reach.parts import attributes, held_by
from nemologger.exact.values import contents

_LOOKED_AT = 64
#: A larger table is most often data, and takes long.
_MOST_CELLS = 2**16
_ARRAYS = (np.ndarray, np.generic, torch.Tensor)


class Strangers:
    """The numbers and tensors of such objects.

    Args:
        holders: Gives the objects that may hold some, by path.
        not_theirs: For each of the holders, the names of attributes that belong to the framework.
    """

    def __init__(self, holders: Callable[[], Mapping[str, object]], not_theirs: Collection[str]) -> None:
        self._holders = holders
        self._not_theirs = not_theirs
        self._seen = {path: (id(one), _sign(one)) for path, one in self._found()}
        self._last: dict[str, int] = {}
        self._stay: set[str] = set()

    def look(self) -> None:
        """For the first steps: what stays from one to the next is no passing result, though it may be replaced later."""
        now = {path: id(one) for path, one in self._found()}
        self._stay |= {path for path, number in now.items() if self._last.get(path) == number}
        self._last = now

    def changed(self) -> dict[str, tuple[str, list[str]]]:
        """Those that have changed since they were first seen, by path: the class, and which attributes."""
        found: dict[str, tuple[str, list[str]]] = {}
        for path, one in self._found():
            known, before = self._seen.setdefault(path, (id(one), _sign(one)))
            now = _sign(one)
            names = [name for name, sign in now.items() if before.get(name) != sign]
            if names and (known == id(one) or path in self._stay):
                found[path] = f"{type(one).__module__}.{type(one).__qualname__}", names
        return found

    def _found(self) -> Iterator[tuple[str, Any]]:
        seen: set[int] = set()
        for place, one in held_by(self._holders(), self._not_theirs):
            if id(one) not in seen and _is_stranger(one):
                seen.add(id(one))
                yield place, one


def _is_stranger(value: Any) -> bool:
    if has_place(value) or _is_table(value):
        return True
    theirs = issubclass(type(value), OTHERS) or is_of_the_program(value) or has_state(value)
    # A second loader is often read by hand, with next(self.unlabelled).
    return is_iterator_of_loader(value) or (may_hold_numbers(type(value)) and not theirs)


def _is_table(value: Any) -> bool:
    """Whether it is a small table or column, as pandas has them."""
    kind = type(value)
    if issubclass(kind, (*_ARRAYS, *OTHERS)) or not (is_ordinary(kind) and hasattr(kind, "__array__")):
        return False
    try:
        return type(value.size) is int and value.size <= _MOST_CELLS
    except Exception:  # noqa: BLE001  it has none, as polars' tables, or is in a file that is closed
        return False


def _sign(one: Any) -> dict[str, list[Any]]:
    """What numbers and tensors its attributes hold, or those of objects that they are, by name."""
    if has_place(one):
        return {"its place": [shown_place(one)]}
    if _is_table(one):
        return {"its values": _values_of(one)}
    inner = {name: [*attributes(v).values()] if _is_stranger(v) else v for name, v in attributes(one).items()}
    return {name: list(islice(_numbers(value), _LOOKED_AT)) for name, value in inner.items()}


def _values_of(table: Any) -> list[Any]:
    try:
        return [contents.fingerprint(np.asarray(table))]
    except Exception:  # noqa: BLE001  not in this process's memory, as cupy's arrays are, or in a file that is closed
        return []


def _numbers(value: Any) -> Iterator[Any]:
    if isinstance(value, _ARRAYS):
        if not getattr(value, "requires_grad", False):  # parameters, and losses
            yield contents.fingerprint(value, _LOOKED_AT)  # some of a large one: nothing is to be kept of it
    elif type(value) in (int, float):
        yield value
    elif type(value) in (dict, list, tuple):
        for item in islice(value.values() if isinstance(value, dict) else value, _LOOKED_AT):
            yield from _numbers(item)
