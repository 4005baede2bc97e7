"""What is looked at, kept and set as the attributes of an object are, and is none."""

from __future__ import annotations

from typing import Any


class View:
    """Shows variables, or the entries of something, as attributes: ``vars()`` of it are these, as they are now.

    Args:
        own: What a subclass needs for that: its slots.
    """

    __slots__ = ()

    def __init__(self, **own: Any) -> None:
        for name, value in own.items():
            object.__setattr__(self, name, value)

    def _entries(self) -> dict[str, Any]:
        raise NotImplementedError

    def _set(self, name: str, value: Any) -> None:
        raise NotImplementedError

    @property
    def __dict__(self) -> dict[str, Any]:  # type: ignore[override]  # it has none itself
        return self._entries()

    def __setattr__(self, name: str, value: Any) -> None:
        self._set(name, value)
