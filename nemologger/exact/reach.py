"""What can be reached from an object: its attributes, what functions were made with, and generators that its class uses."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from functools import partial
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn

from nemologger.exact.rng import GENERATORS

_DEEPEST = 12
_MOST_ITEMS = 32
_MOST_GENERATORS = 1024
_MOST_OBJECTS = 1000
_SCALARS = (int, float, bool, str, type(None))
_CLOSED = (*_SCALARS, bytes, torch.Tensor, np.ndarray, np.generic, type, ModuleType, BuiltinFunctionType, nn.Parameter)
#: Locks, queues, threads, files and processes have numbers that are nobody's to set.
_OPEN = {"builtins", "collections", "functools", "types", "argparse", "dataclasses", "__main__", "random"}
_STANDARD = sys.stdlib_module_names - _OPEN
#: Their classes use no generators but the global ones.
_WITHOUT_OWN = ("torch", "numpy", "lightning", "builtins", *_STANDARD)
#: Of a module: what is no attribute, or in the checkpoint if it decides about anything.
_OF_MODULES = frozenset(vars(nn.Module())) - {"training"}
_EMPTY = CellType()
_names: WeakKeyDictionary[type, frozenset[str]] = WeakKeyDictionary()


def walk(roots: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every object within reach of ``roots``, with its path, ``"dataset.transform.rng"``; each once, and not thousands."""
    seen: set[int] = set()
    waiting = [(name, root, 0) for name, root in roots.items()]
    for path, value, depth in waiting:
        if len(seen) >= _MOST_OBJECTS:
            return
        if id(value) in seen:
            continue
        try:
            is_open, parts = _look(path, value, depth)
        except Exception:  # noqa: BLE001  of a class that objects to being looked at: it is left alone
            continue
        if is_open:
            seen.add(id(value))
            yield path, value
            waiting += parts


def _look(path: str, value: Any, depth: int) -> tuple[bool, list[tuple[str, Any, int]]]:
    """Whether ``value`` may keep something that counts, and what can be reached from it."""
    if isinstance(value, _CLOSED) or _is_closed(value) or (depth and _is_data(value)):
        return False, []
    if depth >= _DEEPEST or isinstance(value, GENERATORS):
        return True, []
    below = [(f"{path}.{name}", item) for name, item in _parts(value)] + _globals_of(value)
    return True, [(name, item, depth + 1) for name, item in below]


def attributes(value: Any) -> dict[str, Any]:
    """Those of ``value``, also in slots."""
    if _is_shared_number(value):
        return {"value": value.value}
    found: dict[str, Any] = {}
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                found[name] = getattr(value, name)
    own = getattr(value, "__dict__", {})
    if isinstance(value, nn.Module):
        own = {name: item for name, item in own.items() if name not in _OF_MODULES}
    return found | own


def has_attributes(value: Any) -> bool:
    """Whether ``value`` is an object that may keep something."""
    open_ = not isinstance(value, (*GENERATORS, MethodType)) and hasattr(type(value), "__module__")
    return open_ and (hasattr(value, "__dict__") or any("__slots__" in kind.__dict__ for kind in type(value).__mro__))


def generators_of_class(value: Any) -> dict[str, Any]:
    """The generators among the attributes of the class of ``value``, by name, that it has none of its own for."""
    own = getattr(value, "__dict__", {})
    return {
        name: item
        for kind in reversed(type(value).__mro__)
        if not _is_without_own(kind)
        for name, item in vars(kind).items()
        if isinstance(item, GENERATORS) and name not in own
    }


def _globals_of(value: Any) -> list[tuple[str, Any]]:
    """The generators among the globals of a file that code of ``value`` names."""
    function = value.__func__ if isinstance(value, MethodType) else value
    if isinstance(function, FunctionType):
        places = [(function.__module__, function.__globals__, _named(function.__code__))]
    else:
        kinds = [kind for kind in type(value).__mro__ if not _is_without_own(kind)]
        places = [(kind.__module__, vars(sys.modules.get(kind.__module__, sys)), _named_by(kind)) for kind in kinds]
    return [
        (f"{module}:{name}", there[name])
        for module, there, names in places
        for name in sorted(names)
        if isinstance(there.get(name), GENERATORS)
    ]


def _named_by(kind: type) -> frozenset[str]:
    if kind not in _names:
        functions = [getattr(item, "__func__", item) for item in vars(kind).values()]
        codes = [item.__code__ for item in functions if isinstance(item, FunctionType)]
        _names[kind] = frozenset().union(*map(_named, codes))
    return _names[kind]


def _named(code: CodeType) -> frozenset[str]:
    inner = [_named(const) for const in code.co_consts if isinstance(const, CodeType)]
    return frozenset(code.co_names).union(*inner)


def _is_without_own(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in _WITHOUT_OWN


def _is_closed(value: Any) -> bool:
    kinds = type(value).__mro__
    # A dataset may hold the trainer or the data module; their state is Lightning's business.
    if any(kind.__module__.startswith("lightning.pytorch.") for kind in kinds):
        return True
    # Nor are what loaders keep while they are gone through, and what they are wrapped in.
    if kinds[0].__name__.endswith("DataLoaderIter") or kinds[0].__module__.startswith("nemologger.exact."):
        return True
    return kinds[0].__module__.partition(".")[0] in _STANDARD and not _is_shared_number(value)


def _is_shared_number(value: Any) -> bool:
    """Whether ``value`` is a ``multiprocessing.Value``, by which a program tells its workers the number of the epoch."""
    kind = type(value)
    return kind.__name__ == "Synchronized" and kind.__module__ == "multiprocessing.sharedctypes"


def _is_data(value: Any) -> bool:
    """Whether ``value`` is a table or column, of pandas say: data like an array, with caches that say nothing of the run."""
    return hasattr(type(value), "__array__")


def _parts(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, list | tuple | dict):
        most = _MOST_ITEMS
        if isinstance(value, list | tuple) and value and isinstance(value[0], GENERATORS):
            most = _MOST_GENERATORS  # one for each sample
        if len(value) > most:
            return []
        return [(str(k), v) for k, v in (value.items() if isinstance(value, dict) else enumerate(value))]
    if isinstance(value, MethodType):
        return [("__self__", value.__self__)]
    parts: list[tuple[Any, Any]] = [*attributes(value).items()]
    if isinstance(value, FunctionType):
        names = value.__code__.co_freevars
        cells = zip(names, value.__closure__ or (), strict=False)
        parts += [(name, cell.cell_contents) for name, cell in cells if cell != _EMPTY]
        parts += [*enumerate(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).items()]
    elif isinstance(value, partial):
        parts += [("func", value.func), *enumerate(value.args), *value.keywords.items()]
    else:
        parts += generators_of_class(value).items()
        if isinstance(value, nn.Module):
            parts += [*value.named_children()]
    return [(str(name), item) for name, item in parts]
