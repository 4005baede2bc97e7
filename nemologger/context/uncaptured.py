"""What stands in a context where a value could not be kept, so that the loss can be seen and named."""

from __future__ import annotations

import inspect
import logging
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

log = logging.getLogger(__name__)

_WARNED = "_nemologger_warned"
_OF_A_VALUE = re.compile(r"(\S+) (\(.*)", re.DOTALL)
_BETWEEN = ("nemologger", "lightning", "torch", "contextlib")


@dataclass(frozen=True)
class Uncaptured:
    """Stands for a value that a context does not hold.

    Attributes:
        what: The type of the missing value, with its module.
        reason: Why it is missing, and what would keep it next time.

    Example:
        >>> Uncaptured("mylib.Net", "it does not inherit IOMixin").what
        'mylib.Net'
    """

    what: str
    reason: str


def class_of(value: object) -> type:
    """The class that ``value`` was made of.

    FSDP2's ``fully_shard`` gives a module another one, made of ``FSDPModule`` and its own; nobody finds that by its name.
    """
    kind = type(value)
    sharded = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    if sharded is None or len(kind.__bases__) != 2 or not issubclass(kind.__bases__[0], sharded):
        return kind
    return kind.__bases__[1]


def type_name(value: object) -> str:
    """The type of ``value`` with its module, as a message shows it."""
    kind = class_of(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def warn_once(owner: Any, messages: Iterable[str], heading: str) -> None:
    """Warn about those ``messages`` that were not yet said for ``owner``.

    A run dumps the same context at every save. What was said is kept with the object it is about, so that two runs in one
    process do not silence each other.
    """
    fresh = _fresh(owner, messages)
    if fresh:
        warnings.warn("\n".join([heading, *(f"  - {line}" for line in _together(fresh))]), stacklevel=_of_user())


def _together(messages: Iterable[str]) -> Iterator[str]:
    """One line for all values of a class that have the same to be said of them."""
    paths: dict[str, list[str]] = {}
    for message in messages:
        found = _OF_A_VALUE.fullmatch(message)
        path, what = found.groups() if found else ("", message)
        paths.setdefault(what, []).append(path)
    for what, (first, *more) in paths.items():
        yield " ".join(filter(None, [first, f"and {len(more)} more" if more else "", what]))


def log_once(owner: Any, messages: Iterable[str], heading: str) -> None:
    """The same in one line of the log, for what hardly anybody misses: only which values, not why and what would help."""
    fresh = _fresh(owner, messages)
    if fresh:
        what = ", ".join(message.partition(":")[0] for message in fresh)
        log.info("%s %s; nemologger.io.load_context tells why", heading, what)


def _fresh(owner: Any, messages: Iterable[str]) -> list[str]:
    said: set[str] = getattr(owner, "__dict__", {}).get(_WARNED, set())
    fresh = [message for message in messages if message not in said]
    if fresh and hasattr(owner, "__dict__"):
        object.__setattr__(owner, _WARNED, said.union(fresh))
    return fresh


def _of_user() -> int:
    """The ``stacklevel`` of the user's line, ``trainer.fit(...)`` for one, as seen from the caller."""
    frame, level = inspect.currentframe(), 0
    while frame is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] not in _BETWEEN:
            return level
        frame, level = frame.f_back, level + 1
    return level
