"""Calls printed as Python, as ``ruff format`` would have it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from enum import Enum
from typing import Any

from nemologger.exp_manager.calls import Call, Name

_WIDTH = 88  # the formatter's default; what fits there is left on one line by wider settings too
_INDENT = "    "
_ALIASES = {"nemologger": "nl"}


def expression(value: Any, indent: int = 0, before: int = 0) -> str:
    """``value`` as an expression.

    Args:
        value: A plain value, a name, or a call, or lists and dictionaries of them.
        indent: How many levels the line it begins in is indented.
        before: How many columns of that line are taken.

    Raises:
        TypeError: It cannot be written down.

    Example:
        >>> expression(Call(Name("datetime", "timedelta"), {"minutes": 30}))
        'timedelta(minutes=30)'
    """
    flat = _flat(value)
    if len(flat) + before + 1 <= _WIDTH or not _parts(value):
        return flat
    start, end = ("[", "]") if isinstance(value, list) else ("{", "}")
    if isinstance(value, Call):
        start, end = f"{name_of(value.target)}(", ")"
    inner = _INDENT * (indent + 1)
    lines = []
    for label, part in _parts(value):
        begin = f"{inner}{label}"
        lines.append(f"{begin}{expression(part, indent + 1, len(begin) + 1)},\n")
    return f"{start}\n{''.join(lines)}{_INDENT * indent}{end}"


def imports(values: Iterable[Any]) -> dict[str, set[str]]:
    """What has to be imported for ``values``: the names of each module; none for a module that has an alias."""
    found: dict[str, set[str]] = {}
    for value in values:
        for name in _names(value):
            names = found.setdefault(name.module, set())
            if name.module not in _ALIASES:
                names.add(name.name.partition(".")[0])
    return found


def name_of(name: Name) -> str:
    """How ``name`` is written, given :func:`imports`."""
    alias = _ALIASES.get(name.module)
    return name.name if alias is None else f"{alias}.{name.name}"


def text(value: str) -> str:
    """A string as the formatter quotes it."""
    quoted = repr(value)
    if quoted[0] == "'" and '"' not in quoted:
        return '"' + quoted[1:-1] + '"'
    return quoted


def _flat(value: Any) -> str:
    if isinstance(value, (Call, list, dict)):
        inner = ", ".join(f"{label}{_flat(part)}" for label, part in _parts(value))
        if isinstance(value, Call):
            return f"{name_of(value.target)}({inner})"
        return f"[{inner}]" if isinstance(value, list) else f"{{{inner}}}"
    if isinstance(value, Name):
        return name_of(value)
    if isinstance(value, str) and not isinstance(value, Enum):
        return text(value)
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    raise TypeError(f"{value!r} ({type(value).__qualname__}) cannot be written into a Python file")


def _parts(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, Call):
        return [(f"{name}=", part) for name, part in value.needed().items()]
    if isinstance(value, list):
        return [("", part) for part in value]
    if isinstance(value, dict):
        return [(f"{_flat(key)}: ", part) for key, part in value.items()]
    return []


def _names(value: Any) -> Iterable[Name]:
    if isinstance(value, Name):
        yield value
    elif isinstance(value, Call):
        yield value.target
    for _, part in _parts(value):
        yield from _names(part)
