"""Long lists of objects, of one for each sample say: to look into each as into others would take milliseconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from nemologger.exact.reach.kinds import has_only_a_dictionary, is_generator, kind_of, may_keep
from nemologger.exact.reach.parts import attributes, text_of

_MOST_GENERATORS = 1024


class Crowd(NamedTuple):
    """Some objects.

    Attributes:
        path: Of the list or dictionary that they are in; "" if they are in none.
        names: Their places in it, or their paths.
        items: The objects.
    """

    path: str
    names: Sequence[Any]
    items: Sequence[Any]

    def path_of(self, place: int) -> str:
        """That of one of the objects."""
        return f"{self.path}.{text_of(self.names[place], place)}" if self.path else str(self.names[place])


def crowd_of(path: str, names: Sequence[Any], items: Sequence[Any]) -> Crowd | None:
    """The objects among ``items`` that may keep something, if there are any: most lists are of numbers and texts."""
    kinds = _kinds_of(items)
    open_ = {number for number, kind in kinds.items() if not kind_of(kind).closed and may_keep(kind)}
    if not open_:
        return None
    if not kinds.keys() <= open_:
        pairs = [(name, item) for name, item in zip(names, items, strict=True) if id(type(item)) in open_]
        names, items = [name for name, _ in pairs], [item for _, item in pairs]
    return Crowd(path, names, items)


def _kinds_of(items: Sequence[Any]) -> dict[int, type]:
    try:
        return {id(kind): kind for kind in set(map(type, items))}  # for each batch, of a million samples
    except Exception:  # noqa: BLE001  some have no hash
        return {id(kind): kind for kind in map(type, items)}


def generators_of(crowd: Crowd) -> dict[str, Any]:
    """The generators of its objects, by path, if the first one has some."""
    names = [name for name, value in named_in(crowd.items[0]).items() if is_generator(value)]
    found: dict[int, tuple[str, Any]] = {}
    for place, item in enumerate(crowd.items[:_MOST_GENERATORS] if names else ()):
        own = named_in(item)
        for name in names:
            if is_generator(own.get(name)):
                found.setdefault(id(own[name]), (f"{crowd.path_of(place)}.{name}", own[name]))
    return dict(found.values())


def named_in(item: Any) -> dict[str, Any]:
    """The attributes of one of its objects, at once."""
    return vars(item) if has_only_a_dictionary(type(item)) else attributes(item)
