"""What the code of a program sets, fills and names, read from the code itself."""

from __future__ import annotations

import dis
import sys
import sysconfig
from functools import cached_property, lru_cache
from inspect import getattr_static
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

_INSTALLED = tuple({sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib", "platstdlib")})
#: Of a user, of an environment below this one, of Debian.
_PACKAGES = {"site-packages", "dist-packages"}
_CACHED = type(lru_cache(len))
_CLOSED = (ModuleType, BuiltinFunctionType)


def is_module_of_the_program(module: str) -> bool:
    """Whether the file of ``module`` is the program's, and no library's."""
    found = sys.modules.get(module)
    # A directory without __init__.py is a package, too.
    file = getattr(found, "__file__", None) or next(iter(getattr(found, "__path__", ())), None)
    installed = file is None or file.startswith(_INSTALLED) or not _PACKAGES.isdisjoint(Path(file).parts)
    return module == "__main__" or not installed


def is_class_of_the_program(kind: type) -> bool:
    """Whether it was written in a file of the program, or in code without one.

    What bindings make of C++ belongs to no module that is imported, either, and has no functions of python.
    """
    module = static_module_of(kind)
    if _is_imported(module):
        return is_module_of_the_program(module)
    return any(type(value) is FunctionType for value in vars(kind).values())


def _is_imported(module: str) -> bool:
    """A program may run code that belongs to no such module: a configuration in Python, a file given by its path."""
    return module.partition(".")[0] in sys.modules


class Code(NamedTuple):
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


NOTHING = Code(frozenset(), frozenset())
_codes: WeakKeyDictionary[FunctionType, Code] = WeakKeyDictionary()
_functions: WeakKeyDictionary[type, tuple[tuple[FunctionType, Code], ...]] = WeakKeyDictionary()


def static_module_of(kind: type) -> str:
    """The name of its module, which its metaclass is not asked for; "" if it has none."""
    name = getattr_static(kind, "__module__", None)
    return name if isinstance(name, str) else ""


def functions_of(kind: type) -> tuple[FunctionType, ...]:
    """Those that are methods of a class itself."""
    return tuple(function for function, _ in codes_of_class(kind))


def codes_of_class(kind: type) -> tuple[tuple[FunctionType, Code], ...]:
    """The methods of a class itself, and what each has to do with."""
    known = _functions.get(kind)
    if known is None:
        functions = filter(None, map(_function_behind, vars(kind).values()))
        known = _functions[kind] = tuple((function, code_of(function)) for function in functions)
    return known


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


def is_function_of_the_program(function: FunctionType) -> bool:
    """Whether it was written in a file of the program, or in code without one."""
    module = str(function.__globals__.get("__name__"))
    return is_module_of_the_program(module) or not _is_imported(module)


def code_of(function: FunctionType) -> Code:
    """What ``function`` has to do with; :data:`NOTHING` if it is a library's."""
    code = _codes.get(function)
    if code is None:
        code = _codes[function] = _look_at(function) if is_function_of_the_program(function) else NOTHING
    return code


def _look_at(function: FunctionType) -> Code:
    sets, fills, names, imports = _read(function.__code__)
    there = function.__globals__
    spaces = [there, *(space for name in sorted(imports) for space in _imported(name, there))]
    for space in spaces:  # and what is appended meanwhile, as modules of packages are: ``project.data.noise()``
        modules = [value for value in map(space.get, names) if type(value) is ModuleType]
        theirs = [vars(module) for module in modules if is_module_of_the_program(module.__name__)]
        spaces += [one for one in theirs if not any(one is known for known in spaces)]
    variables, functions, kinds = [], [], []
    for space in spaces:
        for name in sorted(names.intersection(space)):
            value = space[name]
            inner = _function_behind(value)
            if inner is not None:
                functions.append(inner)
            elif issubclass(type(value), type):
                kinds += [value] * is_class_of_the_program(value)
            elif not issubclass(type(value), _CLOSED):
                variables.append((space, name))
    code = Code(frozenset(sets), frozenset(fills), tuple(variables), tuple(functions), tuple(kinds))
    return code if any(code) else NOTHING


def _imported(name: str, there: dict[str, Any]) -> list[dict[str, Any]]:
    """The variables of the file that code of another one, with the variables ``there``, imports itself, if it is loaded."""
    names = [name, f"{there.get('__package__')}.{name}".rstrip(".")]
    return [vars(sys.modules[one]) for one in names if one in sys.modules and is_module_of_the_program(one)]


def _read(code: CodeType) -> tuple[set[str], set[str], set[str], set[str]]:
    """The global variables, and the attributes, that ``code`` sets, all names in it, and the modules that it imports."""
    sets, fills, names, imports = set(), set(), set(code.co_names), set()
    for instruction in dis.get_instructions(code):
        if instruction.opname == "STORE_GLOBAL":
            sets.add(instruction.argval)
        elif instruction.opname == "STORE_ATTR":
            fills.add(instruction.argval)
        elif instruction.opname == "IMPORT_NAME":
            imports.add(instruction.argval)
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            for all_, more in zip((sets, fills, names, imports), _read(inner), strict=True):
                all_ |= more
    return sets, fills, names, imports
