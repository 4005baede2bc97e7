"""Which objects are the program's own, and where they are."""

from __future__ import annotations

import weakref
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, Sampler

from nemologger.exact.reach import variables
from nemologger.exact.reach.code import is_class_of_the_program
from nemologger.exact.reach.configs import Config, is_config
from nemologger.exact.reach.kinds import has_slots, is_ordinary, module_of
from nemologger.exact.reach.optimizers import OfOptimizer
from nemologger.exact.reach.parts import entries

#: What is found most often in a list, and has nothing within.
_PLAIN = (int, float, bool, str, type(None), torch.Tensor, nn.Parameter)
_MANY = 1000
#: Asked thousands of times for a list of objects.
_of_the_program: weakref.WeakKeyDictionary[type, bool] = weakref.WeakKeyDictionary()


def within(path: str, value: Any) -> list[tuple[str, Any]]:
    """Where to look for variables: in an object, a function, or some of them."""
    if type(value) in (list, tuple, dict) and not is_long(value):
        items = [(name, item) for name, item in entries(value) if type(item) not in _PLAIN]
        return [pair for name, item in items for pair in _behind(f"{path}.{name}", item)]
    return _behind(path, value)


def is_long(value: Any) -> bool:
    """Whether it is a list or the like of more than are looked into one by one."""
    return type(value) in (list, tuple, dict) and len(value) > _MANY


def _behind(path: str, value: Any) -> list[tuple[str, Any]]:
    kind = type(value)
    if kind is MethodType:
        return _behind(f"{path}.__self__", value.__self__)
    if issubclass(kind, partial):
        given = [("func", value.func), *enumerate(value.args), *value.keywords.items()]
        itself = [(path, value)] if any(variables.keeps_something(item) for _, item in given) else []
        return itself + [pair for name, item in given for pair in _behind(f"{path}.{name}", item)]
    is_one = kind is FunctionType or is_config(value) or (is_of_the_program(value) and _has_attributes(value))
    return [(path, value)] if is_one else []


def holder_of(value: Any) -> Any:
    """What to look at in the place of ``value``, as an object whose attributes are what is to be kept."""
    if isinstance(value, FunctionType | partial):
        return variables.of_function(value)
    if issubclass(type(value), Optimizer):
        return OfOptimizer(value)
    return Config(value) if is_config(value) else value


def _has_attributes(value: Any) -> bool:
    try:
        return has_slots(type(value)) or vars(value) is not None
    except Exception:  # noqa: BLE001  a proxy may even raise for them
        return False


def is_of_the_program(value: Any) -> bool:
    """Whether to look into ``value``: an object of a class that is no library's, or a plain namespace."""
    kind = type(value)
    if not is_ordinary(kind):
        return False
    if kind not in _of_the_program:
        _of_the_program[kind] = _is_written_here(kind)
    return _of_the_program[kind]


def _is_written_here(kind: type) -> bool:
    if issubclass(kind, type | Dataset | Sampler | DataLoader | torch.Tensor) or not (
        kind.__dictoffset__ or has_slots(kind)
    ):
        return False
    if any(module_of(base).startswith("lightning.pytorch.") for base in kind.__mro__):
        return False
    # Those of torch are nothing but the numbers that they are made of, and a program may set these.
    plain = issubclass(kind, (*variables.NAMESPACES, torch.distributions.Distribution))
    return plain or is_class_of_the_program(kind)
