"""Generators and counters that a dataset or a sampler keeps among its attributes."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch

from nemologger.exact.rng import GENERATORS, generator_state, set_generator_state

_DEEPEST = 5
_MOST_ITEMS = 32
_MOST_OBJECTS = 300
_SCALARS = (int, float, bool, str, type(None))
_CLOSED = (
    *_SCALARS, bytes, torch.Tensor, torch.nn.Module, np.ndarray, np.generic, type, ModuleType, FunctionType,
    BuiltinFunctionType, MethodType, random.SystemRandom,
)  # fmt: skip


@dataclass(frozen=True)
class Values:
    """What was found at one moment, by path: ``"dataset.transform.rng"``."""

    generators: dict[str, Any] = field(default_factory=dict)
    counters: dict[str, Any] = field(default_factory=dict)

    def to_plain(self) -> dict[str, Any]:
        """As plain types."""
        return {"generators": self.generators, "counters": self.counters}

    @staticmethod
    def from_plain(plain: dict[str, Any]) -> Values:
        """What :meth:`to_plain` was made of."""
        return Values(plain["generators"], plain["counters"])


NOTHING = Values()


class Owned:
    """Looks into objects for the state that they carry from batch to batch.

    A counter is a number or a text that has changed since this object was made: an argument of the constructor stays as
    the program gives it today.

    Args:
        roots: The objects, by name.
        counters: Look for counters too.
    """

    def __init__(self, roots: Mapping[str, Any], *, counters: bool = True) -> None:
        self._roots = {name: root for name, root in roots.items() if root is not None}
        self._counters = counters
        self._at_first = self._scalars() if counters else {}

    @property
    def generators(self) -> dict[str, Any]:
        """The generators, by path."""
        return {path: value for path, value in self._walk() if isinstance(value, GENERATORS)}

    def values(self, *, counters: bool = True) -> Values:
        """The state of this moment; looking for counters is what takes time."""
        if not self._roots:
            return Values()
        generators = {path: generator_state(generator) for path, generator in self.generators.items()}
        changed = {}
        if counters and self._counters:
            unknown = object()
            changed = {p: v for p, v in self._scalars().items() if self._at_first.get(p, unknown) != v}
        return Values(generators, changed)

    def restore(self, values: Values, *, exactly: bool = False) -> None:
        """Set what is still there to ``values``; with ``exactly``, counters that are not among them to what they were."""
        if values.generators:
            for path, generator in self.generators.items():
                if path in values.generators:
                    set_generator_state(generator, values.generators[path])
        counters = {**self._at_first, **values.counters} if exactly else values.counters
        if counters and self._counters:
            for holder_path, holder in self._holders():
                for name, value in list(vars(holder).items()):
                    path = f"{holder_path}.{name}"
                    if path in counters and type(value) in _SCALARS and value != counters[path]:
                        setattr(holder, name, counters[path])

    def _scalars(self) -> dict[str, Any]:
        return {
            f"{path}.{name}": value
            for path, holder in self._holders()
            for name, value in vars(holder).items()
            if type(value) in _SCALARS
        }

    def _holders(self) -> list[tuple[str, Any]]:
        return [(p, v) for p, v in self._walk() if hasattr(v, "__dict__") and not isinstance(v, GENERATORS)]

    def _walk(self) -> Iterator[tuple[str, Any]]:
        """Every object within reach, with its path; each once, and not more than a few hundred."""
        seen: set[int] = set()
        waiting = [(name, root, 0) for name, root in self._roots.items()]
        while waiting and len(seen) < _MOST_OBJECTS:
            path, value, depth = waiting.pop(0)
            if isinstance(value, _CLOSED) or id(value) in seen or _belongs_to_lightning(value):
                continue
            seen.add(id(value))
            yield path, value
            if depth < _DEEPEST and not isinstance(value, GENERATORS):
                waiting += [(f"{path}.{name}", item, depth + 1) for name, item in _parts(value)]


def _belongs_to_lightning(value: Any) -> bool:
    # A dataset may hold the trainer or the data module; their state is Lightning's business.
    return any(kind.__module__.startswith("lightning.pytorch.") for kind in type(value).__mro__)


def _parts(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, list | tuple | Mapping):
        if len(value) > _MOST_ITEMS:
            return []
        return [(str(k), v) for k, v in (value.items() if isinstance(value, Mapping) else enumerate(value))]
    return list(vars(value).items()) if hasattr(value, "__dict__") else []
