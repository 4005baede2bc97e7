"""What a module and a data module keep among their own attributes: counters, arrays, tensors, generators.

Parameters and buffers are in the checkpoint anyway. What a program changes beside them (``self.count += 1``, a queue, an
annealed weight, a generator of its own) decides about losses as well.

A list or dictionary of a module may be a record of what it did in this life (see
:mod:`nemologger.exact.program.records`); then it is named, and not kept. That of another object is kept, or it begins
anew with what may go with it: a buffer of samples has the place for the next one beside them.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache, partial
from inspect import getattr_static
from types import MemberDescriptorType, SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from nemologger.exact.program.crowds import Crowds
from nemologger.exact.program.flags import Flags, is_gone, is_of_clock
from nemologger.exact.program.generators import make_generators, set_states, states_of
from nemologger.exact.program.holders import Holders, is_in, unsaved_buffers
from nemologger.exact.program.kept import Kept
from nemologger.exact.program.owned import is_process_id
from nemologger.exact.program.records import KINDS as KINDS_OF_RECORDS
from nemologger.exact.program.records import Records
from nemologger.exact.program.uses import Uses
from nemologger.exact.reach import variables
from nemologger.exact.reach.configs import is_config
from nemologger.exact.reach.crowd import Crowd, crowd_of
from nemologger.exact.reach.hooks import HOOKED
from nemologger.exact.reach.kinds import SCALARS
from nemologger.exact.reach.look import Look
from nemologger.exact.reach.objects import is_long, is_of_the_program
from nemologger.exact.reach.optimizers import memory_in_states
from nemologger.exact.reach.parts import generators_of_class, many, with_slots
from nemologger.exact.reach.paths import parent_of
from nemologger.exact.reach.variables import set_in
from nemologger.exact.values import contents, plain_contents
from nemologger.exact.values.tensors import moved

_ABSENT = object()
#: The numbers of so many objects in a list are kept at most.
_MOST_COUNTED = 10_000


class Attributes:
    """The attributes of some objects, as they are now and as they were when this was made.

    Only what has changed in between is kept: what the program gives today stays. Counters and contents are those of classes
    of the program itself, and, of the parts of a module that libraries have made, numbers, arrays and tensors: memory banks
    and queues. To both belong buffers that a module does not want to be saved. What a library changes in other objects is
    its business; their generators go on where they were all the same.

    Args:
        roots: The objects by name.
        generators_only: More of them, of which nothing but generators is looked at.
        no_records: The names of those roots whose lists and dictionaries may be records, which are named, and not kept.
        not_theirs: For each root, the names of attributes that belong to the framework.
        most: Bytes that are kept at most.
        optimizers: Whose hooks are looked into, with those of whichever module or optimizer there is; None for none.

    Attributes:
        records: What is not kept because it is most often a record, and of which type it is.
        set_anew: Numbers that were brought back, and that the hooks that start training have then changed.
    """

    def __init__(
        self,
        roots: Mapping[str, object],
        generators_only: Mapping[str, object],
        no_records: Collection[str],
        not_theirs: frozenset[str],
        most: int,
        optimizers: Sequence[Optimizer] | None = None,
    ) -> None:
        self._roots = roots
        self._holders = Holders(roots, not_theirs, optimizers)
        self._generators_only = generators_only
        self._no_records = tuple(f"{name}." for name in no_records)
        self._not_theirs = not_theirs
        #: Lists and dictionaries that have changed and are not kept: what kind each is.
        self.records: dict[str, str] = {}
        self._records = Records()
        self._most = most
        self._flags = Flags(self._holders.named(), contents=True)
        self._crowds = Crowds(self._long_lists(), _MOST_COUNTED)
        values = dict(self._holders.values())
        # Who keeps hundreds of long lists does not wait longer for them.
        self._share = 1 + sum(isinstance(v, contents.KINDS) and not contents.is_small(v) for v in values.values()) // 4
        self._first = {path: self._sign(value) for path, value in values.items()}
        self._started = self._first
        self._there = self._places()
        self.set_anew: list[str] = []
        self._numbers_back: dict[str, int | float] = {}
        self._waiting: dict[str, Any] = {}
        self._waiting_generators: dict[str, Any] = {}
        self._waiting_in_crowds: dict[str, Any] = {}
        self._late: dict[str, tuple[weakref.ref[Any], Any]] = {}

    def begin(self) -> None:
        """The hooks that start training are done: what the program makes later, it makes again after a resume.

        What it has set or made in them (``self.count = 0``), as in every life, and training had changed, is set once more.
        """
        self._holders.look_for_hooks()
        self._started = {path: self._sign(value) for path, value in self._holders.values()}
        made = {path: sign for path, sign in self._started.items() if parent_of(path) not in self._there}
        self._first = {**made, **self._first}
        back = {path: self._sign(value) for path, value in self._numbers_back.items() if not is_of_clock(value)}
        self.set_anew = [path for path, sign in back.items() if self._started.get(path, sign) != sign]
        self._set(self._waiting)
        self._set_generators(self._waiting_generators)
        self._crowds.begin(self._long_lists(), self._waiting_in_crowds)
        self._waiting, self._waiting_generators, self._waiting_in_crowds = {}, {}, {}
        self._there = self._places()
        self._records.begin(self._lists(), Uses(dict(self._holders.of_program()), self._generators_only.values()))

    def look(self) -> None:
        """For the first steps: how lists and dictionaries change says whether they are records."""
        for path, value in self._lists():
            self._records.has(path, value)

    def _lists(self) -> Iterator[tuple[str, Any]]:
        """Those that may be records."""
        objects = self._objects()
        for path, value in self._holders.values():
            if self._may_be_record(path, value, objects):
                yield path, value

    def _long_lists(self) -> list[Crowd]:
        """Those of a module with more objects than are looked into one by one; what data have is looked at with them."""
        found: list[Crowd | None] = []
        for path, named in self._holders.named():
            for name, value in named.items():
                if path.startswith(self._no_records) or f"{path}." in self._no_records:
                    found += [crowd_of(f"{path}.{name}", *many(value))] if is_long(value) else []
        return [crowd for crowd in found if crowd is not None and is_of_the_program(crowd.items[0])]

    def _may_be_record(self, path: str, value: Any, objects: set[str]) -> bool:
        theirs = path.startswith(self._no_records) or ":" in path or HOOKED in path
        return theirs and isinstance(value, KINDS_OF_RECORDS) and parent_of(path) not in objects

    def _objects(self) -> set[str]:
        """The places of objects that are no modules."""
        return {path for path, holder in self._holders.of_program() if path not in self._roots and _is_whole(holder)}

    def _places(self) -> set[str]:
        return set(self._holders.all())

    def at_rest(self) -> AbstractContextManager[None]:
        """While it lasts no object comes or goes: see :meth:`Holders.at_rest`."""
        return self._holders.at_rest()

    def to_plain(self) -> tuple[dict[str, Any], dict[str, str]]:
        """What has changed, as plain types, and why the rest of it is not kept."""
        kept = Kept(self._most)
        since_start: list[str] = []
        late: dict[str, Any] = {}
        lists_lost: dict[str, Any] = {}
        objects = self._objects()
        optimizers = [root for root in self._roots.values() if isinstance(root, Optimizer)]
        in_states = cache(partial(memory_in_states, optimizers))  # a state_dict() may take time
        for may_be_record, path, value, sign in self._changed_in_order(objects):
            holder, made = parent_of(path), self._started.get(path, _ABSENT) == sign
            if holder not in self._there:
                late[path] = value
            elif is_in(in_states, value):
                continue  # in the place of another the optimizer would no longer know it
            elif may_be_record and self._records.has(path, value):
                kept.leave_to_this_life(path, value)
            elif self._keep(kept, path, value, may_be_record=may_be_record, made=made):
                since_start += [] if made or is_of_clock(value) else [path]
            elif not made and holder in objects and isinstance(value, KINDS_OF_RECORDS):
                lists_lost[path] = value
        kept.leave(self._flags.leave(kept.plain, self._holders.named(), [*kept.lost, *kept.records]))
        kept.leave_parts_of(self._wholes())
        kept.leave_beside(lists_lost)
        self.records = kept.records
        in_crowds, crowds_lost = self._crowds.changed(self._long_lists())
        plain = {"attributes": kept.plain, "on_device": kept.on_device, "since_start": since_start}
        plain |= {"in_crowds": in_crowds, "generators": self._states_of_generators()}
        return plain, kept.lost | crowds_lost | self._lost_of_late(late)

    def _changed_in_order(self, objects: set[str]) -> list[tuple[bool, str, Any, Any]]:
        """What may be a record comes last: a cache would take all the room."""
        changed = [
            (self._may_be_record(path, value, objects), path, value, sign)
            for path, value, sign in self._changed()
            if not is_process_id(path, value)
        ]
        return sorted(changed, key=lambda one: one[0])

    def _keep(self, kept: Kept, path: str, value: Any, *, may_be_record: bool, made: bool) -> bool:
        """Keep ``value``, or note that it is not kept, unless the hooks that start training have ``made`` it as it is."""
        try:
            kept.add(path, value, filled=type(self._first.get(path)) is int)  # a fingerprint
        except plain_contents.CannotBeKeptError as error:
            if made:
                return False
            if may_be_record and not self._records.decides(path, value):
                kept.leave_to_this_life(path, value)
            elif not (HOOKED in path and isinstance(value, torch.Tensor)):  # a hook keeps what it sees of a step
                kept.lost[path] = str(error)
            return False
        return True

    def _wholes(self) -> set[str]:
        """Where a bank without its pointer, or the other way round, would be worse than both as the program makes them."""
        with_buffers = {path for path, part in self._holders.of_program() if unsaved_buffers(part)}
        return with_buffers.union(path for path, _ in self._holders.of_libraries())

    def _states_of_generators(self) -> dict[str, Any]:
        states: dict[str, Any] = {}
        for look in self._generators():
            states |= states_of(look)
        return states

    def _lost_of_late(self, values: Mapping[str, Any]) -> dict[str, str]:
        """What is lost with objects made after training began: those that have changed since they were first seen."""
        holders = self._holders.all() if values else {}
        lost: dict[str, str] = {}
        for path, value in values.items():
            where, sign = parent_of(path), self._sign(value)
            if where not in holders:  # of an option of the command line
                lost[path] = "has a name with a dot in it"
                continue
            holder, (seen, before) = holders[where], self._late.get(path, (None, sign))
            if seen is not None and seen() is holder and before != sign:
                lost[where] = "was made after training began"
            if hasattr(type(holder), "__weakref__"):
                self._late[path] = weakref.ref(holder), sign
        return lost

    def changed(self) -> list[str]:
        """The paths of what has changed."""
        return [path for path, _, _ in self._changed()]

    def _changed(self) -> Iterator[tuple[str, Any, Any]]:
        for path, value in self._holders.values():
            sign = self._sign(value)
            if self._first.get(path, _ABSENT) != sign or self._started.get(path, _ABSENT) != sign:
                yield path, value, sign

    def restore(self, plain: Mapping[str, Any], device: torch.device) -> None:
        """Set what has changed to what :meth:`to_plain` returned; what was on a GPU goes to ``device``.

        What belongs to objects that are not there yet, what training has changed since it started, and generators, also
        those that are made anew until then, :meth:`begin` sets.
        """
        self._flags.note_restored(plain["attributes"])
        self._records.go_on_with(plain["attributes"])
        values = {path: plain_contents.unkept(saved) for path, saved in plain["attributes"].items()}
        there = plain["on_device"]  # a list as it was written before: all of each
        there = there if isinstance(there, dict) else dict.fromkeys(there, range(2**32))
        values |= {path: moved(values[path], device, which) for path, which in there.items() if path in values}
        # Copies: hooks that start training may empty what is set now.
        late = plain_contents.copied({path: values[path] for path in plain.get("since_start", ()) if path in values})
        self._waiting = self._set(values) | late
        self._waiting_in_crowds = plain.get("in_crowds", {})
        self._crowds.restore(self._long_lists(), self._waiting_in_crowds, exactly=False)
        numbers = {path: value for path, value in values.items() if type(value) in (int, float)}
        self._numbers_back = {path: value for path, value in numbers.items() if path not in self._waiting}
        self._waiting_generators = plain["generators"]
        self._set_generators(plain["generators"])
        make_generators(self.holders(), plain["generators"], device)

    def _set_generators(self, states: Mapping[str, Any]) -> None:
        for look in self._generators() if states else ():
            set_states(look, states)

    def _set(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Set attributes by path; returns those whose object is not there."""
        holders = self._holders.all() if values else {}
        for path, value in values.items():
            where, _, name = path.rpartition(".")
            if where not in holders or not _is_plain(holders[where], name) or is_gone(value):
                continue
            present = unsaved_buffers(holders[where]).get(name, with_slots(holders[where]).get(name))
            if _are_of_two_kinds(present, value):  # the program is another one today
                continue
            back = plain_contents.fill(present, value, same=True)
            if back is not present:
                set_in(holders[where], name, back)
        return {path: value for path, value in values.items() if parent_of(path) not in holders}

    def _sign(self, value: Any) -> Any:
        return (type(value), value) if type(value) in SCALARS else contents.fingerprint(value, self._share)

    def holders(self) -> dict[str, Any]:
        """The objects that may have generators, or objects with a state of their own, among their attributes, by path."""
        return {**self._holders.with_generators(), **self._generators_only}

    def _generators(self) -> Iterator[Look]:
        """The generators of each of the objects, and what is within reach of its other attributes."""
        for path, holder in self.holders().items():
            theirs = {
                k: v
                for k, v in with_slots(holder).items()
                if k not in self._not_theirs and not (issubclass(type(v), SCALARS) or is_config(v))
            }
            theirs |= generators_of_class(holder)
            if theirs:
                yield Look({path: SimpleNamespace(**theirs)})


def _are_of_two_kinds(present: Any, value: Any) -> bool:
    """Whether one is a list and the other a dictionary, say."""
    kinds = [{kind for kind in KINDS_OF_RECORDS if isinstance(one, kind)} for one in (present, value)]
    return all(kinds) and kinds[0] != kinds[1]


def _is_whole(holder: Any) -> bool:
    """Whether its attributes belong together: a list of samples, and the number that says where the next one goes."""
    return not (isinstance(holder, (nn.Module, *variables.NAMESPACES)) or variables.keeps_variables(holder))


def _is_plain(holder: Any, name: str) -> bool:
    """Whether the attribute is one to set: there as plain data, or not at all, and no other part of a module."""
    if name in unsaved_buffers(holder):
        return True
    own = with_slots(holder)
    if any(name in (own.get(parts) or {}) for parts in ("_parameters", "_buffers", "_modules")):
        return False
    present = own.get(name, getattr_static(type(holder), name, None))
    return type(present) in (*SCALARS, MemberDescriptorType) or contents.is_content(present)
