"""What functions that make learning rates, and optimizers, keep from step to step beside their state dictionaries.

torch saves the attributes of a callable object that is given to ``LambdaLR``, and of an optimizer ``state`` and
``param_groups``. A function that counts its calls does so in a variable of where it was made, an optimizer of the program
perhaps in an attribute. Here they are objects with attributes, as
:class:`~nemologger.exact.program.attributes.Attributes` looks at.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from nemologger.exact.reach.objects import is_of_the_program
from nemologger.exact.reach.variables import of_function
from nemologger.exact.reach.views import View

_DEEPEST = 3
_NUMBERS = (int, float, bool, np.ndarray, np.generic, torch.Tensor)
#: Set by torch itself, some of them when there is a schedule.
_OF_TORCH = {*vars(Optimizer([nn.Parameter(torch.zeros(1))], {})), "_opt_called", "_step_count"}


class Counters(View):
    """The numbers, arrays and tensors of an optimizer that are not torch's."""

    __slots__ = ("_optimizer",)
    _optimizer: Optimizer

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(_optimizer=optimizer)

    def _entries(self) -> dict[str, Any]:
        own = vars(self._optimizer).items()
        return {name: value for name, value in own if name not in _OF_TORCH and isinstance(value, _NUMBERS)}

    def _set(self, name: str, value: Any) -> None:
        setattr(self._optimizer, name, value)


def holders_of_schedule(path: str, schedule: Any) -> dict[str, object]:
    """What the functions of ``schedule``, and of those that it is made of, keep: by path below that of ``schedule``."""
    return dict(_of_schedule(path, schedule, set()))


def _of_schedule(path: str, schedule: Any, seen: set[int]) -> Iterator[tuple[str, object]]:
    seen.add(id(schedule))  # those that are combined may know by what
    for name, value in getattr(schedule, "__dict__", {}).items():
        for place, item in enumerate(value) if isinstance(value, list | tuple) else [(-1, value)]:
            below = f"{path}.{name}" if place < 0 else f"{path}.{name}.{place}"
            if isinstance(item, LRScheduler):
                if id(item) not in seen:
                    yield from _of_schedule(below, item, seen)
            elif callable(item):
                yield from _holders(below, item, 0)


def holders_of_optimizer(path: str, optimizer: Optimizer) -> dict[str, object]:
    """What ``optimizer`` keeps beside its state, if it is of a class of the program that does not save it itself."""
    plain = type(optimizer).state_dict is Optimizer.state_dict
    return {path: Counters(optimizer)} if plain and is_of_the_program(optimizer) else {}


def _holders(path: str, function: Any, depth: int) -> Iterator[tuple[str, object]]:
    if isinstance(function, partial):
        yield from _holders(path, function.func, depth)
    elif isinstance(function, MethodType) and is_of_the_program(function.__self__):
        yield path, function.__self__
    elif isinstance(function, FunctionType):
        yield path, function
        for name, value in vars(of_function(function)).items() if depth < _DEEPEST else ():
            if isinstance(value, FunctionType | MethodType | partial):
                yield from _holders(f"{path}.{name}", value, depth + 1)
