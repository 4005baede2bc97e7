"""What is within reach of a dataset or a sampler: objects, and their attributes."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from nemologger.exact.reach.crowd import Crowd, generators_of
from nemologger.exact.reach.kinds import SCALARS, has_attributes, is_generator
from nemologger.exact.reach.parts import attributes
from nemologger.exact.reach.paths import parent_of
from nemologger.exact.reach.walk import walk


class Look:
    """What is within reach at one moment: going there takes most of the time.

    Attributes:
        there: The paths of all objects.
        generators: The generators among them, by path.
        holders: Those with attributes, by path.
    """

    def __init__(self, roots: Mapping[str, Any]) -> None:
        self.crowds: list[Crowd] = []
        self.there: set[str] = set()
        self.generators: dict[str, Any] = {}
        self.holders: dict[str, Any] = {}
        for path, value in walk(roots):
            if type(value) is Crowd:
                self.crowds.append(value)
                continue
            self.there.add(path)
            if is_generator(value):
                self.generators[path] = value
            elif has_attributes(value):
                self.holders[path] = value
        self.of_crowds = {path: one for crowd in self.crowds for path, one in generators_of(crowd).items()}
        self.generators |= self.of_crowds

    @cached_property
    def named(self) -> dict[str, dict[str, Any]]:
        """The attributes of the holders, by the paths of these."""
        return {path: attributes(holder) for path, holder in self.holders.items()}

    @cached_property
    def with_threads(self) -> set[str]:
        """Where objects are that have a running thread of their own: what they keep is shared with that."""
        mine = {id(threading.main_thread()), id(threading.current_thread())}
        running = {id(thread) for thread in threading.enumerate()} - mine
        if not running:
            return set()
        return {path for path, named in self.named.items() if not running.isdisjoint(map(id, named.values()))}

    def holder_of(self, path: str) -> Any:
        """The object that has ``path``, or the attribute that has."""
        return self.holders.get(path, self.holders.get(parent_of(path)))

    @property
    def scalars(self) -> dict[str, Any]:
        """Numbers and texts, by path."""
        return {
            f"{path}.{name}": value
            for path, named in self.named.items()
            for name, value in named.items()
            if type(value) in SCALARS
        }
