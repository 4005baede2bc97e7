"""What code mentions: functions, variables of files and classes; and what is mentioned there in turn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import FunctionType
from typing import Any

from nemologger.exact.reach.code import (
    NOTHING,
    Code,
    code_of,
    codes_of_class,
    is_function_of_the_program,
    static_module_of,
)
from nemologger.exact.reach.kinds import SCALARS, has_place, is_generator
from nemologger.exact.reach.variables import CHANGES, FILLED, OfClass, Variables, cells_of, is_filled
from nemologger.exact.rng import GENERATORS

_MOST_FUNCTIONS = 1000
_PLAIN = (*SCALARS, FunctionType)
_KEPT = (*FILLED, *GENERATORS)


class Mentioned:
    """Collects what the code of functions and classes of the program names, and what they name in turn.

    Args:
        without: Not the methods of such classes, nor functions of such a name.
    """

    def __init__(self, *without: type | str) -> None:
        self._not_of = tuple(one for one in without if isinstance(one, type))
        self._not_named = {one for one in without if isinstance(one, str)}
        self._seen: set[int] = set()
        self._waiting: list[tuple[FunctionType, Code]] = []
        self._kinds: list[type] = []
        self._fills: set[str] = set()
        self._files: dict[str, tuple[dict[str, Any], set[str]]] = {}

    def add(self, function: FunctionType) -> None:
        """Take ``function`` into account."""
        if id(function) not in self._seen:
            self._add([(function, code_of(function))])

    def _add(self, functions: Iterable[tuple[FunctionType, Code]]) -> None:
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
            functions = codes_of_class(kind)
        except Exception:  # noqa: BLE001  a class without a hash, or one that raises for what is in it
            return
        self._kinds.append(kind)
        self._add(functions)

    def follow(self) -> Iterator[tuple[str, Any]]:
        """What may be looked into, by path: global variables, and those of classes; and functions that keep something."""
        for function, code in self._waiting:
            if _keeps_something(function, code):
                yield f"{function.__module__}:{function.__qualname__}", function
            if code is NOTHING:
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
                if issubclass(type(value), CHANGES) or has_place(value) or (space is not there and name in code.fills):
                    self._note(space, {name})
                if type(value) in (list, dict) or not (is_filled(value) or type(value) in SCALARS):
                    yield f"{space.get('__name__')}:{name}", value
        self._waiting.clear()
        yield from self._of_classes()

    def _of_classes(self) -> Iterator[tuple[str, Any]]:
        """Generators, and objects that code sets as attributes: a class may keep the only one of its kind. Each once."""
        for kind in self._kinds:
            for name, value in vars(kind).items():
                if name.startswith("__") or type(value) in _PLAIN:
                    continue
                wanted = is_generator(value) or (name in self._fills and not is_filled(value))
                if wanted and id(value) not in self._seen:
                    self._seen.add(id(value))
                    yield f"{static_module_of(kind)}:{kind.__qualname__}.{name}", value

    def places(self) -> Iterator[tuple[str, Any]]:
        """The variables of files and classes, by path."""
        for module, (there, names) in self._files.items():
            yield f"{module}:globals", Variables({}, there, frozenset(names))
        for kind in self._kinds:
            names = {
                name
                for name, value in vars(kind).items()
                if not name.startswith("__") and (name in self._fills or issubclass(type(value), _KEPT))
            }
            if names:
                yield f"{static_module_of(kind)}:{kind.__qualname__}", OfClass(kind, frozenset(names))

    def _note(self, there: dict[str, Any], names: frozenset[str] | set[str]) -> None:
        if names:
            self._files.setdefault(str(there.get("__name__")), (there, set()))[1].update(names)


def _keeps_something(function: FunctionType, code: Code) -> bool:
    """Whether calls of ``function`` may find what earlier ones have left: in attributes of its own that they set, say."""
    if function.__closure__ or function.__defaults__ or function.__kwdefaults__ or function.__dict__:
        return True
    return bool(code.fills) and function in code.functions


def functions_within(function: FunctionType) -> tuple[FunctionType, ...]:
    """Those of the program that the code of ``function`` names, or that it was made with, as a decorator does."""
    made_with = (value for value in cells_of(function).values() if type(value) is FunctionType)
    return tuple(one for one in (*code_of(function).functions, *made_with) if is_function_of_the_program(one))
