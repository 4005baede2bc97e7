"""What changes in long lists of objects.

Of such an object the numbers among its own attributes are looked at, which takes half a microsecond, and kept. What else it
has is looked at in a few of them, so that it can be named.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from nemologger.exact.reach.crowd import Crowd, named_in
from nemologger.exact.reach.kinds import SCALARS, has_attributes, is_generator
from nemologger.exact.reach.variables import set_in
from nemologger.exact.values import contents

_FEW = 16
_NUMBERS = (int, float)


class _Seen(NamedTuple):
    ids: list[int]
    numbers: list[dict[str, Any]]
    few: list[dict[str, Any]]


class Crowds:
    """The crowds as they were when this was made.

    Args:
        crowds: Those.
        most: Of more objects than this every so many-th is looked at.
    """

    def __init__(self, crowds: Sequence[Crowd], most: int) -> None:
        self._most = most
        self._first = {crowd.path: self._see(crowd) for crowd in crowds}

    def begin(self, crowds: Sequence[Crowd], counters: Mapping[str, Any]) -> None:
        """The hooks that start training have made some of ``crowds``: these begin with what is among ``counters``."""
        made = [crowd for crowd in crowds if not [*self._still_there([crowd])]]
        self._first |= {crowd.path: self._see(crowd) for crowd in made}
        self.restore(made, counters, exactly=False)

    def changed(self, crowds: Sequence[Crowd]) -> tuple[dict[str, Any], dict[str, str]]:
        """The numbers that are others now, by path, and why some of what has changed cannot be kept."""
        numbers: dict[str, Any] = {}
        lost: dict[str, str] = {}
        for crowd, first, now in self._still_there(crowds):
            step = self._step(crowd)
            if any(_differ(before, after) for before, after in zip(first.few, now.few, strict=True)):
                lost[crowd.path or crowd.path_of(0)] = (
                    "holds more objects than are looked into, and more than numbers of theirs have changed"
                )
            if now.numbers == first.numbers:
                continue
            if step > 1:
                lost[crowd.path or crowd.path_of(0)] = "holds too many objects whose numbers change"
                continue
            for place, (before, after) in enumerate(zip(first.numbers, now.numbers, strict=True)):
                if before != after:
                    path = crowd.path_of(place)
                    numbers |= {f"{path}.{k}": v for k, v in after.items() if k not in before or before[k] != v}
        return numbers, lost

    def restore(self, crowds: Sequence[Crowd], counters: Mapping[str, Any], *, exactly: bool) -> None:
        """Set the numbers that are among ``counters``; with ``exactly``, others to what they were."""
        for crowd, first, now in self._still_there(crowds):
            if self._step(crowd) > 1:
                continue
            for place, item in enumerate(crowd.items):
                path = crowd.path_of(place)
                back = first.numbers[place] if exactly else {}
                back = back | {n: counters[f"{path}.{n}"] for n in now.numbers[place] if f"{path}.{n}" in counters}
                for name, value in back.items():
                    if name in now.numbers[place] and now.numbers[place][name] != value:
                        set_in(item, name, value)

    def _still_there(self, crowds: Sequence[Crowd]) -> Iterator[tuple[Crowd, _Seen, _Seen]]:
        """Those that are made of the same objects, in the same order. Otherwise their list has changed."""
        for crowd in crowds:
            first, now = self._first.get(crowd.path), self._see(crowd)
            if first is not None and first.ids == now.ids:
                yield crowd, first, now

    def _step(self, crowd: Crowd) -> int:
        return 1 + (len(crowd.items) - 1) // self._most

    def _see(self, crowd: Crowd) -> _Seen:
        items = crowd.items[:: self._step(crowd)]
        few = items[:: 1 + len(items) // _FEW]
        return _Seen(list(map(id, items)), list(map(_numbers_of, items)), list(map(_sign, few)))


def _numbers_of(item: Any) -> dict[str, Any]:
    return {name: value for name, value in named_in(item).items() if type(value) in _NUMBERS}


def _sign(item: Any) -> dict[str, Any]:
    """What else it has: lists and arrays, and the numbers of objects."""
    found: dict[str, Any] = {}
    for name, value in named_in(item).items():
        if contents.is_content(value):
            if contents.is_small(value):
                found[name] = contents.fingerprint(value)
        elif type(value) not in SCALARS and has_attributes(value) and not is_generator(value):
            found |= {f"{name}.{inner}": number for inner, number in _numbers_of(value).items()}
    return found


def _differ(before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Whether something has changed; what was not there before is a cache."""
    return any(name in after and after[name] != value for name, value in before.items())
