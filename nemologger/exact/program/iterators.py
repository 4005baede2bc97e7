"""Python's own iterators."""

from __future__ import annotations

from types import GeneratorType
from typing import Any

from nemologger.exact.program.kinds import is_ordinary


def has_place(value: Any) -> bool:
    """Whether ``value`` is an iterator, one of python's own, and not at its end."""
    kind = type(value)
    if kind is GeneratorType:
        return value.gi_frame is not None
    return is_ordinary(kind) and kind.__module__ in ("builtins", "itertools") and hasattr(kind, "__next__")
