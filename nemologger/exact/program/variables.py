"""What code keeps from call to call, and no object has: variables of closures, of files and of classes.

A function that counts its calls does so in a variable of where it was made (``nonlocal``), in one of its file (``global``),
or in one of a class. Here each of these places is an object whose attributes are the variables, so that they can be looked
at, kept and set back as attributes are. Which variables of files and classes those are is read from the code itself, and
from that of the functions and classes that it names, as far as they are the program's own.
"""

from __future__ import annotations

import argparse
import dis
import sys
import sysconfig
from collections import deque
from collections.abc import Iterable, Iterator
from functools import cached_property, lru_cache, partial
from inspect import getattr_static
from pathlib import Path
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch

#: Of nobody's class, and filled by the program.
NAMESPACES = (argparse.Namespace, SimpleNamespace)
_INSTALLED = tuple({sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib", "platstdlib")})
#: Of a user, of an environment below this one, of Debian.
_PACKAGES = {"site-packages", "dist-packages"}
_EMPTY = CellType()
_MOST_FUNCTIONS = 1000
_CACHED = type(lru_cache(len))
_CLOSED = (ModuleType, BuiltinFunctionType)
_SCALARS = (int, float, bool, str, type(None))
#: What changes without its variable being set.
_FILLED = (list, dict, set, deque, bytearray, np.ndarray, torch.Tensor)


def is_of_the_program(module: str) -> bool:
    """Whether the file of ``module`` is the program's, and no library's."""
    file = getattr(sys.modules.get(module), "__file__", None)
    installed = file is None or file.startswith(_INSTALLED) or not _PACKAGES.isdisjoint(Path(file).parts)
    return module == "__main__" or not installed


# --- places -----------------------------------------------------------------------------------------------------------


class Variables:
    """Those of the place where a function was made, and some of its file."""

    __slots__ = ("_cells", "_names", "_there")
    _cells: dict[str, CellType]
    _there: dict[str, Any]
    _names: frozenset[str]

    def __init__(self, cells: dict[str, CellType], there: dict[str, Any], names: frozenset[str]) -> None:
        object.__setattr__(self, "_cells", cells)
        object.__setattr__(self, "_there", there)
        object.__setattr__(self, "_names", names)

    @property
    def __dict__(self) -> dict[str, Any]:  # type: ignore[override]  # vars() of it are the variables
        cells = {name: cell.cell_contents for name, cell in self._cells.items() if cell != _EMPTY}
        return {name: self._there[name] for name in self._names if name in self._there} | cells

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._cells:
            self._cells[name].cell_contents = value
        elif name in self._names:
            self._there[name] = value


class OfClass:
    """Those of a class that code sets or fills."""

    __slots__ = ("_kind", "_names")
    _kind: type
    _names: frozenset[str]

    def __init__(self, kind: type, names: frozenset[str]) -> None:
        object.__setattr__(self, "_kind", kind)
        object.__setattr__(self, "_names", names)

    @property
    def __dict__(self) -> dict[str, Any]:  # type: ignore[override]
        return {name: value for name, value in vars(self._kind).items() if name in self._names}

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._kind, name, value)


class Entries:
    """Those of a dictionary whose entries are used as attributes are: hyperparameters, ``self.hparams.alpha *= 0.9``."""

    __slots__ = ("_there",)
    _there: dict[str, Any]

    def __init__(self, there: dict[str, Any]) -> None:
        object.__setattr__(self, "_there", there)

    @property
    def __dict__(self) -> dict[str, Any]:  # type: ignore[override]
        return {name: value for name, value in self._there.items() if type(name) is str}

    def __setattr__(self, name: str, value: Any) -> None:
        self._there[name] = value


_KEEPERS = (FunctionType, partial, Variables, OfClass)


def of_function(function: FunctionType) -> Variables:
    """Those that outlive a call: of where ``function`` was made, and global ones that it sets itself."""
    return Variables(_cells_of(function), function.__globals__, _code_of(function).sets)


def cells_of(function: FunctionType) -> dict[str, Any]:
    """The variables of where ``function`` was made, and what they hold."""
    return {name: cell.cell_contents for name, cell in _cells_of(function).items() if cell != _EMPTY}


def of_call(function: Any) -> dict[str, Any]:
    """What each call of a function finds again: its variables; lists and the like among its arguments, by number or name."""
    if isinstance(function, partial):
        given = [*enumerate(function.args), *function.keywords.items()]
        return {str(name): value for name, value in given if _is_filled(value)}
    if not (function.__defaults__ or function.__kwdefaults__ or function.__closure__):
        return {}
    defaults = [*enumerate(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).items()]
    return {str(name): value for name, value in defaults if _is_filled(value)} | cells_of(function)


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


# --- code -------------------------------------------------------------------------------------------------------------


class _Code(NamedTuple):
    """What a function, with those within it, has to do with.

    Attributes:
        sets: Global variables that it sets.
        fills: Names of attributes that it sets, of whatever.
        variables: Other global variables that it names: of which file, and which.
        functions: Functions of the program that it names.
        kinds: Classes of the program that it names.
    """

    sets: frozenset[str]
    fills: frozenset[str]
    variables: tuple[tuple[dict[str, Any], str], ...] = ()
    functions: tuple[FunctionType, ...] = ()
    kinds: tuple[type, ...] = ()


_NOTHING = _Code(frozenset(), frozenset())
_codes: WeakKeyDictionary[FunctionType, _Code] = WeakKeyDictionary()
_functions: WeakKeyDictionary[type, tuple[tuple[FunctionType, _Code], ...]] = WeakKeyDictionary()


class Reached:
    """Collects what the code of functions and classes of the program names, and what they name in turn.

    Args:
        without: Not the methods of such classes, nor functions of such a name.
    """

    def __init__(self, *without: type | str) -> None:
        self._not_of = tuple(one for one in without if isinstance(one, type))
        self._not_named = {one for one in without if isinstance(one, str)}
        self._seen: set[int] = set()
        self._waiting: list[tuple[FunctionType, _Code]] = []
        self._kinds: list[type] = []
        self._fills: set[str] = set()
        self._files: dict[str, tuple[dict[str, Any], set[str]]] = {}

    def add(self, function: FunctionType) -> None:
        """Take ``function`` into account."""
        if id(function) not in self._seen:
            self._add([(function, _code_of(function))])

    def _add(self, functions: Iterable[tuple[FunctionType, _Code]]) -> None:
        for function, code in functions:
            if id(function) in self._seen or function.__name__ in self._not_named or len(self._seen) >= _MOST_FUNCTIONS:
                continue
            self._seen.add(id(function))
            self._waiting.append((function, code))

    def add_class(self, kind: type) -> None:
        """Take the methods of ``kind`` into account."""
        if id(kind) in self._seen or issubclass(kind, self._not_of):
            return
        self._seen.add(id(kind))
        try:
            functions = _codes_of_class(kind)
        except Exception:  # noqa: BLE001  a class without a hash, or one that raises for what is in it
            return
        self._kinds.append(kind)
        self._add(functions)

    def follow(self) -> Iterator[tuple[str, Any]]:
        """What may be looked into, by path: global variables that are set by nobody, and functions that keep something."""
        for function, code in self._waiting:
            if function.__closure__ or function.__defaults__ or function.__kwdefaults__ or function.__dict__:
                yield f"{function.__module__}:{function.__qualname__}", function
            if code is _NOTHING:
                continue
            there = function.__globals__
            self._fills |= code.fills
            self._note(there, code.sets)
            for other in code.functions:
                self.add(other)
            for kind in code.kinds:
                self.add_class(kind)
            for space, name in code.variables:
                value = space.get(name)
                if _is_filled(value) or (space is not there and name in code.fills):
                    self._note(space, {name})
                elif type(value) not in _SCALARS:
                    yield f"{space.get('__name__')}:{name}", value
        self._waiting.clear()

    def places(self) -> Iterator[tuple[str, Any]]:
        """The variables of files and classes, by path."""
        for module, (there, names) in self._files.items():
            yield f"{module}:globals", Variables({}, there, frozenset(names))
        for kind in self._kinds:
            names = {
                name
                for name, value in vars(kind).items()
                if (name in self._fills or (type(value) is not FunctionType and issubclass(type(value), _FILLED)))
                and not name.startswith("__")
            }
            if names:
                yield f"{_module_of(kind)}:{kind.__qualname__}", OfClass(kind, frozenset(names))

    def _note(self, there: dict[str, Any], names: frozenset[str] | set[str]) -> None:
        if names:
            self._files.setdefault(str(there.get("__name__")), (there, set()))[1].update(names)


def _module_of(kind: type) -> str:
    name = getattr_static(kind, "__module__", None)
    return name if isinstance(name, str) else ""


def _is_filled(value: Any) -> bool:
    return issubclass(type(value), _FILLED)  # isinstance() would ask a proxy what it stands for


def functions_of(kind: type) -> tuple[FunctionType, ...]:
    """Those that are methods of a class itself."""
    return tuple(function for function, _ in _codes_of_class(kind))


def _codes_of_class(kind: type) -> tuple[tuple[FunctionType, _Code], ...]:
    known = _functions.get(kind)
    if known is None:
        functions = filter(None, map(_function_behind, vars(kind).values()))
        known = _functions[kind] = tuple((function, _code_of(function)) for function in functions)
    return known


def functions_within(function: FunctionType) -> tuple[FunctionType, ...]:
    """Those of the program that the code of ``function`` names, or that it was made with, as a decorator does."""
    made_with = (value for value in cells_of(function).values() if type(value) is FunctionType)
    return tuple(one for one in (*_code_of(function).functions, *made_with) if _is_of_program(one))


def _function_behind(value: Any) -> FunctionType | None:
    """The function that a function, a method, a property or a cache is; None for anything else."""
    kind = type(value)
    if kind in (staticmethod, classmethod):
        value = value.__func__
    elif kind is property:
        value = value.fget
    elif kind is cached_property:
        value = value.func
    if type(value) is _CACHED:
        value = value.__wrapped__
    return value if type(value) is FunctionType else None


@lru_cache(maxsize=1024)
def names_in(code: CodeType) -> tuple[str, ...]:
    """Of attributes and global variables, also in functions within."""
    inner = [names_in(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return tuple(sorted(frozenset(code.co_names).union(*inner)))


def _is_of_program(function: FunctionType) -> bool:
    return is_of_the_program(str(function.__globals__.get("__name__")))


def _code_of(function: FunctionType) -> _Code:
    code = _codes.get(function)
    if code is None:
        code = _NOTHING
        if _is_of_program(function):
            sets, fills, names = _read(function.__code__)
            code = _named(_Code(frozenset(sets), frozenset(fills)), function.__globals__, names)
            code = code if any(code) else _NOTHING
        _codes[function] = code
    return code


def _read(code: CodeType) -> tuple[set[str], set[str], set[str]]:
    """The global variables, and the attributes, that ``code`` sets, and all names in it."""
    sets, fills, names = set(), set(), set(code.co_names)
    for instruction in dis.get_instructions(code):
        if instruction.opname == "STORE_GLOBAL":
            sets.add(instruction.argval)
        elif instruction.opname == "STORE_ATTR":
            fills.add(instruction.argval)
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            for all_, more in zip((sets, fills, names), _read(inner), strict=True):
                all_ |= more
    return sets, fills, names


def _named(code: _Code, there: dict[str, Any], names: set[str]) -> _Code:
    spaces = [there]
    for value in (there[name] for name in names if name in there):
        if type(value) is ModuleType and is_of_the_program(value.__name__):
            spaces.append(vars(value))
    variables, functions, kinds = [], [], []
    for space in spaces:
        for name in sorted(names.intersection(space)):
            value = space[name]
            function = _function_behind(value)
            if function is not None:
                functions.append(function)
            elif issubclass(type(value), type):
                kinds += [value] * is_of_the_program(_module_of(value))
            elif not issubclass(type(value), _CLOSED):
                variables.append((space, name))
    return code._replace(variables=tuple(variables), functions=tuple(functions), kinds=tuple(kinds))
