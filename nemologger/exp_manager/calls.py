"""Calls as values: they can be made, and they can be printed.

What ``exp_manager`` does and what a migrated file says is the same :class:`Call`, so that they cannot differ.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from pkgutil import resolve_name
from typing import Any


@dataclass(frozen=True)
class Name:
    """Something that is imported and used as it is.

    Attributes:
        module: Where it is.
        name: What it is called there, attributes of it included: ``"Signals.SIGTERM"``.
    """

    module: str
    name: str

    def get(self) -> Any:
        """The thing itself."""
        return resolve_name(f"{self.module}:{self.name}")


@dataclass(frozen=True)
class Call:
    """A call with keyword arguments; among them may be plain values, lists, dictionaries, names and other calls.

    Attributes:
        target: What is called.
        arguments: By name.

    Example:
        >>> Call(Name("datetime", "timedelta"), {"minutes": 5}).make()
        datetime.timedelta(seconds=300)
    """

    target: Name
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def make(self) -> Any:
        """Make the call, and the ones among its arguments before it."""
        return self.target.get()(**{name: make(value) for name, value in self.arguments.items()})

    def needed(self) -> dict[str, Any]:
        """The arguments that are not the target's defaults anyway."""
        try:
            parameters = inspect.signature(self.target.get()).parameters
        except ValueError:  # it is written in C
            return dict(self.arguments)
        return {
            name: value
            for name, value in self.arguments.items()
            if name not in parameters or not _same(parameters[name].default, value)
        }


def make(value: Any) -> Any:
    """``value`` with the calls in it made."""
    if isinstance(value, Call):
        return value.make()
    if isinstance(value, Name):
        return value.get()
    if isinstance(value, list):
        return [make(one) for one in value]
    if isinstance(value, dict):
        return {key: make(one) for key, one in value.items()}
    return value


def _same(default: Any, value: Any) -> bool:
    if isinstance(value, Name):
        return bool(value.get() == default)
    return type(default) is type(value) and bool(default == value)
