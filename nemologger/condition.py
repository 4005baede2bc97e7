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


def kind_of(value: object) -> str:
    """What ``value`` is, for an error that says that something else is needed.

    Lightning is there as two packages, whose classes have the same names and are not the same: who has made a model with the
    one would be told that a LightningModule is no LightningModule.

    Example:
        >>> kind_of("runs"), kind_of(str)
        ('a str', 'the class str itself, not an object of it')
    """
    if isinstance(value, type):
        return f"the class {value.__qualname__} itself, not an object of it"
    is_of_twin = any(base.__module__.partition(".")[0] == "pytorch_lightning" for base in type(value).__mro__)
    hint = " of the package pytorch_lightning (use `import lightning.pytorch as pl` everywhere)" if is_of_twin else ""
    return f"a {type(value).__qualname__}{hint}"
