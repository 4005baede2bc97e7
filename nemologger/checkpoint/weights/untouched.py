"""Classes stay what they are while a pickle that strangers wrote is read.

A pickle may set attributes of anything it names, and what it must be able to name are classes that all of the program uses:
with another ``__init__`` or ``__hash__`` they would spoil every save to come.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any

from nemologger.errors import RefusedError


@contextmanager
def untouched(kinds: Iterable[type], file: object) -> Iterator[None]:
    """Put back what is changed of the classes ``kinds``, and of the members of those that are enums.

    Raises:
        RefusedError: If something was; it names ``file``.
    """
    before = {id(kind): (kind, dict(vars(kind))) for kind in kinds}
    members: list[tuple[Enum, dict[str, Any]]] = [
        (member, dict(vars(member)))
        for kind, _ in before.values()
        if issubclass(kind, Enum)
        for member in kind.__members__.values()
    ]
    try:
        yield
    finally:
        changed = [kind.__name__ for kind, then in before.values() if _restored(kind, then)]
        for member, values in members:
            if not _same(vars(member), values):
                vars(member).clear()
                vars(member).update(values)
                changed.append(str(member))
        if changed:
            raise RefusedError(f"{file} changes {', '.join(changed)}, which no checkpoint needs: it was not loaded")


def _restored(kind: type, then: dict[str, Any]) -> bool:
    """Give ``kind`` the attributes back that it had ``then``; whether some were others."""
    now = dict(vars(kind))
    if _same(now, then):
        return False
    # Past the metaclass: that of enums has its own ideas.
    for name in now.keys() - then.keys():
        type.__delattr__(kind, name)
    for name, value in then.items():
        if now.get(name, kind) is not value:
            type.__setattr__(kind, name, value)
    return True


def _same(now: Any, then: dict[str, Any]) -> bool:
    return now.keys() == then.keys() and all(now[name] is value for name, value in then.items())
