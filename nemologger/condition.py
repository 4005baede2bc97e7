"""Conditions on values that somebody else has given, which may be of any type."""

from __future__ import annotations

from collections.abc import Callable


def holds(condition: Callable[..., object], *values: object) -> bool:
    """Whether ``condition(*values)`` is true; it is not if it cannot be asked of them, of a text instead of a number, say.

    Example:
        >>> decay = "0.9"
        >>> holds(lambda: 0 <= decay <= 1)
        False
    """
    try:
        return bool(condition(*values))
    except TypeError:
        return False
