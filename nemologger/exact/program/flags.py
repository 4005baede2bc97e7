"""Flags that say that something was made: that a file is open, which, and by which process. Alone they lie."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from datetime import datetime
from itertools import chain
from pathlib import Path, PurePath
from typing import Any

from nemologger.disk.there import exists
from nemologger.exact.reach.kinds import SCALARS, is_generator
from nemologger.exact.reach.paths import parent_of
from nemologger.exact.values.contents import KINDS

#: When this life began.
_BEGAN = {clock: clock() for clock in (time.time, time.monotonic, time.perf_counter)}
#: Stand for no file, or none of some numbered ones.
_NOTHING = ("", -1)


class Flags:
    """Tells them from those that decide: they were set when an object was made that had not been there.

    Args:
        named: The attributes of all objects by path, when there is nothing yet.
        contents: Whether a list or array that was made may be kept.
    """

    def __init__(self, named: Iterable[tuple[str, Mapping[str, Any]]], *, contents: bool) -> None:
        named = list(named)
        self._holders = {path for path, _ in named}
        self._there = set(_objects(named, SCALARS))
        self._begin = {
            f"{path}.{name}"
            for path, attributes in named
            for name, value in attributes.items()
            if type(value) in (int, float, str) and value not in _NOTHING
        }
        self._with_contents = contents
        self._plain: tuple[type, ...] = (*SCALARS, *KINDS) if contents else SCALARS
        self._set_then: dict[str, dict[str, Any]] = {}
        self._restored: set[str] = set()

    def note_restored(self, paths: Iterable[str]) -> None:
        """These decide."""
        self._restored.update(paths)

    def leave(
        self,
        changed: dict[str, Any],
        named: Iterable[tuple[str, Mapping[str, Any]]],
        lost: Iterable[str] = (),
        *,
        kept: Collection[str] = (),
    ) -> list[str]:
        """Take such flags out of ``changed``; returns those that have changed again since, and are something else.

        Args:
            changed: The attributes that are to be saved, by path.
            named: All there are.
            lost: Lists and arrays that are not kept.
            kept: Those that are, although they are taken for objects otherwise.
        """
        known = self._there.union(kept)
        made = {parent_of(p) for p in chain(_objects(named, self._plain), lost) if p not in known}
        for holder in made.difference(self._set_then):
            self._set_then[holder] = {
                path: value
                for path, value in changed.items()
                if parent_of(path) == holder and path not in self._restored and self._may_be_flag(path, value)
            }
        again = []
        for flags in self._set_then.values():
            for path in flags.keys() & changed.keys():
                if changed.pop(path) != flags[path]:
                    again.append(path)
        return again

    def _may_be_flag(self, path: str, value: Any) -> bool:
        """What counts begins with a number, and what speaks of something open as if there were nothing.

        A module makes many things late, and keeps what decides beside them: there only what is true or false may be a flag.
        """
        if type(value) is bool:
            return True
        wide = parent_of(path) in self._holders and (not self._with_contents or ":" in path)
        return wide and type(value) in (int, float, str) and path not in self._begin


def is_gone(value: Any) -> bool:
    """Whether it is the path of something that is not there any more: another life had it, or another machine has it."""
    if not (type(value) is str or issubclass(type(value), PurePath)) or not os.path.isabs(value):
        return False
    try:
        return not exists(Path(value))
    except (OSError, ValueError):  # nobody can say, or it is no path
        return False


def is_of_clock(value: Any) -> bool:
    """Whether it may be the time of a moment of this life."""
    if type(value) is datetime:
        try:
            value = value.timestamp()
        except (OverflowError, OSError, ValueError):  # of a year that no clock shows
            return False
    return type(value) is float and any(began <= value <= clock() for clock, began in _BEGAN.items())


def _objects(named: Iterable[tuple[str, Mapping[str, Any]]], plain: tuple[type, ...]) -> Iterator[str]:
    for path, attributes in named:
        for name, value in attributes.items():
            if not issubclass(type(value), plain) and not is_generator(value):
                yield f"{path}.{name}"
