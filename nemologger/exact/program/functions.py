"""What functions that make learning rates keep from step to step beside the state dictionaries of their schedules.

Those of torch have all attributes of a schedule. Another class may have a ``state_dict()`` that leaves out what it changes,
also of one of torch's within it: these are looked at themselves. torch saves the attributes of a callable object that is
given to ``LambdaLR``. A function that counts its calls does so in a variable of where it was made. Here it is an object with
attributes, as :class:`~nemologger.exact.program.attributes.Attributes` looks at.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import FunctionType, MethodType
from typing import Any

from torch.optim.lr_scheduler import LRScheduler

from nemologger.exact.reach.objects import is_of_the_program
from nemologger.exact.reach.parts import items_of
from nemologger.exact.reach.variables import of_function

_DEEPEST = 3


def holders_of_schedule(path: str, schedule: Any) -> dict[str, object]:
    """``schedule`` and those that it is made of, unless torch saves them, and what their functions keep, by path."""
    return dict(_of_schedule(path, schedule, set()))


def _of_schedule(path: str, schedule: Any, seen: set[int], *, saved: bool = True) -> Iterator[tuple[str, object]]:
    seen.add(id(schedule))  # those that are combined may know by what
    saved = saved and type(schedule).__module__.startswith("torch.")
    if not saved:
        yield path, schedule
    for name, value in getattr(schedule, "__dict__", {}).items():
        for place, item in enumerate(value) if isinstance(value, list | tuple) else [(-1, value)]:
            below = f"{path}.{name}" if place < 0 else f"{path}.{name}.{place}"
            if isinstance(item, LRScheduler):
                if id(item) not in seen:
                    yield from _of_schedule(below, item, seen, saved=saved)
            elif callable(item):
                yield from _holders(below, item, 0)


def functions_of_schedules(path: str, value: Any) -> Iterator[tuple[str, object]]:
    """The same of a schedule that the program steps itself, or of some in a list."""
    if issubclass(type(value), (LRScheduler, list, tuple, dict)):
        for place, item in items_of(path, value):
            if issubclass(type(item), LRScheduler):
                yield from _of_schedule(place, item, set())


def _holders(path: str, function: Any, depth: int) -> Iterator[tuple[str, object]]:
    if isinstance(function, partial):
        yield from _holders(path, function.func, depth)
        yield from [(f"{path}.partial", function)] if vars(of_function(function)) else []
    elif isinstance(function, MethodType) and is_of_the_program(function.__self__):
        yield path, function.__self__
    elif isinstance(function, FunctionType):
        yield path, function
        for name, value in vars(of_function(function)).items() if depth < _DEEPEST else ():
            if isinstance(value, FunctionType | MethodType | partial):
                yield from _holders(f"{path}.{name}", value, depth + 1)
