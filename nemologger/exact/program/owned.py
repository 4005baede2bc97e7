"""Generators, counters, lists and arrays that a dataset or a sampler keeps among its attributes."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from nemologger.exact.program.caches import Caches
from nemologger.exact.program.crowds import Crowds
from nemologger.exact.program.flags import Flags, is_gone
from nemologger.exact.program.generators import may_begin, set_states, states_of
from nemologger.exact.reach.kinds import SCALARS, has_place, is_generator, module_of, shown_place
from nemologger.exact.reach.look import Look
from nemologger.exact.reach.paths import parent_of, root_of, way_to
from nemologger.exact.reach.variables import keeps_variables, set_in
from nemologger.exact.values import contents, plain_contents

_BELONGS = "belongs to an object of which another part cannot be kept"
_THREAD = "belongs to an object with a thread of its own, which waits for it or changes it at any time"
#: Stands for the number of the process, whichever it is.
_PROCESS = {"process": True}
#: Stands for a list or array that could not be kept.
_LEFT = (None, True)
_ABSENT = object()


@dataclass(frozen=True)
class Values:
    """What was found at one moment, by path: ``"dataset.transform.rng"``.

    Attributes:
        generators: States of generators.
        counters: Numbers and texts.
        contents: Of lists, dictionaries, arrays and tensors: what they hold, and whether it is the object that was there at
            first. None if nobody has looked.
    """

    generators: dict[str, Any] = field(default_factory=dict)
    counters: dict[str, Any] = field(default_factory=dict)
    contents: dict[str, tuple[Any, bool]] | None = None

    def to_plain(self) -> dict[str, Any]:
        """As plain types."""
        return {"generators": self.generators, "counters": self.counters, "contents": self.contents}

    @staticmethod
    def from_plain(plain: dict[str, Any]) -> Values:
        """What :meth:`to_plain` was made of."""
        return Values(plain["generators"], plain["counters"], plain.get("contents"))


NOTHING = Values()


class _First(NamedTuple):
    """A list, dictionary, array or tensor as the program made it."""

    value: Any
    fingerprint: int
    kept: Any


class Owned:
    """Looks into objects for the state that they carry from batch to batch.

    A counter is a number or a text that has changed since this object was made: an argument of the constructor stays as
    the program gives it today. So are contents of lists, dictionaries, arrays and tensors.

    Args:
        roots: The objects, by name.
        counters: Look for counters and contents too.
        closed: The names of roots whose contents are none of our business.
        most: Keep no more bytes of contents than this.
        most_counted: Keep the numbers of so many objects in a list at most.
        kept: What others have kept of the same lists and arrays at first, by their identity; more is added.
        light: Look at small contents alone, and remember none: for processes that share their memory with others. There a
            dictionary that has only been added to is a cache, and has not changed.

    Attributes:
        lost: What has changed and cannot be kept, by path, and why.
    """

    def __init__(
        self,
        roots: Mapping[str, Any],
        *,
        counters: bool = True,
        closed: Collection[str] = (),
        most: int = plain_contents.MOST_BYTES,
        light: bool = False,
        most_counted: int = 10_000,
        kept: dict[int, Any] | None = None,
    ) -> None:
        self._roots = {name: root for name, root in roots.items() if root is not None}
        self._counters = counters
        self._closed = closed
        self._most = most
        self._light = light
        look = Look(self._roots if counters else {})
        self._at_first = look.scalars
        self._flags = Flags(look.named.items(), contents=False)
        holding = self._holding(look)
        # Who keeps hundreds of long lists does not wait longer for them.
        self._share = 1 + sum(not contents.is_small(value) for _, value in holding) // 4
        left = [0 if light else plain_contents.MOST_BYTES]
        kept = {} if kept is None else kept
        kept |= {id(value): _kept(value, left) for _, value in holding if id(value) not in kept}
        self._first = {p: _First(v, contents.fingerprint(v, self._share), kept[id(v)]) for p, v in holding}
        self._caches = Caches()
        for path, value in holding:
            if isinstance(value, dict) and (light or keeps_variables(look.holder_of(path))):
                self._caches.watch(path, value)
        self._crowds = Crowds(look.crowds, most_counted)
        self._there = look.there
        self._names = {f"{path}.{name}" for path, named in look.named.items() for name in named}
        self._nones = {path for path, value in self._at_first.items() if value is None and self._is_object(path, look)}
        self._places = {path: shown_place(value) for path, value in _with_places(look)}
        self._late: dict[str, Any] = {}
        self._partly: set[str] = set()
        self.lost: dict[str, str] = {}

    @property
    def generators(self) -> dict[str, Any]:
        """The generators, by path."""
        return Look(self._roots).generators

    def values(
        self, *, counters: bool | Literal["open"] = True, look: Literal["all", "quiet", "small", "not"] = "all"
    ) -> Values:
        """The state of this moment.

        Args:
            counters: Look for counters, which takes time; for "open", not among the attributes of what is closed.
            look: Which contents to look at, too. For every batch, small ones; then :meth:`name_large` at a save. What
                cannot be kept is not named if that is to be "quiet", and left as it is then: it may be made again.
        """
        if not self._roots:
            return Values()
        seen = Look(self._roots)
        generators = states_of(seen)
        if not (counters and self._counters):
            return Values(generators)
        changed = self._counters_changed(seen, only_open=counters == "open")
        for path in [path for path in changed if parent_of(path) in seen.with_threads]:
            del changed[path]
            if look == "all":
                self.lost.setdefault(path, _THREAD)
        again = self._flags.leave(changed, seen.named.items(), kept=self._late_numbers(seen))
        of_crowds, lost = self._crowds.changed(seen.crowds)
        if look == "all":
            self._name_late(generators, changed, seen)
            self.lost = {**dict.fromkeys(again, _BELONGS), **lost, **self.lost}
        changed |= of_crowds
        return Values(generators, changed, None if look == "not" else self._changed(seen, look))

    def _counters_changed(self, look: Look, *, only_open: bool) -> dict[str, Any]:
        unknown = object()
        changed = {p: v for p, v in look.scalars.items() if self._at_first.get(p, unknown) != v}
        if only_open:
            changed = {path: value for path, value in changed.items() if self._is_open(path, look)}
        for path in [path for path, value in changed.items() if is_process_id(path, value)]:
            del changed[path]
            if self._generator_goes_with(path, look):
                changed[path] = _PROCESS
        return changed

    def restore(self, values: Values, *, exactly: bool = False) -> None:
        """Set what is still there to ``values``; with ``exactly``, counters that are not among them to what they were."""
        look = Look(self._roots)
        if values.generators:
            set_states(look, values.generators)
        if self._counters:
            self._restore_counters(look, values.counters, exactly=exactly)
            if values.contents is not None:
                self._restore_contents(look, values.contents, exactly=exactly)

    def _restore_counters(self, look: Look, counters: Mapping[str, Any], *, exactly: bool) -> None:
        self._flags.note_restored(counters)
        self._crowds.restore(look.crowds, counters, exactly=exactly)
        for path, value in ({**self._at_first, **counters} if exactly else counters).items():
            where, _, name = path.rpartition(".")
            if where not in look.holders or where in look.with_threads or (is_gone(value) and path in counters):
                continue
            value = os.getpid() if value == _PROCESS else value
            there = look.named[where].get(name, _ABSENT)
            # Not there yet: the program begins to count when it first has something to count.
            begins = there is _ABSENT and path in counters and may_begin(look.holders[where], name)
            # A list that is made when it is needed, and was needed by now.
            emptied = value is None and path in counters and contents.is_content(there)
            if begins or emptied or (type(there) in SCALARS and there != value):
                set_in(look.holders[where], name, value)

    def _restore_contents(self, look: Look, saved: Mapping[str, tuple[Any, bool]], *, exactly: bool) -> None:
        late, holding = self._late_numbers(look), self._holding(look)
        for path, value in holding:
            where, _, name = path.rpartition(".")
            if where not in self._there or saved.get(path) == _LEFT or not (path in saved or exactly):
                continue
            if where in look.with_threads:
                continue
            if path not in saved and (path in self.lost or not self._has_changed(path, value)):
                continue
            if path not in saved and path in late:
                set_in(look.holders[where], name, None)
                continue
            kept, same = saved.get(path) or (self._first[path].kept if path in self._first else None, True)
            if kept is None:
                self.lost[path] = "was changed before it could be kept"
                continue
            back = plain_contents.put_back(value, kept, same=same, exactly=exactly)
            if back is not value and not is_gone(back):
                set_in(look.holders[where], name, back)
        for path in self._nones.intersection(saved).difference(dict(holding)):
            where, _, name = path.rpartition(".")
            if (
                saved[path] != _LEFT
                and where not in look.with_threads
                and look.named.get(where, {}).get(name, self) is None
            ):
                set_in(look.holders[where], name, plain_contents.unkept(saved[path][0]))

    def name_large(self) -> None:
        """Put what has changed, and is too large to be kept for every batch, among what is :attr:`lost`."""
        for path, value in self._holding(Look(self._roots)):
            if path not in self.lost and not contents.is_small(value) and self._has_changed(path, value):
                self.lost[path] = "is too large to be noted with every batch, which a sampler without __len__() needs"

    def _generator_goes_with(self, path: str, look: Look) -> bool:
        """Whether the number of the process at ``path`` says whose a generator of the same object is, and nothing else.

        Who finds another number there makes the generator anew, with the files and connections that it has beside it.
        """
        holder = parent_of(path)
        parts = {f"{holder}.{name}": part for name, part in look.named[holder].items() if type(part) not in SCALARS}
        generators = [name for name, part in parts.items() if is_generator(part)]
        late = {name for name in parts if name not in self._names or self._at_first.get(name, self) is None}
        if late.issubset(generators):
            return bool(generators) and not self._light
        for name in generators:
            self.lost.setdefault(name, _BELONGS)
        return False

    def _name_late(self, generators: Mapping[str, Any], counters: Mapping[str, Any], look: Look) -> None:
        """Put objects that were made late, and go on changing, among what is :attr:`lost`, and iterators with a place."""
        late = {path: None for path in generators if ":" not in path and path not in look.of_crowds} | dict(counters)
        for path, value in late.items():
            if path not in self._there and parent_of(path) not in self._there:
                self._look_at_late(path, value)
        for path, value in _with_places(look):
            if root_of(path) not in self._closed and self._places.get(path) != shown_place(value):
                self.lost.setdefault(path, "is an iterator, whose place cannot be kept")

    def _look_at_late(self, path: str, value: Any) -> None:
        """Name the object made late that has ``path``, if it has changed since it was first seen; a generator will."""
        if root_of(path) in self._closed or (value is not None and self._late.setdefault(path, value) == value):
            return
        made = next(place for place in way_to(path) if place not in self._there)
        self.lost.setdefault(made, "was made after training began")

    def _changed(self, look: Look, at: Literal["all", "quiet", "small"]) -> dict[str, tuple[Any, bool]]:
        found: dict[str, tuple[Any, bool]] = {}
        left, small, late = [self._most], at == "small", self._late_numbers(look)
        lost, partly = (self.lost, self._partly) if at != "quiet" else ({}, set())
        for path, value in self._holding(look):
            if (small and not contents.is_small(value)) or (path in self._caches and self._caches.find(path, value)):
                continue
            if parent_of(path) in look.with_threads and self._has_changed(path, value):
                lost.setdefault(path, _THREAD)
                continue
            if not self._has_changed(path, value) or (self._light and self._caches.find(path, value)):
                continue
            first = self._first.get(path)
            if first is None and isinstance(value, np.memmap) and self._late.setdefault(path, id(value)) == id(value):
                continue  # a file, opened when it was first needed
            if parent_of(path) not in self._there:
                if at == "all":
                    self._look_at_late(path, contents.fingerprint(value))
                continue
            try:
                if path in late:
                    found[path] = plain_contents.keep(value, left), False
                    continue
                if first is None:
                    raise plain_contents.CannotBeKeptError("was not there when training began")
                found[path] = plain_contents.keep_changed(value, left, first.kept), value is first.value
            except plain_contents.CannotBeKeptError as error:
                if self._is_memo(path, value, look):
                    continue
                lost[path] = str(error)
                partly.add(parent_of(path))
        # An object of which only a part can be kept is left as it is: its parts may belong together.
        for path in [path for path in found if parent_of(path) in partly]:
            lost.setdefault(path, _BELONGS)
            del found[path]
        return found | dict.fromkeys(lost, _LEFT) if at == "quiet" else found

    def _late_numbers(self, look: Look) -> set[str]:
        """Where small lists and arrays of numbers are in whose place there was nothing when training began.

        What was drawn for a sample, or for the epoch, is brought back, as a count is that began late. Texts may name files
        of this life.
        """
        found = set()
        for path in self._nones:
            where, _, name = path.rpartition(".")
            value = look.named.get(where, {}).get(name)
            if value is not None and contents.is_content(value) and contents.is_small(value):
                found.update([path] if contents.are_only_numbers(value) else [])
        return found

    def _is_memo(self, path: str, value: Any, look: Look) -> bool:
        """Whether it is a cache of a function or a file, perhaps made only when it was first needed."""
        if not isinstance(value, dict) or not keeps_variables(look.holder_of(path)):
            return False
        if path not in self._first:
            self._caches.watch(path, {})
            self._first[path] = _First(value, 0, _kept({}, [8]))
        return self._caches.find(path, value)

    def _is_object(self, path: str, look: Look) -> bool:
        holder = look.holders[parent_of(path)]
        return not (keeps_variables(holder) or module_of(type(holder)).startswith("lightning."))

    def _is_open(self, path: str, look: Look) -> bool:
        """Whether what is at ``path`` is our business; what functions keep is in nobody's state."""
        return root_of(path) not in self._closed or keeps_variables(look.holder_of(path))

    def _has_changed(self, path: str, value: Any) -> bool:
        first = self._first.get(path)
        return first is None or contents.fingerprint(value, self._share) != first.fingerprint

    def _holding(self, look: Look) -> list[tuple[str, Any]]:
        return [
            (f"{path}.{name}", value)
            for path, named in look.named.items()
            if self._is_open(path, look) and not module_of(type(look.holders[path])).startswith("lightning.")
            for name, value in named.items()
            if type(value) not in SCALARS  # asked for every batch
            and contents.is_content(value)
            and not (self._light and not contents.is_small(value))
        ]


def is_process_id(path: str, value: Any) -> bool:
    """Whether an attribute has the number of this process: it is not the next one's."""
    return type(value) is int and path.lower().endswith("pid") and value == os.getpid()


def _with_places(look: Look) -> Iterator[tuple[str, Any]]:
    for path, named in look.named.items():
        yield from ((f"{path}.{name}", value) for name, value in named.items() if has_place(value))


def _kept(value: Any, left: list[int]) -> Any:
    try:
        return plain_contents.keep(value, left)
    except plain_contents.CannotBeKeptError:
        return None
