"""Conditions on values that somebody else has given, which may be of any type."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from functools import wraps
from inspect import signature
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")


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
    hint = (
        " of the package pytorch_lightning (use `import lightning.pytorch as pl` everywhere; for a library that imports "
        "pytorch_lightning, call nemologger.use_one_lightning() before it is imported)"
    )
    return f"a {type(value).__qualname__}{hint if is_of_twin else ''}"


def unexpected(called: str, name: str, known: Iterable[str]) -> TypeError:
    """For an argument that ``called`` does not have: what Python says of it, and which one may be meant.

    Example:
        >>> unexpected("AutoResume", "resume_if_exist", ["resume_if_exists"])
        TypeError("AutoResume() got an unexpected keyword argument 'resume_if_exist'; did you mean 'resume_if_exists'?")
    """
    return TypeError(f"{called}() got an unexpected keyword argument {name!r}{did_you_mean(name, known)}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The one of ``known`` that is most like ``name``, as the end of a sentence; nothing if none is."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def suggests_arguments(cls: type[T]) -> type[T]:
    """Decorator: have the class say which argument may be meant where it has none of that name."""
    plain: Any = cls
    made: Callable[..., None] = plain.__init__
    known = list(signature(made).parameters)[1:]

    @wraps(made)
    def checked(self: T, *args: Any, **arguments: Any) -> None:
        for name in arguments:
            if name not in known:
                raise unexpected(cls.__name__, name, known)
        made(self, *args, **arguments)

    plain.__init__ = checked
    return cls


def flags_of(made: DataclassInstance) -> dict[str, object]:
    """What an object of a dataclass has for the fields that are True or False by default."""
    return {one.name: getattr(made, one.name) for one in fields(made) if isinstance(one.default, bool)}


def texts_for_flags(flags: Mapping[str, object]) -> str:
    """Why some of ``flags`` are none, for an error; empty if all are, or say what they count as.

    A shell or a file makes ``"false"``, which counts as True.

    Example:
        >>> texts_for_flags({"resume_if_exists": "false", "resume_past_end": False})
        "resume_if_exists='false': expected True or False, found a text (Python takes any text for True)"
    """
    wrong = ", ".join(f"{name}={value!r}" for name, value in flags.items() if _misleads(value))
    return f"{wrong}: expected True or False, found a text (Python takes any text for True)" if wrong else ""


def _misleads(flag: object) -> bool:
    return isinstance(flag, str) and flag.lower() != "true"
