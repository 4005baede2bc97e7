"""Which of python's own kinds a dictionary is: one within a list is made again, and a program may count on its kind."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable
from typing import Any

_KINDS: dict[str, type[dict[Any, Any]]] = {kind.__name__: kind for kind in (dict, OrderedDict, Counter)}
_FACTORIES: dict[str, Any] = {
    kind.__name__: kind for kind in (list, dict, set, deque, int, float, bool, str, Counter, OrderedDict)
}
_WITH = "defaultdict "


def name_of(value: dict[Any, Any]) -> str | None:
    """A name for its kind; None if it is of a class of somebody's, or makes new values with a function of somebody's."""
    if type(value) is defaultdict:
        made_by = value.default_factory
        if made_by is None:
            return _WITH
        name = getattr(made_by, "__name__", "")
        return _WITH + name if _FACTORIES.get(name) is made_by else None
    name = type(value).__name__
    return name if _KINDS.get(name) is type(value) else None


def of_name(name: str, items: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    """A dictionary of that kind.

    Raises:
        KeyError: There is none.
    """
    if name.startswith(_WITH):
        made_by = name.removeprefix(_WITH)
        return defaultdict(_FACTORIES[made_by] if made_by else None, items)
    made = _KINDS[name]()
    for key, item in items:  # a Counter's update() counts them
        made[key] = item
    return made
