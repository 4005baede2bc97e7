"""Values of python and torch that no file of plain types holds as they are: a complex number, a fraction, a date.

Each is a name and plain parts. To read one back calls what this table has for the name, and nothing else. A number or text
of a class of somebody's (``class Steps(int)``) is the name of that and the plain one; no code of the class runs.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from operator import index
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from nemologger.checkpoint.state.plain import name_of_class, scalar_of_class


class _Sort(NamedTuple):
    kind: type
    parts: Callable[[Any], list[Any]]
    made_of: Callable[..., Any]


def _bounds(value: Any) -> list[Any]:
    return [value.start, value.stop, value.step]


def _of_clock(value: Any) -> list[Any]:
    return [value.isoformat(), value.fold]


def _fraction(numerator: int, denominator: int) -> Fraction:
    return Fraction(index(numerator), index(denominator))  # of a text it would compute any power


def _dtype(name: str) -> torch.dtype:
    found = vars(torch).get(name)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"torch has no dtype {name!r}")
    return found


_SORTS = {
    "complex": _Sort(complex, lambda value: [value.real, value.imag], complex),
    "fraction": _Sort(Fraction, lambda value: [value.numerator, value.denominator], _fraction),
    "decimal": _Sort(Decimal, lambda value: [str(value)], Decimal),
    "range": _Sort(range, _bounds, range),
    "slice": _Sort(slice, _bounds, slice),
    "date": _Sort(date, lambda value: [value.isoformat()], date.fromisoformat),
    "datetime": _Sort(datetime, _of_clock, lambda text, fold: datetime.fromisoformat(text).replace(fold=fold)),
    "time": _Sort(time, _of_clock, lambda text, fold: time.fromisoformat(text).replace(fold=fold)),
    "timedelta": _Sort(timedelta, lambda value: [value.days, value.seconds, value.microseconds], timedelta),
    "path": _Sort(type(Path()), lambda value: [str(value)], Path),
    "size": _Sort(torch.Size, lambda value: [*value], lambda *sizes: torch.Size(map(index, sizes))),
    "dtype": _Sort(torch.dtype, lambda value: [str(value).removeprefix("torch.")], _dtype),
    "array": _Sort(array, lambda value: [value.typecode, value.tobytes()], lambda code, content: array(code, content)),
}
_NAMES = {sort.kind: name for name, sort in _SORTS.items()}
_PARTS = (int, float, str, bytes, type(None))

#: Their classes but for fractions: an abstract one asks each class whether it is one of its own, and some raise.
KINDS: tuple[type, ...] = tuple(kind for kind in _NAMES if kind is not Fraction)


#: What makes them of what a class of somebody's is made of; members of enumerations are known by their names.
_PLAIN = {int: int.__int__, float: float.__float__, str: str.__str__}
_BASES = tuple(_PLAIN)
_KNOWN_OTHERWISE = (bool, Enum, np.generic)
_OF_A_CLASS = "of a class"


def is_atom(value: Any) -> bool:
    """Whether ``value`` is one of them, or of a class of somebody's that is made of one, or of a number or text."""
    kind = type(value)
    return issubclass(kind, KINDS) or kind is Fraction or _is_of_a_class(kind)


def _is_of_a_class(kind: type) -> bool:
    return issubclass(kind, _BASES) and kind not in _BASES and not issubclass(kind, _KNOWN_OTHERWISE)


def parts_of(value: Any) -> list[Any] | None:
    """A name and plain values; None if it is something else, or more than these say."""
    if _is_of_a_class(type(value)):
        return _parts_of_a_class(value)
    name = _NAMES.get(type(value)) if is_atom(value) else None
    if name is None or type(getattr(value, "tzinfo", None)) not in (timezone, type(None)):  # a zone has rules
        return None
    parts = _SORTS[name].parts(value)
    return [name, *parts] if all(type(part) in _PARTS for part in parts) else None


def sign_of(value: Any) -> Any:
    """The same for values that are equal, also where :func:`parts_of` has no name for their class."""
    return parts_of(value) or (_plain(value) if _is_of_a_class(type(value)) else id(value))


def _parts_of_a_class(value: Any) -> list[Any] | None:
    kind = type(value)
    name = name_of_class(kind)
    more = getattr(value, "__dict__", None) or any(vars(base).get("__slots__") for base in kind.__mro__)
    return None if name is None or more else [_OF_A_CLASS, name, _plain(value)]


def _plain(value: Any) -> Any:
    return next(plain(value) for base, plain in _PLAIN.items() if issubclass(type(value), base))


def made_of(parts: list[Any]) -> Any:
    """What :func:`parts_of` was given.

    Raises:
        Exception: It is none of these, as the constructors raise it.
    """
    name, *own = parts
    if name == _OF_A_CLASS:
        return scalar_of_class(*own)
    return _SORTS[name].made_of(*own)
