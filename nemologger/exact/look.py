"""What is within reach of a dataset or a sampler: objects, and their attributes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from nemologger.exact.crowds import generators_of
from nemologger.exact.reach import Crowd, attributes, has_attributes, is_generator, walk

_SCALARS = (int, float, bool, str, type(None))


class Look:
    """What is within reach at one moment: going there takes most of the time.

    Attributes:
        there: The paths of all objects.
        generators: The generators among them, by path.
        holders: Those with attributes, by path.
    """

    def __init__(self, roots: Mapping[str, Any]) -> None:
        found = list(walk(roots))
        self.crowds = [value for _, value in found if type(value) is Crowd]
        found = [pair for pair in found if type(pair[1]) is not Crowd]
        self.there = {path for path, _ in found}
        self.generators = {path: value for path, value in found if is_generator(value)}
        self.of_crowds = {path: one for crowd in self.crowds for path, one in generators_of(crowd).items()}
        self.generators |= self.of_crowds
        self.holders = {path: value for path, value in found if has_attributes(value)}

    @cached_property
    def named(self) -> dict[str, dict[str, Any]]:
        """The attributes of the holders, by the paths of these."""
        return {path: attributes(holder) for path, holder in self.holders.items()}

    def holder_of(self, path: str) -> Any:
        """The object that has ``path``, or the attribute that has."""
        return self.holders.get(path, self.holders.get(path.rpartition(".")[0]))

    @property
    def scalars(self) -> dict[str, Any]:
        """Numbers and texts, by path."""
        return {
            f"{path}.{name}": value
            for path, named in self.named.items()
            for name, value in named.items()
            if type(value) in _SCALARS
        }
