"""What is kept of the attributes of some objects, what is not, and what is left out with that.

A list or dictionary of a module that cannot be kept begins anew alone. In an object it does so with what may go with it: a
buffer of samples has the place for the next one beside them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from nemologger.exact.program.records import KINDS
from nemologger.exact.reach.paths import parent_of
from nemologger.exact.values import contents, plain_contents
from nemologger.exact.values.tensors import on_device, tensors_in

_BELONGS = "belongs to an object of which another part is not saved"
#: How they are kept.
_LISTS = {*(kind.__name__ for kind in KINDS), "queue"}


class Kept:
    """Some attributes as plain types, and why others are not kept.

    Args:
        most: Bytes that are kept at most.

    Attributes:
        plain: What is kept, by path.
        on_device: Which of the tensors in it were not the CPU's, by path.
        lost: Why something is not kept, by path.
        records: Lists and dictionaries that most often are records, and not kept: what kind each is.
    """

    def __init__(self, most: int) -> None:
        self._left = [most]
        self.plain: dict[str, Any] = {}
        self.on_device: dict[str, list[int]] = {}
        self.lost: dict[str, str] = {}
        self.records: dict[str, str] = {}

    def add(self, path: str, value: Any, *, filled: bool) -> None:
        """Keep ``value``; with ``filled``, it will be there to be filled.

        Raises:
            CannotBeKeptError: It holds objects, or too much.
        """
        self.plain[path] = plain_contents.keep(value, self._left, filled=filled)
        if any(tensor.device.type != "cpu" for tensor in tensors_in(value)):
            self.on_device[path] = on_device(value)

    def leave_to_this_life(self, path: str, value: Any) -> None:
        """It is a record, or begins anew as one does."""
        self.records[path] = type(value).__name__
        self.lost.pop(path, None)

    def leave(self, paths: Iterable[str]) -> None:
        """Nor are these kept: another part of their object is not."""
        for path in paths:
            self.plain.pop(path, None)
            self.lost[path] = _BELONGS

    def leave_parts_of(self, wholes: Collection[str]) -> None:
        """Leave what is kept of each of ``wholes``, objects by path, of which something is lost."""
        partly = {parent_of(path) for path in self.lost}.intersection(wholes)
        self.leave([path for path in self.plain if parent_of(path) in partly])

    def leave_beside(self, lost: Mapping[str, Any]) -> None:
        """Leave what may go with ``lost``, lists of objects; those with which nothing does begin anew alone."""
        beside = {path: self._goes_with(path, value) for path, value in lost.items()}
        for path, others in beside.items():
            self.leave(others)
            if not others:
                self.leave_to_this_life(path, lost[path])

    def _goes_with(self, path: str, value: Any) -> list[str]:
        """Other lists of the object, and places in this one."""
        own = {other: kept for other, kept in self.plain.items() if parent_of(other) == parent_of(path)}
        return [other for other, kept in own.items() if _is_list(kept) or _is_place(kept, value)]


def _is_list(kept: Any) -> bool:
    return isinstance(kept, dict) and not kept.keys().isdisjoint(_LISTS)


def _is_place(kept: Any, samples: Any) -> bool:
    return type(kept) is int and 0 <= kept <= contents.length(samples)
