"""What can be reached from some objects: through attributes, lists and functions, and by what their code names."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from functools import cache, partial
from types import FunctionType, MethodType
from typing import Any

from torch import nn

from nemologger.exact.reach.code import functions_of, names_in
from nemologger.exact.reach.crowd import crowd_of
from nemologger.exact.reach.kinds import Kind, kind_of, module_of
from nemologger.exact.reach.mentioned import Mentioned
from nemologger.exact.reach.parts import items_of, many, parts
from nemologger.exact.reach.variables import NAMESPACES

_DEEPEST = 12
_MOST_OBJECTS = 1000


def walk(roots: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every object within reach of ``roots``, with its path, ``"dataset.transform.rng"``; each once, and not thousands.

    After them come those that code names, ``"file:STATE"``, and the variables of its files and classes.
    """
    seen: set[int] = set()
    looked_at: set[int] = set()
    mentioned = Mentioned()
    waiting = [(name, root, 0) for name, root in roots.items()]
    most = _MOST_OBJECTS
    while waiting:
        for place, (path, value, depth) in enumerate(waiting):
            if len(seen) >= most:
                rest = waiting[place:]
                crowd = crowd_of("", [path for path, _, _ in rest], [item for _, item, _ in rest])
                if crowd is not None:
                    yield "", crowd
                break
            kind = kind_of(type(value))
            if kind.closed or id(value) in seen or (depth and kind.data) or _is_network(value):
                continue
            seen.add(id(value))
            has_more = depth < _DEEPEST and not kind.generator
            try:
                within = parts(value) if has_more else []
                names, items = many(value)
                crowd = crowd_of(path, names, items) if items else None
            except Exception:  # noqa: BLE001  it does not want to be looked into
                continue
            yield path, value
            if crowd is not None:
                yield path, crowd
            if has_more:
                waiting += [(f"{path}.{name}", item, depth + 1) for name, item in within]
                waiting += [(name, item, depth + 1) for name, item in _globals_of(value, kind, looked_at)]
                _mention(value, kind, mentioned)
        most = len(seen) + _MOST_OBJECTS
        named = [pair for path, value in mentioned.follow() for pair in items_of(path, value)]
        waiting = [(path, item, 1) for path, item in named if _is_followed(item) and id(item) not in seen]
    yield from mentioned.places()


def _is_network(value: Any) -> bool:
    """Whether ``value`` is no transform, but a model, or a part of one that is trained: that is in the checkpoint."""
    if not issubclass(type(value), nn.Module):
        return False
    try:
        return next(value.parameters(), None) is not None
    except Exception:  # noqa: BLE001  nobody has called its __init__()
        return True


def _globals_of(value: Any, kind: Kind, looked_at: set[int]) -> list[tuple[str, Any]]:
    """The generators among the globals of a file that code of ``value`` names."""
    function = value.__func__ if type(value) is MethodType else value
    if type(function) is FunctionType:
        places = [(function.__module__, function.__globals__, names_in(function.__code__))]
    else:
        new = [base for base in kind.own if id(base) not in looked_at]
        looked_at.update(map(id, new))
        places = [
            (module_of(base), getattr(sys.modules.get(module_of(base)), "__dict__", {}), _names_in_class(base))
            for base in reversed(new)
        ]
    return [
        (f"{module}:{name}", there[name])
        for module, there, named in places
        for name in named
        if name in there and kind_of(type(there[name])).generator
    ]


@cache
def _names_in_class(kind: type) -> tuple[str, ...]:
    return tuple(sorted({name for function in functions_of(kind) for name in names_in(function.__code__)}))


def _mention(value: Any, kind: Kind, mentioned: Mentioned) -> None:
    function = value.__func__ if isinstance(value, MethodType) else value
    if isinstance(function, FunctionType):
        mentioned.add(function)
    for base in kind.program:
        mentioned.add_class(base)


def _is_followed(value: Any) -> bool:
    """Whether to look into a global variable: at functions and objects of the program, and generators."""
    kind = kind_of(type(value))
    return kind.generator or bool(kind.program) or issubclass(type(value), (FunctionType, partial, *NAMESPACES))
