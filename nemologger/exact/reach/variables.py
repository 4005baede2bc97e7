"""What code keeps from call to call, and no object has: variables of closures, of files and of classes.

A function that counts its calls does so in a variable of where it was made (``nonlocal``), in one of its file (``global``),
or in one of a class. Here each of these places is an object whose attributes are the variables, so that they can be looked
at, kept and set back as attributes are.
"""

from __future__ import annotations

import argparse
from collections import deque
from functools import partial
from types import CellType, FunctionType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from nemologger.exact.reach.code import code_of
from nemologger.exact.reach.kinds import is_generator
from nemologger.exact.reach.views import View
from nemologger.exact.rng import GENERATORS

#: Of nobody's class, and filled by the program.
NAMESPACES = (argparse.Namespace, SimpleNamespace)
#: What changes without its variable being set.
FILLED = (list, dict, set, deque, bytearray, np.ndarray, torch.Tensor)
#: The same, of what is not kept as a variable is.
CHANGES = (*FILLED, *GENERATORS, nn.Module)
_EMPTY = CellType()


class Variables(View):
    """Those of the place where a function was made, and some of its file; what it was given, and its own attributes."""

    __slots__ = ("_cells", "_names", "_there", "function")
    _cells: dict[str, CellType]
    _there: dict[str, Any]
    _names: frozenset[str]
    function: FunctionType | partial[Any] | None

    def __init__(
        self,
        cells: dict[str, CellType],
        there: dict[str, Any],
        names: frozenset[str],
        function: FunctionType | partial[Any] | None = None,
    ) -> None:
        super().__init__(_cells=cells, _there=there, _names=names, function=function)

    def _entries(self) -> dict[str, Any]:
        own = {} if self.function is None else of_call(self.function) | vars(self.function)
        return own | {name: self._there[name] for name in self._names if name in self._there} | _contents(self._cells)

    def _set(self, name: str, value: Any) -> None:
        if name in self._cells:
            self._cells[name].cell_contents = value
        elif name in self._names:
            self._there[name] = value
        elif self.function is not None and not _is_given(self.function, name):  # that is filled where it is
            setattr(self.function, name, value)


class OfClass(View):
    """Those of a class that code sets or fills."""

    __slots__ = ("_kind", "_names")
    _kind: type
    _names: frozenset[str]

    def __init__(self, kind: type, names: frozenset[str]) -> None:
        super().__init__(_kind=kind, _names=names)

    def _entries(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self._kind).items() if name in self._names}

    def _set(self, name: str, value: Any) -> None:
        setattr(self._kind, name, value)


_KEEPERS = (FunctionType, partial, Variables, OfClass)


def of_function(function: FunctionType | partial[Any]) -> Variables:
    """Those that outlive a call: of where ``function`` was made, and global ones that it sets itself."""
    if isinstance(function, partial):
        return Variables({}, {}, frozenset(), function)
    return Variables(_cells_of(function), function.__globals__, code_of(function).sets, function)


def cells_of(function: FunctionType) -> dict[str, Any]:
    """The variables of where ``function`` was made, and what they hold."""
    return _contents(_cells_of(function))


def of_call(function: Any) -> dict[str, Any]:
    """What each call of a function finds again: its variables; lists and generators it was made with, by number or name."""
    if isinstance(function, partial):
        given = [*enumerate(function.args), *function.keywords.items()]
        return {str(name): value for name, value in given if keeps_something(value)}
    if not (function.__defaults__ or function.__kwdefaults__ or function.__closure__):
        return {}
    defaults = [*enumerate(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).items()]
    return {str(name): value for name, value in defaults if keeps_something(value)} | cells_of(function)


def _is_given(function: Any, name: str) -> bool:
    """Whether ``name`` is that of an argument, or its number, and no attribute of ``function``."""
    named = function.keywords if isinstance(function, partial) else function.__kwdefaults__
    return name.isdigit() or name in (named or {})


def keeps_variables(holder: Any) -> bool:
    """Whether it is a function, or one of the places of this file, and no object with attributes."""
    return isinstance(holder, _KEEPERS)


def set_in(holder: Any, name: str, value: Any) -> None:
    """Set an attribute, or a variable of a function."""
    cells = _cells_of(holder) if isinstance(holder, FunctionType) else {}
    if name in cells and name not in vars(holder):
        cells[name].cell_contents = value
        return
    try:
        setattr(holder, name, value)
    except Exception:  # noqa: BLE001  what is frozen changes itself in this way
        object.__setattr__(holder, name, value)


def _cells_of(function: FunctionType) -> dict[str, CellType]:
    if function.__closure__ is None:
        return {}
    cells = zip(function.__code__.co_freevars, function.__closure__, strict=False)
    return {name: cell for name, cell in cells if name != "__class__"}


def _contents(cells: dict[str, CellType]) -> dict[str, Any]:
    return {name: cell.cell_contents for name, cell in cells.items() if cell != _EMPTY}


def keeps_something(value: Any) -> bool:
    """Whether a function that was made with it finds it changed in the next call, without a look into it."""
    return is_filled(value) or is_generator(value)


def is_filled(value: Any) -> bool:
    """Whether it is one of :data:`FILLED`; isinstance() would ask a proxy what it stands for."""
    return issubclass(type(value), FILLED)
